"""Execs: what runs or ran, the bounded log of each, its deadline and its end.

The log is the record stream itself, so a follower is an offset into it: a daemon that lost its connection,
or was restarted, asks for the same exec from where it stopped and nothing is lost or doubled.
"""

from __future__ import annotations

import array
import collections
import errno
import fcntl
import json
import os
import signal
import termios
import time
from typing import Any, Callable, Deque, Dict, Iterable, List, Optional, Protocol, Tuple

from e80_agent import protocol
from e80_agent.log import Log
from e80_agent.loop import Loop, Timer
from e80_agent.spool import Spool
from e80_agent.stdin import Stdin
from e80_agent.sweep import Sweep
from e80_agent.tenant import TAG_BASE, Tenant, check_user, rights_of
from e80_agent.terminal import Terminal, check_size, open_terminal

MAX_RUNNING = 64
KEPT_FINISHED = 64
KEPT_BYTES = 32 * 1024 * 1024
# Ids of execs whose logs are gone are kept in two generations of so many: the older one goes as a whole.
REMEMBERED = 32768
_READ_SIZE = 65536
_MAX_PACKETS = 64
_MAX_EARLY_SIGNALS = 16
# More than a terminal holds on its way from one end to the other.
_MAX_IN_TERMINAL = 256 * 1024


class Follower(Protocol):
    def log_grew(self) -> None: ...

    def log_drops(self, start: int, end: int) -> None:
        """The record between these offsets is about to be dropped."""


class Session(Protocol):
    """What runs an exec that has no process of its own: the context whose call it is."""

    def kill_call(self, run: Exec, reason: str) -> None: ...

    def signal_call(self, run: Exec, number: int) -> bool: ...


class Exec:
    """One run. `finished` is set with the last record of its log."""

    def __init__(self, header: Dict[str, Any], tag: int, stdin: bytes = b"") -> None:
        self.id: str = header["id"]
        self.kind = "command" if header["op"] == "command" else "code"
        self.context: Optional[str] = header.get("context")
        self.session: Optional[Session] = None
        self.waiting = False  # for its turn in its session
        self.fingerprint: Optional[str] = header.get("fingerprint")
        self.user = check_user(header.get("user", "user"))
        self.tag = tag
        self.timeout_s: Optional[float] = header.get("timeout_s")
        self.output_limit: int = header["output_limit"]
        self.spool_limit: int = header.get("spool_limit", 0)
        self.log = Log(self.output_limit, header.get("ring") is True, self._drops)
        self.followers: List[Follower] = []
        self.finished = False
        self.pid: Optional[int] = None
        self.reason = "exit"
        self.truncated = False
        self.created = self.started = time.monotonic()  # `started` moves on by the time deadlines were held
        self.main_exited = False
        self.status = 0
        self.cpu_ms = 0.0
        self.max_rss_kb = 0
        self.fault: Optional[Dict[str, str]] = None  # why it could not even be started
        self.oom_kills_before = oom_kills()
        self.outputs: Dict[int, int] = {}  # our end of a pipe -> record kind
        self.error = bytearray()
        pty = header.get("pty")
        self.pty_size = None if pty is None else check_size(pty.get("rows"), pty.get("cols"))
        self.terminal: Optional[Terminal] = None
        self.stdin = Stdin(stdin, pty is not None or header.get("stdin_open") is True)
        self.early_signals: List[int] = []  # sent while there was no process yet
        self.deadline: Optional[Timer] = None
        self.left_s = self.timeout_s  # of its time, when the clock of deadlines last began to run or stopped
        self.spool: Optional[Spool] = None
        self.ending = False

    def append(self, kind: int, payload: bytes) -> None:
        """Adds a record that does not count as output."""
        self.log.append(kind, payload)
        self._tell()

    def output(self, kind: int, data: bytes) -> None:
        """Adds what the program wrote, within the limit."""
        self.log.output(kind, data)
        self._tell()

    def _tell(self) -> None:
        for follower in list(self.followers):
            follower.log_grew()

    def _drops(self, start: int, end: int) -> None:
        for follower in self.followers:
            follower.log_drops(start, end)


