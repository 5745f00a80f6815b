"""Finding, starting and stopping a Docker Engine, with an engine of the test's own in a scratch folder."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripts.shell import bash

LIBRARIES = ("common", "venv", "engine")
ENSURE = "ensure_engine; engine info --format '{{.LiveRestoreEnabled}} {{.DockerRootDir}}'"


class Scratch:
    """Settings that put an engine and its state into one short-named folder."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="e80e-", dir="/var/tmp"))
        self.socket = self.root / "docker.sock"
        self.settings = {
            "SANDBOXD_DOCKER_URL": f"unix://{self.socket}",
            "SANDBOXD_STATE_DIR": str(self.root / "state"),
            "E80_DOCKERD_DIR": str(self.root / "engine"),
        }

    def bash(self, code: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return bash(code, libraries=LIBRARIES, **(self.settings | settings))

    @property
    def pid_file(self) -> Path:
        return self.root / "engine" / "docker.pid"

    @property
    def containerd_pid_file(self) -> Path:
        return self.root / "engine" / "exec" / "containerd" / "containerd.pid"


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    found = Scratch()
    yield found
    found.bash("stop_engine")
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith(str(found.root)):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
    shutil.rmtree(found.root)


def kill(pid: int) -> None:
    """SIGKILL, and gone: nothing but a zombie is left."""
    os.kill(pid, signal.SIGKILL)
    assert bash(f"while lives_as {pid}; do sleep 0.02; done", timeout_s=10).returncode == 0


@pytest.mark.docker
def test_engine_starts_from_nothing_and_stops(scratch: Scratch) -> None:
    done = scratch.bash(ENSURE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["true", str(scratch.root / "engine" / "data")]
    assert "starting the Docker Engine in the background" in done.stderr
    pid = scratch.pid_file.read_text()

    again = scratch.bash(ENSURE)
    assert again.returncode == 0, again.stderr
    assert "starting" not in again.stderr
    assert scratch.pid_file.read_text() == pid

    assert scratch.bash("stop_engine").returncode == 0
    assert scratch.bash(f"lives_as {pid}").returncode != 0
    assert "was not started by scripts/up: left running" in scratch.bash("stop_engine").stderr


@pytest.mark.docker
def test_engine_starts_again_after_it_was_killed(scratch: Scratch) -> None:
    assert scratch.bash(ENSURE).returncode == 0
    pid, containerd = int(scratch.pid_file.read_text()), int(scratch.containerd_pid_file.read_text())
    for process in (pid, containerd):
        if scratch.bash(f"lives_as {process}").returncode == 0:
            kill(process)
    # The worst case: both numbers have gone to another process that lives.
    scratch.pid_file.write_text(str(os.getpid()))
    scratch.containerd_pid_file.write_text(str(os.getpid()))
    done = scratch.bash(ENSURE)
    assert done.returncode == 0, done.stderr
    assert f"removing {scratch.pid_file}" in done.stderr
    assert f"removing {scratch.containerd_pid_file}" in done.stderr


@pytest.mark.docker
def test_engine_that_cannot_start_says_why(scratch: Scratch) -> None:
    done = scratch.bash(ENSURE, E80_DOCKERD_DIR="/proc/no-such-place")
    assert done.returncode == 1
    assert f"error: the Docker Engine does not answer at unix://{scratch.socket}" in done.stderr
    assert "/proc/no-such-place" in done.stderr


@pytest.mark.docker
def test_engine_of_another_file_system_is_refused(scratch: Scratch) -> None:
    """An engine that does not see this host's /var/tmp, as a remote one would not."""
    engine = scratch.root / "engine"
    config = scratch.root / "elsewhere.json"
    config.write_text(
        json.dumps(
            {
                "hosts": [scratch.settings["SANDBOXD_DOCKER_URL"]],
                "data-root": str(engine / "data"),
                "exec-root": str(engine / "exec"),
                "pidfile": str(scratch.pid_file),
                "bridge": "none",
                "iptables": False,
            }
        )
    )
    engine.mkdir()
    hide = f"mount --bind {scratch.root} {scratch.root} && mkdir -p /tmp/e80-hidden"
    hide += f" && mount --bind {scratch.root} /tmp/e80-hidden && mount -t tmpfs tmpfs /var/tmp"
    hide += f" && mkdir {scratch.root} && mount --move /tmp/e80-hidden {scratch.root}"
    hide += f"; exec dockerd --config-file {config}"
    with (scratch.root / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-ec",
                f"{hide}; exec dockerd --config-file {config}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        wait = scratch.bash(f"await_engine 60 <(echo {process.pid})")
        assert wait.returncode == 0, (scratch.root / "log").read_text()
        done = scratch.bash(ENSURE)
        assert done.returncode == 1
        assert "does not share this host's file system" in done.stderr
        assert "SANDBOXD_DOCKER_URL=unix://" in done.stderr
    finally:
        process.terminate()
        process.wait(30)
        Path("/tmp/e80-hidden").rmdir()


def test_remote_engine_that_does_not_answer_is_named() -> None:
    done = bash("ensure_engine", libraries=LIBRARIES, SANDBOXD_DOCKER_URL="tcp://127.0.0.1:9")
    assert done.returncode == 1
    assert "error: the Docker Engine at tcp://127.0.0.1:9 does not answer" in done.stderr


def test_engine_settings_keep_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "docker" / "daemon.json"
    code = f"dockerd_config {file} {file} live-restore=true 'bridge=\"none\"'"
    assert bash(code).returncode == 0
    assert json.loads(file.read_text()) == {"live-restore": True, "bridge": "none"}

    file.write_text('{"log-driver": "local", "live-restore": false}')
    assert bash(code).returncode == 0
    assert json.loads(file.read_text()) == {"log-driver": "local", "live-restore": True, "bridge": "none"}
    assert [path.name for path in file.parent.iterdir()] == ["daemon.json"]


def test_engine_settings_that_are_no_json_stay_untouched(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text("{ oops")
    done = bash(f"dockerd_config {file} {file} live-restore=true")
    assert done.returncode == 1
    assert f"error: {file} could not be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert file.read_text() == "{ oops"


def test_stale_pid_file_goes_and_a_live_one_stays(tmp_path: Path) -> None:
    stale = tmp_path / "stale.pid"
    stale.write_text(str(os.getpid()))
    live = tmp_path / "live.pid"
    comm = Path("/proc/self/comm").read_text().strip()
    live.write_text(str(os.getpid()))
    done = bash(f"remove_stale_pid_file {stale} dockerd; remove_stale_pid_file {live} '{comm}'")
    assert done.returncode == 0, done.stderr
    assert not stale.exists()
    assert live.exists()
