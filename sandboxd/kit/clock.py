"""Time as an object, so that tests can turn it."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Unix seconds (UTC); may jump."""

    def monotonic(self) -> float:
        """Seconds since the host booted, sleep included. Never jumps, and means the same in every process."""


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