class Execs:
    """The execs of this sandbox."""

    def __init__(
        self,
        loop: Loop,
        tenant: Tenant,
        own_pids: Callable[[], Iterable[int]],
        remembered: int = REMEMBERED,
    ) -> None:
        self._loop = loop
        self._tenant = tenant
        self._own_pids = own_pids
        self._remembered = remembered
        self._by_id: Dict[str, Exec] = {}
        self._finished: Deque[Exec] = collections.deque()
        self._gone: Dict[int, None] = {}
        self._gone_before: Dict[int, None] = {}
        self._held_since: Optional[float] = None
        self._tags = 0

    def get(self, exec_id: str) -> Optional[Exec]:
        return self._by_id.get(exec_id)

    def all(self) -> List[Exec]:
        return list(self._by_id.values())

    def running(self) -> int:
        return len(self._by_id) - len(self._finished)

    def create(self, header: Dict[str, Any], stdin: bytes, session: Optional[Session] = None) -> Exec:
        """A new exec, whose time begins now, or for a call in a session with `begin`."""
        self._tags = (self._tags + 1) % 0x20000000
        run = Exec(header, TAG_BASE + self._tags, stdin)
        self._by_id[run.id] = run
        run.session, run.waiting = session, session is not None
        if self._held_since is None and not run.waiting:
            self._arm(run)
        return run

    def new_tag(self) -> int:
        """A mark that no process carries."""
        self._tags = (self._tags + 1) % 0x20000000
        return TAG_BASE + self._tags

    def begin(self, run: Exec) -> None:
        """The turn of a call has come: from now on its deadline runs."""
        run.waiting = False
        run.started = time.monotonic()
        run.oom_kills_before = oom_kills()
        if self._held_since is None:
            self._arm(run)

    def forget(self, run: Exec) -> None:
        """For an exec that could not be started: as if it had never been."""
        self._by_id.pop(run.id, None)
        if run.finished:
            self._finished.remove(run)
        run.finished = True
        if run.deadline is not None:
            run.deadline.cancel()
        self._close_pipes(run)

    def is_gone(self, exec_id: str) -> bool:
        """Whether an exec with a key ran under this id whose log is no longer here."""
        number = hash(exec_id)
        return number in self._gone or number in self._gone_before

    @property
    def held(self) -> bool:
        return self._held_since is not None

    def hold(self) -> None:
        """Stops the clock of all deadlines, for the time the sandbox is frozen. May be called twice."""
        if self._held_since is not None:
            return
        for run in self._by_id.values():
            run.left_s = self.left_s(run)
            if run.deadline is not None:
                run.deadline.cancel()
        self._held_since = time.monotonic()

    def release(self) -> None:
        """Deadlines go on with what was left of them, or begin, for execs begun meanwhile. May be called
        twice."""
        if self._held_since is None:
            return
        since, self._held_since = self._held_since, None
        now = time.monotonic()
        for run in self._by_id.values():
            if not run.finished:
                run.started += now - max(since, run.started)
                if not run.ending and not run.waiting:
                    self._arm(run)

    def left_s(self, run: Exec) -> Optional[float]:
        """What is left of the exec's time; None for one without a limit."""
        if run.timeout_s is None or self.held or run.waiting:
            return run.left_s
        return max(0.0, run.timeout_s - (time.monotonic() - run.started))

    def _arm(self, run: Exec) -> None:
        if run.left_s is not None:
            run.deadline = self._loop.call_later(run.left_s, lambda: self.kill(run, "timeout"))

    def open_pipes(self, run: Exec, with_error: bool) -> List[int]:
        """Pipes for stdin, stdout, stderr (and the error channel), or a terminal for the first three; returns
        the child's ends, to be closed. Raises OSError."""
        uid = self._tenant.user(run.user).uid
        theirs: List[int] = []
        try:
            if run.pty_size is not None:
                self._open_terminal(run, uid, run.pty_size, theirs)
            else:
                with rights_of(uid):
                    self._open_pipes(run, with_error, theirs)
        except OSError:
            for fd in theirs:
                os.close(fd)
            self._close_pipes(run)
            raise
        return theirs

    def _open_pipes(self, run: Exec, with_error: bool, theirs: List[int]) -> None:
        if run.stdin.wanted:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            run.stdin.own(writer)
            theirs.append(reader)
        else:
            theirs.append(os.open("/dev/null", os.O_RDONLY))
        kinds = [protocol.RECORD_STDOUT, protocol.RECORD_STDERR]
        for kind in kinds + ([protocol.RECORD_ERROR] if with_error else []):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            run.outputs[reader] = kind
            theirs.append(writer)

    def _open_terminal(self, run: Exec, uid: int, size: Tuple[int, int], theirs: List[int]) -> None:
        master, run.terminal = open_terminal(uid, size)
        run.outputs[master] = protocol.RECORD_STDOUT
        run.stdin.own(os.dup(master), is_terminal=True)
        theirs.extend(run.terminal.duplicate() for _ in range(3))

    def started(self, run: Exec, pid: int) -> None:
        """The process exists: from here on it is read and fed and, at the end, swept."""
        run.pid = pid
        for fd in run.outputs:
            self._loop.set_reader(fd, self._reader(run, fd))
        run.stdin.start(self._loop)
        for number in run.early_signals:
            self.signal(run, number)
        run.early_signals = []

    def exited(self, run: Exec, status: int, cpu_ms: float, max_rss_kb: int) -> None:
        """The main process has ended: whatever it left behind ends with it."""
        run.main_exited = True
        run.status, run.cpu_ms, run.max_rss_kb = status, cpu_ms, max_rss_kb
        self._end(run)

    def kill(self, run: Exec, reason: str) -> None:
        """Ends the exec and all it started. Does nothing when it is already ending."""
        if run.finished or run.ending:
            return
        if run.session is not None:
            run.session.kill_call(run, reason)
            return
        run.reason = reason
        if run.pid is None:
            run.main_exited = True
            run.status = signal.SIGKILL
        elif not run.main_exited:
            _kill(run.pid, signal.SIGKILL)
        self._end(run)

    def signal(self, run: Exec, number: int) -> bool:
        """Sends a signal to the exec's process group; SIGKILL ends everything it started. False when it came
        too late."""
        if run.finished or run.ending:
            return False
        if run.session is not None:
            return run.session.signal_call(run, number)
        if number == signal.SIGKILL:
            self.kill(run, "killed")
        elif run.pid is None:
            run.early_signals = [*run.early_signals, number][-_MAX_EARLY_SIGNALS:]
        else:
            try:
                os.killpg(run.pid, number)
            except ProcessLookupError:
                return _kill(run.pid, number)
        return True

    def _end(self, run: Exec) -> None:
        if run.ending:
            return
        run.ending = True
        if run.deadline is not None:
            run.deadline.cancel()
        Sweep(self._loop, run.tag, self._own_pids, lambda: run.main_exited, lambda: self._finish(run)).run()

    def _finish(self, run: Exec) -> None:
        # Every writer is gone, so what is in the pipes now is all there will be. Not more than that: another
        # exec may have been handed a descriptor, and could write as fast as we read.
        self.drain(run)
        self._close_pipes(run)
        if run.error:
            run.append(protocol.RECORD_ERROR, bytes(run.error))
        run.finished = True
        run.append(protocol.RECORD_END, json.dumps(self._outcome(run)).encode())
        run.followers.clear()
        self._finished.append(run)
        self._evict()

    def drain(self, run: Exec) -> None:
        """Moves what the pipes hold at this moment into the log."""
        if run.terminal is not None:
            run.terminal.close()
        for fd in list(run.outputs):
            left = _waiting_bytes(fd) if run.terminal is None else _MAX_IN_TERMINAL
            while left > 0 and fd in run.outputs:
                size = self._read(run, fd)
                left = left - size if size else 0

    def call_ended(self, run: Exec, status: int, cpu_ms: float, max_rss_kb: int) -> List[int]:
        """A call in a session is over. What it started lives on, so nothing is swept. Returns the pipes that
        somebody may still write to, which are the caller's now."""
        run.ending = run.main_exited = True
        run.waiting = False
        run.status, run.cpu_ms, run.max_rss_kb = status, cpu_ms, max_rss_kb
        if run.deadline is not None:
            run.deadline.cancel()
        self.drain(run)
        left = list(run.outputs)
        for fd in left:
            self._loop.forget(fd)
        run.outputs.clear()
        self._finish(run)
        return left

    def add_result(self, run: Exec, payload: bytes) -> None:
        """Adds a rich result of a call, behind what the call had written when it came."""
        self.drain(run)
        run.append(protocol.RECORD_RESULT, payload)

    def _outcome(self, run: Exec) -> Dict[str, Any]:
        number = os.WTERMSIG(run.status) if os.WIFSIGNALED(run.status) else None
        code = os.WEXITSTATUS(run.status) if os.WIFEXITED(run.status) else None
        if run.reason == "exit" and (number == signal.SIGKILL or code == 128 + signal.SIGKILL):
            if oom_kills() > run.oom_kills_before:
                run.reason = "oom"
        return {
            "exit_code": code,
            "signal": number,
            "reason": run.reason,
            "fault": run.fault,
            "truncated": run.truncated,
            "spool": run.spool.directory if run.spool is not None else None,
            "duration_ms": round((time.monotonic() - run.started) * 1000, 3),
            "cpu_ms": round(run.cpu_ms, 3),
            "max_rss_kb": run.max_rss_kb,
        }

    def _reader(self, run: Exec, fd: int) -> Callable[[], None]:
        def readable() -> None:
            self._read(run, fd)

        return readable

    def _read(self, run: Exec, fd: int) -> int:
        """Moves what a pipe holds, about one read's worth, into the log; returns how much that was."""
        kind = run.outputs[fd]
        data = b""
        # A pipe in packet mode gives one write at a time; a record for each would drown who reads them.
        for _ in range(_MAX_PACKETS):
            try:
                part = os.read(fd, _READ_SIZE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                part = b""  # how the end of a terminal reads
            if not part:
                self._loop.forget(fd)
                os.close(fd)
                del run.outputs[fd]
                break
            data = data + part if data else part
            if len(data) >= _READ_SIZE // 2:
                break
        if not data:
            return 0
        if kind == protocol.RECORD_ERROR:
            run.error += data[: protocol.MAX_ERROR - len(run.error)]
        else:
            self._log(run, kind, data)
        return len(data)

    def _log(self, run: Exec, kind: int, data: bytes) -> None:
        if not run.truncated and not run.log.has_room(len(data)):
            run.truncated = True
            if run.spool_limit:
                run.spool = Spool.open(run.id, self._tenant, run.spool_limit)
                if run.spool is not None:
                    run.spool.replay(run.log.read(0, len(run.log)))
        if run.spool is not None:
            run.spool.write(kind, data)
        run.output(kind, data)

    def _close_pipes(self, run: Exec) -> None:
        for fd in list(run.outputs):
            self._loop.forget(fd)
            os.close(fd)
        run.outputs.clear()
        run.stdin.close()
        if run.terminal is not None:
            run.terminal.close()
        if run.spool is not None:
            run.spool.close()

    def _evict(self) -> None:
        """Finished logs are kept for a daemon that may come back for them, within a bound."""
        kept = sum(len(run.log) for run in self._finished)
        while len(self._finished) > 1 and (len(self._finished) > KEPT_FINISHED or kept > KEPT_BYTES):
            oldest = self._finished.popleft()
            kept -= len(oldest.log)
            del self._by_id[oldest.id]
            if oldest.fingerprint is not None:
                self._remember(oldest.id)

    def _remember(self, exec_id: str) -> None:
        """So that a retry that comes late is told that it ran, instead of running it again. Hashes only, and
        only of execs with a key: every other id is random, and nobody sends it twice."""
        if len(self._gone) >= self._remembered:
            self._gone, self._gone_before = {}, self._gone
        self._gone[hash(exec_id)] = None


def oom_kills() -> int:
    """How often the kernel's out-of-memory killer has struck in this container; 0 where it does not tell."""
    for path in ("/sys/fs/cgroup/memory/memory.oom_control", "/sys/fs/cgroup/memory.events"):
        try:
            with open(path) as file:
                for line in file:
                    name, _, count = line.partition(" ")
                    if name == "oom_kill":
                        return int(count)
        except OSError:
            continue
    return 0


def _waiting_bytes(fd: int) -> int:
    """How many bytes a pipe holds right now; where nobody can tell, the most it can hold."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        return 1024 * 1024
    return count[0]


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
