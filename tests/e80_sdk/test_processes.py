"""Programs in the background: their output, their input, their end, from either face and from anywhere."""

import asyncio
import hashlib
import signal
import time
from typing import TYPE_CHECKING

import pytest
from e80_sdk import (
    AsyncProcess,
    BadRequestError,
    ConflictError,
    Eighty80,
    NotFoundError,
    Process,
    Sandbox,
    StdinClosedError,
)

from tests.e80_sdk.fake_server import FakeServer, Fault
from tests.e80_sdk.gaps import until

if TYPE_CHECKING:
    from tests.conftest import Daemon

FULL = {"error": {"message": "the program does not read; 3 of 5 bytes were taken", "code": "stdin_full"}}


def test_output_is_read_in_parts_from_one_handle(login: FakeServer) -> None:
    login.script = [("stdout", b"1\n"), ("stderr", b"e\n"), ("stdout", b"2\n")]
    login.cuts = [(2, "drop")]
    with Eighty80() as client, client.sandbox() as sandbox:
        process = sandbox.start("counts")
        assert isinstance(process, Process)
        assert login.last("POST", "/exec").body == {"command": "counts", "background": True}
        assert next(iter(process)) == "1\n"
        assert [str(chunk) for chunk in process] == ["e\n", "2\n"]
        assert list(process) == []
        assert process.wait() == "1\n2\n"
        assert [str(chunk) for chunk in sandbox.process(process.id)] == ["1\n", "e\n", "2\n"]


def test_output_that_is_not_kept_is_told_of(login: FakeServer) -> None:
    login.script = [("gap", b"1000"), ("gap", b"24"), ("stdout", b"rest"), ("stdout", b"!")]
    with Eighty80() as client, client.sandbox() as sandbox:
        assert [(str(chunk), chunk.missed_bytes) for chunk in sandbox.start("x")] == [
            ("rest", 1024),
            ("!", 0),
        ]


def test_input_arrives_once_over_lost_answers(login: FakeServer) -> None:
    """The answers to two writes are lost, and one finds the pipe full."""
    with Eighty80() as client, client.sandbox() as sandbox:
        process = sandbox.start("cat", stdin_open=True)
        login.faults.append(Fault("POST", "/stdin", 0, after=True, times=3))
        assert process.write("one ") == 4
        login.faults.append(Fault("POST", "/stdin", 409, body=FULL))
        assert process.write(b"two ") == 4
        big = bytes(range(256)) * 2000
        assert process.write(big) == len(big)
        process.close_stdin()
        assert b"".join(chunk.data for chunk in process) == b"one two " + big
        assert process.wait().ok


async def test_writes_that_nobody_awaits_arrive_in_their_order(login: FakeServer) -> None:
    async with Eighty80() as client, client.sandbox() as sandbox:
        process = await sandbox.start("cat", stdin_open=True)
        assert isinstance(process, AsyncProcess)
        for number in range(20):
            process.write(f"{number} ")
        process.close_stdin()
        assert "".join([chunk async for chunk in process]) == "".join(f"{number} " for number in range(20))
        assert (await process.wait()).exit_code == 0


async def test_leaving_a_process_leaves_it_alone(login: FakeServer) -> None:
    async with Eighty80() as client, client.sandbox() as sandbox:
        process = await sandbox.start("echo on; sleep 30")
        waiting = process.wait()
        async for chunk in process:
            assert chunk == "on\n"
            break
        waiting.cancel()
        with pytest.raises(TimeoutError, match=r"still runs after 0\.1 s"):
            await process.wait(timeout_s=0.1)
        assert await process.poll() is None
        assert login.count("POST", "/signal") == 0
        assert await process.kill()
        result = await process.wait()
        assert (result.status, result.signal) == ("killed", "SIGKILL")
        assert await process.poll() is result


async def test_a_cancelled_pending_ends_its_program(login: FakeServer) -> None:
    login.retry_grace_s = 60
    async with Eighty80() as client, client.sandbox() as sandbox:
        pending = sandbox.run("sleep 30")
        await until(lambda: login.programs)
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        await until(lambda: not login.programs)


async def test_a_signal_that_may_have_arrived_is_not_sent_again(login: FakeServer) -> None:
    async with Eighty80() as client, client.sandbox() as sandbox:
        process = await sandbox.start("sleep 30")
        login.faults.append(Fault("POST", "/signal", 0, after=True, times=1))
        with pytest.raises(Exception, match="not sent again because that could do it twice"):
            await process.send_signal("SIGURG")
        login.faults.append(Fault("POST", "/signal", 0, after=True, times=1))
        await process.kill()
        [run] = login.execs.values()
        assert run.signals == ["SIGURG", "SIGKILL", "SIGKILL"]


def test_options_of_a_start(login: FakeServer) -> None:
    login.script = []
    with Eighty80() as client, client.sandbox() as sandbox:
        sandbox.start(["sh"], pty=True, timeout_s=None, user="nobody", idempotency_key="k")
        assert login.last("POST", "/exec").body == {
            "command": ["sh"],
            "pty": {},
            "timeout_s": None,
            "user": "nobody",
            "background": True,
        }
        assert login.last("POST", "/exec").headers["idempotency-key"] == "k"
        sandbox.run("top", pty={"rows": 50, "cols": 100})
        assert login.last("POST", "/exec").body["pty"] == {"rows": 50, "cols": 100}
        sandbox.run("top", pty=False)
        assert "pty" not in login.last("POST", "/exec").body
        with pytest.raises(TypeError, match="did you mean 'stdin_open'"):
            sandbox.start("x", stdin_opened=True)  # type: ignore[call-arg]  # the misuse under test
        with pytest.raises(TypeError, match="no option 'pty'"):
            sandbox.start_python("1", pty=True)  # type: ignore[call-arg]  # the misuse under test


