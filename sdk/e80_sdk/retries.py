"""When a request that failed is sent again: how long trouble is waited out, and with which pauses. Knows no
HTTP."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from e80_sdk.errors import E80Error, RequestTimeoutError

PATIENCE_S = 60.0
"""How long a server that restarts is waited for."""
BUSY_PATIENCE_S = 30.0
"""How long a server that says it is full, or that something behind it is down, is waited for."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
STEADY_S = 5.0
"""A request that may take long and went well for so long has left the trouble before it behind."""
STREAM_SILENCE_S = 60.0
"""A stream of events that says nothing for so long, not even that it is alive, is opened anew."""

OnWait = Callable[[E80Error, float], None]


@dataclass(frozen=True)
class Patience:
    """How much trouble is borne.

    Attributes:
        total_s: How long one trouble (a restart, say) is waited out; 0 for not at all.
        unknown_s: The same for a server that never answered yet, where the address may be wrong; None for
            `total_s`.
        max_retries: At most so many retries of one call; None for as many as fit into the time.
    """

    total_s: float = PATIENCE_S
    unknown_s: float | None = None
    max_retries: int | None = None

    def limit_s(self, *, known: bool, busy: bool) -> float:
        """The time for one trouble."""
        limit_s = self.total_s if known or self.unknown_s is None else min(self.unknown_s, self.total_s)
        return min(limit_s, BUSY_PATIENCE_S) if busy else limit_s


class Failure(Exception):
    """An attempt failed with `error`.

    `resend` says whether sending it again can do harm; `asked_s` is the pause that the server asked for;
    `busy` says that the server works but has no room; `broken` that the connection broke under way.
    """

    def __init__(
        self,
        error: E80Error,
        *,
        resend: bool,
        asked_s: float | None = None,
        busy: bool = False,
        broken: bool = False,
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.resend = resend
        self.asked_s = asked_s
        self.busy = busy
        self.broken = broken


def silence_is_broken(failure: Failure) -> Failure:
    """Silence of a stream is a broken connection: a healthy one says now and then that it is alive."""
    if isinstance(failure.error, RequestTimeoutError):
        return Failure(failure.error, resend=True, broken=True)
    return failure


class Attempts:
    """The attempts of one call: pauses between them, and the end of patience."""

    def __init__(
        self,
        patience: Patience,
        *,
        sleep: Callable[[float], Awaitable[None]],
        clock: Callable[[], float],
        on_wait: OnWait | None = None,
        lasting: bool = False,
    ) -> None:
        """`lasting`: the call may take long by itself, so a break late in it is a new trouble."""
        self._patience = patience
        self._sleep = sleep
        self._clock = clock
        self._on_wait = on_wait
        self._lasting = lasting
        self._retries = 0
        self._pauses = 0
        self._since: float | None = None
        self._began = clock()

    def begin(self) -> None:
        """An attempt begins."""
        self._began = self._clock()

    def progress(self) -> None:
        """Something new arrived: whatever trouble there was is over."""
        self._since = None

    async def again(self, failure: Failure, *, known: bool) -> None:
        """Pause before the next attempt; `known` says whether the server has ever answered.

        Raises:
            E80Error: The error of the failure, when there is to be no next attempt.
        """
        now = self._clock()
        if self._since is None or (self._lasting and failure.broken and now - self._began >= STEADY_S):
            self._since, self._pauses = now, 0
        limit_s = self._patience.limit_s(known=known, busy=failure.busy)
        pause_s = self._pause_s() if failure.asked_s is None else failure.asked_s
        left_s = self._since + limit_s - now - pause_s
        most = self._patience.max_retries
        if not failure.resend or left_s < 0 or (most is not None and self._retries >= most):
            self._tell_end(failure, now)
            raise failure.error from failure.__cause__
        self._retries += 1
        self._pauses += 1
        if self._on_wait is not None:
            self._on_wait(failure.error, left_s)
        await self._sleep(pause_s)

    def _pause_s(self) -> float:
        longest_s = min(FIRST_PAUSE_S * 2.0 ** min(self._pauses, 16), LONGEST_PAUSE_S)
        return longest_s * random.uniform(0.75, 1.0)  # many clients must not come back at the same moment

    def _tell_end(self, failure: Failure, now: float) -> None:
        if not self._retries or not failure.resend or failure.busy:
            return
        assert self._since is not None
        error = failure.error
        error.message += f" (gave up after {self._retries + 1} attempts in {now - self._since:.0f} s)"
        error.args = (error.message,)
