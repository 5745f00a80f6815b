"""The agent's side of the parent interpreters: starting them, their spare children, the exits they report."""

from __future__ import annotations

import collections
import os
import signal
import socket
import time
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple

from e80_agent import interpreter, launch
from e80_agent.fork import receive_fds
from e80_agent.loop import Loop, Timer

Spare = Tuple[int, socket.socket]
OnSpare = Callable[[int, socket.socket], None]
OnExit = Callable[[int, float, int], None]

_RESTART_DELAY_S = 0.2
_RESTART_MAX_S = 5.0

PARK_AFTER_S = 120.0
# After the first calls in a context that missed it: they have the processor first.
WARM_LATER_S = 2.0

# Imports are what makes a run slow; these are forked from, heavier ones are imported by the child (a fork
# copies every page table: with sympy and sklearn in the parent each fork would cost 15 ms instead of 4).
WARM_MODULES = ["numpy", "pandas", "matplotlib.pyplot"]
_WARM_WORDS = (b"numpy", b"pandas", b"matplotlib", b"scipy", b"sklearn", b"seaborn")

# OpenBLAS and OpenMP start threads when they are imported; a process with threads must not fork.
_ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

# Read when a library is imported, so a fork of a parent that has imported it would ignore them.
_READ_AT_IMPORT = ("PYTHON", "MPL", "OPENBLAS_", "OMP_", "MKL_", "NUMEXPR_", "LD_", "GLIBC_", "MALLOC_")


class Interpreter:
    """One parent process and its children."""

    def __init__(
        self, loop: Loop, preload: List[str], extra_env: Dict[str, str], tenant_env: Dict[str, str]
    ) -> None:
        self._loop = loop
        self._preload = preload
        self._extra_env = extra_env
        self._tenant_env = tenant_env
        self._sock: Optional[socket.socket] = None
        self._spares: Deque[Spare] = collections.deque()
        self._waiting: Deque[OnSpare] = collections.deque()
        self._on_exit: Dict[int, OnExit] = {}
        self._forks_asked = 0
        self._was_ready = False
        self._stopped = False
        self._restarts = 0
        self.pid: Optional[int] = None
        self.ready = False

    def start(self, launched: Optional[Tuple[int, int]] = None) -> None:
        """Launches the parent, or takes one that was launched before there was a loop."""
        if self.pid is not None:
            return
        self._stopped = False
        try:
            self.pid, control = launched or launch.launch(self._preload, self._extra_env, self._tenant_env)
        except OSError:
            # No room for a process, which tenant code can bring about; it cannot last.
            self._loop.call_later(_RESTART_DELAY_S, self.start)
            return
        self._sock = socket.socket(fileno=control)
        self._sock.setblocking(False)
        self._loop.set_reader(control, self._readable)
        self._loop.on_exit(self.pid, lambda _pid, _status, _usage: self._died())

    def stop(self) -> None:
        """Ends the parent and its spares; `start` begins anew. Only while it is not busy."""
        self._stopped = True
        self._lost()

    @property
    def busy(self) -> bool:
        """Whether children of it run, or are waited for: their exits reach us only through it."""
        return bool(self._on_exit or self._waiting)

    def take(self, callback: OnSpare) -> None:
        """Calls back with a child forked ahead, now or as soon as there is one."""
        if self._spares:
            callback(*self._spares.popleft())
            self._ask_for_fork()
            return
        self._waiting.append(callback)
        if self.ready and self._forks_asked < len(self._waiting):
            self._ask_for_fork()

    def watch(self, pid: int, callback: OnExit) -> None:
        """`callback(wait status, cpu_ms, memory growth in KiB)` when the child `pid` has ended."""
        self._on_exit[pid] = callback

    def pids(self) -> Iterator[int]:
        if self.pid is not None:
            yield self.pid
        for pid, _ in self._spares:
            yield pid

    def _ask_for_fork(self) -> None:
        if self._sock is not None:
            self._forks_asked += 1
            self._sock.sendall(interpreter.FORK)

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            data, fds = receive_fds(self._sock, interpreter.REPORT.size, 1)
        except BlockingIOError:
            return
        if not data:
            self._lost()
            return
        kind, pid, status, cpu_ms, grown_kb = interpreter.REPORT.unpack(data)
        if kind == interpreter.READY:
            self.ready = True
            self._was_ready = True
            for _ in range(max(1, len(self._waiting))):
                self._ask_for_fork()
        elif kind == interpreter.SPARE:
            self._forks_asked -= 1
            self._spare(pid, socket.socket(fileno=fds[0]))
        elif kind == interpreter.EXITED:
            self._spares = collections.deque(item for item in self._spares if item[0] != pid)
            callback = self._on_exit.pop(pid, None)
            if callback is not None:
                callback(status, cpu_ms, grown_kb)

    def _spare(self, pid: int, sock: socket.socket) -> None:
        if not self._waiting:
            self._spares.append((pid, sock))
            return
        self._waiting.popleft()(pid, sock)
        if not self._waiting and not self._forks_asked:
            self._ask_for_fork()

    def _lost(self) -> None:
        if self._sock is None:
            return
        self._loop.forget(self._sock.fileno())
        self._sock.close()
        self._sock = None
        self.ready = False
        self._forks_asked = 0

    def _died(self) -> None:
        """The parent was killed (out of memory, most likely). Its children are ours now; start another."""
        if self._sock is not None:
            self._drain()
        self.pid = None
        for _pid, sock in self._spares:
            sock.close()  # a spare without its socket ends
        self._spares.clear()
        for pid, callback in self._on_exit.items():
            if _is_child(pid):
                self._loop.on_exit(pid, _adopted(callback))
            else:
                callback(signal.SIGKILL, 0.0, 0)  # reaped as an orphan, before we knew whose it was
        self._on_exit.clear()
        if self._stopped:
            return
        if not self._was_ready and self._preload:
            return  # its imports cannot be preloaded here; runs import them themselves
        self._restarts += 1
        self._loop.call_later(min(_RESTART_MAX_S, _RESTART_DELAY_S * self._restarts), self.start)

    def _drain(self) -> None:
        while self._sock is not None:
            self._readable()


