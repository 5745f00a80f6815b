"""Contexts over REST on the real engine: state that stays, results of a notebook, ends of all kinds."""

import base64
import json
from collections.abc import Iterator

import httpx2
import pytest

from tests.docker.scene_contexts import Call, Contexts, wait_for

pytestmark = pytest.mark.docker

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def contexts(daemon) -> Iterator[Contexts]:
    with daemon.client() as http:
        made = http.post("/v1/sandboxes", json={"timeout_s": 600, "memory_size_mb": 512}).json()
        yield Contexts(http, made["id"])
        http.post(f"/v1/sandboxes/{made['id']}/stop")


@pytest.fixture
def python(contexts) -> Iterator[str]:
    made = contexts.make()
    yield made
    contexts.http.delete(f"{contexts.url}/contexts/{made}")


@pytest.fixture
def bash(contexts) -> Iterator[str]:
    made = contexts.make("bash")
    yield made
    contexts.http.delete(f"{contexts.url}/contexts/{made}")


def test_state_stays_and_contexts_stand_apart(contexts, python):
    other = contexts.make(cwd="/tmp", env={"NAME": "value"})
    contexts.run(python, "x = 41\nimport os; os.environ['SEEN'] = '1'")
    assert contexts.value(python, "x + 1") == "42"
    assert (
        contexts.value(other, "'x' in globals(), os.environ.get('SEEN')") is None
    )  # os is not imported there
    assert contexts.run(other, "x")["error"]["name"] == "NameError"
    assert contexts.value(other, "import os; os.getcwd(), os.environ['NAME'], 'SEEN' in os.environ") == (
        "('/tmp', 'value', False)"
    )
    assert contexts.run(None, "print('x' in globals())")["stdout"] == "False\n"
    shown = {item["id"]: item for item in contexts.http.get(f"{contexts.url}/contexts").json()["data"]}
    assert shown[python] == contexts.get(python)
    assert (shown[other]["cwd"], shown[other]["executions"], shown[other]["status"]) == ("/tmp", 3, "idle")
    deleted = contexts.http.delete(f"{contexts.url}/contexts/{other}")
    assert deleted.json() == {"id": other, "object": "sandbox.context", "deleted": True}
    for answer in (
        contexts.http.get(f"{contexts.url}/contexts/{other}"),
        contexts.http.delete(f"{contexts.url}/contexts/{other}"),
        contexts.ask(other, "1"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "context_not_found")


def test_the_call_is_an_exec_of_the_sandbox(contexts, python):
    result = contexts.run(python, "print('out'); import sys; print('err', file=sys.stderr); 7")
    assert (result["status"], result["exit_code"], result["context"]) == ("completed", 0, python)
    assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")
    assert result["results"] == [{"text/plain": "7"}]
    assert result["usage"]["cpu_ms"] > 0
    again = contexts.http.get(f"{contexts.url}/execs/{result['id']}").json()
    assert (again["results"], again["context"]) == (result["results"], python)


def test_rich_results_are_those_of_a_notebook(contexts, python):
    frame = contexts.run(python, "import pandas as pd\npd.DataFrame({'a': [1]})")["results"][0]
    assert "<table" in frame["text/html"]
    assert frame["text/plain"] == "   a\n0  1"
    assert contexts.run(python, "5;")["results"] == []
    code = (
        "from IPython.display import display, JSON, HTML, clear_output\n"
        "display('gone'); clear_output()\n"
        "handle = display(HTML('<i>1</i>'), display_id='counter')\n"
        "display(JSON({'n': float('nan')}))\n"
        "handle.update(HTML('<i>2</i>'))\n"
        "class Own:\n"
        "    def __repr__(self): return 'own'\n"
        "    def _repr_mimebundle_(self, **_):\n"
        "        return {'text/x-own': 'o', 'image/png': b'raw', 'bad': object()}\n"
        "Own()"
    )
    shown = contexts.run(python, code)["results"]
    assert [item.get("text/html") for item in shown] == ["<i>2</i>", None, None]
    assert shown[1]["application/json"] == {"n": None}
    png = base64.b64encode(b"raw").decode()
    assert shown[2] == {"text/plain": "own", "text/x-own": "o", "image/png": png}


def test_a_stream_tells_results_in_their_place(contexts, python):
    code = "print('a')\ndisplay(1)\nprint('b')\n2"
    events = [event for event in contexts.stream(python, code) if event["type"] != "exec.started"]
    told = [event.get("delta") or event.get("result") for event in events[:-1]]
    assert told == ["a\n", {"text/plain": "1"}, "b\n", {"text/plain": "2"}]
    assert [item["text/plain"] for item in events[-1]["exec"]["results"]] == ["1", "2"]


def test_figures_are_shown_without_being_asked_for_and_closed(contexts, python):
    code = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);\nprint('drawn')"
    first = contexts.run(python, code)
    assert (first["stdout"], first["stderr"]) == ("drawn\n", "")
    assert base64.b64decode(first["results"][-1]["image/png"]).startswith(PNG)
    assert contexts.value(python, "plt.get_fignums()") == "[]"
    shown = contexts.run(python, "plt.plot([3]); plt.show(); print('after')")
    assert [sorted(item) for item in shown["results"]] == [["image/png", "text/plain"]]


