"""Ends what an exec started: every process that carries its group mark, however it was detached.

Process groups miss setsid, parents miss double forks, and killing by uid would take the neighbours of the
same sandbox along. The mark is a supplementary group (see tenant.become), which no tenant can drop.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Callable, Iterable, List, Set, Tuple

from e80_agent.loop import Loop

_PASS_DELAY_S = 0.002
_UNKILLABLE_S = 0.05
# How long a pass may find nobody but those who were killed before.
_STUCK_S = 1.0


def marked(tag: int, skip: Iterable[int]) -> Tuple[List[int], List[int]]:
    """The processes that carry `tag`, alive and dead; `skip` are pids known to be ours."""
    known = set(skip)
    alive: List[int] = []
    dead: List[int] = []
    needle = b"%d" % tag
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in known:
            continue
        try:
            with open("/proc/" + name + "/status", "rb", buffering=0) as file:
                status = file.read(4096)
        except OSError:
            continue
        if needle not in _field(status, b"Groups").split():
            continue
        # A process whose first thread has ended shows as a zombie, too, while its other threads run on.
        ended = _field(status, b"State").startswith(b"Z") and _field(status, b"Threads") == b"1"
        (dead if ended else alive).append(int(name))
    return alive, dead


def _field(status: bytes, name: bytes) -> bytes:
    return status.partition(b"\n" + name + b":")[2].partition(b"\n")[0].strip()


class Sweep:
    """Kills until nothing marked is left, one pass per turn of the loop, then calls `done`.

    A pass is no snapshot: a process can fork and end before it is looked at, its child is not in the list
    any more. But while orphans are not reaped it leaves a zombie, so the last pass is one that finds
    nothing alive and no zombie that the pass before had not seen, after the main process was reaped.

    One that hangs in the kernel (a disk that does not answer) cannot die before its wait ends. It was
    killed all the same and runs no more code of its own: the exec does not wait for it.
    """

    def __init__(
        self,
        loop: Loop,
        tag: int,
        skip: Callable[[], Iterable[int]],
        main_reaped: Callable[[], bool],
        done: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._tag = tag
        self._skip = skip
        self._main_reaped = main_reaped
        self._done = done
        self._zombies: Set[int] = set()
        self._killed: Set[int] = set()
        self._last_news = time.monotonic()
        self._passes = 0
        loop.hold_orphans()

    def run(self) -> None:
        try:
            over = self._pass()
        except OSError:
            over = False  # out of descriptors, say: the next pass may have better luck
        if over:
            self._loop.release_orphans()
            self._done()
            return
        # A process in an uninterruptible wait dies when its wait ends; there is no use in spinning on it.
        self._passes += 1
        self._loop.call_later(_PASS_DELAY_S if self._passes < 100 else _UNKILLABLE_S, self.run)

    def _pass(self) -> bool:
        may_be_last = self._main_reaped()
        left, dead = marked(self._tag, self._skip())
        if may_be_last and not left and self._zombies.issuperset(dead):
            return True
        if not (may_be_last and self._killed.issuperset(left) and self._zombies.issuperset(dead)):
            self._last_news = time.monotonic()
        elif time.monotonic() - self._last_news > _STUCK_S:
            return True
        self._zombies.update(dead)
        self._killed.update(left)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return False
