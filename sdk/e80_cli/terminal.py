"""This side of an interactive program: the terminal, raw while the program has it, and then as it was."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

ROWS, COLS = 24, 80
LARGEST = 1000
# What a program that ended in the middle may leave switched on: the other screen, a hidden cursor, the mouse,
# bracketed paste, the keypad's mode, colours.
_CALM = b"\x1b[?1047l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1l\x1b>\x1b[0m\r\n"


class Terminal:
    """The terminal that stdin is."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._orderly = False

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns, within what the server takes."""
        try:
            cols, rows = os.get_terminal_size(self._fd)
        except OSError:
            cols, rows = 0, 0
        return min(rows or ROWS, LARGEST), min(cols or COLS, LARGEST)

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Every key is a byte of input, Ctrl-C too. Whatever ends the block, the terminal is as it was."""
        before = termios.tcgetattr(self._fd)
        try:
            tty.setraw(self._fd, termios.TCSANOW)
            yield
        finally:
            # A terminal that was closed has no state to restore. Not TCSADRAIN: output may be held by Ctrl-S.
            with suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, before)
            if not self._orderly and os.isatty(sys.stdout.fileno()):
                with suppress(OSError):
                    os.write(sys.stdout.fileno(), _CALM)

    def program_ended(self) -> None:
        """The program has ended by itself, and left the terminal as it wanted to."""
        self._orderly = True

    async def watch_size(self, tell: Callable[[int, int], Awaitable[None]]) -> None:
        """Call `tell` with rows and columns whenever they have changed, one call at a time."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        told = self.size
        loop.add_signal_handler(signal.SIGWINCH, changed.set)
        try:
            while True:
                if (now := self.size) != told:
                    await tell(*now)
                    told = now
                    continue
                await changed.wait()
                changed.clear()
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)


def is_raw(fd: int = 0) -> bool:
    """Whether it is a terminal on which Ctrl-C is a key like others."""
    try:
        return not termios.tcgetattr(fd)[3] & termios.ISIG
    except termios.error:
        return False


class Escape:
    """Finds `~.` at the beginning of a typed line, the way out when nobody answers; `~~` is one `~`."""

    def __init__(self) -> None:
        self._at_start = True
        self._held = False

    def typed(self, data: bytes) -> tuple[bytes, bool]:
        """What of it is for the program, and whether the user wants out."""
        out = bytearray()
        for byte in data:
            if self._held:
                self._held = False
                if byte == ord("."):
                    return bytes(out), True
                out.append(ord("~"))
                if byte == ord("~"):
                    self._at_start = False
                    continue
            elif self._at_start and byte == ord("~"):
                self._held = True
                continue
            out.append(byte)
            self._at_start = byte in b"\r\n"
        return bytes(out), False
