"""The blocking face: `with`, plain calls, notebooks, forks, interrupts, the end of the program."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from e80_sdk import (
    Eighty80,
    ExecResult,
    ExecStream,
    NotFoundError,
    Sandbox,
    SandboxNotRunningError,
    eighty80_app,
)

from tests.e80_sdk.fake_server import FakeServer, Fault


def test_a_block_gives_values_and_stops_the_sandbox(login: FakeServer) -> None:
    with Eighty80() as client, client.sandbox(labels={"a": "b"}) as sandbox:
        assert isinstance(sandbox, Sandbox)
        assert sandbox.files.write("in.txt", "grüße") == 7
        assert sandbox.files.read("in.txt") == "grüße".encode()
        result = sandbox.run_python("print(open('in.txt').read())")
        assert isinstance(result, ExecResult)
        assert result == "grüße\n"
        assert sandbox.run(["sh", "-c", "exit 3"]).exit_code == 3
        assert sandbox.run("echo $0") == "bash\n"
    assert login.sandboxes[sandbox.id]["labels"] == {"a": "b"}
    assert login.alive() == []


async def test_it_works_while_a_loop_runs_as_in_a_notebook(login: FakeServer) -> None:
    app = eighty80_app()
    with app.sandbox() as sandbox:
        assert sandbox.run_python("print(1)") == "1\n"
    app.client.close()


def test_sandboxes_can_be_managed_by_id(login: FakeServer) -> None:
    with Eighty80() as client:
        made = [client.sandboxes.create() for _ in range(3)]
        assert [one.id for one in client.sandboxes.list()] == [one.id for one in reversed(made)]
        assert [one.id for one in client.sandboxes.list(limit=1)] == [made[-1].id]
        assert client.sandboxes.stop(made[0].id).status == "stopped"
        assert client.sandboxes.get(made[0].id).info.termination_reason == "user"
        assert len(client.sandboxes.list(status="all")) == 3
        made[1].stop()
        made[1].stop()
        with pytest.raises(SandboxNotRunningError, match="ended"):
            made[1].run("true")
        with pytest.raises(NotFoundError):
            client.sandboxes.get("sbx_nothing")
        with made[2]:
            pass
    assert login.alive() == []


def test_a_long_list_is_read_page_by_page(login: FakeServer) -> None:
    for number in range(250):
        login.sandboxes[f"sbx_{number}"] = {"id": f"sbx_{number}", "status": "running"}
    with Eighty80() as client:
        assert len(client.sandboxes.list()) == 250
        assert login.count("GET", "/sandboxes") == 3
        assert len(client.sandboxes.list(limit=150)) == 150


def test_ids_that_would_name_something_else_are_refused(login: FakeServer) -> None:
    with Eighty80() as client:
        for wrong in ("", "..", "a/b", "a?b"):
            with pytest.raises(Exception, match="is not a sandbox id"):
                client.sandboxes.stop(wrong)
    assert login.seen == []


def test_a_stream_gives_chunks_then_the_result(login: FakeServer) -> None:
    with Eighty80() as client, client.sandbox() as sandbox:
        stream = sandbox.run_python("import sys; print('o'); print('e', file=sys.stderr)", stream=True)
        assert isinstance(stream, ExecStream)
        texts = {"stdout": "", "stderr": ""}
        for chunk in stream:
            texts[chunk.stream] += chunk
        assert texts == {"stdout": "o\n", "stderr": "e\n"}
        assert stream.result().stdout == "o\n"
        with sandbox.run("echo x; sleep 30", stream=True) as broken_off:
            assert next(iter(broken_off)).stream == "stdout"


def test_callbacks_run_in_the_calling_thread(login: FakeServer) -> None:
    threads: set[int] = set()
    texts: list[str] = []

    def heard(chunk: str) -> None:
        threads.add(threading.get_ident())
        texts.append(chunk)

    with Eighty80() as client, client.sandbox() as sandbox:
        result = sandbox.run("echo 1; sleep 0.05; echo 2", on_stdout=heard)
        with pytest.raises(TypeError, match="plain functions"):
            sandbox.run("echo 1", on_stdout=_coroutine)
    assert "".join(texts) == result.stdout == "1\n2\n"
    assert threads == {threading.get_ident()}


def test_an_exception_in_the_block_stops_the_sandbox(login: FakeServer) -> None:
    client = Eighty80()
    with pytest.raises(ZeroDivisionError), client.sandbox():
        _ = 1 / 0
    assert login.alive() == []
    client.close()


def test_many_threads_share_a_client(login: FakeServer) -> None:
    results: list[str] = []
    with Eighty80() as client, client.sandbox() as sandbox:
        threads = [
            threading.Thread(target=lambda n=n: results.append(sandbox.run(f"echo {n}"))) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [f"{n}\n" for n in range(8)]


def test_a_client_that_is_dropped_leaves_no_thread(login: FakeServer) -> None:
    client = Eighty80()
    client.sandboxes.list()
    before = threading.active_count()
    del client
    gc.collect()
    assert threading.active_count() == before - 1


def test_a_closed_client_works_again(login: FakeServer) -> None:
    client = Eighty80()
    client.sandboxes.list()
    client.close()
    client.close()
    assert client.sandboxes.list() == []
    client.close()


def test_any_request_can_be_sent(login: FakeServer) -> None:
    with Eighty80() as client:
        assert client.request("GET", "/v1/doctor")["isolation"]["level"] == 0


def test_an_interrupt_stops_the_sandbox(login: FakeServer) -> None:
    """Ctrl-C while the main thread waits for a program."""
    code = (
        "from e80_sdk import Eighty80\n"
        "with Eighty80() as client, client.sandbox() as sandbox:\n"
        "    sandbox.run('sleep 30')\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    _until(lambda: login.count("POST", "/exec") == 1)
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert login.alive() == []


@pytest.mark.parametrize(
    "call",
    [
        "sandbox.run('echo on; sleep 30')",
        "sandbox.run('echo on; sleep 30', on_stdout=print)",
        "list(sandbox.run('echo on; sleep 30', stream=True))",
    ],
)
def test_an_interrupt_ends_the_program_at_once(login: FakeServer, call: str) -> None:
    """The sandbox stays, and so would the program, until the server gives up waiting for who was there."""
    login.retry_grace_s = 60
    code = f"from e80_sdk import Eighty80\nsandbox = Eighty80().sandboxes.create()\n{call}\n"
    program = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    _until(lambda: login.programs)
    time.sleep(0.1)  # the answer is on its way to who is interrupted
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    _until(lambda: not login.programs)
    assert [run.signals for run in login.execs.values()] == [["SIGKILL"]]
    assert len(login.alive()) == 1


def test_a_program_may_end_with_the_client_open(login: FakeServer) -> None:
    code = "from e80_sdk import Eighty80\nclient = Eighty80()\nprint(client.sandboxes.list())\n"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, timeout=20, check=True
    )
    assert done.stdout == b"[]\n"
    assert done.stderr == b""


def test_a_forked_child_gets_a_thread_of_its_own(login: FakeServer) -> None:
    code = (
        "import os\nfrom e80_sdk import Eighty80\nclient = Eighty80()\nclient.sandboxes.list()\n"
        "child = os.fork()\nassert client.sandboxes.list() == []\n"
        "if child:\n    assert os.waitpid(child, 0)[1] == 0\n    print('both')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20, check=True)
    assert done.stdout == b"both\n"


def test_a_loop_that_cannot_start_is_an_error_and_no_hang(
    login: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    client = Eighty80(base_url="https://192.0.2.1")
    with pytest.raises(FileNotFoundError):
        client.sandboxes.list()


def test_a_blocking_call_from_the_clients_own_loop_is_refused(login: FakeServer) -> None:
    client = Eighty80()
    portal = client._portal

    async def nested() -> None:
        portal.call(asyncio.sleep, 0)

    with pytest.raises(RuntimeError, match="own event loop"):
        portal.call(nested)
    client.close()


def test_a_cut_stream_is_no_success(login: FakeServer) -> None:
    login.cut_stream_after = 0
    with Eighty80(max_retries=2) as client, client.sandbox() as sandbox:
        for login.cut_cleanly in (False, True):
            with pytest.raises(Exception, match=r"ended before its result|connection broke") as caught:
                sandbox.run("echo 1; sleep 0.1; echo 2", on_stdout=lambda chunk: None)
            assert caught.value.code == "connection_lost"
        assert login.count("POST", "/exec") == 6
        assert login.started == 2, "it was sent again, and did not run again"
    assert login.alive() == []


def test_an_error_event_is_raised(login: FakeServer) -> None:
    login.error_event = {"message": "the agent is gone", "type": "server_error", "code": "agent_lost"}
    with Eighty80() as client, client.sandbox() as sandbox:
        with pytest.raises(Exception, match="agent is gone") as caught:
            sandbox.run("echo 1", stream=True).result()
        assert caught.value.code == "agent_lost"


def test_a_failing_stop_does_not_hide_the_result(login: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    login.faults.append(
        Fault("POST", "/stop", 500, body={"error": {"message": "broken", "code": "internal_error"}})
    )
    with Eighty80() as client, client.sandbox() as sandbox:
        result = sandbox.run("echo kept")
    assert result == "kept\n"
    assert "could not be stopped" in caplog.text


async def _coroutine(chunk: str) -> None:
    os.write(1, chunk.encode())


def _until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
