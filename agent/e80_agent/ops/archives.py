"""Whole folders as tar archives: pack and unpack, in pieces as they come and go."""

from __future__ import annotations

import itertools
import os
import stat
from typing import Any, Callable, Dict, Iterator, List, Tuple

from e80_agent import tar, tree
from e80_agent.agent import Agent
from e80_agent.helper import (
    CHUNK,
    Body,
    Refused,
    Reply,
    in_child,
    make_folders,
    open_folder,
    open_regular,
    path_of,
    refusal,
    text_of,
    write_all,
)
from e80_agent.link import Connection
from e80_agent.tar import BadArchive, Member

_GZIP = b"\x1f\x8b"
_GZIP_LEVEL = 3
_WINDOW = 31  # zlib's, with the header and the checksum of gzip
_IN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Pieces = Iterator[memoryview]


def pack(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, gzip. Answers {}, then the archive of the folder's content in RECORD_DATA records, and
    RECORD_END; closes the connection."""
    path, gzip = path_of(header), header["gzip"] is True
    in_child(agent, connection, lambda reply: _pack(reply, path, gzip))


def unpack(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path. Then an archive in RECORD_DATA records and RECORD_END from the daemon, with gzip or
    without; answers {entries, size}. Files appear one by one, each when it is complete."""
    path = path_of(header)
    rest = connection.take_input()
    in_child(agent, connection, lambda reply: _unpack(reply, Body(reply.sock, rest), path))


def _pack(reply: Reply, path: bytes, gzip: bool) -> None:
    top = open_folder(path)
    _require_readable(top)
    out = _Out(reply, _zlib().compressobj(_GZIP_LEVEL, 8, _WINDOW) if gzip else None)
    reply.head()
    prefix: List[bytes] = [b""]
    for what, folder, item in tree.walk(top):
        if what == tree.LEAVE:
            prefix.pop()
            continue
        name = prefix[-1] + os.fsencode(item)
        if what == tree.ENTER:
            prefix.append(name + b"/")
            facts = os.stat(item, dir_fd=folder, follow_symlinks=False)
            out.add(tar.header(Member(tar.FOLDER, prefix[-1], 0, _mode(facts), facts.st_mtime, b"")))
            continue
        try:
            _pack_one(out, folder, item, name)
        except FileNotFoundError:
            continue  # it went meanwhile
    out.add(tar.END)
    out.close()


def _require_readable(top: int) -> None:
    """Once the archive has begun, a file that cannot be read could only break it off."""
    for what, folder, item in tree.walk(top):
        if what == tree.FILE and not _is_readable(folder, item):
            raise Refused("permission_denied", "%s in it cannot be read" % text_of(item)[-200:])


def _is_readable(folder: int, item: str) -> bool:
    try:
        if not stat.S_ISREG(os.stat(item, dir_fd=folder, follow_symlinks=False).st_mode):
            return True
        return os.access(item, os.R_OK, dir_fd=folder, effective_ids=True)
    except FileNotFoundError:
        return True


def _pack_one(out: _Out, folder: int, item: str, name: bytes) -> None:
    facts = os.stat(item, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(facts.st_mode):
        link = os.fsencode(os.readlink(item, dir_fd=folder))
        out.add(tar.header(Member(tar.SYMLINK, name, 0, 0o777, facts.st_mtime, link)))
    if not stat.S_ISREG(facts.st_mode):
        return  # pipes, sockets and devices are nothing without what is behind them
    fd = open_regular(os.fsencode(item), folder, os.O_NOFOLLOW)
    try:
        facts = os.fstat(fd)
        out.add(tar.header(Member(tar.FILE, name, facts.st_size, _mode(facts), facts.st_mtime, b"")))
        left = facts.st_size
        while left:
            data = os.read(fd, min(CHUNK, left))
            if not data:
                raise BrokenPipeError("a file is shorter than its header says")
            left -= len(data)
            out.add(data)
        out.add(tar.padding(facts.st_size))
    finally:
        os.close(fd)


def _mode(facts: os.stat_result) -> int:
    return stat.S_IMODE(facts.st_mode) & 0o777


class _Out:
    """An archive on its way: small pieces are put together, and compressed if that is wanted."""

    def __init__(self, reply: Reply, compressor: Any) -> None:
        self._reply = reply
        self._compressor = compressor
        self._waiting = bytearray()

    def add(self, data: bytes) -> None:
        self._waiting += data if self._compressor is None else self._compressor.compress(data)
        if len(self._waiting) >= CHUNK:
            self._flush()

    def close(self) -> None:
        if self._compressor is not None:
            self._waiting += self._compressor.flush()
        if self._waiting:
            self._flush()
        self._reply.end()

    def _flush(self) -> None:
        # One piece and what waited before it: never more than a record may hold.
        self._reply.data(self._waiting)
        self._waiting = bytearray()


def _unpack(reply: Reply, body: Body, path: bytes) -> None:
    make_folders(path)
    target = _Target(open_folder(path))
    name = b""
    try:
        archive = tar.Reader(_plain(iter(body)))
        for member in archive:
            name = member.name
            target.add(member, archive.content())
        target.finish()
    except (OSError, Refused) as error:
        fault = error if isinstance(error, Refused) else refusal(error)
        where = "" if isinstance(error, BadArchive) else " at %s" % text_of(name)[-200:]
        done = "%d entries before it are unpacked" % target.entries
        raise Refused(fault.code, "%s%s; %s" % (fault, where, done)) from None
    reply.head(entries=target.entries, size=target.size)


class _Target:
    """Where an archive goes: below one folder, and through no link to anywhere else."""

    def __init__(self, top: int) -> None:
        self.entries = 0
        self.size = 0
        self._top = top
        self._path = os.fsencode(os.readlink("/proc/self/fd/%d" % top))
        self._inside: Tuple[bytes, ...] = ()
        self._folder = os.dup(top)
        # Of folders that would not let us in again.
        self._modes: Dict[Tuple[bytes, ...], int] = {}

    def add(self, member: Member, content: Pieces) -> None:
        parts = _parts(member.name)
        if parts:
            folder = self._enter(parts[:-1])
            if member.kind == tar.FOLDER:
                self._add_folder(member, parts, folder)
            elif member.kind == tar.FILE:
                self._add_file(member, parts[-1], folder, content)
            elif member.kind == tar.SYMLINK:
                self._check_link(member, parts)
                _put(folder, parts[-1], lambda name: os.symlink(member.link, name, dir_fd=folder))
            else:
                self._add_hard_link(member, parts[-1], folder)
        self.entries += 1

    def finish(self) -> None:
        """Gives folders the modes that would have been in the way, the deepest first."""
        for parts in sorted(self._modes, key=len, reverse=True):
            os.chmod(parts[-1], self._modes[parts], dir_fd=self._enter(parts[:-1]))

    def _enter(self, parts: Tuple[bytes, ...]) -> int:
        """The folder of that name, made when it is missing. Good until the next call."""
        if parts == self._inside:
            return self._folder
        here = os.dup(self._top)
        for part in parts:
            try:
                below = _open_or_make(part, here)
            except NotADirectoryError:
                shown = b"/".join(parts)[-200:].decode("utf-8", "replace")
                raise BadArchive("%r goes through something that is no folder" % shown) from None
            finally:
                os.close(here)
            here = below
        os.close(self._folder)
        self._folder, self._inside = here, parts
        return here

    def _add_folder(self, member: Member, parts: Tuple[bytes, ...], folder: int) -> None:
        try:
            os.mkdir(parts[-1], 0o700, dir_fd=folder)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
                raise
        os.chmod(parts[-1], member.mode | 0o700, dir_fd=folder)
        if member.mode & 0o700 != 0o700:
            self._modes[parts] = member.mode
        else:
            self._modes.pop(parts, None)

    def _add_file(self, member: Member, name: bytes, folder: int, content: Pieces) -> None:
        with tree.NewFile(folder, name, member.mode) as made:
            for piece in content:
                write_all(made.fd, piece)
                self.size += len(piece)
            os.utime(made.fd, (member.mtime, member.mtime))
            made.commit()

    def _add_hard_link(self, member: Member, name: bytes, folder: int) -> None:
        target = _parts(member.link)
        if not target:
            raise BadArchive("%r is a link to nothing" % member.name[-200:].decode("utf-8", "replace"))
        here = os.dup(folder)
        try:
            there = self._enter(target[:-1])
            _put(
                here,
                name,
                lambda new: os.link(
                    target[-1], new, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False
                ),
            )
        finally:
            os.close(here)

    def _check_link(self, member: Member, parts: Tuple[bytes, ...]) -> None:
        """Refuses a link that leads out. Dots are taken at their word at its beginning only, because what is
        above are real folders: behind a name they could undo a link."""
        steps = [step for step in member.link.split(b"/") if step not in (b"", b".")]
        if member.link.startswith(b"/"):
            inside = (member.link + b"/").startswith(self._path.rstrip(b"/") + b"/") and b".." not in steps
        else:
            up = next((number for number, step in enumerate(steps) if step != b".."), len(steps))
            inside = up < len(parts) and b".." not in steps[up:]
        if not inside:
            shown = (
                member.name[-200:].decode("utf-8", "replace"),
                member.link[-200:].decode("utf-8", "replace"),
            )
            raise BadArchive("%r is a link that leads out of the folder, to %r" % shown)


def _parts(name: bytes) -> Tuple[bytes, ...]:
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if name.startswith(b"/") or b".." in parts:
        raise BadArchive("%r leads out of the folder" % name[-200:].decode("utf-8", "replace"))
    return parts


def _open_or_make(name: bytes, folder: int) -> int:
    try:
        return os.open(name, _IN, dir_fd=folder)
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=folder)
        return os.open(name, _IN, dir_fd=folder)


def _put(folder: int, name: bytes, make: Callable[[bytes], None]) -> None:
    """Makes something of that name; what has it already is replaced, unless it is a folder."""
    try:
        make(name)
    except FileExistsError:
        hidden = tree.hidden_name(name)
        make(hidden)
        try:
            os.rename(hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            # Still there when that failed, and when both are one file, which makes the kernel do nothing.
            if os.access(hidden, os.F_OK, dir_fd=folder, follow_symlinks=False):
                os.unlink(hidden, dir_fd=folder)


def _plain(pieces: Pieces) -> Pieces:
    """The archive without gzip, whether it came with it or not."""
    start = b""
    for piece in pieces:
        start += piece
        if len(start) >= len(_GZIP):
            break
    if start[: len(_GZIP)] == _GZIP:
        yield from _unzip(start, pieces)
        return
    if start:
        yield memoryview(start)
    yield from pieces


def _unzip(start: bytes, pieces: Pieces) -> Pieces:
    """One gzip member after the other, in pieces of bounded size however much they unpack to."""
    zlib = _zlib()
    unzip: Any = zlib.decompressobj(_WINDOW)
    for piece in itertools.chain([memoryview(start)], pieces):
        data = bytes(piece)
        while data:
            if unzip.eof:
                data = data.lstrip(b"\0")
                unzip = zlib.decompressobj(_WINDOW) if data else unzip
                continue
            full = True
            while full and not unzip.eof:
                try:
                    plain = unzip.decompress(data, CHUNK)
                except zlib.error as error:
                    raise BadArchive("gzip: %s" % error) from None
                if plain:
                    yield memoryview(plain)
                data = unzip.unconsumed_tail
                # All input may be in while some output has still to come.
                full = bool(data) or len(plain) == CHUNK
            data = unzip.unused_data
    if not unzip.eof:
        raise BadArchive("it is cut short")


def _zlib() -> Any:
    # Not before it is needed, which is in a helper: the agent has no use for it, and some images have none.
    try:
        import zlib  # noqa: PLC0415
    except ImportError:
        raise Refused("unsupported", "this image's Python has no zlib: use an archive without gzip") from None
    return zlib
