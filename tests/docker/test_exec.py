"""Execs over REST on the real engine: results, streams, limits, and that bad input is told apart."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

pytestmark = pytest.mark.docker


def run(client: httpx2.Client, sandbox_id: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def events(client: httpx2.Client, sandbox_id: str, **body: Any) -> Iterator[dict[str, Any]]:
    request = client.stream("POST", f"/v1/sandboxes/{sandbox_id}/exec", json={**body, "stream": True})
    with request as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_python_result_has_every_field(client, sandbox_id):
    result = run(client, sandbox_id, code="import sys; print('out'); print('err', file=sys.stderr)")
    assert result["object"] == "sandbox.exec"
    assert result["sandbox_id"] == sandbox_id
    assert (result["stdout"], result["stderr"], result["exit_code"]) == ("out\n", "err\n", 0)
    assert (result["status"], result["signal"], result["error"]) == ("completed", None, None)
    assert result["usage"]["cpu_ms"] > 0
    assert 0 < result["duration_ms"] < 60_000


def test_an_exception_is_a_normal_result_with_the_right_line(client, sandbox_id):
    result = run(client, sandbox_id, code="x = 1\n\nraise ValueError('no ' + str(x))\n")
    assert (result["status"], result["exit_code"]) == ("failed", 1)
    assert result["error"]["name"] == "ValueError"
    assert result["error"]["value"] == "no 1"
    assert "line 3, in <module>" in result["stderr"]
    assert "raise ValueError('no ' + str(x))" in result["stderr"]
    assert "e80_agent" not in result["stderr"]


def test_a_syntax_error_names_its_line(client, sandbox_id):
    result = run(client, sandbox_id, code="print(1)\nfor in x:\n")
    assert result["status"] == "failed"
    assert result["error"]["name"] == "SyntaxError"
    assert "line 2" in result["stderr"]
    assert result["stdout"] == ""


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("raise SystemExit", 0),
        ("raise SystemExit(3)", 3),
        ("import sys; sys.exit('why')", 1),
        ("exit(256)", 0),
    ],
)
def test_exit_codes_are_those_of_python(client, sandbox_id, code, exit_code):
    assert run(client, sandbox_id, code=code)["exit_code"] == exit_code


def test_what_python_does_at_exit_is_done(client, sandbox_id):
    code = (
        "import atexit, threading, time\n"
        "atexit.register(lambda: print('bye'))\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()\n"
        "print('main')"
    )
    assert run(client, sandbox_id, code=code)["stdout"] == "main\nthread\nbye\n"


def test_runs_do_not_share_state(client, sandbox_id):
    run(client, sandbox_id, code="import sys; sys.leak = 1; import os; os.environ['LEAK'] = '1'")
    result = run(
        client, sandbox_id, code="import sys, os; print(hasattr(sys, 'leak'), os.environ.get('LEAK'))"
    )
    assert result["stdout"] == "False None\n"


def test_random_state_differs_between_forks(client, sandbox_id):
    code = "import random, numpy as np; print(random.random(), np.random.rand())"
    seen = {part for _ in range(4) for part in run(client, sandbox_id, code=code)["stdout"].split()}
    assert len(seen) == 8


def test_files_stay_between_runs_and_are_importable(client, sandbox_id):
    run(client, sandbox_id, code="open('helper.py', 'w').write('ANSWER = 42')")
    assert run(client, sandbox_id, code="import helper; print(helper.ANSWER)")["stdout"] == "42\n"


def test_environment_cwd_and_stdin(client):
    created = client.post("/v1/sandboxes", json={"env": {"FROM": "create", "KEEP": "1"}}).json()
    try:
        assert created["env"] == ["FROM", "KEEP"]
        code = "import os, sys; print(os.environ['FROM'], os.environ['KEEP'], os.getcwd(), sys.stdin.read())"
        result = run(client, created["id"], code=code, env={"FROM": "exec"}, cwd="/tmp", stdin="grüße")
        assert result["stdout"] == "exec 1 /tmp grüße\n"
    finally:
        client.delete(f"/v1/sandboxes/{created['id']}")


def test_stdin_is_closed_unless_given(client, sandbox_id):
    assert run(client, sandbox_id, command=["cat"])["stdout"] == ""


def test_stdin_larger_than_a_pipe(client, sandbox_id):
    assert run(client, sandbox_id, command=["wc", "-c"], stdin="x" * 1_000_000)["stdout"].strip() == "1000000"


def test_fresh_interpreter_gives_the_same_result(client, sandbox_id):
    result = run(client, sandbox_id, code="import sys\nprint('é')\n1/0", fresh=True)
    assert result["stdout"] == "é\n"
    assert result["error"]["name"] == "ZeroDivisionError"
    assert "line 3" in result["stderr"]


def test_variables_read_at_import_are_honoured(client, sandbox_id):
    result = run(
        client, sandbox_id, code="import sys; print(sys.flags.optimize)", env={"PYTHONOPTIMIZE": "2"}
    )
    assert result["stdout"] == "2\n"


def test_command_as_text_and_as_arguments(client, sandbox_id):
    assert run(client, sandbox_id, command="echo $((6*7)) | tr 4 x")["stdout"] == "x2\n"
    assert run(client, sandbox_id, command=["printf", "%s", "a b"])["stdout"] == "a b"


def test_a_program_killed_by_a_signal_says_which(client, sandbox_id):
    result = run(client, sandbox_id, code="import os; os.kill(os.getpid(), 15)")
    assert (result["status"], result["exit_code"], result["signal"]) == ("failed", None, "SIGTERM")


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        (["no-such-program"], 127),
        (["/etc/hostname"], 126),
        (["/home/user"], 126),
        (["/etc/hostname/x"], 127),
        (["x" * 5000], 127),
    ],
)
def test_a_program_that_cannot_start_is_a_result(client, sandbox_id, command, exit_code):
    result = run(client, sandbox_id, command=command)
    assert (result["status"], result["exit_code"]) == ("failed", exit_code)
    assert command[0][:200] in result["stderr"]


def test_heredoc_does_not_hang(client, sandbox_id):
    assert run(client, sandbox_id, command="cat <<EOF\na\nb\nEOF", timeout_s=5)["stdout"] == "a\nb\n"


def test_timeout_ends_everything_the_exec_started(client, sandbox_id):
    code = (
        "import os, signal, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        for number in range(1, 32):\n"
        "            try: signal.signal(number, signal.SIG_IGN)\n"
        "            except OSError: pass\n"
        "        open('pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
        "time.sleep(1000)\n"
    )
    result = run(client, sandbox_id, code=code, timeout_s=0.5)
    assert result["status"] == "timed_out"
    assert 500 <= result["duration_ms"] < 5000
    left = run(client, sandbox_id, command="test -s pid && ! test -e /proc/$(cat pid) && echo gone")
    assert left["stdout"] == "gone\n"


def test_what_an_exec_leaves_behind_ends_with_it_and_others_go_on(client, sandbox_id):
    results: list[dict[str, Any]] = []
    other = threading.Thread(
        target=lambda: results.append(run(client, sandbox_id, code="import time; time.sleep(1); print('on')"))
    )
    other.start()
    run(client, sandbox_id, command="(setsid sleep 1000 &) ; sleep 0.1")
    survivors = run(client, sandbox_id, command="pgrep -c sleep || true")
    assert survivors["stdout"] == "0\n"
    other.join()
    assert results[0]["stdout"] == "on\n"


def test_output_beyond_the_cap_is_cut_flagged_and_in_a_file(client, sandbox_id):
    code = "import sys\nfor i in range(700_000): sys.stdout.write('%09d\\n' % i)"
    result = run(client, sandbox_id, code=code)
    assert result["status"] == "completed"
    assert result["truncated"] is True
    assert 3_000_000 < len(result["stdout"]) <= 4 * 1024 * 1024
    size = run(client, sandbox_id, command=["wc", "-c", result["output_path"] + "/stdout"])
    assert size["stdout"].split()[0] == "7000000"


def test_binary_output_is_streamed_byte_for_byte(client, sandbox_id):
    code = (
        "import os, time\n"
        "for part in (b'gr\\xc3', b'\\xbc', b'\\xff\\xfe', b'end'): os.write(1, part); time.sleep(.05)"
    )
    stream = list(events(client, sandbox_id, code=code))
    numbers = [event["sequence_number"] for event in stream]
    assert numbers == sorted(set(numbers))
    assert stream[0]["type"] == "exec.started"
    assert stream[-1]["type"] == "exec.completed"
    text = [event for event in stream if event["type"] == "exec.stdout.delta"]
    assert [event["delta"] for event in text if "encoding" not in event] == ["gr", "ü", "end"]
    assert [event["delta"] for event in text if "encoding" in event] == ["//4="]


def test_a_stream_shows_each_print_when_it_happens(client, sandbox_id):
    code = "import time\nprint('first')\ntime.sleep(2)\nprint('second')"
    started = time.monotonic()
    seen = {}
    for event in events(client, sandbox_id, code=code):
        if event["type"] == "exec.stdout.delta":
            seen[event["delta"]] = time.monotonic() - started
    assert seen["second\n"] - seen["first\n"] > 1.5


def test_a_client_that_hangs_up_ends_its_foreground_stream(client, sandbox_id):
    stream = events(client, sandbox_id, code="import time\nprint('on')\ntime.sleep(1000)", timeout_s=900)
    next(stream)
    assert next(stream)["delta"] == "on\n"
    stream.close()
    deadline = time.monotonic() + 10
    # The agent, its parents and their spares are root's: tenant code alone runs under the sandbox's own uid.
    while run(client, sandbox_id, command="pgrep -u user -c python || true")["stdout"] != "0\n":
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"code": "1", "command": "ls"}, None),
        ({"code": 5}, "code"),
        ({"code": "1", "nonsense": 1}, "nonsense"),
        ({"code": "1", "timeout_s": -1}, "timeout_s"),
        ({"code": "1", "timeout_s": 1e9}, "timeout_s"),
        ({"code": "1", "cwd": "/no/such"}, "cwd"),
        ({"code": "1", "env": {"A=B": "1"}}, "env"),
        ({"command": []}, "command"),
        ({"command": ["a\u0000b"]}, "command"),
        ({"command": ["echo", "x" * 200_000]}, None),
        ({"code": "1", "language": "cobol"}, "language"),
    ],
)
def test_bad_requests_are_refused_with_the_field(client, sandbox_id, body, param):
    answer = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert param in error["param"]
    assert run(client, sandbox_id, code="print('fine')")["stdout"] == "fine\n"


def test_a_stream_is_refused_with_a_status_where_that_is_possible(client, sandbox_id):
    body = {"code": "1", "stream": True, "timeout_s": 1e9}
    assert client.post(f"/v1/sandboxes/{sandbox_id}/exec", json=body).status_code == 400


def test_code_with_half_a_character_is_refused(client, sandbox_id):
    answer = client.post(
        f"/v1/sandboxes/{sandbox_id}/exec",
        content=b'{"code": "print(\'\\ud800\')"}',
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "code"


def test_many_at_once_in_one_sandbox(client, sandbox_id):
    results: list[str] = []

    def one(number: int) -> None:
        results.append(run(client, sandbox_id, code=f"print({number})")["stdout"])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(text) for text in results) == list(range(32))
