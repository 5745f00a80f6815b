"""The event loop of PID 1: descriptors, timers and children, on epoll, in one thread.

asyncio would cost every sandbox some 8 MB and 40 ms of start-up; the agent needs three kinds of events.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import signal
import sys
import time
import traceback
from typing import Any, Callable, Dict, List, Optional

# So many timers are looked through for cancelled ones.
_TIDY_TIMERS = 256

Callback = Callable[[], None]
ExitCallback = Callable[[int, int, Any], None]


class Timer:
    """A pending call; cancel() may be called twice and after it ran."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Optional[Callback] = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    def __init__(self) -> None:
        self.faults = 0
        self._epoll = select.epoll()
        self._readers: Dict[int, Callback] = {}
        self._writers: Dict[int, Callback] = {}
        self._timers: List[Any] = []
        self._tidy_at = _TIDY_TIMERS
        self._sequence = itertools.count()
        self._children: Dict[int, ExitCallback] = {}
        self._orphan_holds = 0
        self._wake_r, wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.set_reader(self._wake_r, self._woken)

    def set_reader(self, fd: int, callback: Optional[Callback]) -> None:
        self._set(self._readers, fd, callback)

    def set_writer(self, fd: int, callback: Optional[Callback]) -> None:
        self._set(self._writers, fd, callback)

    def forget(self, fd: int) -> None:
        """Must be called before `fd` is closed: a closed descriptor's number is soon used again."""
        self._set(self._readers, fd, None)
        self._set(self._writers, fd, None)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        timer = Timer(callback)
        if len(self._timers) >= self._tidy_at:
            # Most execs end long before their deadline, which would stay here for up to an hour.
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._tidy_at = max(_TIDY_TIMERS, 2 * len(self._timers))
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._sequence), timer))
        return timer

    def on_exit(self, pid: int, callback: ExitCallback) -> None:
        """`callback(pid, wait status, rusage)` once, when the child `pid` has been reaped."""
        self._children[pid] = callback

    def known_children(self) -> Any:
        return self._children.keys()

    def hold_orphans(self) -> None:
        """Leave orphans unreaped: a zombie keeps its slot in the pids limit, so a fork bomb being killed
        runs out of room instead of racing us."""
        self._orphan_holds += 1

    def release_orphans(self) -> None:
        self._orphan_holds -= 1
        if self._orphan_holds == 0:
            self._guarded(self._reap)

    def run(self) -> None:
        self._guarded(self._reap)  # a child may have ended before we watched
        while True:
            for fd, events in self._poll():
                if events & ~select.EPOLLOUT and fd in self._readers:
                    self._guarded(self._readers[fd])
                if events & ~select.EPOLLIN and fd in self._writers:
                    self._guarded(self._writers[fd])
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                timer = heapq.heappop(self._timers)[2]
                if timer.callback is not None:
                    self._guarded(timer.callback)

    def _poll(self) -> List[Any]:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        timeout = -1.0
        if self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        return self._epoll.poll(timeout, 64)

    def _guarded(self, callback: Callback) -> None:
        # The one border of the agent: PID 1 must outlive any fault of a single callback.
        try:
            callback()
        except Exception:
            self.faults += 1
            sys.stderr.write("agent: " + traceback.format_exc())

    def _set(self, table: Dict[int, Callback], fd: int, callback: Optional[Callback]) -> None:
        before = (fd in self._readers, fd in self._writers)
        if callback is None:
            table.pop(fd, None)
        else:
            table[fd] = callback
        after = (fd in self._readers, fd in self._writers)
        if before == after:
            return
        mask = (select.EPOLLIN if after[0] else 0) | (select.EPOLLOUT if after[1] else 0)
        if not mask:
            self._epoll.unregister(fd)
        elif any(before):
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)

    def _woken(self) -> None:
        try:
            while os.read(self._wake_r, 512):
                continue
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        if self._orphan_holds:
            for pid in list(self._children):
                self._reap_one(pid)
            return
        while self._reap_one(-1):
            continue

    def _reap_one(self, which: int) -> bool:
        try:
            pid, status, usage = os.wait4(which, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return False
        callback = self._children.pop(pid, None)
        if callback is not None:
            self._guarded(lambda: callback(pid, status, usage))
        return True
