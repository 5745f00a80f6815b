"""The process of a context as the agent sees it: its start, what it is told, what it says, its end."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import socket
import termios
from typing import Any, Callable, Dict, List, Optional, Protocol, Tuple

from e80_agent import channel, runner
from e80_agent.execs import Execs
from e80_agent.fork import send_fds
from e80_agent.interpreters import Interpreter, Interpreters
from e80_agent.loop import Loop, Timer
from e80_agent.protocol import ProtocolError
from e80_agent.sweep import Sweep

# What the child of a parent gets is read at once; the limit is for one that was killed meanwhile.
_SEND_S = 5.0
_READ_SIZE = 256 * 1024
# Pipes of calls that have ended, to which something that they started may still write.
MAX_TAILS = 16
_TAIL_READ = 65536
_MAX_ACKS = 4096
_TAIL_DELAY_S = 0.05


class Owner(Protocol):
    def said(self, kind: int, payload: bytes) -> None: ...

    def over(self, status: int, cpu_ms: float, grown_kb: int) -> None: ...


class Process:
    """One life of a context. Its owner is told of each record, and once that nothing of it is left."""

    def __init__(self, loop: Loop, execs: Execs, skip: Callable[[], Any], owner: Owner) -> None:
        self._loop = loop
        self._owner = owner
        self._skip = skip
        self._tag = execs.new_tag()
        self._interpreters: Optional[Interpreters] = None
        self._sock: Optional[socket.socket] = None
        self._records = channel.Records()
        self._output = bytearray()
        self._fds: List[int] = []
        self._tails: Dict[int, Optional[Timer]] = {}
        self._exit: Optional[Tuple[int, float, int]] = None
        self._sweeping = False
        self.pid: Optional[int] = None
        self.killed = False

    def start(self, interpreters: Interpreters, tenant: Any, language: str, cwd: str, env: Any) -> None:
        header = {
            "uid": tenant.uid,
            "gid": tenant.gid,
            "tag": self._tag,
            "max_processes": tenant.max_processes,
            "env": env,
            "cwd": cwd,
            "context": language,
        }
        self._interpreters = interpreters
        interpreters.take_to_keep(language, lambda *child: self._forked(header, *child))

    def send(self, number: int, code: bytes, fds: List[int]) -> None:
        """Hands over a call; the descriptors are closed here. The one before it must have ended."""
        if self._output or self._fds or self._unread():
            # It told the end of a call that it had not even read. Descriptors on their way count for root on
            # the whole host, and at our limit of open files no agent could send any more.
            for fd in fds:
                os.close(fd)
            self.kill()
            return
        self._output += channel.REQUEST.pack(number, len(code)) + code
        self._fds = fds
        self._writable()

    def acknowledge(self) -> None:
        """Answers a result, whose process prints nothing more until then."""
        self._output += channel.ACK
        if len(self._output) > _MAX_ACKS:
            self.kill()  # it never reads them
            return
        self._writable()

    def interrupt(self) -> None:
        self.signal(signal.SIGINT)

    def signal(self, number: int) -> bool:
        if self.pid is None or self._exit is not None:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """Ends it and all it started. The owner hears of it when nothing is left."""
        if self.pid is None:
            if not self.killed:
                self._loop.call_later(0, self._never_began)
            self.killed = True
            return
        self.killed = True
        self.signal(signal.SIGKILL)
        self._sweep()

    def keep_tails(self, fds: List[int]) -> None:
        """Takes the pipes of a call that has ended. What is still written to them goes nowhere; but whatever
        writes, a server that the call started, say, must not die of a pipe that nobody reads."""
        for fd in fds:
            self._tails[fd] = None
            self._loop.set_reader(fd, lambda fd=fd: self._swallow(fd))  # type: ignore[misc]
        while len(self._tails) > MAX_TAILS:
            self._close_tail(next(iter(self._tails)))

    def _never_began(self) -> None:
        self._owner.over(signal.SIGKILL, 0.0, 0)

    def _forked(self, header: Dict[str, Any], parent: Interpreter, pid: int, sock: socket.socket) -> None:
        if self.killed:
            sock.close()  # without its socket the child ends
            return
        self.pid = pid

        def exited(status: int, cpu_ms: float, grown_kb: int) -> None:
            self._exit = (status, cpu_ms, grown_kb)
            self._sweep()
            assert self._interpreters is not None
            self._interpreters.run_ended(parent)

        parent.watch(pid, exited)
        request = runner.pack_request(header, b"")
        null = os.open("/dev/null", os.O_RDWR)
        try:
            sock.settimeout(_SEND_S)
            send_fds(sock, request[: runner.REQUEST.size], [null, null, null])
            sock.sendall(request[runner.REQUEST.size :])
        except OSError:
            sock.close()
            self.kill()
            return
        finally:
            os.close(null)
        sock.setblocking(False)
        self._sock = sock
        self._loop.set_reader(sock.fileno(), self._came)

    def _came(self) -> None:
        self._readable()

    def _readable(self) -> bool:
        """Passes on what has come; False when that is nothing."""
        assert self._sock is not None
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        try:
            if not data:
                raise ProtocolError("it hung up")
            for kind, payload in self._records.feed(data):
                self._owner.said(kind, payload)
        except ProtocolError:
            # It has ended, or it says what no process of ours says: then it has to.
            self._hang_up()
            self.kill()
        return True

    def _writable(self) -> None:
        if self._sock is None:
            self._drop_fds()
            return
        try:
            if self._fds:
                send_fds(self._sock, bytes(self._output[: channel.REQUEST.size]), self._fds)
                del self._output[: channel.REQUEST.size]
                self._drop_fds()
            while self._output:
                sent = self._sock.send(memoryview(self._output)[:_READ_SIZE])
                del self._output[:sent]
        except BlockingIOError:
            self._loop.set_writer(self._sock.fileno(), self._writable)
            return
        except OSError:
            self._hang_up()
            self.kill()
            return
        self._loop.set_writer(self._sock.fileno(), None)

    def _swallow(self, fd: int) -> None:
        """Reads a tail, at a pace that leaves the agent its time."""
        try:
            data = os.read(fd, _TAIL_READ)
        except BlockingIOError:
            return
        if not data:
            self._close_tail(fd)
            return
        self._loop.set_reader(fd, None)

        def go_on() -> None:
            self._tails[fd] = None
            self._loop.set_reader(fd, lambda: self._swallow(fd))

        self._tails[fd] = self._loop.call_later(_TAIL_DELAY_S, go_on)

    def _close_tail(self, fd: int) -> None:
        timer = self._tails.pop(fd)
        if timer is not None:
            timer.cancel()
        self._loop.forget(fd)
        os.close(fd)

    def _unread(self) -> bool:
        """Whether something that was sent waits to be read. Who ends a call has read all there is."""
        if self._sock is None:
            return False
        waiting = array.array("i", [0])
        fcntl.ioctl(self._sock, termios.TIOCOUTQ, waiting)
        return waiting[0] > 0

    def _drop_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._loop.forget(self._sock.fileno())
            self._sock.close()
            self._sock = None
        self._output.clear()
        self._drop_fds()

    def _sweep(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            Sweep(self._loop, self._tag, self._skip, lambda: self._exit is not None, self._over).run()

    def _over(self) -> None:
        while self._sock is not None and self._readable():
            continue  # its last words
        self._close()
        assert self._exit is not None
        self._owner.over(*self._exit)

    def _close(self) -> None:
        self._hang_up()
        for fd in list(self._tails):
            self._close_tail(fd)
