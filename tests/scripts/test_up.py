"""scripts/up and scripts/down from end to end, with state, port and stored key of their own."""

import json
import os
import re
import shutil
import socket
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.scripts.shell import ENGINE_URL, REPO, bash, script

COMMAND = REPO / ".venv" / "bin" / "8080"


class Setup:
    """What one user's scripts/up would make, in a scratch folder."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="e80u-", dir="/tmp"))
        self.state = self.root / "state"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.settings = {
            "SANDBOXD_DOCKER_URL": ENGINE_URL,
            "SANDBOXD_STATE_DIR": str(self.state),
            "SANDBOXD_RUN_DIR": str(self.root / "run"),
            "SANDBOXD_PORT": str(self.port),
            "SANDBOXD_POOL_SIZE": "1",
            "SANDBOXD_POOL_MAX": "1",
            "_8080_CONFIG_DIR": str(self.root / "config"),
        }

    def run(self, *command: str, **settings: str) -> CompletedProcess[str]:
        return script(*command, **(self.settings | settings))

    def cli(self, *arguments: str) -> CompletedProcess[str]:
        return script(str(COMMAND), *arguments, **self.settings)

    @property
    def pid(self) -> str:
        return (self.state / "sandboxd.pid").read_text().strip()


@pytest.fixture
def setup(engine) -> Iterator[Setup]:
    found = Setup()
    yield found
    found.run("down", "--all")
    assert str(found.root) not in Path("/proc/mounts").read_text()
    shutil.rmtree(found.root)


def steps(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stderr


@pytest.mark.docker
def test_up_again_and_down(setup: Setup) -> None:
    first = setup.run("up")
    assert "creating a project and an API key" in steps(first)
    assert "| Oslo" in first.stdout
    assert "How long each step took" in first.stdout
    assert "8080 --base-url" in first.stdout
    credentials = setup.root / "config" / "credentials.toml"
    assert credentials.stat().st_mode & 0o777 == 0o600
    stored = tomllib.loads(credentials.read_text())
    pid = setup.pid

    begin = time.monotonic()
    second = setup.run("up")
    took_s = time.monotonic() - begin
    assert f"sandboxd runs already (pid {pid})" in steps(second)
    assert "creating" not in second.stderr
    assert setup.pid == pid
    assert tomllib.loads(credentials.read_text()) == stored
    assert took_s < 5

    env = setup.cli("env").stdout
    for name in ("_8080_API_KEY", "_8080_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        assert f"export {name}=" in env

    kept = setup.cli("sandbox", "create").stdout.strip()
    assert setup.cli("sandbox", "exec", kept, "--", "sh", "-c", "echo here > note").returncode == 0
    down = setup.run("down")
    assert re.search(r"kept: [12] running sandboxes", steps(down))
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    assert "sandboxd does not run" in steps(setup.run("down"))

    steps(setup.run("up"))
    assert setup.cli("sandbox", "exec", kept, "--", "cat", "note").stdout == "here\n"
    # The one that was made, and those that the pool has ready.
    assert re.search(r"ending [12] sandboxes.*\nstopped 1 sandboxes", steps(setup.run("down", "--all")))


@pytest.mark.docker
def test_other_settings_restart_the_daemon_and_a_dead_key_is_replaced(setup: Setup) -> None:
    steps(setup.run("up"))
    pid = setup.pid
    keys = json.loads(setup.cli("apikey", "list", "--json").stdout)["data"]
    setup.cli("apikey", "revoke", "--yes", keys[0]["id"])

    again = setup.run("up", SANDBOXD_LOG_LEVEL="warning")
    assert "runs other code or settings, or is not ready: restarting it" in steps(again)
    assert "creating a project and an API key" in again.stderr
    assert setup.pid != pid
    assert not os.path.exists(f"/proc/{pid}/exe")


@pytest.mark.docker
def test_taken_port_is_named(setup: Setup) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", setup.port))
        taken.listen()
        done = setup.run("up")
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {setup.port}: Address already in use" in done.stderr
    assert "SANDBOXD_PORT=" in done.stderr


@pytest.mark.docker
def test_daemon_that_refuses_its_settings_says_why(setup: Setup) -> None:
    done = setup.run("up", SANDBOXD_RUNTIME="magic")
    assert done.returncode == 1
    assert "SANDBOXD_RUNTIME" in done.stderr
    assert "sandboxd did not become ready" in done.stderr


@pytest.mark.parametrize("arguments", [("up", "now"), ("down", "--some"), ("build-images", "--quick")])
def test_wrong_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    done = script(*arguments)
    assert done.returncode == 1
    assert f"usage: scripts/{arguments[0]}" in done.stderr


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_port_that_is_none_is_refused(port: str) -> None:
    done = bash("check_port", SANDBOXD_PORT=port)
    assert done.returncode == 1
    assert f"SANDBOXD_PORT={port} is no port" in done.stderr
