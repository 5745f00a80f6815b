"""Contexts: interpreters and shells that keep their state from call to call.

A call is an exec with a log of its own; the calls of one context run one after the other. The context
outlives them all, and what a call started lives on with it. See docs/design/contexts.md.
"""

from __future__ import annotations

import collections
import os
import signal
import time
from typing import Any, Callable, Deque, Dict, Iterable, List, Optional, Tuple

from e80_agent import channel, protocol
from e80_agent.context_process import Process
from e80_agent.execs import Exec, Execs, oom_kills
from e80_agent.interpreters import Interpreters
from e80_agent.loop import Loop, Timer
from e80_agent.tenant import Tenant

LANGUAGES = ("python", "bash")
MAX_CONTEXTS = 16
MAX_QUEUED = 16
# Between the interrupt of a call that has to end and the end of its context.
GRACE_S = 1.0
START_S = 15.0
# All results of one call together; a single one has protocol.MAX_RESULT.
MAX_RESULTS = 8 * 1024 * 1024
_RESULT_OVERHEAD = 400
_TOO_MANY_RESULTS = b'{"text/plain": "<further results left out: those of one call may take 8 MiB>"}'

# What went wrong: a code of protocol.ERROR_CODES and a message.
Fault = Tuple[str, str]
Done = Callable[[Optional[Fault]], None]