class Interpreters:
    """The bare parent, always there, and the warm one, started when it is worth its memory."""

    def __init__(self, loop: Loop, base_env: Dict[str, str], launched: Tuple[int, int]) -> None:
        self.bare = Interpreter(loop, [], {}, base_env)
        self.warm = Interpreter(loop, WARM_MODULES, _ONE_THREAD, base_env)
        self._loop = loop
        self._warm_wanted = False
        self._warm_used = 0.0
        self._park_timer: Optional[Timer] = None
        self.bare.start(launched)

    def choose(self, code: bytes) -> Interpreter:
        """The parent to fork `code` from. A plain search for the names: parsing hostile code in PID 1 is
        not worth the few runs that mention a library without importing it."""
        if any(word in code for word in _WARM_WORDS):
            if self.warm.ready:
                return self.warm
            self._warm_wanted = True
        return self.bare

    def take_to_keep(
        self, language: str, callback: Callable[[Interpreter, int, socket.socket], None]
    ) -> None:
        """Calls back with a child that will be a context. One for Python is of the warm parent, if that is
        there. It is not worth a wait: a child of the bare one imports what a context needs five times as
        fast as the warm one starts, and is there alone; the next one is to find the warm one all the same."""
        parent = self.warm if language == "python" and self.warm.ready else self.bare
        parent.take(lambda pid, sock: callback(parent, pid, sock))
        if language == "python" and parent is self.bare:
            self._loop.call_later(WARM_LATER_S, self.start_warm)

    def run_ended(self, parent: Interpreter) -> None:
        """Starts the warm parent once somebody has missed it, and not while they import it themselves."""
        if parent is self.warm:
            self._warm_used = time.monotonic()
        elif self._warm_wanted:
            self._warm_wanted = False
            self.start_warm()

    def start_warm(self) -> None:
        self._warm_used = time.monotonic()
        self.warm.start()
        if self._park_timer is None:
            self._park_timer = self._loop.call_later(PARK_AFTER_S, self._park)

    def _park(self) -> None:
        """Ends a warm parent that nobody has used for a while: it is most of an idle sandbox's memory."""
        left = self._warm_used + PARK_AFTER_S - time.monotonic()
        if left > 0 or self.warm.busy:
            self._park_timer = self._loop.call_later(max(left, 1.0), self._park)
            return
        self._park_timer = None
        self.warm.stop()

    def pids(self) -> Iterator[int]:
        yield from self.bare.pids()
        yield from self.warm.pids()


def needs_fresh(env: Dict[str, str]) -> bool:
    """Whether variables given for one run are such as only a new interpreter would notice."""
    return any(key.startswith(_READ_AT_IMPORT) for key in env)


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _adopted(callback: OnExit) -> Callable[[int, int, Any], None]:
    def exited(_pid: int, status: int, usage: Any) -> None:
        callback(status, (usage.ru_utime + usage.ru_stime) * 1000, usage.ru_maxrss)

    return exited