def test_tracebacks_name_the_lines_of_the_code_and_nothing_of_ours(contexts, python):
    contexts.run(python, "def f():\n    return 1 / 0")
    result = contexts.run(python, "\n\nf()")
    error = result["error"]
    assert (result["status"], result["exit_code"]) == ("failed", 1)
    assert (error["name"], error["value"]) == ("ZeroDivisionError", "division by zero")
    assert [line for line in error["traceback"].splitlines() if line.startswith("  File")] == [
        '  File "<cell 2>", line 3, in <module>',
        '  File "<cell 1>", line 2, in f',
    ]
    assert "\x1b" not in error["traceback"]
    assert result["stderr"] == error["traceback"]
    syntax = contexts.run(python, "1\nfor in x:")["error"]
    assert syntax["name"] == "SyntaxError"
    assert "line 2" in syntax["traceback"]
    group = contexts.run(python, "raise ExceptionGroup('g', [ValueError(1)])")["error"]
    assert "ValueError: 1" in group["traceback"]
    assert "IPython" not in group["traceback"]


def test_what_people_type_into_notebooks_works(contexts, python):
    look = "import os; print(sorted(os.listdir('/home/user')))"
    before = contexts.run(None, look)["stdout"]
    assert contexts.run(python, "!echo out; echo err >&2; exit 3")["stdout"] == "out\n"
    assert contexts.value(python, "_exit_code") == "3"
    assert contexts.run(python, "%timeit -n1 -r1 1")["stdout"] != ""
    assert contexts.run(python, "%%bash\necho cell")["stdout"] == "cell\n"
    assert contexts.value(python, "import asyncio\nawait asyncio.sleep(0.01, 'awaited')") == "'awaited'"
    assert (
        contexts.run(python, "import subprocess; subprocess.run(['echo', 'child']);")["stdout"] == "child\n"
    )
    assert contexts.run(python, "input()")["error"]["name"] == "EOFError"
    assert contexts.run(python, "%nothing")["error"]["name"] == "UsageError"
    for code, status in (("import sys; sys.exit(3)", 3), ("exit()", 0), ("quit(4)", 4)):
        assert contexts.run(python, code)["exit_code"] == status
    # None of it writes to the user's home, nor does the start of a context. Libraries that earlier calls have
    # imported may have.
    contexts.http.delete(f"{contexts.url}/contexts/{contexts.make()}")
    assert contexts.run(None, look)["stdout"] == before
    assert ".ipython" not in before


def test_a_fork_that_comes_back_from_a_call_does_not_speak_for_it(contexts, python):
    contexts.run(python, "import os\npid = os.fork()")
    assert contexts.value(python, "pid > 0") == "True"


def test_results_are_bounded(contexts, python):
    contexts.run(python, "from IPython.display import HTML")
    large = contexts.run(python, "HTML('x' * 5_000_000)")["results"]
    assert [sorted(item) for item in large] == [["text/plain"]]
    assert "the limit is 4194304" in large[0]["text/plain"]
    many = contexts.run(python, "for _ in range(6): display(HTML('x' * 2_500_000))")["results"]
    assert len(many) == 4
    assert "left out" in many[-1]["text/plain"]


