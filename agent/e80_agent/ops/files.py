"""read_file and write_file: done by a child that is the tenant, so that the kernel decides what it may."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any, Callable, Dict

from e80_agent import protocol
from e80_agent.agent import Agent
from e80_agent.fork import run_as_tenant
from e80_agent.link import Connection
from e80_agent.tenant import HOME

_CHUNK = 256 * 1024

_CODES = {
    errno.ENOENT: "file_not_found",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EISDIR: "is_directory",
    errno.ENOTDIR: "not_directory",
    errno.EEXIST: "not_directory",
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EROFS: "read_only",
    errno.ENAMETOOLONG: "bad_path",
    errno.ELOOP: "bad_path",
    errno.ENXIO: "not_regular",
}


class _Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_file(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path. Answers {size}, then RECORD_DATA records and RECORD_END; closes the connection."""
    path = _path(header)
    _in_child(agent, connection, lambda sock: _read_file(sock, path))


def write_file(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path. Then RECORD_DATA records and RECORD_END from the daemon; answers {size, created}.

    The data goes to a file beside the target that takes its name at the end: a write that breaks off
    leaves the old content as it was."""
    path = _path(header)
    rest = connection.take_input()
    _in_child(agent, connection, lambda sock: _write_file(_Records(sock, rest), sock, path))


def _path(header: Dict[str, Any]) -> str:
    path = header["path"]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError("path")
    return os.path.join(HOME, path)


def _in_child(agent: Agent, connection: Connection, work: Callable[[socket.socket], None]) -> None:
    sock = connection.detach()

    def run() -> None:
        sock.setblocking(True)
        try:
            work(sock)
        except _Refused as error:
            _send_error(sock, error.code, str(error))
        except OSError as error:
            code = _CODES.get(error.errno or 0, "io_error")
            _send_error(sock, code, os.strerror(error.errno or 0))

    run_as_tenant(agent.tenant, run, keep=[sock])
    sock.close()


def _read_file(sock: socket.socket, path: str) -> None:
    # Not blocking: opening a FIFO without a writer would never return.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    facts = os.fstat(fd)
    _require_regular(facts)
    # Files of /proc have no size; they are read before it is said.
    data = os.read(fd, _CHUNK) if facts.st_size == 0 else b""
    sock.sendall(protocol.pack_header({"ok": True, "size": facts.st_size or len(data)}))
    data = data or os.read(fd, _CHUNK)
    while data:
        sock.sendall(protocol.pack_record(protocol.RECORD_DATA, data))
        data = os.read(fd, _CHUNK)
    sock.sendall(protocol.pack_record(protocol.RECORD_END, b""))


def _write_file(records: _Records, sock: socket.socket, path: str) -> None:
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    created = not os.path.lexists(target)
    mode = 0o644
    if not created:
        facts = os.stat(target)
        _require_regular(facts)
        mode = stat.S_IMODE(facts.st_mode)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, ".%s.%s.part" % (name[:200], os.urandom(6).hex()))
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    size = 0
    try:
        for data in records:
            size += len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        os.close(fd)
        os.rename(partial, target)
    except BaseException:
        os.unlink(partial)
        raise
    sock.sendall(protocol.pack_header({"ok": True, "size": size, "created": created}))


def _require_regular(facts: os.stat_result) -> None:
    if stat.S_ISDIR(facts.st_mode):
        raise _Refused("is_directory", "it is a directory")
    if not stat.S_ISREG(facts.st_mode):
        raise _Refused("not_regular", "it is not a regular file")


def _send_error(sock: socket.socket, code: str, message: str) -> None:
    """Says why, then reads on until the daemon hangs up: closing with unread data would lose the answer."""
    try:
        sock.sendall(protocol.pack_header({"ok": False, "code": code, "message": message}))
        while sock.recv(_CHUNK):
            continue
    except OSError:
        return


class _Records:
    """The data records of a request, as they come in; ends at RECORD_END, raises when cut short."""

    def __init__(self, sock: socket.socket, rest: bytes) -> None:
        self._file = sock.makefile("rb", buffering=_CHUNK)
        self._rest = rest

    def __iter__(self) -> Any:
        while True:
            kind, length = protocol.RECORD.unpack(self._read(protocol.RECORD.size))
            if kind == protocol.RECORD_END:
                return
            if kind != protocol.RECORD_DATA or length > protocol.MAX_RECORD:
                raise _Refused("bad_request", "unexpected record")
            yield self._read(length)

    def _read(self, size: int) -> bytes:
        data, self._rest = self._rest[:size], self._rest[size:]
        if len(data) < size:
            data += self._file.read(size - len(data))
        if len(data) < size:
            raise OSError(errno.EPIPE, "the upload broke off")
        return data
