"""Children that act on files: each serves one request, as the tenant, on that request's own connection.

A helper is a copy of PID 1, whose memory holds the link's key. So what it opens is looked at as a descriptor,
never as a name: what turns out to be the helper itself in /proc is refused, and no device is ever opened.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any, Callable, Dict, Iterator

from e80_agent import protocol
from e80_agent.agent import Agent
from e80_agent.fork import run_as_tenant
from e80_agent.link import Connection
from e80_agent.tenant import HOME

CHUNK = 256 * 1024
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC

_CODES = {
    errno.ENOENT: "file_not_found",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EISDIR: "is_directory",
    errno.ENOTDIR: "not_directory",
    errno.EEXIST: "file_exists",
    errno.ENOTEMPTY: "not_empty",
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EROFS: "read_only",
    errno.ENAMETOOLONG: "bad_path",
    errno.ELOOP: "bad_path",
    errno.EINVAL: "bad_path",
    errno.ENXIO: "not_regular",
    errno.EBUSY: "busy",
    errno.EMFILE: "busy",
    errno.EOPNOTSUPP: "unsupported",
}


class Refused(Exception):
    """What the daemon is told: a code of protocol.ERROR_CODES, and why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def refusal(error: OSError) -> Refused:
    return Refused(_CODES.get(error.errno or 0, "io_error"), os.strerror(error.errno or 0))


def path_of(header: Dict[str, Any], key: str = "path") -> bytes:
    """The path's bytes; a relative one is below the home folder. Bytes that are no UTF-8 come as lone
    surrogates."""
    path = header[key]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(key)
    return os.path.join(HOME.encode(), path.encode("utf-8", "surrogateescape"))


def mode_of(header: Dict[str, Any]) -> Any:
    """The permission bits, or None."""
    mode = header.get("mode")
    if mode is not None and (not isinstance(mode, int) or not 0 <= mode <= 0o7777):
        raise ValueError("mode")
    return mode


def text_of(name: Any) -> str:
    """A name as it goes over the wire."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


class Reply:
    """What a helper says on its connection: one header, then perhaps data records and the end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.begun = False

    def head(self, **fields: Any) -> None:
        self.begun = True
        self.sock.sendall(protocol.pack_header(dict(fields, ok=True)))

    def data(self, data: Any) -> None:
        """One record; at most MAX_RECORD."""
        self.sock.sendall(protocol.RECORD.pack(protocol.RECORD_DATA, len(data)), socket.MSG_MORE)
        self.sock.sendall(data)

    def end(self) -> None:
        self.sock.sendall(protocol.pack_record(protocol.RECORD_END, b""))

    def refuse(self, error: Refused) -> None:
        """Says why, then reads on until the daemon hangs up: closing with unread data would lose the answer.
        In the middle of the data it says nothing: the connection's end without RECORD_END is the answer."""
        if self.begun:
            return
        try:
            self.sock.sendall(_pack_refusal(error))
            while self.sock.recv(CHUNK):
                continue
        except OSError:
            return


def in_child(agent: Agent, connection: Connection, work: Callable[[Reply], None]) -> None:
    """Runs `work` in a helper, which takes the connection over. It answers by itself, or raises."""
    sock = connection.detach()

    def run() -> None:
        sock.setblocking(True)
        reply = Reply(sock)
        try:
            work(reply)
        except Refused as error:
            reply.refuse(error)
        except OSError as error:
            reply.refuse(refusal(error))

    # Behind it is the agent alone: a helper never comes back.
    try:
        run_as_tenant(agent.tenant, run, keep=[sock])
    except OSError as error:
        # Not blocking, and it fits: the agent waits for nobody.
        sock.send(_pack_refusal(Refused("busy", "no room for another process: %s" % error.strerror)))
    finally:
        sock.close()


def forbid_self(fd: int) -> None:
    """Refuses a descriptor that shows this very process: its memory, its descriptors, its state."""
    if os.fstat(fd).st_dev != os.stat("/proc").st_dev:
        return
    name = os.readlink("/proc/self/fd/%d" % fd)
    if (name + "/").startswith("/proc/%d/" % os.getpid()):
        raise Refused("permission_denied", "it belongs to the server's own process")


def open_regular(path: bytes, folder: Any = None, flags: int = 0) -> int:
    """A descriptor to read a regular file with. Nothing else is opened: that could block, or set off a
    device."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags, dir_fd=folder)
    again = "/proc/self/fd/%d" % fd
    try:
        if not os.access(again, os.R_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        require_regular(os.fstat(fd))
        forbid_self(fd)
        return os.open(again, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(fd)


def open_folder(path: Any, folder: Any = None, flags: int = 0) -> int:
    """A descriptor to list a folder with."""
    fd = os.open(path, FOLDER_FLAGS | flags, dir_fd=folder)
    try:
        forbid_self(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_folders(path: bytes) -> None:
    """Makes a folder and those above it that are missing, however deep; behind a link that leads nowhere
    nothing is made, as the kernel has it."""
    missing = []
    while path not in (b"", b"/") and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path.rstrip(b"/"))
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise Refused("not_directory", "it, or a part of the path, is not a directory") from None


def require_regular(facts: os.stat_result) -> None:
    if stat.S_ISDIR(facts.st_mode):
        raise Refused("is_directory", "it is a directory")
    if not stat.S_ISREG(facts.st_mode):
        raise Refused("not_regular", "it is not a regular file")


def write_all(fd: int, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Body:
    """The data records of a request, one after another, in one buffer that is used again and again."""

    def __init__(self, sock: socket.socket, rest: bytes) -> None:
        self._sock = sock
        self._rest = rest
        self._buffer = memoryview(bytearray(protocol.MAX_RECORD))

    def __iter__(self) -> Iterator[memoryview]:
        """Each is good until the next one is asked for. Ends at RECORD_END; raises when it is cut short."""
        while True:
            kind, length = protocol.RECORD.unpack(self._read(protocol.RECORD.size))
            if kind == protocol.RECORD_END:
                return
            if kind != protocol.RECORD_DATA or length > protocol.MAX_RECORD:
                raise Refused("bad_request", "unexpected record")
            yield self._read(length)

    def _read(self, size: int) -> memoryview:
        have = min(size, len(self._rest))
        if have:
            self._buffer[:have] = self._rest[:have]
            self._rest = self._rest[have:]
        while have < size:
            got = self._sock.recv_into(self._buffer[have:size], size - have, socket.MSG_WAITALL)
            if not got:
                raise OSError(errno.EPIPE, "the upload broke off")
            have += got
        return self._buffer[:size]


def _pack_refusal(error: Refused) -> bytes:
    return protocol.pack_header({"ok": False, "code": error.code, "message": str(error)[:1000]})
