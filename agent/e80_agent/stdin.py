"""What a program reads: bytes on their way into its pipe or terminal, bounded, counted from the first one."""

from __future__ import annotations

import collections
import errno
import os
from typing import Callable, Deque, List, Optional

from e80_agent.loop import Loop

BUFFER = 256 * 1024
_WRITE_SIZE = 65536
# Ctrl-D, which ends the input of a terminal: at the beginning of a line, or else the line first.
_END_OF_LINE, _END = b"\x04\x04", b"\x04"


class Stdin:
    """The input of one exec. `size` counts what was taken in all, `open` whether more may come."""

    def __init__(self, data: bytes, stays_open: bool) -> None:
        self.size = len(data)
        self.open = stays_open
        self._chunks: Deque[memoryview] = collections.deque([memoryview(data)] if data else [])
        self._buffered = len(data)
        self._last = data[-1:]
        self._loop: Optional[Loop] = None
        self._fd: Optional[int] = None
        self._is_terminal = False
        self._waiting: List[Callable[[], None]] = []

    @property
    def wanted(self) -> bool:
        """Whether there is or may be anything to read."""
        return self.open or self._buffered > 0

    def own(self, fd: int, is_terminal: bool = False) -> None:
        """The descriptor to write to, which must not block; it is closed at the end of the input."""
        self._fd = fd
        self._is_terminal = is_terminal

    def start(self, loop: Loop) -> None:
        """The program is there: from here on it is fed."""
        self._loop = loop
        self._pump()

    def take(self, data: bytes) -> int:
        """Takes what there is room for, and returns how much that was."""
        data = data[: max(0, BUFFER - self._buffered)]
        if data:
            self._chunks.append(memoryview(data))
            self._buffered += len(data)
            self.size += len(data)
            self._last = data[-1:]
            self._pump()
        return len(data)

    def finish(self) -> None:
        """Nothing follows: the program sees the end when it has read all that was taken. May be called
        twice."""
        if not self.open:
            return
        self.open = False
        if self._is_terminal:
            # A terminal is not closed: the program writes to it, too.
            end = _END if self._last in (b"", b"\n", b"\r") else _END_OF_LINE
            self._chunks.append(memoryview(end))
            self._buffered += len(end)
        self._pump()
        self._wake()

    def wait(self, callback: Callable[[], None]) -> None:
        """Calls back once, when there is room again or nothing more can come."""
        self._waiting.append(callback)

    def stop_waiting(self, callback: Callable[[], None]) -> None:
        if callback in self._waiting:
            self._waiting.remove(callback)

    def close(self) -> None:
        """The program has ended, or reads no more."""
        self.open = False
        self._chunks.clear()
        self._buffered = 0
        self._release()
        self._wake()

    def _pump(self) -> None:
        if self._loop is None or self._fd is None:
            return
        if self._buffered:
            self._loop.set_writer(self._fd, self._feed)
        elif self.open:
            self._loop.set_writer(self._fd, None)
        else:
            self._release()

    def _feed(self) -> None:
        assert self._fd is not None
        try:
            written = os.write(self._fd, self._chunks[0][:_WRITE_SIZE])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.close()
            return
        self._buffered -= written
        self._chunks[0] = self._chunks[0][written:]
        if not self._chunks[0].nbytes:
            self._chunks.popleft()
        self._pump()
        if self._buffered < BUFFER:
            self._wake()

    def _release(self) -> None:
        if self._fd is None:
            return
        if self._loop is not None:
            self._loop.forget(self._fd)
        os.close(self._fd)
        self._fd = None

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()
