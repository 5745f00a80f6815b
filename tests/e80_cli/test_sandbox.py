"""create, list, get, stop, exec, run."""

import json
import signal
import time

import pytest

from tests.e80_cli.conftest import Cli
from tests.e80_sdk.fake_server import FakeServer, Fault

ALL_BYTES = bytes(range(256))


def create(cli: Cli, *words: str) -> str:
    done = cli("sandbox", "create", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_create_prints_the_id_alone(cli: Cli, fake: FakeServer) -> None:
    sandbox_id = create(cli)
    assert sandbox_id in fake.sandboxes
    assert fake.last("POST", "/sandboxes").body == {}
    code, shown = cli.on_terminal("sandbox", "create")
    assert code == 0
    assert "8080 sandbox stop sbx_" in shown


def test_create_passes_its_options_on(cli: Cli, fake: FakeServer) -> None:
    sizes = ["--cpu-mhz", "500", "--memory-size-mb", "64", "--disk-size-mb", "100", "--timeout-s", "9.5"]
    words = ["--image", "x", *sizes, "--label", "a=b=c", "-e", "N=1", "-e", "SET", "-e", "UNSET"]
    made = json.loads(cli("sandbox", "create", *words, "--json", SET="here").stdout)
    assert made["labels"] == {"a": "b=c"}
    assert fake.last("POST", "/sandboxes").body == {
        "image": "x",
        "cpu_mhz": 500,
        "memory_size_mb": 64,
        "disk_size_mb": 100,
        "timeout_s": 9.5,
        "labels": {"a": "b=c"},
        "env": {"N": "1", "SET": "here"},
    }
    create(cli, "--timeout-s", "none")
    assert fake.last("POST", "/sandboxes").body == {"timeout_s": None}


def test_list_get_stop(cli: Cli, fake: FakeServer) -> None:
    first, second = create(cli), create(cli, "--label", "a=b")
    assert cli("sandbox", "list").stdout.decode().split() == [second, first]
    assert cli("sandbox", "list", "--limit", "1").stdout.decode().split() == [second]
    listed = json.loads(cli("sandbox", "list", "--json").stdout)
    assert listed["object"] == "list"
    assert [one["id"] for one in listed["data"]] == [second, first]
    code, shown = cli.on_terminal("sandbox", "list")
    assert code == 0
    assert first in shown, "an id is never cut"
    assert "a=b" in shown
    got = cli("sandbox", "get", second).stdout.decode()
    assert f"id                  {second}\n" in got
    assert "labels              a=b\n" in got
    assert json.loads(cli("sandbox", "get", second, "--json").stdout)["new_field"] == 1
    done = cli("sandbox", "stop", first, "sbx_none", second)
    assert (done.returncode, done.stdout.decode().split()) == (1, [first, second])
    assert b"sbx_none" in done.stderr
    assert cli("sandbox", "list").stdout == b""
    assert json.loads(cli("sandbox", "stop", first, "--json").stdout)["status"] == "stopped"
    assert cli("sandbox", "list", "--status", "all").stdout.decode().split() == [second, first]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--", "true"], 0),
        (["--", "sh", "-c", "exit 7"], 7),
        (["--", "sh", "-c", "kill -TERM $$"], 143),
        (["--", "sh", "-c", "kill -9 $$"], 137),
        (["--code", "raise SystemExit(5)"], 5),
        (["--code", "1/0"], 1),
        (["--timeout-s", "0.3", "--", "sleep", "20"], 124),
    ],
)
def test_exec_returns_the_code_of_the_program(cli: Cli, words: list[str], code: int) -> None:
    assert cli("sandbox", "exec", create(cli), *words).returncode == code


def test_exec_keeps_streams_and_bytes_apart(cli: Cli) -> None:
    code = "import sys; b = bytes(range(256)); sys.stdout.buffer.write(b); sys.stderr.buffer.write(b[::-1])"
    done = cli("sandbox", "exec", create(cli), "--code", code)
    assert done.returncode == 0
    assert done.stdout == ALL_BYTES
    assert done.stderr == ALL_BYTES[::-1]


def test_exec_options(cli: Cli, fake: FakeServer) -> None:
    sandbox_id = create(cli)
    words = ("--cwd", "/tmp", "-e", "A=1", "-e", "B", "--timeout-s", "5", "-i", "--", "cat")
    done = cli("sandbox", "exec", sandbox_id, *words, stdin=ALL_BYTES, B="2")
    assert done.stdout == ALL_BYTES
    body = fake.last("POST", "/exec").body
    assert body.pop("stream") is True
    assert body == {
        "command": ["cat"],
        "cwd": "/tmp",
        "env": {"A": "1", "B": "2"},
        "timeout_s": 5,
        "stdin_open": True,
    }


def test_exec_with_json_prints_the_events(cli: Cli) -> None:
    done = cli("sandbox", "exec", create(cli), "--json", "--", "sh", "-c", "echo hi; exit 3")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["type"] for event in events] == ["exec.started", "exec.stdout.delta", "exec.completed"]
    assert events[-1]["exec"]["exit_code"] == done.returncode == 3


def test_exec_in_what_is_not_there_is_125(cli: Cli, fake: FakeServer) -> None:
    done = cli("sandbox", "exec", "sbx_none", "--", "true")
    assert done.returncode == 125
    assert b"no sandbox 'sbx_none'" in done.stderr
    sandbox_id = create(cli)
    cli("sandbox", "stop", sandbox_id)
    assert cli("sandbox", "exec", sandbox_id, "--", "true").returncode == 125


