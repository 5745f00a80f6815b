"""Ends what an exec started: every process that carries its group mark, however it was detached.

Process groups miss setsid, parents miss double forks, and killing by uid would take the neighbours of the
same sandbox along. The mark is a supplementary group (see tenant.become), which no tenant can drop.
"""

from __future__ import annotations

import os
import signal
from typing import Callable, Iterable, List

from e80_agent.loop import Loop

_PASS_DELAY_S = 0.002
_UNKILLABLE_S = 0.05


def marked(tag: int, skip: Iterable[int]) -> List[int]:
    """The processes, zombies aside, that carry `tag`; `skip` are pids known to be ours."""
    known = set(skip)
    found = []
    needle = b"%d" % tag
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in known:
            continue
        try:
            with open("/proc/" + name + "/status", "rb", buffering=0) as file:
                status = file.read(4096)
        except OSError:
            continue
        if b"\nState:\tZ" in status:
            continue
        groups = status.partition(b"\nGroups:")[2].partition(b"\n")[0]
        if needle in groups.split():
            found.append(int(name))
    return found


class Sweep:
    """Kills until nothing marked is left, one pass per turn of the loop, then calls `done`."""

    def __init__(
        self, loop: Loop, tag: int, skip: Callable[[], Iterable[int]], done: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._tag = tag
        self._skip = skip
        self._done = done
        self._holding = False
        self._passes = 0

    def run(self) -> None:
        left = marked(self._tag, self._skip())
        if not left:
            if self._holding:
                self._loop.release_orphans()
            self._done()
            return
        if not self._holding:
            self._holding = True
            self._loop.hold_orphans()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        # A process in an uninterruptible wait dies when its wait ends; there is no use in spinning on it.
        self._passes += 1
        self._loop.call_later(_PASS_DELAY_S if self._passes < 100 else _UNKILLABLE_S, self.run)
