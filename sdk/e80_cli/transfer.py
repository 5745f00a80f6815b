"""Copying a file to or from a sandbox: in pieces, with progress, and never half a file under the final
name."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from e80_sdk.errors import E80Error

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80

CHUNK_BYTES = 256 * 1024
_REMOTE = re.compile(r"(sbx_[A-Za-z0-9_-]+):(.*)", re.DOTALL)
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Remote:
    """`ID:PATH`."""

    sandbox_id: str
    path: str


def parse_place(text: str) -> Remote | None:
    """`ID:PATH`, or None for a local path."""
    found = _REMOTE.fullmatch(text)
    return Remote(found[1], found[2]) if found else None


async def upload(client: AsyncEighty80, source: str, target: Remote) -> tuple[str, int]:
    """Send a local file (`-` for stdin); the server puts it in place when all of it has arrived."""
    name = "stdin" if source == "-" else os.path.basename(source)
    path = target.path + name if target.path.endswith("/") or not target.path else target.path
    with _opened(source) as file:
        size = os.fstat(file.fileno()).st_size if source != "-" else None
        with progress(name, size) as advance:
            body = _Body(file, source, advance)
            sent = await client.api.write_file(target.sandbox_id, path, body.again)
    return path, sent


async def download(client: AsyncEighty80, source: Remote, target: str) -> tuple[str, int]:
    """Fetch a file (to `-` for stdout). It appears under its name when all of it has arrived."""
    name = source.path.rstrip("/").rsplit("/", 1)[-1]
    async with client.api.open_file(source.sandbox_id, source.path) as (size, chunks):
        with progress(name, size) as advance:
            if target == "-":
                return "-", await _drain(chunks, sys.stdout.buffer, advance, size)
            path = _place(target, name)
            received = await _replace(path, chunks, advance, size)
    return path, received


def _place(target: str, name: str) -> str:
    return os.path.join(target, name) if target.endswith("/") or os.path.isdir(target) else target


@contextmanager
def progress(name: str, size: int | None) -> Iterator[Advance]:
    """A progress bar on stderr, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield _ignore
        return
    # Loading rich takes 50 ms, which a pipe has no use for.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name, total=size)
        yield lambda count: bars.advance(task, count)


def _ignore(count: int) -> None:
    """The progress of a copy that nobody watches."""


async def _replace(path: str, chunks: AsyncGenerator[bytes], advance: Advance, size: int | None) -> int:
    try:
        handle, temporary = tempfile.mkstemp(
            dir=os.path.dirname(path) or ".", prefix=f".{os.path.basename(path)}.", suffix=".part"
        )
    except OSError as exc:
        raise _local(path, exc) from exc
    try:
        with os.fdopen(handle, "wb") as file:
            received = await _drain(chunks, file, advance, size)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as exc:
        raise _local(path, exc) from exc
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return received


async def _drain(chunks: AsyncGenerator[bytes], file: BinaryIO, advance: Advance, size: int | None) -> int:
    received = 0
    async for chunk in chunks:
        received += file.write(chunk)
        advance(len(chunk))
    file.flush()
    if size is not None and received != size:
        raise E80Error(f"{received} bytes of {size} arrived", code="copy_incomplete")
    return received


class _Body:
    """A file as the body of a request that may have to be sent again."""

    def __init__(self, file: BinaryIO, source: str, advance: Advance) -> None:
        self._file = file
        self._source = source
        self._advance = advance
        # Read here, so that a directory or an unreadable file fails before a request.
        self._first = _read(file, source)
        self._begun = False

    def again(self) -> AsyncGenerator[bytes]:
        """The file from its start."""
        if self._begun:
            # What is gone from a pipe cannot be sent again, and the rest alone would look like the file.
            if not self._file.seekable():
                raise E80Error("stdin cannot be read a second time; copy a file instead", code="local_file")
            self._file.seek(len(self._first))
        return self._pieces()

    async def _pieces(self) -> AsyncGenerator[bytes]:
        self._begun = True
        piece = self._first
        while piece:
            yield piece
            self._advance(len(piece))
            piece = _read(self._file, self._source)


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(source, "rb"))
        except OSError as exc:
            raise _local(source, exc) from exc
        yield file


def _read(file: BinaryIO, source: str) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except OSError as exc:
        raise _local(source, exc) from exc


def _local(path: str, exc: OSError) -> E80Error:
    return E80Error(f"{path}: {exc.strerror or exc}", code="local_file")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
