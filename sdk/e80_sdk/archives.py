"""Folders as tar archives: packed from this machine's disk, and unpacked onto it.

An archive comes out of a sandbox, so nothing in it is believed: each entry lands below its folder or is
refused.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

from e80_sdk.errors import BadArchiveError, E80Error
from e80_sdk.sources import Readable

PIECE = 256 * 1024
BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1024 * 1024
"""tarfile holds names, and other headers of an entry, in memory."""
MAX_LINKS = 100_000
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def pack(folder: Path) -> Iterator[bytes]:
    """A folder as a tar archive, piece by piece: files, folders and symbolic links, by names relative to it.
    Sockets, pipes and devices are left out.

    Raises:
        E80Error: A file changed its size while it was read.
        OSError: Something cannot be read.
    """
    buffer = bytearray()
    for piece in _entries(folder):
        buffer += piece
        if len(buffer) >= PIECE:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer) + bytes(2 * BLOCK)


def packed_size(folder: Path) -> int:
    """How big `pack` will make it, but for names that are very long."""
    size = 2 * BLOCK
    for path, _ in _walk(folder):
        facts = path.lstat()
        size += BLOCK + (_padded(facts.st_size) if stat.S_ISREG(facts.st_mode) else 0)
    return size


def unpack(archive: Readable, target: Path) -> int:
    """Unpack a tar archive into a folder; gives how many entries it had.

    All of it appears when all of it has arrived: what is in the folder already is replaced where the archive
    has the same name, and stays otherwise.

    Raises:
        BadArchiveError: It is broken or cut short, or an entry would land outside of the folder.
        OSError: Something cannot be written.
    """
    target = Path(os.path.abspath(target))  # its parent must be named
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
    partial.mkdir()
    try:
        entries = _Unpacking(partial).run(archive)
        _place(partial, target)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(partial)
    return entries


def _entries(folder: Path) -> Iterator[bytes]:
    for path, name in _walk(folder):
        facts = path.lstat()
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = facts.st_mode & 0o777, int(facts.st_mtime)
        if stat.S_ISREG(facts.st_mode):
            yield from _file(path, info)
            continue
        if stat.S_ISDIR(facts.st_mode):
            info.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(facts.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        else:
            continue
        yield _header(info)


def _file(path: Path, info: tarfile.TarInfo) -> Iterator[bytes]:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        info.size = left = os.fstat(file.fileno()).st_size
        yield _header(info)
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise E80Error(f"{path} changed while it was read", code="file_changed")
            left -= len(piece)
            yield piece
        yield bytes(_padded(info.size) - info.size)


def _header(info: tarfile.TarInfo) -> bytes:
    # GNU's format takes names as the bytes that they are.
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Everything below a folder with its relative name, a folder before what is in it."""
    waiting = [(folder, "")]
    while waiting:
        current, prefix = waiting.pop()
        for name in sorted(os.listdir(current)):
            path = current / name
            yield path, f"{prefix}{name}"
            if path.is_dir() and not path.is_symlink():
                waiting.append((path, f"{prefix}{name}/"))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class _Info(tarfile.TarInfo):
    """A header that is bounded, and that tells an archive's end from its being cut short."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _LONG_HEADERS and self.size > MAX_HEADER_BYTES:
            raise BadArchiveError(f"the archive holds a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]  # not in the stubs

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Info:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
            assert isinstance(archive, _Archive)
            archive.ended = True
            raise


class _Archive(tarfile.TarFile):
    tarinfo = _Info
    members: list[tarfile.TarInfo]
    ended = False


class _Unpacking:
    """One archive on its way into a folder that is new and nobody else's.

    Links are made when everything else is there, so that no entry is written through one.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._links: dict[tuple[str, ...], str] = {}

    def run(self, stream: Readable) -> int:
        entries = 0
        try:
            # The stubs want a file that can be written, too.
            source = cast("IO[bytes]", stream)
            with _Archive.open(
                fileobj=source, mode="r|", encoding="utf-8", errors="surrogateescape"
            ) as archive:
                for entry in archive:
                    archive.members = []  # it would remember them all
                    self._take(archive, entry)
                    entries += 1
                if not archive.ended:
                    raise BadArchiveError("the archive is broken or cut short")
        except tarfile.TarError as exc:
            raise BadArchiveError(f"the archive cannot be read: {exc}") from exc
        for parts, leads_to in self._links.items():
            path = self._made(parts)
            path.unlink(missing_ok=True)
            os.symlink(leads_to, path)
        return entries

    def _take(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        parts = _parts(entry.name)
        if entry.isdir():
            self._root.joinpath(*parts).mkdir(parents=True, exist_ok=True)
            if parts:
                self._root.joinpath(*parts).chmod(entry.mode & 0o777 | 0o700)
        elif not parts:
            raise BadArchiveError(f"the archive holds {entry.name!r}, which is no folder")
        elif entry.isreg() and not entry.issparse():
            content = archive.extractfile(entry)
            assert content is not None
            with content:
                self._write(content, parts, entry)
        elif entry.issym():
            _check_link(parts, entry.linkname)
            self._links[parts] = entry.linkname
            if len(self._links) > MAX_LINKS:
                raise BadArchiveError(f"the archive holds more than {MAX_LINKS} links")
        else:
            raise BadArchiveError(f"{entry.name!r} in the archive is no file, folder or symbolic link")

    def _write(self, content: IO[bytes], parts: tuple[str, ...], entry: tarfile.TarInfo) -> None:
        self._links.pop(parts, None)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(self._made(parts), flags, 0o600), "wb") as file:
            shutil.copyfileobj(content, file, PIECE)
            os.fchmod(file.fileno(), entry.mode & 0o777)
            file.flush()
            os.utime(file.fileno(), (entry.mtime, entry.mtime))

    def _made(self, parts: tuple[str, ...]) -> Path:
        path = self._root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _parts(name: str) -> tuple[str, ...]:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise BadArchiveError(f"{name!r:.200} in the archive would land outside of its folder")
    return tuple(part for part in parts if part not in ("", "."))


def _check_link(parts: tuple[str, ...], leads_to: str) -> None:
    """A link leads to where it is or below, after going up at most to the folder. Going up later would be
    from where another link leads."""
    steps = [step for step in leads_to.split("/") if step not in ("", ".")]
    up = next((n for n, step in enumerate(steps) if step != ".."), len(steps))
    if leads_to.startswith("/") or not leads_to or up > len(parts) - 1 or ".." in steps[up:]:
        raise BadArchiveError(
            f"the link {'/'.join(parts)!r:.200} in the archive leads out of its folder, to {leads_to!r:.200}"
        )


def _place(made: Path, target: Path) -> None:
    """Put what was made where it belongs. A link that is there already is not followed."""
    if not os.path.lexists(target):
        os.rename(made, target)
        return
    if target.is_symlink() or not target.is_dir():
        raise NotADirectoryError(20, "there is something else than a folder", str(target))
    for name in os.listdir(made):
        source, there = made / name, target / name
        if source.is_dir() and not source.is_symlink():
            _place(source, there)
        else:
            os.replace(source, there)
