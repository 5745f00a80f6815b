"""Terminals for commands. The kernel gives one to whoever opens it, and only its owner can open it again by
name, as tmux and script do: so it is opened with the rights of who will use it.
PID 1 takes those for the moment: no child that is already the tenant need be asked for it, nor waited for.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from typing import Any, Tuple

from e80_agent.tenant import rights_of

MAX_SIDE = 1000

# Not in the module `termios` of Python 3.8.
_TIOCSPTLCK = 0x40045431
_TIOCGPTN = 0x80045430
_IUTF8 = 0o40000


class Terminal:
    """The program's end of a terminal, held open so that the other end sees no hangup while it may still be
    opened again; see `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def resize(self, rows: int, cols: int) -> None:
        """The kernel tells the foreground processes by SIGWINCH."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def duplicate(self) -> int:
        return os.dup(self._fd)

    def close(self) -> None:
        """After that, reading the other end finds its end. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_terminal(uid: int, size: Tuple[int, int]) -> Tuple[int, Terminal]:
    """Our end of a new terminal, which does not block, and the program's, which belongs to `uid`. Raises
    OSError."""
    with rights_of(uid):
        master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
            (number,) = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))
            terminal = Terminal(os.open("/dev/pts/%d" % number, os.O_RDWR | os.O_NOCTTY))
        except OSError:
            os.close(master)
            raise
    try:
        _expect_utf8(terminal)
        terminal.resize(*size)
    except OSError:
        os.close(master)
        terminal.close()
        raise
    return master, terminal


def check_size(rows: Any, cols: Any) -> Tuple[int, int]:
    """Raises ValueError for what is no size of a terminal."""
    for side in (rows, cols):
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MAX_SIDE:
            raise ValueError("a terminal of %r rows and %r columns" % (rows, cols))
    return rows, cols


def take_as_controlling(fd: int) -> None:
    """For a child that has begun a session of its own: Ctrl-C and job control work from here on."""
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def _expect_utf8(terminal: Terminal) -> None:
    """So that the kernel's own line editing rubs out characters, not bytes."""
    fd = terminal.duplicate()
    try:
        modes = termios.tcgetattr(fd)
        modes[0] |= _IUTF8
        termios.tcsetattr(fd, termios.TCSANOW, modes)
    except termios.error as error:
        raise OSError(*error.args) from error
    finally:
        os.close(fd)