class Context:
    def __init__(self, contexts: Contexts, header: Dict[str, Any]) -> None:
        self.id: str = header["id"]
        self.language: str = header["language"]
        self.cwd: str = header["cwd"]
        self.env: Dict[str, str] = header["env"]
        self.fingerprint: Optional[str] = header.get("fingerprint")
        self.created_at = self.last_used_at = time.time()
        self.executions = 0
        self.lost: Optional[str] = None  # why it has no process any more
        self._contexts = contexts
        self._loop = contexts.loop
        self._execs = contexts.execs
        self._process: Optional[Process] = None
        self._ready = False
        self._queue: Deque[Tuple[Exec, bytes]] = collections.deque()
        self._call: Optional[Exec] = None
        self._call_reason: Optional[str] = None  # why the call is being ended, unless it ends by itself
        self._grace: Optional[Timer] = None
        self._start_timer: Optional[Timer] = None
        self._fault: Optional[Fault] = None
        self._on_started: List[Done] = []
        self._on_over: List[Callable[[], None]] = []
        self._oom_kills = 0
        self._results = 0  # bytes of the call that runs

    @property
    def status(self) -> str:
        if self.lost is not None:
            return "lost"
        return "busy" if self._call is not None or self._queue or not self._ready else "idle"

    @property
    def full(self) -> bool:
        return len(self._queue) >= MAX_QUEUED

    def start(self, done: Done) -> None:
        """Starts its process; `done` is called when it takes calls, or cannot. May be called twice."""
        self._on_started.append(done)
        if self._process is not None:
            return
        self.lost = self._fault = None
        self.executions = 0
        self._oom_kills = oom_kills()
        self._process = self._contexts.start_process(self)
        self._start_timer = self._loop.call_later(START_S, self._start_failed)

    def add(self, run: Exec, code: bytes) -> None:
        """Takes a call, to run when those before it have ended. Only while it is neither lost nor full."""
        self._queue.append((run, code))
        self._next()

    def interrupt(self) -> None:
        """What Ctrl-C does: the call that runs gets a KeyboardInterrupt, the state stays."""
        if self._process is not None and self._call is not None:
            self._process.interrupt()

    def end(self, why: str, over: Callable[[], None]) -> None:
        """Ends its process and all it started, and the calls in it; `over` is called when nothing is left."""
        self.lost = why
        if self._call is not None:
            self._call_reason = self._call_reason or "killed"
        for run, _ in list(self._queue):
            self.kill_call(run, "killed")
        if self._process is None:
            over()
            return
        self._on_over.append(over)
        self._process.kill()

    def kill_call(self, run: Exec, reason: str) -> None:
        """Ends a call: one that waits never runs, one that runs is interrupted and, if that does not end it
        within the grace, ended with its context."""
        if run is not self._call:
            self._queue = collections.deque(item for item in self._queue if item[0] is not run)
            run.reason = reason
            self._execs.call_ended(run, signal.SIGKILL, 0.0, 0)
        elif self._call_reason is None:
            self._call_reason = reason
            self.interrupt()
            self._arm_grace(2)

    def signal_call(self, run: Exec, number: int) -> bool:
        if run is not self._call:
            if number not in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                return False
            self.kill_call(run, "killed")
        elif number == signal.SIGKILL:
            self.end("it was sent SIGKILL", lambda: None)
        elif number == signal.SIGTERM:
            self.kill_call(run, "killed")
        else:
            assert self._process is not None
            return self._process.signal(number)
        return True

    def said(self, kind: int, payload: bytes) -> None:
        """A record of its process. Raises ProtocolError for what it cannot say now."""
        run = self._call
        if kind == channel.READY:
            self._set_ready()
        elif kind == channel.FAULT:
            self._set_fault(payload)
        elif kind == channel.ENDING:
            self.lost = "its shell has ended"
        elif run is None:
            return  # a thread that displays something between two calls
        elif kind == channel.RESULT:
            self._add_result(run, payload)
        elif kind == channel.ERROR:
            run.error = bytearray(payload)
        else:
            self._call_done(run, channel.parse_done(payload))

    def over(self, status: int, cpu_ms: float, grown_kb: int) -> None:
        """Nothing is left of its process."""
        self._process, self._ready = None, False
        if self._start_timer is not None:
            self._start_timer.cancel()
        self.lost = self.lost or self._why_lost(status)
        if self._call is not None:
            self._end_call(self._call, status, cpu_ms, grown_kb)
        while self._queue:
            run, _ = self._queue.popleft()
            run.fault = {"code": "context_lost", "message": self.lost_message}
            self._execs.call_ended(run, 0, 0.0, 0)
        self._tell_started(self._fault or ("start_failed", "the context did not start: %s" % self.lost))
        over, self._on_over = self._on_over, []
        for callback in over:
            callback()

    @property
    def lost_message(self) -> str:
        return "context %s is lost: %s; restart it, its state is gone" % (self.id, self.lost)

    def _next(self) -> None:
        while self._ready and self._call is None and self._queue and self.lost is None:
            run, code = self._queue.popleft()
            try:
                theirs = self._execs.open_pipes(run, with_error=False)
            except OSError as error:
                run.fault = {"code": "start_failed", "message": str(error.strerror)}
                self._execs.call_ended(run, 0, 0.0, 0)
                continue
            assert self._process is not None
            assert self._process.pid is not None
            os.close(theirs[0])
            self._call, self._results = run, 0
            self.executions += 1
            self.last_used_at = time.time()
            self._execs.begin(run)
            self._execs.started(run, self._process.pid)
            self._process.send(self.executions, code, theirs[1:])

    def _call_done(self, run: Exec, done: channel.Done) -> None:
        if done.number != self.executions:
            raise protocol.ProtocolError("the end of call %d" % done.number)
        self._end_call(run, (done.exit_code & 0xFF) << 8, done.cpu_ms, done.grown_kb)
        self._next()

    def _end_call(self, run: Exec, status: int, cpu_ms: float, grown_kb: int) -> None:
        self._call = None
        self.last_used_at = time.time()
        if self._grace is not None:
            self._grace.cancel()
        run.reason, self._call_reason = self._call_reason or run.reason, None
        left = self._execs.call_ended(run, status, cpu_ms, grown_kb)
        if self._process is not None:
            self._process.keep_tails(left)
        else:
            for fd in left:
                os.close(fd)

    def _add_result(self, run: Exec, payload: bytes) -> None:
        # Each costs something: there may be any number of empty ones.
        before, self._results = self._results, self._results + _RESULT_OVERHEAD + len(payload)
        if self._results <= MAX_RESULTS:
            self._execs.add_result(run, payload)
        elif before <= MAX_RESULTS:
            self._execs.add_result(run, _TOO_MANY_RESULTS)
        if self._process is not None:
            self._process.acknowledge()

    def _arm_grace(self, parts: int) -> None:
        """Interrupts once more when half of the grace is over: the first may have come too early."""
        due = time.monotonic() + GRACE_S / 2

        def passed() -> None:
            if time.monotonic() - due > GRACE_S:
                self._arm_grace(parts)  # the sandbox was frozen meanwhile, and the call with it
            elif parts > 1:
                self.interrupt()
                self._arm_grace(parts - 1)
            elif self._process is not None:
                ended = "its time was over" if self._call_reason == "timeout" else "it was cancelled"
                self.lost = "a call did not end when it was interrupted, because %s" % ended
                self._process.kill()

        self._grace = self._loop.call_later(GRACE_S / 2, passed)

    def _set_ready(self) -> None:
        if self._start_timer is not None:
            self._start_timer.cancel()
        self._ready = True
        self._tell_started(None)
        self._next()

    def _set_fault(self, payload: bytes) -> None:
        code, _, message = payload.decode("utf-8", "replace").partition(" ")
        if self._ready or code not in protocol.ERROR_CODES:
            raise protocol.ProtocolError("a fault of no known code")
        self._fault = (code, message)
        self.lost = message

    def _start_failed(self) -> None:
        if self._process is not None:
            self._fault = ("start_failed", "the context did not start within %d s" % START_S)
            self.lost = self._fault[1]
            self._process.kill()

    def _tell_started(self, fault: Optional[Fault]) -> None:
        waiting, self._on_started = self._on_started, []
        for done in waiting:
            done(fault)

    def _why_lost(self, status: int) -> str:
        if os.WIFEXITED(status):
            return "its process ended with exit status %d" % os.WEXITSTATUS(status)
        number = os.WTERMSIG(status)
        if number == signal.SIGKILL and oom_kills() > self._oom_kills:
            return "the sandbox ran out of memory and its process was killed"
        if number == signal.SIGKILL:
            return "its process was killed, or hung up on the agent and had to be"
        return "its process was ended by signal %d" % number


