"""A person at a terminal, for tests."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 30.0
ENTER = b"\r"
CTRL_C = b"\x03"
CTRL_D = b"\x04"
ESCAPE = b"\x1b"


class Session:
    """A command on a terminal of its own, with somebody who types and looks."""

    def __init__(
        self, command: Sequence[str], env: dict[str, str], folder: Path, rows: int, cols: int
    ) -> None:
        self._leader, follower = pty.openpty()
        self.resize(rows, cols)
        self.modes_before = termios.tcgetattr(self._leader)
        self.process = subprocess.Popen(
            command,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=env,
            cwd=folder,
            start_new_session=True,
            # The kernel tells of a new size, and of the end of a line, only those whose terminal it is.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        # Kept open, so that the terminal's modes can be looked at afterwards.
        self._follower = follower
        self.shown = b""

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self._follower)
        os.close(self._leader)

    def type(self, *keys: bytes | str) -> None:
        for key in keys:
            os.write(self._leader, key.encode() if isinstance(key, str) else key)

    def see(self, *wanted: bytes | str) -> bytes:
        """What is shown up to the end of each of these, in this order; it is not seen again."""
        seen = b""
        for text in wanted:
            sought = text.encode() if isinstance(text, str) else text
            deadline = time.monotonic() + PATIENCE_S
            while sought not in self.shown:
                assert time.monotonic() < deadline, f"{sought!r} is not in {self.shown!r}"
                assert self._more() or self.process.poll() is None, f"{sought!r} is not in {self.shown!r}"
            head, _, self.shown = self.shown.partition(sought)
            seen += head + sought
        return seen

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def ended(self) -> int:
        """The exit code, when it has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end: {self.shown!r}"
            self._more()
        while self._more():
            pass
        return self.process.returncode

    @property
    def is_raw(self) -> bool:
        return not self._modes()[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    @property
    def is_as_before(self) -> bool:
        return self._modes() == self.modes_before

    def _modes(self) -> list[object]:
        return list(termios.tcgetattr(self._leader))

    def _more(self) -> bool:
        if not select.select([self._leader], [], [], 0.05)[0]:
            return False
        self.shown += os.read(self._leader, 65536)
        return True
