"""What is to be sent as a body: bytes, text, files, iterators. Read in pieces, and again where that is
possible."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, cast, runtime_checkable

from e80_sdk.errors import E80Error

PIECE = 256 * 1024
OnProgress = Callable[[int, int | None], None]
"""Called with the bytes that are through, and how many there are in all (None: nobody knows)."""


@runtime_checkable
class Readable(Protocol):
    """A file that is open for reading bytes."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most so many; none at the end."""
        ...


Data = (
    bytes
    | bytearray
    | memoryview
    | str
    | os.PathLike[str]
    | Readable
    | Iterable[bytes]
    | AsyncIterable[bytes]
)
"""What can be written to a file: bytes, text (as UTF-8), a path of this machine, an open file, or pieces."""


class Source:
    """A body, with how much of it there is where that is known, and who wants to know how far it is."""

    def __init__(
        self,
        make: Callable[[], AsyncIterable[bytes]],
        size: int | None = None,
        progress: OnProgress | None = None,
        *,
        about: int | None = None,
        once: str | None = None,
    ) -> None:
        """What `make` gives are the pieces from the start.

        Args:
            make: Called for each attempt.
            size: How many bytes there are, exactly.
            progress: Called after each piece.
            about: How many bytes there are, for `progress` alone.
            once: What it is that cannot be read again, if so.
        """
        self.size = size
        self._make = make
        self._total = size if about is None else about
        self._progress = progress
        self._once = once
        self._made = False

    @classmethod
    def of(cls, data: Data, progress: OnProgress | None = None) -> Source:
        """The source for what a caller gave.

        Raises:
            TypeError: It is nothing that bytes come out of.
            OSError: The file cannot be read.
        """
        if isinstance(data, str):
            data = data.encode()
        if isinstance(data, bytes | bytearray | memoryview):
            raw = bytes(data)
            return cls(lambda: _from_bytes(raw), len(raw), progress)
        if isinstance(data, os.PathLike):
            path = Path(data)
            return cls(lambda: _from_path(path), path.stat().st_size, progress)
        if isinstance(data, Readable):
            return cls._of_file(data, progress)
        if isinstance(data, AsyncIterable):
            given = data
            return cls(lambda: given, None, progress, once="this iterator")
        if isinstance(data, Iterable):
            items = iter(data)
            return cls(lambda: in_threads(items), None, progress, once="this iterator")
        raise TypeError(
            "data must be bytes, text, a path (pathlib.Path), a file that is open for bytes, or an iterator "
            f"of bytes, not {type(data).__name__}"
        )

    @classmethod
    def _of_file(cls, file: Readable, progress: OnProgress | None) -> Source:
        seekable = getattr(file, "seekable", None)
        if seekable is None or not seekable():
            return cls(lambda: _from_file(file), None, progress, once="this file")
        begin: int = file.tell()  # type: ignore[attr-defined]  # what can seek can tell
        end: int = file.seek(0, os.SEEK_END)  # type: ignore[attr-defined]
        file.seek(begin)  # type: ignore[attr-defined]

        def again() -> AsyncIterable[bytes]:
            file.seek(begin)  # type: ignore[attr-defined]
            return _from_file(file)

        return cls(again, end - begin, progress)

    def chunks(self) -> AsyncGenerator[bytes]:
        """The pieces from the start.

        Raises:
            E80Error: They were read before, and cannot be read again.
        """
        if self._made and self._once is not None:
            raise E80Error(f"{self._once} cannot be read a second time", code="source_used")
        self._made = True
        return self._counted(self._make())

    async def _counted(self, pieces: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
        done = 0
        async for piece in pieces:
            if not isinstance(piece, bytes | bytearray | memoryview):
                raise TypeError(f"a file is written from bytes, not from {type(piece).__name__}")
            yield bytes(piece)
            done += len(piece)
            if self._progress is not None:
                self._progress(done, self._total)


async def in_threads(items: Iterator[bytes]) -> AsyncGenerator[bytes]:
    """The items of an iterator that may block, each made in a thread."""
    end = object()
    while (item := await asyncio.to_thread(next, items, end)) is not end:
        yield cast("bytes", item)


async def _from_bytes(raw: bytes) -> AsyncGenerator[bytes]:
    for begin in range(0, len(raw), PIECE):
        yield raw[begin : begin + PIECE]


async def _from_path(path: Path) -> AsyncGenerator[bytes]:
    file: BinaryIO = await asyncio.to_thread(path.open, "rb")
    try:
        async for piece in _from_file(file):
            yield piece
    finally:
        file.close()


async def _from_file(file: Readable) -> AsyncGenerator[bytes]:
    while piece := await asyncio.to_thread(file.read, PIECE):
        yield piece