class Contexts:
    """The contexts of this sandbox."""

    def __init__(
        self,
        loop: Loop,
        tenant: Tenant,
        execs: Execs,
        interpreters: Interpreters,
        own_pids: Callable[[], Iterable[int]],
    ) -> None:
        self.loop = loop
        self.execs = execs
        self._tenant = tenant
        self._interpreters = interpreters
        self._own_pids = own_pids
        self._by_id: Dict[str, Context] = {}

    def get(self, context_id: str) -> Optional[Context]:
        return self._by_id.get(context_id)

    def all(self) -> List[Context]:
        return list(self._by_id.values())

    def create(self, header: Dict[str, Any], done: Done) -> Optional[Fault]:
        """Starts a context; why not, if it cannot even be tried."""
        if header["language"] not in LANGUAGES:
            known = ", ".join(LANGUAGES)
            return "unknown_language", "no %s here: contexts speak %s" % (header["language"], known)
        if len(self._by_id) >= MAX_CONTEXTS:
            return "busy", "%d contexts are there, the limit" % MAX_CONTEXTS
        context = Context(self, header)
        self._by_id[context.id] = context

        def started(fault: Optional[Fault]) -> None:
            if fault is not None:
                self._forget(context)
            done(fault)

        context.start(started)
        return None

    def delete(self, context: Context, over: Callable[[], None]) -> None:
        self._forget(context)
        context.end("it was deleted", over)

    def restart(self, context: Context, done: Done) -> None:
        """A new process for it, unless it is deleted meanwhile; the calls that run or wait are ended."""

        def over() -> None:
            if self.get(context.id) is context:
                context.start(done)
            else:
                done(None)

        context.end("it is being restarted", over)

    def start_process(self, context: Context) -> Process:
        process = Process(self.loop, self.execs, self._own_pids, context)
        process.start(self._interpreters, self._tenant, context.language, context.cwd, context.env)
        return process

    def _forget(self, context: Context) -> None:
        if self._by_id.get(context.id) is context:
            del self._by_id[context.id]
