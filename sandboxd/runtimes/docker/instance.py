"""Which run of the engine this is: the process behind its socket, the moment it began, and the host's boot.

Asked of the kernel and not of the engine, whose API has no word for it.
"""

import asyncio
import os
import socket
import struct
from pathlib import Path

from sandboxd.runtimes.docker.engine import Engine
from sandboxd.runtimes.errors import EngineUnavailableError

_CONNECT_S = 2.0
_PEER = struct.Struct("3i")
_LISTENS = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix


class EngineInstance:
    """Names the engine's run; while the process that was found lives, a name costs one read of /proc."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: tuple[int, str] | None = None

    async def name(self) -> str:
        """Raises EngineUnavailableError. An engine behind TCP, or in another process namespace, is known by
        its id only: the name changes with the host's boot, and not with the engine's restart."""
        if self._known is not None:
            pid, name = self._known
            if _name(pid) == name:
                return name
            self._known = None
        if not self._engine.url.startswith("unix://"):
            return await self._by_id()
        path = self._engine.url.removeprefix("unix://")
        pid = await asyncio.to_thread(_listener, path)
        if pid == 1:
            # systemd opened the socket and handed it on, with the first call at the latest.
            await self._engine.call(lambda client: client.ping())
            pid = await asyncio.to_thread(_other_holder, path)
        found = _name(pid) if pid else None
        if found is None:
            return await self._by_id()
        self._known = (pid, found)
        return found

    async def _by_id(self) -> str:
        info = await self._engine.call(lambda client: client.info())
        return f"{_boot_id()}-{info.get('ID')}"


def _listener(path: str) -> int:
    """The process that listens at a unix socket, as our own namespace knows it; 0 when it does not."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_CONNECT_S)
        try:
            sock.connect(path)
        except OSError as error:
            raise EngineUnavailableError(f"no Docker Engine answers at {path}: {error}") from error
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(peer)[0])


def _other_holder(path: str) -> int:
    """The process, but for the first of the host, that has the listening socket open; 0 for none."""
    real = os.path.realpath(path)
    wanted = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and int(fields[3], 16) & _LISTENS and os.path.realpath(fields[7]) == real:
            wanted.add(f"socket:[{fields[6]}]")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or entry.name == "1":
            continue
        try:
            if any(os.readlink(fd) in wanted for fd in (entry / "fd").iterdir()):
                return int(entry.name)
        except OSError:
            continue  # ended meanwhile
    return 0


def _name(pid: int) -> str | None:
    """Boot, process and when it began, in ticks since the boot; None when it is not there any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The program's name is in brackets and may hold anything; the start is the 20th field after it.
    fields = stat.rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return f"{_boot_id()}-{pid}-{int(fields[19])}"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
