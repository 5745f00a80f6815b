"""Names rather than content: stat, list, make_folder, move, remove, chmod."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, Dict, List, Optional

from e80_agent import tree
from e80_agent.agent import Agent
from e80_agent.helper import (
    Refused,
    Reply,
    forbid_self,
    in_child,
    make_folders,
    mode_of,
    open_folder,
    path_of,
)
from e80_agent.link import Connection
from e80_agent.tenant import HOME

MAX_PAGE = 1000
_BATCH = 256 * 1024
# Nobody may take these away, but what is in them would be gone by the time the kernel says so.
_MOUNTS = (HOME, "/tmp", "/dev/shm", "/")


def stat_file(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, follow. Answers {entry}."""
    path, follow = path_of(header), header["follow"] is True
    in_child(agent, connection, lambda reply: reply.head(entry=_stat(path, follow)))


def list_folder(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, limit, after. Answers {has_more}, then RECORD_DATA records, each a JSON list of entries,
    and RECORD_END; closes the connection."""
    path, limit = path_of(header), header["limit"]
    if not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE:
        raise ValueError("limit")
    after = header.get("after")
    behind = None if after is None else after.encode("utf-8", "surrogateescape")
    in_child(agent, connection, lambda reply: _list(reply, path, behind, limit))


def make_folder(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, parents, mode. Answers {created, entry}."""
    path, parents, mode = path_of(header), header["parents"] is True, mode_of(header)
    in_child(agent, connection, lambda reply: _make_folder(reply, path, parents, mode))


def move(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, to, overwrite. Answers {entry}."""
    path, target, overwrite = path_of(header), path_of(header, "to"), header["overwrite"] is True
    in_child(agent, connection, lambda reply: reply.head(entry=_move(path, target, overwrite)))


def remove(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, recursive. Answers {}."""
    path, recursive = path_of(header), header["recursive"] is True
    in_child(agent, connection, lambda reply: _remove(reply, path, recursive))


def chmod(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, mode, recursive. Answers {entry}."""
    path, mode, recursive = path_of(header), mode_of(header), header["recursive"] is True
    if mode is None:
        raise ValueError("mode")
    in_child(agent, connection, lambda reply: reply.head(entry=_chmod(path, mode, recursive)))


def _stat(path: bytes, follow: bool) -> Dict[str, Any]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        forbid_self(fd)
        facts = os.fstat(fd)
        link = os.readlink("", dir_fd=fd) if stat.S_ISLNK(facts.st_mode) else None
    finally:
        os.close(fd)
    return tree.entry(_name(path), facts, link, tree.names())


def _name(path: bytes) -> bytes:
    return os.path.basename(path.rstrip(b"/")) or b"/"


def _list(reply: Reply, path: bytes, after: Optional[bytes], limit: int) -> None:
    folder = open_folder(path)
    names, has_more = tree.page(folder, after, limit)
    reply.head(has_more=has_more)
    owners = tree.names()
    batch: List[bytes] = []
    size = 0
    for name in names:
        try:
            data = json.dumps(tree.look(name, folder, owners), separators=(",", ":")).encode("ascii")
        except FileNotFoundError:
            continue  # it went meanwhile
        batch.append(data)
        size += len(data)
        if size >= _BATCH:
            _send_batch(reply, batch)
            batch, size = [], 0
    _send_batch(reply, batch)
    reply.end()


def _send_batch(reply: Reply, batch: List[bytes]) -> None:
    reply.data(b"[" + b",".join(batch) + b"]")


def _make_folder(reply: Reply, path: bytes, parents: bool, mode: Optional[int]) -> None:
    # Behind a link that leads nowhere nothing is made, as the kernel has it.
    path = path.rstrip(b"/") or b"/"
    created = True
    try:
        if parents:
            make_folders(os.path.dirname(path))
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        created = False
    if created and mode is not None:
        os.chmod(path, mode)
    reply.head(created=created, entry=_stat(path, follow=True))


def _move(path: bytes, target: bytes, overwrite: bool) -> Dict[str, Any]:
    path, target = path.rstrip(b"/"), target.rstrip(b"/")
    _require_movable(path)
    _require_movable(target)
    _refuse_mount(os.lstat(path))
    try:
        (_rename_over if overwrite else _rename)(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _move_by_copy(path, target, overwrite)
    return tree.look(_name(target), os.open(os.path.dirname(target), os.O_PATH), tree.names())


def _rename_over(path: bytes, target: bytes) -> None:
    os.rename(path, target)


def _rename(path: bytes, target: bytes) -> None:
    """Renames to a name that must be free. The call that does it in one is not in Python: a file gets the
    second name first, which fails when it is taken; a folder takes the place of a fresh one."""
    facts = os.lstat(path)
    if stat.S_ISDIR(facts.st_mode):
        os.mkdir(target)
        try:
            os.rename(path, target)
        except BaseException:
            os.rmdir(target)
            raise
        return
    try:
        os.link(path, target, follow_symlinks=False)
    except PermissionError:
        # The kernel lets nobody link what is somebody else's, but whoever owns the folder may rename it.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(path, target)
        return
    try:
        os.unlink(path)
    except BaseException:
        os.unlink(target)
        raise


def _move_by_copy(path: bytes, target: bytes, overwrite: bool) -> None:
    """/home/user and /tmp are mounts of their own. The copy gets its name when it is complete, then the
    original goes."""
    folder = os.open(os.path.dirname(target), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    hidden = os.path.join(os.path.dirname(target), tree.hidden_name(os.path.basename(target)))
    try:
        tree.copy(path, None, folder, os.path.basename(hidden))
        (_rename_over if overwrite else _rename)(hidden, target)
    except BaseException:
        if os.path.lexists(hidden):
            _delete(hidden, True)
        raise
    _delete(path, True)


def _require_movable(path: bytes) -> None:
    """What a name at the end of a path must be to be given or taken away."""
    if os.path.basename(path) in (b"", b".", b".."):
        raise Refused("bad_path", "the path does not end in a name")


def _remove(reply: Reply, path: bytes, recursive: bool) -> None:
    path = path.rstrip(b"/")
    _require_movable(path)
    _delete(path, recursive)
    reply.head()


def _delete(path: bytes, recursive: bool) -> None:
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode):
        os.unlink(path)
        return
    _refuse_mount(facts)
    if recursive:
        tree.remove(path, None)
    else:
        os.rmdir(path)


def _refuse_mount(facts: os.stat_result) -> None:
    if any(os.path.samestat(facts, os.stat(top)) for top in _MOUNTS):
        raise Refused("permission_denied", "it is where the workspace is")


def _chmod(path: bytes, mode: int, recursive: bool) -> Dict[str, Any]:
    if recursive and os.path.isdir(path):
        _chmod_below(path, mode)
    os.chmod(path, mode)
    return _stat(path, follow=True)


def _chmod_below(path: bytes, mode: int) -> None:
    def open_up(folder: int, name: str) -> None:
        if not os.access(name, os.R_OK | os.X_OK, dir_fd=folder, effective_ids=True):
            os.chmod(name, 0o700, dir_fd=folder)

    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        os.chmod(path, 0o700)
    top = open_folder(path)
    try:
        for what, folder, name in tree.walk(top, open_up):
            if what == tree.LEAVE or (what == tree.FILE and not _is_link(folder, name)):
                os.chmod(name, mode, dir_fd=folder)
    finally:
        os.close(top)


def _is_link(folder: int, name: str) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
