"""Where output beyond the cap goes: two files in the tenant's own workspace, within its own quota."""

from __future__ import annotations

import os
import signal
import socket
import struct
from typing import Dict, Optional

from e80_agent import protocol
from e80_agent.fork import receive_fds, run_as_tenant, send_fds
from e80_agent.tenant import HOME, Tenant

_OPEN_S = 0.25
_NAMES = {protocol.RECORD_STDOUT: "stdout", protocol.RECORD_STDERR: "stderr"}


class Spool:
    """Open files of one exec. Writing stops for good at the limit and at the first error (a full disk)."""

    def __init__(self, directory: str, files: Dict[int, int], limit: int) -> None:
        self.directory = directory
        self._files = files
        self._room = limit

    @classmethod
    def open(cls, exec_id: str, tenant: Tenant, limit: int) -> Optional[Spool]:
        """Files made by a child that is the tenant, never by root. None if it cannot."""
        directory = "%s/.8080/execs/%s" % (HOME, exec_id)
        ours, theirs = socket.socketpair()

        def make() -> None:
            os.makedirs(directory, 0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            fds = [os.open(directory + "/" + name, flags, 0o600) for name in _NAMES.values()]
            send_fds(theirs, b"f", fds)

        with ours, theirs:
            pid = run_as_tenant(tenant, make, keep=[theirs])
            theirs.close()
            ours.settimeout(_OPEN_S)
            try:
                _, fds = receive_fds(ours, 1, 2)
            except OSError:
                # Tenant code can stop a process of its own uid, and must not stop PID 1 by it.
                os.kill(pid, signal.SIGKILL)
                return None
        if len(fds) != 2:
            return None
        return cls(directory, dict(zip(_NAMES, fds)), limit)

    def replay(self, log: bytes) -> None:
        """Writes what the log already holds, so that the files start at the beginning."""
        at = 0
        while at < len(log):
            kind, length = struct.unpack_from(">BI", log, at)
            at += protocol.RECORD.size
            if kind in _NAMES:
                self.write(kind, log[at : at + length])
            at += length

    def write(self, kind: int, data: bytes) -> None:
        data = data[: self._room]
        if not data:
            return
        try:
            self._room -= os.write(self._files[kind], data)
        except OSError:
            self._room = 0

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._room = 0
