"""The name of the engine's run, with a server of the test's own for an engine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd.runtimes.docker import instance
from sandboxd.runtimes.docker.engine import Engine
from sandboxd.runtimes.errors import EngineUnavailableError

LISTEN = """
import os, socket, sys, time
sock = socket.socket(socket.AF_UNIX)
if os.path.exists(sys.argv[1]): os.unlink(sys.argv[1])
sock.bind(sys.argv[1]); sock.listen()
print("up", flush=True)
time.sleep(600)
"""


class Listener:
    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTEN, str(path)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


async def test_another_process_is_another_run(tmp_path):
    path = tmp_path / "engine.sock"
    names = instance.EngineInstance(Engine(f"unix://{path}"))
    with pytest.raises(EngineUnavailableError):
        await names.name()
    first = Listener(path)
    name = await names.name()
    assert f"-{first.process.pid}-" in name
    assert [await names.name() for _ in range(100)] == [name] * 100
    assert await instance.EngineInstance(Engine(f"unix://{path}")).name() == name
    first.end()
    with pytest.raises(EngineUnavailableError):
        await names.name()
    second = Listener(path)
    assert await names.name() != name
    second.end()


async def test_the_heir_of_a_socket_that_another_process_opened_is_found(tmp_path):
    # As systemd does it: what listens is not what answers.
    path = tmp_path / "engine.sock"
    listener = Listener(path)
    assert instance._listener(str(path)) == listener.process.pid
    assert instance._other_holder(str(path)) == listener.process.pid
    assert instance._other_holder(str(tmp_path / "other.sock")) == 0
    listener.end()


def test_a_process_that_ended_has_no_name():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert instance._name(process.pid) is None  # a zombie
    process.wait(10)
    assert instance._name(process.pid) is None
