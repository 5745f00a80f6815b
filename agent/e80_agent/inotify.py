"""What the kernel tells of changes below a path. For helpers only: theirs is the tenant's uid, and the kernel
counts instances by uid."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from e80_agent import tree
from e80_agent.helper import Refused, forbid_self

MAX_FOLDERS = 2048

_MODIFY, _ATTRIB = 0x2, 0x4
_MOVED_FROM, _MOVED_TO = 0x40, 0x80
_CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ISDIR = 0x40000000
_ALL = _MODIFY | _ATTRIB | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_EVENT = struct.Struct("iIII")
_READ = 64 * 1024


class Change(NamedTuple):
    kind: str
    path: bytes
    source: Optional[bytes] = None


class Watcher:
    """Paths are relative to the one that is watched, which is b"" itself."""

    def __init__(self, path: bytes, recursive: bool) -> None:
        self._libc = _libc()
        self._recursive = recursive
        self._top = b""
        self._paths: Dict[int, bytes] = {}
        self._moves: Dict[int, Tuple[bytes, bool]] = {}
        self.over = False
        self.fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise self._fault("the sandbox's programs have all inotify instances that it may have")
        # Open only until it is watched: of what is open the kernel does not say that it is gone.
        top = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            forbid_self(top)
            is_folder = stat.S_ISDIR(os.fstat(top).st_mode)
            self._top = b"/proc/self/fd/%d" % top
            self._add(b"")
            self._top = os.readlink(self._top)
        finally:
            os.close(top)
        if recursive and is_folder:
            self._add_below(b"", [])

    def read(self) -> List[Change]:
        """What has come; call it when `fd` can be read, and a moment later while `pending`."""
        try:
            data = os.read(self.fd, _READ)
        except BlockingIOError:
            data = b""
        changes: List[Change] = []
        waiting, self._moves = self._moves, {}
        at = 0
        while at < len(data):
            watch, mask, cookie, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            name = data[at : at + length].rstrip(b"\0")
            at += length
            if cookie in waiting:
                self._moves[cookie] = waiting.pop(cookie)
            self._take(changes, watch, mask, cookie, name)
        # The kernel says both halves of a move in one go: what has not come by now went elsewhere.
        for path, is_folder in waiting.values():
            self._left(changes, path, is_folder)
        return _without_repeats(changes)

    @property
    def pending(self) -> bool:
        """Whether the first half of a move waits for its second."""
        return bool(self._moves)

    def _take(self, changes: List[Change], watch: int, mask: int, cookie: int, name: bytes) -> None:
        if mask & _OVERFLOW:
            self._moves.clear()
            changes.append(Change("overflow", b""))
            return
        if mask & _IGNORED:
            self._paths.pop(watch, None)
            return
        if watch not in self._paths:
            return
        folder = self._paths[watch]
        path = os.path.join(folder, name) if name else folder
        if mask & (_DELETE_SELF | _MOVE_SELF):
            if path == b"":
                changes.append(Change("deleted", path))
                self.over = True
        elif self._is_upload(path, mask):
            return
        elif mask & _MOVED_FROM:
            self._moves[cookie] = (path, bool(mask & _ISDIR))
        elif mask & _MOVED_TO:
            self._moved_to(changes, cookie, path, bool(mask & _ISDIR))
        elif mask & _CREATE:
            changes.append(Change("created", path))
            if mask & _ISDIR:
                self._enter(path, changes)
        elif mask & _DELETE:
            changes.append(Change("deleted", path))
        else:
            changes.append(Change("modified", path))

    def _moved_to(self, changes: List[Change], cookie: int, path: bytes, is_folder: bool) -> None:
        source, _ = self._moves.pop(cookie, (None, False))
        if source is not None and tree.is_hidden(source):
            changes.append(Change("modified", path))
        elif source is None:
            changes.append(Change("created", path))
            if is_folder:
                self._enter(path, changes)
        else:
            changes.append(Change("moved", path, source))
            if is_folder:
                self._rename(source, path)

    def _rename(self, source: bytes, path: bytes) -> None:
        prefix = source + b"/"
        for watch, old in self._paths.items():
            if old == source or old.startswith(prefix):
                self._paths[watch] = path + old[len(source) :]

    def _is_upload(self, path: bytes, mask: int) -> bool:
        """Whether it is a file of ours on its way: one without a name, which shows as a number, or a hidden
        one."""
        name = os.path.basename(path)
        if name[:1] == b"#" and name[1:].isdigit() and mask & (_MODIFY | _ATTRIB):
            return not os.path.lexists(self._name(path))
        return tree.is_hidden(name) and not mask & _MOVED_FROM

    def _left(self, changes: List[Change], path: bytes, is_folder: bool) -> None:
        """Something was moved out of what is watched."""
        if tree.is_hidden(path):
            return
        changes.append(Change("deleted", path))
        if is_folder:
            for watch, old in list(self._paths.items()):
                if old == path or old.startswith(path + b"/"):
                    self._libc.inotify_rm_watch(self.fd, watch)
                    del self._paths[watch]

    def _enter(self, path: bytes, changes: List[Change]) -> None:
        """A new folder: what was made in it before it was watched is told now."""
        if not self._recursive:
            return
        try:
            self._add(path)
            self._add_below(path, changes)
        except (FileNotFoundError, NotADirectoryError):
            return  # it went at once
        except (Refused, OSError):
            # Too many folders, or one that cannot be read: what happens in there is not seen.
            changes.append(Change("overflow", b""))

    def _add_below(self, path: bytes, found: List[Change]) -> None:
        waiting = [path]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(self._name(folder)) as items:
                    below = [(os.fsencode(item.name), item.is_dir(follow_symlinks=False)) for item in items]
            except (FileNotFoundError, NotADirectoryError):
                continue
            for name, is_folder in below:
                inner = os.path.join(folder, name)
                found.append(Change("created", inner))
                if is_folder:
                    self._add(inner)
                    waiting.append(inner)
        if path == b"":
            found.clear()

    def _add(self, path: bytes) -> None:
        if len(self._paths) >= MAX_FOLDERS:
            raise Refused("unsupported", "there are more than %d folders in it" % MAX_FOLDERS)
        # The last name is not followed when it has become a link; the first is the descriptor's own.
        flags = 0 if path == b"" else 0x02000000
        watch = self._libc.inotify_add_watch(self.fd, self._name(path), _ALL | flags)
        if watch < 0:
            raise self._fault("the sandbox has all the inotify watches that it may have")
        self._paths[watch] = path

    def _name(self, path: bytes) -> bytes:
        return os.path.join(self._top, path) if path else self._top

    def _fault(self, full: str) -> Exception:
        number = _errno()
        if number in (errno.EMFILE, errno.ENOSPC):
            return Refused("busy", full)
        if number == errno.ENOSYS:
            return Refused("unsupported", "this sandbox's kernel has no inotify")
        return OSError(number, os.strerror(number))


def _without_repeats(changes: List[Change]) -> List[Change]:
    """A program that writes byte by byte changes one file, not a thousand."""
    kept: List[Change] = []
    for change in changes:
        if not kept or kept[-1] != change or change.kind != "modified":
            kept.append(change)
    return kept


def _libc() -> Any:
    # Only a helper that watches needs it, and some images' Python has none.
    try:
        import ctypes  # noqa: PLC0415
    except ImportError:
        raise Refused("unsupported", "this image's Python has no ctypes, which is needed to watch") from None
    return ctypes.CDLL(None, use_errno=True)


def _errno() -> int:
    import ctypes  # noqa: PLC0415  # as above; it is loaded by now

    return ctypes.get_errno()