def test_a_deadline_interrupts_the_call_and_keeps_the_state(contexts, python, bash):
    """A timeout does not cost the session: llm-sandbox#43, llm-sandbox#100."""
    contexts.run(python, "x = 1")
    contexts.run(bash, "x=1")
    late = contexts.run(python, "import time; time.sleep(60)", timeout_s=0.3)
    assert (late["status"], late["error"]["name"]) == ("timed_out", "KeyboardInterrupt")
    assert contexts.run(bash, "sleep 60; echo next", timeout_s=0.3)["status"] == "timed_out"
    assert contexts.value(python, "x") == "1"
    assert contexts.run(bash, "echo $x")["stdout"] == "1\n"


DEAF = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"


def test_a_call_that_ignores_its_deadline_takes_its_context_along(contexts, python):
    """A dead session says so, and comes back: daytona#3770, OpenSandbox#217."""
    contexts.run(
        python, "import subprocess\nchild = subprocess.Popen(['sleep', '4711'], start_new_session=True)"
    )
    assert contexts.run(python, DEAF, timeout_s=0.3)["status"] == "timed_out"
    assert contexts.get(python)["status"] == "lost"
    assert (
        contexts.run(None, "import os; print(os.system('pgrep -f \"sleep 471[1]\"') != 0)")["stdout"]
        == "True\n"
    )
    refused = contexts.ask(python, "1")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "context_lost")
    assert "its time was over" in refused.json()["error"]["message"]
    assert contexts.act(python, "restart")["status"] == "idle"
    assert contexts.run(python, "child")["error"]["name"] == "NameError"
    assert contexts.get(python)["executions"] == 1


@pytest.mark.parametrize("code", ["while True: pass", "!sleep 60", "import asyncio; await asyncio.sleep(60)"])
def test_an_interrupt_ends_the_call_and_keeps_the_state(contexts, python, code):
    contexts.run(python, "x = 1")
    call = Call(contexts, python, code)
    contexts.wait_busy(python)
    wait_for(lambda: contexts.act(python, "interrupt")["status"] == "idle")
    assert (call.result()["status"], call.result()["error"]["name"]) == ("failed", "KeyboardInterrupt")
    assert contexts.value(python, "x") == "1"


def test_an_interrupt_of_nothing_changes_nothing(contexts, python, bash):
    for context_id in (python, bash):
        contexts.act(context_id, "interrupt")
    assert contexts.value(python, "1") == "1"
    assert contexts.run(bash, "echo 1")["stdout"] == "1\n"


@pytest.mark.parametrize(
    ("signal", "status", "after"), [("SIGINT", "failed", "idle"), ("SIGKILL", "killed", "lost")]
)
def test_signals_to_a_call(contexts, python, signal, status, after):
    call = Call(contexts, python, "import time; time.sleep(60)")
    running = f"{contexts.url}/execs?status=running"
    wait_for(lambda: bool(contexts.http.get(running).json()["data"]))
    exec_id = contexts.http.get(running).json()["data"][0]["id"]

    def ended() -> bool:
        contexts.http.post(f"{contexts.url}/execs/{exec_id}/signal", json={"signal": signal})
        return not call.is_alive()

    wait_for(ended)
    assert call.result()["status"] == status
    assert contexts.get(python)["status"] == after


@pytest.mark.parametrize(
    ("code", "status", "why"),
    [
        ("import os; os._exit(5)", "failed", "exit status 5"),
        ("import ctypes; ctypes.string_at(0)", "failed", "signal 11"),
        ("b = bytearray(10**9)\nfor i in range(0, len(b), 4096): b[i] = 1", "oom", "out of memory"),
    ],
)
def test_a_process_that_dies_loses_its_context_and_no_other(contexts, python, bash, code, status, why):
    contexts.run(bash, "x=alive")
    assert contexts.run(python, code)["status"] == status
    assert why in contexts.ask(python, "1").json()["error"]["message"]
    assert contexts.run(bash, "echo $x")["stdout"] == "alive\n"
    assert contexts.act(python, "restart")["status"] == "idle"


