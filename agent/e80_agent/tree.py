"""Folders for helpers: what is in one, everything below one, and files that appear when they are complete.

Everything goes by descriptors of folders. What a tenant renames or replaces meanwhile can then lead a helper
astray only to where the tenant may go by itself.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from e80_agent.helper import CHUNK, FOLDER_FLAGS, Refused, open_folder, open_regular, text_of, write_all

FILE = "file"
ENTER = "enter"
LEAVE = "leave"

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
# What file systems say that cannot make a file without a name.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_HIDDEN = re.compile(rb"\..*\.[0-9a-f]{12}\.part", re.DOTALL)


def names() -> Dict[int, str]:
    """Names of the uids of this sandbox."""
    with open("/etc/passwd", encoding="ascii", errors="replace") as file:
        rows = [line.split(":") for line in file]
    return {int(row[2]): row[0] for row in rows if len(row) > 2 and row[2].isdigit()}


def entry(name: Any, facts: os.stat_result, link: Any, owners: Dict[int, str]) -> Dict[str, Any]:
    """What the daemon is told of one name."""
    return {
        "name": text_of(name),
        "type": _TYPES.get(stat.S_IFMT(facts.st_mode), "device"),
        "size": facts.st_size,
        "mode": stat.S_IMODE(facts.st_mode),
        "owner": owners.get(facts.st_uid, str(facts.st_uid)),
        "modified_ns": facts.st_mtime_ns,
        "link": None if link is None else text_of(link),
    }


def look(name: Any, folder: Optional[int], owners: Dict[int, str]) -> Dict[str, Any]:
    """The entry of a name as it is, a link as a link."""
    facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
    link = os.readlink(name, dir_fd=folder) if stat.S_ISLNK(facts.st_mode) else None
    return entry(name, facts, link, owners)


def page(folder: int, after: Optional[bytes], limit: int) -> Tuple[List[bytes], bool]:
    """The first names behind `after`, by their bytes, and whether there are more. Holds a multiple of `limit`
    in memory, however many there are."""
    kept: List[bytes] = []
    bound: Optional[bytes] = None
    with os.scandir(folder) as found:
        for item in found:
            name = os.fsencode(item.name)
            if (after is not None and name <= after) or (bound is not None and name > bound):
                continue
            kept.append(name)
            if len(kept) > 4 * limit:
                kept.sort()
                del kept[limit + 1 :]
                bound = kept[-1]
    kept.sort()
    return kept[:limit], len(kept) > limit


def walk(
    top: int, before: Callable[[int, str], None] = lambda _folder, _name: None
) -> Iterator[Tuple[str, int, str]]:
    """Everything below a folder: (FILE, folder, name), and each folder's content between ENTER and LEAVE.

    Follows no link. `folder` is a descriptor, good until the next step. At any depth one descriptor is open;
    `before` is called before a folder is opened."""
    here = os.open(".", FOLDER_FLAGS, dir_fd=top)
    above: List[Tuple[str, Tuple[int, int], List[str]]] = []
    try:
        folders: List[str] = []
        yield from _content(here, folders)
        while folders or above:
            if folders:
                name = folders.pop()
                before(here, name)
                try:
                    below = open_folder(name, here, os.O_NOFOLLOW)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # it went meanwhile, or is something else now
                above.append((name, _identity(here), folders))
                yield ENTER, here, name
                os.close(here)
                here, folders = below, []
                yield from _content(here, folders)
            else:
                name, parent, folders = above.pop()
                up = os.open("..", FOLDER_FLAGS, dir_fd=here)
                os.close(here)
                here = up
                if _identity(here) != parent:
                    raise Refused("io_error", "a folder was moved meanwhile")
                yield LEAVE, here, name
    finally:
        os.close(here)


def remove(name: Any, folder: Optional[int]) -> None:
    """Removes a folder and all that is in it."""
    top = open_folder(name, folder, os.O_NOFOLLOW)
    try:
        for what, here, item in walk(top):
            if what == LEAVE:
                os.rmdir(item, dir_fd=here)
            elif what == FILE:
                os.unlink(item, dir_fd=here)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=folder)


def copy(source: Any, source_folder: Optional[int], folder: int, name: Any) -> None:
    """Copies what has a name, a folder with all that is in it, to another file system. The copy's name must
    be free. Raises Refused for what is neither file, folder nor link."""
    facts = os.stat(source, dir_fd=source_folder, follow_symlinks=False)
    if stat.S_ISLNK(facts.st_mode):
        os.symlink(os.readlink(source, dir_fd=source_folder), name, dir_fd=folder)
    elif stat.S_ISDIR(facts.st_mode):
        _copy_folder(source, source_folder, folder, name)
    elif stat.S_ISREG(facts.st_mode):
        _copy_file(source, source_folder, folder, name)
    else:
        raise Refused("not_regular", "%s is neither a file, a folder nor a link" % text_of(source)[-200:])


class NewFile:
    """A file without a name until it is complete; with a hidden one where a file system has no such thing."""

    def __init__(self, folder: int, name: bytes, mode: int) -> None:
        self._folder = folder
        self._name = name
        self._hidden: Optional[bytes] = None
        try:
            self.fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._hidden = hidden_name(name)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(self._hidden, flags, 0o600, dir_fd=folder)
        os.fchmod(self.fd, mode)

    def commit(self, replace: bool = True) -> bool:
        """Gives it its name, in one step; whether there was nothing of that name. Raises OSError: then what
        had the name still has it."""
        if self._hidden is None:
            try:
                self._link(self._name)
                return True
            except FileExistsError:
                if not replace:
                    raise
            hidden = hidden_name(self._name)
            self._link(hidden)
            self._hidden = hidden
        created = not _exists(self._name, self._folder)
        if not (created or replace):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(self._hidden, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._hidden = None
        return created

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        if self._hidden is not None:
            os.unlink(self._hidden, dir_fd=self._folder)

    def _link(self, name: bytes) -> None:
        # Python follows the link in /proc, as it has to be here, only when a folder is given.
        os.link("/proc/self/fd/%d" % self.fd, name, dst_dir_fd=self._folder, follow_symlinks=True)


def hidden_name(name: bytes) -> bytes:
    return b".%s.%s.part" % (name[:200], os.urandom(6).hex().encode())


def is_hidden(path: bytes) -> bool:
    """Whether the path ends in what `hidden_name` gives."""
    return _HIDDEN.fullmatch(os.path.basename(path)) is not None


def _content(here: int, folders: List[str]) -> Iterator[Tuple[str, int, str]]:
    """Yields what is no folder, and collects the folders."""
    with os.scandir(here) as found:
        for item in found:
            if item.is_dir(follow_symlinks=False):
                folders.append(item.name)
            else:
                yield FILE, here, item.name


def _identity(folder: int) -> Tuple[int, int]:
    facts = os.fstat(folder)
    return facts.st_dev, facts.st_ino


def _exists(name: bytes, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _copy_folder(source: Any, source_folder: Optional[int], folder: int, name: Any) -> None:
    top = open_folder(source, source_folder, os.O_NOFOLLOW)
    os.mkdir(name, 0o700, dir_fd=folder)
    # One for each level: a tree that is thousands of folders deep is refused.
    made = [os.open(name, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)]
    modes = [stat.S_IMODE(os.fstat(top).st_mode)]
    try:
        for what, here, item in walk(top):
            if what == ENTER:
                facts = os.stat(item, dir_fd=here, follow_symlinks=False)
                os.mkdir(item, 0o700, dir_fd=made[-1])
                made.append(os.open(item, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=made[-1]))
                modes.append(stat.S_IMODE(facts.st_mode))
            elif what == LEAVE:
                os.fchmod(made[-1], modes.pop())
                os.close(made.pop())
            else:
                copy(item, here, made[-1], item)
        os.fchmod(made[-1], modes.pop())
    finally:
        for fd in [top, *made]:
            os.close(fd)


def _copy_file(source: Any, source_folder: Optional[int], folder: int, name: Any) -> None:
    fd = open_regular(os.fsencode(source), source_folder, os.O_NOFOLLOW)
    try:
        facts = os.fstat(fd)
        with NewFile(folder, os.fsencode(name), stat.S_IMODE(facts.st_mode)) as made:
            data = os.read(fd, CHUNK)
            while data:
                write_all(made.fd, data)
                data = os.read(fd, CHUNK)
            os.utime(made.fd, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            made.commit(replace=False)
    finally:
        os.close(fd)
