"""Single files: read_file and write_file."""

from __future__ import annotations

import os
import stat
from typing import Any, Dict, List, Optional, Tuple

from e80_agent.agent import Agent
from e80_agent.helper import (
    CHUNK,
    Body,
    Refused,
    Reply,
    in_child,
    make_folders,
    mode_of,
    open_regular,
    path_of,
    require_regular,
    write_all,
)
from e80_agent.link import Connection
from e80_agent.tree import NewFile

# Up to here a file is read before its size is said: those of the kernel do not know theirs.
_SMALL = 64 * 1024
_MAX_KERNEL_FILE = 1024 * 1024

Range = List[Optional[int]]


def read_file(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path; range ([first, last], [first, null] or [null, size of the end]), tag. Answers {size,
    start, length, tag}, then RECORD_DATA records and RECORD_END; closes the connection. `start` is null when
    the range is behind the end, and all is sent when `tag` is not the file's."""
    path = path_of(header)
    wanted = header.get("range")
    tag = header.get("tag")
    in_child(agent, connection, lambda reply: _read_file(reply, path, wanted, tag))


def write_file(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, mode. Then RECORD_DATA records and RECORD_END from the daemon; answers {size, created}.

    The data goes to a file without a name that gets it at the end: a write that breaks off leaves the old
    content as it was."""
    path, mode = path_of(header), mode_of(header)
    rest = connection.take_input()
    in_child(agent, connection, lambda reply: _write_file(reply, Body(reply.sock, rest), path, mode))


def _read_file(reply: Reply, path: bytes, wanted: Optional[Range], tag: Optional[str]) -> None:
    fd = open_regular(path)
    facts = os.fstat(fd)
    own_tag = "%x-%x-%x" % (facts.st_mtime_ns, facts.st_size, facts.st_ino)
    if tag is not None and tag != own_tag:
        wanted = None
    content = _read_small(fd) if facts.st_size <= _SMALL else None
    size = facts.st_size if content is None else len(content)
    start, length = _part(wanted, size)
    reply.head(size=size, start=start, length=length, tag=own_tag)
    if start is None:
        return
    if content is not None:
        for at in range(start, start + length, CHUNK):
            reply.data(memoryview(content)[at : min(at + CHUNK, start + length)])
    else:
        _send_file(reply, fd, facts, start, length)
    reply.end()


def _read_small(fd: int) -> bytes:
    content = b""
    data = os.read(fd, _MAX_KERNEL_FILE)
    while data:
        content += data
        if len(content) > _MAX_KERNEL_FILE:
            raise Refused("not_regular", "it says that it is small, and does not end")
        data = os.read(fd, _MAX_KERNEL_FILE)
    return content


def _part(wanted: Optional[Range], size: int) -> Tuple[Optional[int], int]:
    """Where the part begins, None when it is not there, and its length."""
    if wanted is None:
        return 0, size
    first, last = wanted
    if first is None:
        length = min(size, last or 0)
        return (size - length, length) if length else (None, 0)
    if first >= size:
        return None, 0
    stop = size if last is None else min(last + 1, size)
    return first, stop - first


def _send_file(reply: Reply, fd: int, facts: os.stat_result, start: int, length: int) -> None:
    buffer = memoryview(bytearray(CHUNK))
    os.lseek(fd, start, os.SEEK_SET)
    while length:
        got = os.readv(fd, [buffer[: min(CHUNK, length)]])
        length -= got
        if not length and _has_changed(facts, os.fstat(fd)):
            # The reader has all but the last piece, and must not take it for a file that ever was.
            raise BrokenPipeError("the file changed")
        if not got:
            raise BrokenPipeError("the file is shorter now")
        reply.data(buffer[:got])


def _has_changed(before: os.stat_result, now: os.stat_result) -> bool:
    """Not when it grew: what is sent then is a log's beginning."""
    if now.st_size == before.st_size:
        return now.st_mtime_ns != before.st_mtime_ns
    return now.st_size < before.st_size


def _write_file(reply: Reply, body: Body, path: bytes, mode: Optional[int]) -> None:
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    if not name:
        raise Refused("is_directory", "it is a directory")
    if os.path.lexists(target):
        facts = os.stat(target)
        require_regular(facts)
        if mode is None:
            mode = stat.S_IMODE(facts.st_mode)
    make_folders(folder)
    parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    size = 0
    with NewFile(parent, name, 0o644 if mode is None else mode) as made:
        for data in body:
            size += len(data)
            write_all(made.fd, data)
        created = made.commit()
    reply.head(size=size, created=created)