def test_a_fork_bomb_ends_with_its_context(contexts, python, bash):
    contexts.run(bash, "x=alive")
    deaf = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    bomb = deaf + "while True:\n  try: os.fork()\n  except OSError: pass"
    assert contexts.run(python, bomb, timeout_s=0.5)["status"] == "timed_out"
    assert contexts.get(python)["status"] == "lost"
    assert contexts.run(bash, "echo $x")["stdout"] == "alive\n"


def test_calls_run_one_after_another_in_their_own_time(contexts, python):
    first = Call(contexts, python, "import time; time.sleep(2); order = ['first']")
    contexts.wait_busy(python)
    # Its deadline is shorter than the wait for its turn.
    second = Call(contexts, python, "order.append('second'); time.sleep(0.1); order", timeout_s=1.5)
    assert first.result()["status"] == "completed"
    assert second.result()["results"] == [{"text/plain": "['first', 'second']"}]


def test_a_queue_has_an_end(contexts, python):
    calls = [Call(contexts, python, "import time; time.sleep(60)")]
    contexts.wait_busy(python)
    calls += [Call(contexts, python, "1") for _ in range(18)]
    wait_for(lambda: sum(not call.is_alive() for call in calls) >= 2)
    contexts.http.delete(f"{contexts.url}/contexts/{python}")
    for call in calls:
        call.join(30)
    answers = [call.answer for call in calls if call.answer is not None]
    refused = [answer.json()["error"]["code"] for answer in answers if answer.status_code != 200]
    assert refused == ["context_busy"] * 2
    assert [answer.json()["status"] for answer in answers if answer.status_code == 200] == ["killed"] * 17


def test_whoever_leaves_ends_his_call_and_not_the_context(contexts, python):
    contexts.run(python, "ran = []; import time")
    for code in ("ran.append(1); time.sleep(60)", "ran.append(2)"):
        # The second of them waits for its turn and never gets it.
        busy = Call(contexts, python, "time.sleep(2)") if "2" in code else None
        if busy is not None:
            contexts.wait_busy(python)
        with pytest.raises(httpx2.ReadTimeout):
            contexts.http.post(f"{contexts.url}/exec", json={"code": code, "context": python}, timeout=0.4)
        wait_for(lambda: contexts.get(python)["status"] == "idle")
    assert contexts.value(python, "ran") == "[1]"


def test_a_server_that_a_call_started_outlives_the_call(contexts, python):
    start = "import subprocess, sys\nserver = subprocess.Popen([sys.executable, '-m', 'http.server', '8765'])"
    contexts.run(python, start)
    ask = "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:8765/').status"
    wait_for(lambda: contexts.run(python, ask)["status"] == "completed")
    # It writes to the stderr of a call that has ended, and does not die of it.
    assert [contexts.run(python, ask)["results"] for _ in range(3)] == [[{"text/plain": "200"}]] * 3


def test_output_between_calls_goes_nowhere(contexts, python):
    """Clean per turn: agent-sandbox#296."""
    code = (
        "import threading, time\n"
        "def late():\n    time.sleep(0.2); print('late', flush=True); done.set()\n"
        "done = threading.Event(); threading.Thread(target=late).start()"
    )
    assert contexts.run(python, code)["stdout"] == ""
    contexts.run(None, "import time; time.sleep(0.5)")
    result = contexts.run(python, "done.wait()")
    assert (result["stdout"], result["results"]) == ("", [{"text/plain": "True"}])


def test_bash_keeps_folder_variables_and_functions(contexts, bash):
    contexts.run(bash, 'cd /tmp; x=5; f() { echo "f $1"; return 7; }')
    result = contexts.run(bash, "pwd; echo $x; echo err >&2; f 3")
    assert (result["stdout"], result["stderr"], result["exit_code"]) == ("/tmp\n5\nf 3\n", "err\n", 7)
    assert contexts.run(bash, 'cat; read y; echo "[$y]"')["stdout"] == "[]\n"