def test_a_cut_stream_is_125(cli: Cli, fake: FakeServer) -> None:
    sandbox_id = create(cli)
    fake.cut_stream_after = 2
    for fake.cut_cleanly in (True, False):
        command = ("sandbox", "exec", sandbox_id, "--", "sh", "-c", "echo 1; sleep 0.1; echo 2")
        done = cli("--patience-s", "0", *command)
        assert (done.returncode, done.stdout) == (125, b"1\n")


def test_output_comes_live(cli: Cli) -> None:
    program = cli.start("sandbox", "exec", create(cli), "--", "sh", "-c", "echo first; sleep 30")
    assert program.stdout is not None
    began = time.monotonic()
    assert program.stdout.readline() == b"first\n"
    assert time.monotonic() - began < 15
    program.terminate()
    program.communicate(timeout=20)


def test_run_a_script_with_arguments(cli: Cli, fake: FakeServer) -> None:
    script = cli.folder / "my script.py"
    script.write_text(
        "import os, sys\nprint(sys.argv[1:], os.path.basename(__file__))\n"
        "print('bad', file=sys.stderr)\nsys.stdout.flush()\n"
        "sys.stdout.buffer.write(bytes(range(256)))\nsys.exit(9)\n"
    )
    done = cli("sandbox", "run", "my script.py", "a b", "--json", "-x", "")
    assert done.returncode == 9
    assert done.stdout == b"['a b', '--json', '-x', ''] my script.py\n" + ALL_BYTES
    assert done.stderr == b"bad\n"
    assert fake.alive() == []


@pytest.mark.parametrize(
    ("words", "stdin", "out"),
    [
        (["-c", "print(6*7)"], None, b"42\n"),
        (["-c", "import sys; print(sys.argv[1:])", "a", "-b"], None, b"['a', '-b']\n"),
        (["-"], b"print(6*7)", b"42\n"),
        (["-", "a", "-b"], b"import sys; print(sys.argv[1:])", b"['a', '-b']\n"),
        (["-i", "-c", "print(input())"], b"line\n", b"line\n"),
        (["-i", "read.py", "arg"], b"line\n", b"line arg\n"),
    ],
)
def test_run_code(cli: Cli, fake: FakeServer, words: list[str], stdin: bytes | None, out: bytes) -> None:
    (cli.folder / "read.py").write_text("import sys; print(input(), sys.argv[1])")
    done = cli("sandbox", "run", *words, stdin=stdin)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, b"")
    assert fake.alive() == []


def test_run_gives_the_sandbox_longer_than_the_program(cli: Cli, fake: FakeServer) -> None:
    done = cli("sandbox", "run", "--timeout-s", "0.4", "-e", "A=1", "-c", "import time; time.sleep(20)")
    assert done.returncode == 124
    assert b"--timeout-s" in done.stderr
    assert fake.last("POST", "/sandboxes").body["timeout_s"] > 60
    assert fake.last("POST", "/exec").body["env"] == {"A": "1"}
    assert fake.alive() == []


def test_run_that_cannot_start_is_125(cli: Cli, fake: FakeServer) -> None:
    done = cli("sandbox", "run", "--image", "missing", "-c", "1")
    assert done.returncode == 125
    assert b"there is no image 'missing'" in done.stderr
    fake.faults.append(
        Fault("POST", "/exec", 500, {}, {"error": {"message": "agent", "code": "internal_error"}})
    )
    assert cli("sandbox", "run", "-c", "1").returncode == 125
    assert fake.alive() == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_run_stops_the_sandbox_when_it_is_interrupted(
    cli: Cli, fake: FakeServer, number: int, code: int
) -> None:
    program = cli.start("sandbox", "run", "-c", "import time; time.sleep(60)")
    until(lambda: fake.count("POST", "/exec") == 1)
    program.send_signal(number)
    _, errors = program.communicate(timeout=20)
    assert program.returncode == code
    assert b"Traceback" not in errors
    assert fake.alive() == []


def test_an_interrupt_during_create_leaves_no_sandbox(cli: Cli, fake: FakeServer) -> None:
    fake.create_delay_s = 0.5
    program = cli.start("sandbox", "run", "-c", "1")
    until(lambda: len(fake.sandboxes) == 1)
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=20)
    assert program.returncode == 130
    assert fake.alive() == []


def test_impatience_does_not_leak_the_sandbox(cli: Cli, fake: FakeServer) -> None:
    """Ctrl-C twice."""
    fake.create_delay_s = 0.5
    program = cli.start("sandbox", "run", "-c", "1")
    until(lambda: len(fake.sandboxes) == 1)
    program.send_signal(signal.SIGINT)
    time.sleep(0.05)  # a second Ctrl-C of a person, not one that the kernel merges with the first
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=20)
    assert program.returncode == 130
    assert fake.alive() == []


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_big_output_is_passed_on_whole(cli: Cli) -> None:
    done = cli("sandbox", "run", "-c", "import os\nfor i in range(200): os.write(1, bytes(range(256)) * 400)")
    assert done.returncode == 0
    assert done.stdout == ALL_BYTES * 400 * 200
