"""Files and folders between this machine and a sandbox; what arrived in part never stands under its name."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from e80_sdk.archives import pack, packed_size, unpack
from e80_sdk.errors import ConflictError
from e80_sdk.file_api import FileApi
from e80_sdk.sources import OnProgress, Source, in_threads


async def download(
    files: FileApi,
    sandbox_id: str,
    path: str,
    target: str | os.PathLike[str] | BinaryIO,
    progress: OnProgress | None = None,
) -> int:
    """Fetch a file of a sandbox; gives its size.

    Args:
        files: The files of sandboxes.
        sandbox_id: The sandbox.
        path: The file there.
        target: Where to: a path (in a folder that is there the file gets its own name) or a file that is open
            for writing bytes.
        progress: Called after each piece.

    Raises:
        ConflictError: The connection broke, the file has changed since, and `target` cannot go back.
        OSError: It cannot be written here.
    """
    if not isinstance(target, str | os.PathLike):
        return await _into_file(files, sandbox_id, path, target, progress)
    place = await asyncio.to_thread(_place, Path(target), path)
    partly = place.parent / f".{place.name}.{secrets.token_hex(4)}.part"
    try:
        with partly.open("xb") as file:
            size = await _into_file(files, sandbox_id, path, file, progress)
        os.replace(partly, place)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partly)
    return size


async def upload_dir(
    files: FileApi,
    sandbox_id: str,
    folder: str | os.PathLike[str],
    path: str,
    progress: OnProgress | None = None,
) -> int:
    """Send a folder of this machine, into a folder of the sandbox; gives how many entries it had."""
    local = Path(folder)
    size = None if progress is None else await asyncio.to_thread(packed_size, local)
    return await files.unpack(
        sandbox_id, path, Source(lambda: in_threads(pack(local)), progress=progress, about=size)
    )


async def download_dir(
    files: FileApi,
    sandbox_id: str,
    path: str,
    folder: str | os.PathLike[str],
    progress: OnProgress | None = None,
) -> int:
    """Fetch a folder of a sandbox into a folder of this machine; gives how many entries it had.

    Raises:
        BadArchiveError: Something in it would land outside of the folder.
        OSError: It cannot be written here.
    """
    return await files.archive(sandbox_id, path, partial(_unpacked, Path(folder), progress))


def _place(target: Path, path: str) -> Path:
    return target / path.rstrip("/").rsplit("/", 1)[-1] if target.is_dir() else target


async def _into_file(
    files: FileApi, sandbox_id: str, path: str, file: BinaryIO, progress: OnProgress | None
) -> int:
    begin = file.tell() if file.seekable() else None
    done, total, begun = 0, None, False

    def start(size: int | None) -> None:
        nonlocal done, total, begun
        if done and begin is None:
            raise ConflictError(
                f"the connection broke while {path!r} was read, and the file has changed since",
                code="file_changed",
            )
        if begun and begin is not None:
            file.seek(begin)
            file.truncate()
        done, total, begun = 0, size, True

    async with aclosing(files.download(sandbox_id, path, start)) as chunks:
        async for chunk in chunks:
            await asyncio.to_thread(file.write, chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    await asyncio.to_thread(file.flush)
    return done


async def _unpacked(target: Path, progress: OnProgress | None, chunks: AsyncGenerator[bytes]) -> int:
    reader = _ThreadReader(chunks, progress)
    unpacking = asyncio.ensure_future(asyncio.to_thread(unpack, reader, target))
    try:
        return await asyncio.shield(unpacking)
    except asyncio.CancelledError:
        reader.stop()
        await asyncio.wait([unpacking])
        raise


class _ThreadReader:
    """An asynchronous stream as a file for a thread."""

    def __init__(self, chunks: AsyncGenerator[bytes], progress: OnProgress | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks = chunks
        self._progress = progress
        self._buffer = b""
        self._done = 0
        self._stopped = False
        self._waiting: asyncio.Task[bytes] | None = None

    def stop(self) -> None:
        """Let the thread come to its end; from the loop."""
        self._stopped = True
        if self._waiting is not None:
            self._waiting.cancel()

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most so many; none at the end."""
        while len(self._buffer) < size:
            chunk = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
            if not chunk:
                break
            self._buffer += chunk
        made, self._buffer = self._buffer[:size], self._buffer[size:]
        return made

    async def _next(self) -> bytes:
        if self._stopped:
            raise OSError("nobody waits for this archive any more")
        self._waiting = asyncio.ensure_future(anext(self._chunks, b""))
        chunk = await self._waiting
        self._done += len(chunk)
        if chunk and self._progress is not None:
            self._progress(self._done, None)
        return chunk