@pytest.mark.docker
def test_a_server_in_the_background(real_sandbox: Sandbox) -> None:
    """Long processes and open stdin hang execs (daytona#3770, E2B#339): a server is started, looked at,
    signalled and waited for, each at once."""
    server = real_sandbox.start("trap 'echo bye; exit 3' TERM; echo listening; while :; do sleep 0.05; done")
    for chunk in server:
        assert chunk == "listening\n"
        break
    assert server.poll() is None
    assert server.result().stdout == "listening\n"
    assert [one.id for one in real_sandbox.processes()] == [server.id]
    for info in (server.info, real_sandbox.processes()[0].info):
        assert info is not None
        assert (info.kind, (info.title or "").startswith("trap")) == ("command", True)
    assert server.send_signal("SIGTERM")
    assert [str(chunk) for chunk in server if chunk.stream == "stdout"] == ["bye\n"]
    result = server.wait(timeout_s=10)
    assert (result.stdout, result.exit_code, result.status) == ("listening\nbye\n", 3, "failed")
    assert server.kill() is False
    assert real_sandbox.processes() == []
    assert real_sandbox.process(server.id).wait() == result
    with pytest.raises(NotFoundError):
        real_sandbox.process("exec_" + "0" * 34).wait()
    left = real_sandbox.start("sleep 300")
    real_sandbox.stop()
    assert left.wait().status == "killed"
    with pytest.raises(NotFoundError, match="no longer kept"):
        list(left)


@pytest.mark.docker
def test_the_other_user(real_sandbox: Sandbox) -> None:
    result = real_sandbox.run("pwd; touch /tmp/mine && touch /home/user/theirs", user="nobody")
    assert (result.stdout, result.ok) == ("/tmp\n", False)
    assert "Permission denied" in result.stderr
    with pytest.raises(BadRequestError, match="least of all as root"):
        real_sandbox.run("id", user="root")


@pytest.mark.docker
def test_input_of_any_size_and_its_end(real_sandbox: Sandbox) -> None:
    counting = real_sandbox.start("sha256sum; echo done", stdin_open=True, stdin="head")
    data = bytes(range(256)) * 8192
    assert counting.write(data) == len(data)
    assert counting.write("grüße") == 7
    counting.close_stdin()
    result = counting.wait(timeout_s=30)
    assert result.stdout == f"{hashlib.sha256(b'head' + data + 'grüße'.encode()).hexdigest()}  -\ndone\n"
    with pytest.raises(StdinClosedError):
        counting.write("too late")
    with pytest.raises(StdinClosedError):
        real_sandbox.start("sleep 5").write("never open")


@pytest.mark.docker
def test_a_terminal(real_sandbox: Sandbox) -> None:
    shell = real_sandbox.start(["bash", "--norc"], pty={"rows": 40, "cols": 120})
    shell.write("stty size; tty; echo $TERM\n")
    text = ""
    for chunk in shell:
        text += chunk
        if "xterm-256color" in text:
            break
    assert "40 120" in text
    assert "/dev/pts/" in text
    shell.resize(50, 132)
    shell.write("stty size; exit 7\n")
    text = "".join(shell)
    assert "50 132" in text
    assert shell.wait().exit_code == 7
    with pytest.raises(ConflictError, match="terminal"):
        real_sandbox.start("sleep 5").resize(1, 1)


@pytest.mark.docker
def test_who_leaves_a_run_ends_it(real_client: Eighty80) -> None:
    """Streaming exec and cancel are missing in SDKs (kubernetes-sigs/agent-sandbox#1603): whoever stops
    listening ends what runs, with all that it started."""
    program = "sleep 300 & echo on; sleep 300"
    with real_client.sandbox() as sandbox:
        with sandbox.run(program, stream=True) as stream:
            assert next(iter(stream)) == "on\n"
        began = time.monotonic()
        while sandbox.run("pgrep -c sleep") != "0\n":
            assert time.monotonic() - began < 5

        async def cancelled() -> None:
            async with asyncio.timeout(0.5):
                await real_client._core.api.execs.run(sandbox.id, {"command": program})

        with pytest.raises(TimeoutError):
            asyncio.run(cancelled())
        assert sandbox.run("pgrep -c sleep; true") == "0\n"
        assert time.monotonic() - began < 20, "well before a run that nobody follows is given up"


@pytest.mark.docker
def test_a_process_is_followed_over_a_restart(own_daemon: "Daemon", tmp_path: object) -> None:
    program = "for n in $(seq 60); do echo line $n; sleep 0.05; done; read word; echo got $word"
    with Eighty80(own_daemon.api_key, own_daemon.base_url) as client, client.sandbox() as sandbox:
        process = sandbox.start(program, stdin_open=True)
        text = ""
        for number in (signal.SIGKILL, signal.SIGTERM):
            for chunk in process:
                text += chunk
                if len(text) > 100:
                    break
            own_daemon.stop(number)
            own_daemon.start()
        process.write("hello\n")
        text += "".join(process)
        whole = "".join(f"line {n}\n" for n in range(1, 61)) + "got hello\n"
        assert text == whole
        assert process.wait() == whole
