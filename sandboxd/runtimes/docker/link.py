"""The daemon's end of the link to one agent: listens, checks who dials, keeps the connections that wait.

The socket and the key lie in a folder of the daemon's that the container sees read-only. A connection counts
only after its peer has proved the key; where the peer's process can be seen, it must be in the container.
"""

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path

import structlog
from e80_agent import protocol

from sandboxd.runtimes.base import SandboxSpec
from sandboxd.runtimes.errors import AgentUnreachableError

log = structlog.get_logger(__name__)

_HANDSHAKE_S = 5.0
_CLOSE_S = 1.0
_MAX_IDLE = 8
_READ_LIMIT = 1024 * 1024
_PEER = struct.Struct("3i")
_CLOSED = "its link was closed"
_PAUSED = "the sandbox is paused"

PeerCheck = Callable[[int], bool]
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class LinkStream:
    """One use of a proved connection; see kit.streams.Stream. The next use gets an object of its own, so
    that a late `release` or `close` of this one cannot reach it."""

    def __init__(self, link: "Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._link = link
        self._open = True

    def release(self) -> None:
        if self._open:
            self._open = False
            self._link.take_back(self.reader, self.writer)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._link.hang_up(self.writer)


class Link:
    """The listener of one sandbox. `open` may follow `close` in another process: the agent redials."""

    def __init__(self, sandbox_id: str, folder: Path, peer_check: PeerCheck | None) -> None:
        self.sandbox_id = sandbox_id
        self.folder = folder
        self.peer_check = peer_check
        self._key = b""
        self._server: asyncio.Server | None = None
        self._control: asyncio.StreamWriter | None = None
        self._idle: deque[_Connection] = deque()
        self._writers: set[asyncio.StreamWriter] = set()
        self._waiting: deque[asyncio.Future[LinkStream]] = deque()
        self._asked = 0
        self._closed = False
        self.paused = False

    async def open(self) -> None:
        """Reads the key that `write_config` left and listens. Raises OSError when the folder is not there."""
        self._key = bytes.fromhex(json.loads((self.folder / "config.json").read_bytes())["key"])
        path = self.folder / "agent.sock"
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            path.chmod(0o600)
            self._server = await asyncio.start_unix_server(
                self._accept, sock=sock, limit=_READ_LIMIT, backlog=protocol.MAX_CONNECTIONS
            )
        except BaseException:
            sock.close()
            raise

    async def close(self) -> None:
        """Stops listening and hangs up. The files stay: they belong to the sandbox, not to this process."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._control is not None:
            self._control.close()
        writers = list(self._writers)
        for writer in writers:
            self.hang_up(writer)
        self._closed = True
        self._refuse_waiting(_CLOSED)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    def pause(self) -> None:
        """Hangs up and refuses to dial until `resume`; goes on listening. The agent is frozen, so what is
        still to be sent is dropped: it would wait for ever."""
        if self.paused:
            return
        self.paused = True
        for writer in list(self._writers):
            self._writers.discard(writer)
            writer.transport.abort()
        self._control = None
        self._idle.clear()
        self._refuse_waiting(_PAUSED)

    def resume(self) -> None:
        """Lets the agent in again, which dials as soon as it finds its connections gone."""
        self.paused = False

    async def dial(self, timeout_s: float) -> LinkStream:
        """A connection that waits, or the next that the agent makes. Raises AgentUnreachableError."""
        if self._closed or self.paused:
            raise self._unreachable(_CLOSED if self._closed else _PAUSED)
        while self._idle:
            reader, writer = self._idle.pop()
            if _usable(reader, writer):
                return LinkStream(self, reader, writer)
            self.hang_up(writer)
        future: asyncio.Future[LinkStream] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._ask()
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            self._asked = max(0, self._asked - 1)
            raise self._unreachable(f"no connection within {timeout_s:g} s") from error
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()  # it came just as nobody wanted it any more
            raise
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def take_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hands the connection to who waits for one, or keeps it, or hangs up when there are enough."""
        if not _usable(reader, writer):
            self.hang_up(writer)
            return
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(LinkStream(self, reader, writer))
                return
        if len(self._idle) < _MAX_IDLE:
            self._idle.append((reader, writer))
        else:
            self.hang_up(writer)

    def hang_up(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()

    @property
    def connected(self) -> bool:
        return self._control is not None

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def _unreachable(self, reason: str) -> AgentUnreachableError:
        return AgentUnreachableError(f"the agent of sandbox {self.sandbox_id} cannot be reached: {reason}")

    def _refuse_waiting(self, reason: str) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_exception(self._unreachable(reason))
        self._waiting.clear()

    def _ask(self) -> None:
        """Asks the agent for as many connections as are waited for and not already on their way."""
        missing = min(len(self._waiting) - self._asked, protocol.MAX_CONNECTIONS)
        if self._control is not None and missing > 0:
            self._control.write(bytes([missing]))
            self._asked += missing

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A border: whatever the peer does, it costs this connection and nothing else.
        if self._closed or self.paused:
            writer.close()
            return
        self._writers.add(writer)
        try:
            role = await self._handshake(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, protocol.ProtocolError) as error:
            log.warning("link.refused", sandbox_id=self.sandbox_id, reason=str(error) or type(error).__name__)
            self.hang_up(writer)
            return
        if role == protocol.ROLE_CONTROL:
            await self._serve_control(reader, writer)
            return
        self._asked = max(0, self._asked - 1)
        self.take_back(reader, writer)

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        if len(self._writers) > protocol.MAX_CONNECTIONS:
            raise protocol.ProtocolError("too many connections")
        self._check_peer(writer)
        nonce = secrets.token_bytes(protocol.NONCE_SIZE)
        writer.write(nonce)
        async with asyncio.timeout(_HANDSHAKE_S):
            answer = await reader.readexactly(protocol.PROOF_SIZE)
        role = answer[:1]
        if role not in (protocol.ROLE_CONTROL, protocol.ROLE_STREAM):
            raise protocol.ProtocolError("unknown role")
        if not hmac.compare_digest(answer, protocol.proof(self._key, role, nonce)):
            raise protocol.ProtocolError("wrong key")
        return role

    def _check_peer(self, writer: asyncio.StreamWriter) -> None:
        if self.peer_check is None:
            return
        sock = writer.get_extra_info("socket")
        pid, _uid, _gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if not self.peer_check(pid):
            raise protocol.ProtocolError(f"process {pid} is not in the container")

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._control is not None:
            self._control.close()
        self._control = writer
        self._asked = 0
        self._ask()
        with contextlib.suppress(OSError):
            # The agent sends nothing here: anything read, and the end, ends the connection.
            await reader.read(1)
        self.hang_up(writer)
        if self._control is writer:
            self._control = None


def _usable(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    return not reader.at_eof() and not writer.is_closing()


def write_config(folder: Path, spec: SandboxSpec) -> None:
    """The agent's configuration with a new key, readable by root only: the tenant sees the folder."""
    config = {
        "key": secrets.token_hex(32),
        "uid": spec.uid,
        "gid": spec.uid,
        "max_processes": spec.max_processes,
        "nobody_uid": spec.nobody_uid,
        "nobody_max_processes": spec.nobody_processes,
    }
    fd = os.open(folder / "config.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
    with os.fdopen(fd, "w") as file:
        json.dump(config, file)
