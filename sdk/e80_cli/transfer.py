"""Copying files and folders to and from a sandbox: where things go, and how far they are. What arrived in
part never stands under its name; the SDK sees to that."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e80_sdk import transfers
from e80_sdk.errors import E80Error, NotFoundError
from e80_sdk.sources import Source

from e80_cli.output import printable
from e80_cli.places import Remote
from e80_cli.stdin import pieces

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80
    from e80_sdk.records import FileEntry

OnProgress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Copied:
    """Where it went, and how much it was: bytes of a file, or entries of a folder."""

    path: str
    size: int | None = None
    entries: int | None = None


async def upload(client: AsyncEighty80, source: str, target: Remote, *, recursive: bool) -> Copied:
    """Send a local file (`-` for stdin), or with `recursive` a folder; the server puts a file in place when
    all of it has arrived."""
    name = "stdin" if source == "-" else os.path.basename(source.rstrip("/")) or "."
    folder = _is_folder(source)
    if folder and not recursive:
        raise E80Error(f"{source}: Is a directory; copy it with -r", code="local_file")
    with _local_errors(), ExitStack() as stack:
        # Opened before a request is made, to say what cannot be read; and once, because it may be a pipe.
        file = None if folder or source == "-" else stack.enter_context(open(source, "rb"))  # noqa: ASYNC230
        path = await _remote_place(client, target, name)
        advance = stack.enter_context(progress(name))
        if folder:
            count = await transfers.upload_dir(client.api.files, target.sandbox_id, source, path, advance)
            return Copied(path, entries=count)
        body = (
            Source(lambda: pieces(0), None, advance, once="stdin")
            if file is None
            else Source.of(file, advance)
        )
        return Copied(path, size=await client.api.files.write(target.sandbox_id, path, body))


async def download(client: AsyncEighty80, source: Remote, target: str, *, recursive: bool) -> Copied:
    """Fetch a file (to `-` for stdout), or with `recursive` a folder. It appears under its name when all of
    it has arrived."""
    name = source.path.rstrip("/").rsplit("/", 1)[-1]
    files = client.api.files
    entry = await _found(client, source) if recursive else None
    with _local_errors(target), progress(name or "/") as advance:
        if entry is not None and entry.type == "directory":
            if target == "-":
                raise E80Error("a folder cannot go to stdout: name a folder", code="is_directory")
            path = _local_place(target, name)
            count = await transfers.download_dir(files, source.sandbox_id, source.path, path, advance)
            return Copied(path, entries=count)
        if target == "-":
            size = await transfers.download(files, source.sandbox_id, source.path, sys.stdout.buffer, advance)
            return Copied("-", size=size)
        path = _local_place(target, name)
        size = await transfers.download(files, source.sandbox_id, source.path, path, advance)
        return Copied(path, size=size)


@contextmanager
def progress(name: str) -> Iterator[OnProgress | None]:
    """A progress bar on stderr, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
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
        task = bars.add_task(printable(name), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


async def _remote_place(client: AsyncEighty80, target: Remote, name: str) -> str:
    """The path that it gets: below the target where that is a folder, as `cp` does it."""
    if not target.path or target.path.endswith("/"):
        return target.path + name
    found = await _found(client, target)
    return f"{target.path}/{name}" if found is not None and found.type == "directory" else target.path


async def _found(client: AsyncEighty80, place: Remote) -> FileEntry | None:
    try:
        return await client.api.files.stat(place.sandbox_id, place.path or ".", follow=True)
    except NotFoundError as error:
        if error.code == "file_not_found":
            return None
        raise


def _local_place(target: str, name: str) -> str:
    return os.path.join(target, name) if target.endswith("/") or os.path.isdir(target) else target


def _is_folder(source: str) -> bool:
    return source != "-" and os.path.isdir(source)


@contextmanager
def _local_errors(place: str | None = None) -> Iterator[None]:
    """What fails on this machine is said of `place`, or of the file that the error names."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads our stdout; that is no error of a copy
    except OSError as exc:
        named = os.fsdecode(exc.filename) if isinstance(exc.filename, str | bytes) else "here"
        where = printable(named if place is None else place)
        raise E80Error(f"{where}: {exc.strerror or exc}", code="local_file") from exc
