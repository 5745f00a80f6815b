"""Short-lived children of the agent, and passing descriptors between processes."""

from __future__ import annotations

import array
import os
import resource
import socket
import sys
import traceback
from typing import Any, Callable, List, Tuple

from e80_agent import tenant as tenants
from e80_agent.tenant import Tenant


def run_as_tenant(tenant: Tenant, work: Callable[[], None], keep: List[socket.socket]) -> int:
    """Forks a child that acts as the tenant and runs `work`; returns its pid.

    The child keeps only the given sockets and never runs code of the tenant. The kernel sees the tenant in
    all it does to files, but it stays out of the tenant's reach: no signal, no trace, no descriptor of it.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        tenants.default_signals()
        low = 3
        for fd in sorted(item.fileno() for item in keep):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        tenants.offer_to_oom_killer()
        tenants.act_as(tenant.uid, tenant.gid)
        os.umask(0o022)
        os.chdir(tenants.HOME)
        work()
        code = 0
    except BaseException:
        # Nobody above this frame may ever run: it is a copy of PID 1.
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)
    raise AssertionError("unreachable")


def send_fds(sock: socket.socket, data: bytes, fds: List[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def receive_fds(sock: socket.socket, size: int, max_fds: int) -> Tuple[bytes, List[int]]:
    """One message of at most `size` bytes and the descriptors that came with it."""
    fds = array.array("i")
    data, ancillary, _flags, _address = sock.recvmsg(size, socket.CMSG_SPACE(max_fds * fds.itemsize))
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    received: List[Any] = list(fds)
    return data, received
