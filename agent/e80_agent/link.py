"""The agent's end of the link: dials the daemon, proves the key, and serves one request at a time per stream.

The daemon may vanish and come back at any moment. Execs do not notice; the link redials within 200 ms.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any, Callable, Dict, Optional, Set

from e80_agent import protocol
from e80_agent.execs import Exec
from e80_agent.loop import Loop, Timer

REDIAL_S = 0.1
SPARE_CONNECTIONS = 2
_HANDSHAKE_S = 5.0
_SEND_SIZE = 256 * 1024
_EAGER_BYTES = 256 * 1024

Handler = Callable[["Connection", Dict[str, Any], bytes], None]


class Connection:
    """One connection to the daemon: nonce, then requests; while it follows an exec, that exec's log."""

    def __init__(self, link: Link, role: bytes) -> None:
        self._link = link
        self._role = role
        self._loop = link.loop
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._input = bytearray()
        self._output = bytearray()
        self._proved = False
        self._follows: Optional[Exec] = None
        self._offset = 0
        self._missed = 0
        self._eager = True
        self.idle = False
        self._timer: Optional[Timer] = None

    def dial(self) -> None:
        """Connects; raises OSError when nobody listens. A unix socket answers at once or not at all."""
        self.sock.setblocking(False)
        self.sock.connect(self._link.address)
        self._loop.set_reader(self.sock.fileno(), self._readable)
        self._timer = self._loop.call_later(_HANDSHAKE_S, self.close)

    def close(self) -> None:
        if self.sock.fileno() < 0:
            return
        self.detach()
        self.sock.close()

    def detach(self) -> socket.socket:
        """Takes the connection out of the loop, for a child that goes on with it; the caller closes it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._follows is not None:
            self._unfollow()
        self._loop.forget(self.sock.fileno())
        self._link.gone(self)
        return self.sock

    def reply(self, header: Dict[str, Any]) -> None:
        self._send(protocol.pack_header(header))
        self._next_request()

    def fail(self, code: str, message: str) -> None:
        assert code in protocol.ERROR_CODES, code
        self.reply({"ok": False, "code": code, "message": message[:1000]})

    def follow(self, run: Exec, offset: int, eager: bool, resumed: bool = False) -> None:
        """Answers with the exec's log from `offset` on, until its last record. Not eager means: in as few
        writes as possible, because nobody looks at the output before the end."""
        reply: Dict[str, Any] = {"ok": True, "size": run.log.end, "finished": run.finished}
        if run.log.base:
            reply.update(base=run.log.base, dropped=run.log.dropped)
        if resumed:
            reply.update(resumed=True, age_s=round(time.monotonic() - run.created, 3))
        self._output += protocol.pack_header(reply)
        self._follows = run
        self._offset = max(offset, run.log.base)
        self._missed = 0
        self._eager = eager
        run.followers.append(self)
        self.log_grew()

    def log_grew(self) -> None:
        run = self._follows
        assert run is not None
        if self._eager or run.finished or run.log.end - self._offset > _EAGER_BYTES:
            self._writable()

    def log_drops(self, start: int, end: int) -> None:
        """A follower that is too slow for a log that keeps the newest output: what it has begun to send it
        sends to its end, and goes on where the log then begins, once there is room again."""
        run = self._follows
        assert run is not None
        if self._offset <= start:
            self._missed += end - start - protocol.RECORD.size
        elif self._offset < end:
            self._output += run.log.read(self._offset, end - self._offset)
            self._offset = end

    def _readable(self) -> None:
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._input += data
        if not self._proved:
            self._prove()
        if self._proved and self._role == protocol.ROLE_CONTROL:
            self._link.asked_for(sum(self._input))
            self._input.clear()
        elif self._proved and self.idle:
            self._parse()

    def _prove(self) -> None:
        if len(self._input) < protocol.NONCE_SIZE:
            return
        nonce = bytes(self._input[: protocol.NONCE_SIZE])
        del self._input[: protocol.NONCE_SIZE]
        self._proved = True
        self.idle = True
        if self._timer is not None:
            self._timer.cancel()
        self._send(protocol.proof(self._link.key, self._role, nonce))

    def _parse(self) -> None:
        data = self._input
        if len(data) < 4:
            return
        try:
            end = 4 + protocol.header_length(bytes(data[:4]))
            if len(data) < end:
                return
            header = protocol.parse_header(bytes(data[4:end]))
            body_size = header.get("body", 0)
            if not isinstance(body_size, int) or not 0 <= body_size <= protocol.MAX_BODY:
                raise protocol.ProtocolError("bad body size")
        except protocol.ProtocolError:
            self.close()
            return
        if len(data) < end + body_size:
            return
        body = bytes(data[end : end + body_size])
        del data[: end + body_size]
        self.idle = False
        self._link.request(self, header, body)

    def take_input(self) -> bytes:
        """What the daemon has already sent beyond the request; for operations that read on by themselves."""
        data = bytes(self._input)
        self._input.clear()
        return data

    def _next_request(self) -> None:
        self.idle = True
        if self._input:
            self._parse()

    def _send(self, data: bytes) -> None:
        self._output += data
        self._writable()

    def _writable(self) -> None:
        """Sends what is due; a reader that is slow costs a copy of at most _SEND_SIZE and delays nobody."""
        run = self._follows
        while True:
            if run is not None and len(self._output) < _SEND_SIZE and self._offset < run.log.end:
                if self._offset < run.log.base:
                    self._skip(run)
                chunk = run.log.read(self._offset, _SEND_SIZE)
                self._output += chunk
                self._offset += len(chunk)
                run.log.sent = max(run.log.sent, self._offset)
            if not self._output:
                break
            try:
                sent = self.sock.send(self._output)
            except BlockingIOError:
                self._loop.set_writer(self.sock.fileno(), self._writable)
                return
            except OSError:
                self.close()
                return
            del self._output[:sent]
        self._loop.set_writer(self.sock.fileno(), None)
        if run is not None and run.finished and self._offset >= run.log.end:
            self._unfollow()
            self._next_request()

    def _skip(self, run: Exec) -> None:
        gap = {"base": run.log.base, "missed": self._missed}
        self._output += protocol.pack_record(protocol.RECORD_GAP, json.dumps(gap).encode())
        self._offset, self._missed = run.log.base, 0

    def _unfollow(self) -> None:
        assert self._follows is not None
        if self in self._follows.followers:
            self._follows.followers.remove(self)
        self._follows = None


class Link:
    """All connections of this agent: one control connection, and streams dialled ahead of their use."""

    def __init__(self, loop: Loop, address: str, key: bytes, on_request: Handler) -> None:
        self.loop = loop
        self.address = address
        self.key = key
        self.request = on_request
        self._control: Optional[Connection] = None
        self._streams: Set[Connection] = set()

    def start(self) -> None:
        """Dials until the daemon answers; called again whenever it was lost."""
        control = Connection(self, protocol.ROLE_CONTROL)
        try:
            control.dial()
        except OSError:
            control.sock.close()
            self.loop.call_later(REDIAL_S, self.start)
            return
        self._control = control
        self.asked_for(SPARE_CONNECTIONS)

    def asked_for(self, count: int) -> None:
        for _ in range(count):
            if len(self._streams) >= protocol.MAX_CONNECTIONS - 1:
                return
            connection = Connection(self, protocol.ROLE_STREAM)
            try:
                connection.dial()
            except OSError:
                connection.sock.close()
                return
            self._streams.add(connection)

    def gone(self, connection: Connection) -> None:
        if connection is self._control:
            self._control = None
            self.loop.call_later(REDIAL_S, self.start)
        self._streams.discard(connection)

    def used(self, _connection: Connection) -> None:
        """Called when a spare begins to work: another one is dialled so that the next need not wait."""
        if sum(1 for item in self._streams if item.idle) < SPARE_CONNECTIONS:
            self.asked_for(1)
