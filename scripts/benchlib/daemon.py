"""The server under test: a daemon of our own on a scratch folder, or one that runs already."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from scripts.benchlib.client import Api
from scripts.benchlib.figures import BenchError

START_S = 60.0
STOP_S = 40.0
FIRST_UID = 300_000
# More than one daemon has sandboxes.
UIDS = 1000
_uid_ranges = itertools.count()


class Daemon:
    """Leaves nothing behind: `close` removes its sandboxes, mounts and files, whatever has happened."""

    def __init__(self, **settings: str) -> None:
        """`settings` are SANDBOXD_ variables, in lower case."""
        # Short: the path of a unix socket has room for 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="e80b", dir="/tmp"))
        self._state = self.root / "state"
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
        if "SANDBOXD_DOCKER_URL" in os.environ:
            self._env["SANDBOXD_DOCKER_URL"] = os.environ["SANDBOXD_DOCKER_URL"]
        self._env.update(
            SANDBOXD_STATE_DIR=str(self._state),
            SANDBOXD_RUN_DIR=str(self.root / "run"),
            SANDBOXD_PORT=str(_free_port()),
            # The kernel counts some limits by uid: not those of another daemon on this host.
            SANDBOXD_FIRST_UID=str(FIRST_UID + next(_uid_ranges) * UIDS),
            **{f"SANDBOXD_{name.upper()}": value for name, value in settings.items()},
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.base_url = f"http://127.0.0.1:{self._env['SANDBOXD_PORT']}"
        self.log = self.root / "sandboxd.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def open(self) -> Api:
        made = subprocess.run(
            [sys.executable, "-m", "sandboxd", "create-key", "--name", "bench"],
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_S,
        )
        if made.returncode:
            raise BenchError(f"the daemon made no key: {made.stderr}")
        self.start()
        return Api(self.base_url, made.stdout.strip())

    def start(self) -> None:
        """Starts the process, again on the same state, and waits until it serves."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sandboxd", "serve"],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is ours: the daemon ends when we have stopped its sandboxes.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the daemon does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(STOP_S)

    def close(self) -> None:
        # A second Ctrl-C must not leave half of it behind.
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
        try:
            self._close()
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)

    def _close(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.stop()
        self.stop(signal.SIGKILL)
        installation = self._state / "installation"
        if installation.exists():
            remove_containers(f"sandboxd.owner={installation.read_text().strip()}")
        for line in Path("/proc/mounts").read_text().splitlines():
            if line.split()[1].startswith(f"{self.root}/"):
                subprocess.run(["umount", "--lazy", line.split()[1]], check=True)
        shutil.rmtree(self.root)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


def remove_containers(label: str) -> None:
    """Removes all containers with this label."""
    found = docker("ps", "--all", "--quiet", "--filter", f"label={label}").split()
    if found:
        docker("rm", "--force", "--volumes", *found)


def docker(*arguments: str) -> str:
    """The output of the docker command; BenchError when it fails."""
    url = os.environ.get("SANDBOXD_DOCKER_URL")
    done = subprocess.run(
        ["docker", *(["--host", url] if url else []), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode:
        raise BenchError(f"docker {' '.join(arguments[:3])} ...: {done.stderr.strip()[-500:]}")
    return done.stdout


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