def test_a_heredoc_or_a_syntax_error_does_not_hang_a_shell(contexts, bash):
    """Heredocs that hang a session: daytona#4230."""
    contexts.run(bash, "x=1")
    assert contexts.run(bash, "cat <<EOF\nhere\nEOF")["stdout"] == "here\n"
    assert contexts.run(bash, "cat <<EOF\nno end")["stdout"] == "no end\n"
    for code in ("if then", "echo 'no quote", "echo $((", "}"):
        assert contexts.run(bash, code)["exit_code"] in (1, 2)
    assert contexts.run(bash, "echo $x")["stdout"] == "1\n"


def test_a_shell_that_ends_is_lost_and_comes_back(contexts, bash):
    """A dead shell does not hang the next command: daytona#4520."""
    result = contexts.run(bash, "echo bye; exit 3")
    assert (result["stdout"], result["stderr"], result["exit_code"]) == ("bye\n", "", 3)
    assert contexts.ask(bash, "echo").json()["error"]["code"] == "context_lost"
    contexts.act(bash, "restart")
    assert contexts.run(bash, "echo $?")["stdout"] == "0\n"


def test_a_context_that_cannot_be_made(contexts):
    def refused(**body: str) -> tuple[int, str]:
        answer = contexts.http.post(f"{contexts.url}/contexts", json=body)
        return answer.status_code, answer.json()["error"]["code"]

    assert refused(language="javascript") == (400, "unknown_language")
    assert refused(cwd="/nowhere") == (400, "cwd_not_found")
    assert contexts.http.get(f"{contexts.url}/contexts").json()["data"] == []


def test_a_key_makes_one_context(contexts):
    headers = {"Idempotency-Key": "one"}
    made = [contexts.http.post(f"{contexts.url}/contexts", json={}, headers=headers).json() for _ in range(2)]
    assert made[0]["id"] == made[1]["id"]
    other = contexts.http.post(f"{contexts.url}/contexts", json={"cwd": "/tmp"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    contexts.http.delete(f"{contexts.url}/contexts/{made[0]['id']}")


def test_contexts_have_a_limit(contexts):
    made = [contexts.make("bash") for _ in range(16)]
    answer = contexts.http.post(f"{contexts.url}/contexts", json={"language": "bash"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "context_busy")
    for context_id in made:
        contexts.http.delete(f"{contexts.url}/contexts/{context_id}")


LOOK = """
import builtins, json, logging, os, signal, sys, threading, warnings
print(json.dumps({
    "modules": sorted(name for name in sys.modules if name.partition(".")[0] in
        ("IPython", "traitlets", "pygments", "jedi", "decorator", "matplotlib_inline", "ipykernel")),
    "builtins": sorted(vars(builtins)),
    "filters": [str(item) for item in warnings.filters if "numpy" not in str(item)],
    "hooks": [sys.displayhook is sys.__displayhook__, sys.excepthook is sys.__excepthook__],
    "handlers": len(logging.root.handlers),
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "threads": threading.active_count(),
    "environment": sorted(set(os.environ) - {"LC_CTYPE", "PYTHONUNBUFFERED", "OLDPWD", "SHLVL", "_"}),
}))
"""


def test_a_plain_exec_does_not_notice_what_contexts_need(contexts, python):
    """IPython is loaded beside it, and hidden: a library that finds it takes every run for a notebook."""
    code = "import numpy, pandas, matplotlib.pyplot\n" + LOOK
    warm = contexts.run(None, code)
    fresh = contexts.run(None, code, fresh=True)
    assert (
        contexts.run(None, "import sys; print('pandas' in sys.modules, 'numpy')")["stdout"] == "True numpy\n"
    )
    assert json.loads(warm["stdout"]) == json.loads(fresh["stdout"])
    count = "import os; print(len(os.listdir('/proc/self/task')), 'pandas')"
    assert contexts.run(None, count)["stdout"] == "1 pandas\n"


def test_an_exec_in_a_context_takes_no_options_of_a_process(contexts, python):
    for option in (
        {"cwd": "/tmp"},
        {"env": {"A": "1"}},
        {"stdin": "x"},
        {"fresh": True},
        {"background": True},
    ):
        assert contexts.ask(python, "1", **option).status_code == 400
