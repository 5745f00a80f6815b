"""Runs the command as users do: in this process where that is enough (a tenth of the time), in one of its own
for signals, pipes and terminals."""

import io
import os
import pty
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from e80_cli.main import run

from tests.e80_cli.person import Session
from tests.e80_sdk.fake_server import FakeServer, Switch, fresh_fake, serving

COMMAND = [sys.executable, "-c", "from e80_cli.main import main; main()"]


@dataclass
class Done:
    """How a command ended and what it printed."""

    returncode: int
    stdout: bytes
    stderr: bytes


@dataclass
class Cli:
    """The command in an environment of its own."""

    env: dict[str, str]
    folder: Path

    def __call__(self, *words: str, stdin: bytes | None = b"", **env: str) -> Done:
        streams = {
            name: io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for name in ("stdout", "stderr")
        }
        with (
            _stdin(stdin) as given,
            mock.patch.dict(os.environ, self.env | env, clear=True),
            mock.patch.multiple(sys, stdin=given, **streams),
            chdir(self.folder),
        ):
            code = run(words)
        return Done(code, *(streams[name].buffer.getvalue() for name in ("stdout", "stderr")))

    def start(self, *words: str, **options: object) -> "subprocess.Popen[bytes]":
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen([*COMMAND, *words], env=self.env, cwd=self.folder, **pipes)  # type: ignore[call-overload]  # options of Popen

    def session(self, *words: str, rows: int = 24, cols: int = 80, **env: str) -> Session:
        """Run it on a terminal, with somebody who types."""
        return Session([*COMMAND, *words], self.env | {"TERM": "xterm"} | env, self.folder, rows, cols)

    def on_terminal(
        self, *words: str, answer: bytes = b"", hidden: bool = False, **env: str
    ) -> tuple[int, str]:
        """Run it on a terminal; gives the exit code and all that the terminal showed."""
        leader, follower = pty.openpty()
        program = subprocess.Popen(
            [*COMMAND, *words],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=self.env | {"TERM": "xterm", "COLUMNS": "100"} | env,
            cwd=self.folder,
            start_new_session=True,
        )
        os.close(follower)
        shown = b""
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # EIO: the last user of the terminal is gone
                break
            if not data:
                break
            shown += data
            if answer and shown.rstrip().endswith(b":"):
                while hidden and termios.tcgetattr(leader)[3] & termios.ECHO:
                    time.sleep(0.005)  # until echo is off, what is typed is thrown away
                os.write(leader, answer)
                answer = b""
        os.close(leader)
        return program.wait(timeout=60), shown.decode()


@contextmanager
def _stdin(content: bytes | None) -> Iterator[io.TextIOWrapper]:
    """Stdin of this process, for those who read it by its number, too."""
    before = os.dup(0)
    with tempfile.TemporaryFile() as file:
        file.write(content or b"")
        file.seek(0)
        os.dup2(file.fileno(), 0)
    try:
        with open(0, encoding="utf-8", closefd=False) as text:
            yield text
    finally:
        os.dup2(before, 0)
        os.close(before)


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, Switch]]:
    with serving() as running:
        yield running


@pytest.fixture
def fake(server: tuple[str, Switch]) -> Iterator[FakeServer]:
    with fresh_fake(*server) as made:
        yield made


@pytest.fixture
def cli_alone(tmp_path: Path) -> Cli:
    """The command on a machine where nothing is set up."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("_8080", "XDG_"))}
    home = tmp_path / "home"
    home.mkdir()
    return Cli(kept | {"HOME": str(home), "_8080_CONFIG_DIR": str(home / "8080")}, tmp_path)


@pytest.fixture
def cli(cli_alone: Cli, fake: FakeServer) -> Cli:
    """The command, logged in to the fake server."""
    cli_alone.env |= {"_8080_BASE_URL": fake.base_url, "_8080_API_KEY": fake.api_key}
    return cli_alone
