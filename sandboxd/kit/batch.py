"""Group commit: many small writes in few transactions, off the way of who makes them. Knows no table."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

import structlog

from sandboxd.kit.errors import SandboxdError

log = structlog.get_logger(__name__)

T = TypeVar("T")

DELAY_S = 0.05
MAX_ROWS = 500
MAX_WAITING = 20_000
RETRY_S = 1.0


class Batch(Generic[T]):
    """Holds what `add` is given until `write` has it. `write` may get an item twice, when it failed or was
    cancelled the first time: it must make no difference. Loses the oldest when too many wait, and says so."""

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[T]], Awaitable[object]],
        on_dropped: Callable[[int], object],
        *,
        delay_s: float = DELAY_S,
        max_rows: int = MAX_ROWS,
        max_waiting: int = MAX_WAITING,
        retry_s: float = RETRY_S,
    ) -> None:
        self._name = name
        self._write = write
        self._on_dropped = on_dropped
        self._delay_s = delay_s
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._retry_s = retry_s
        self._waiting: deque[T] = deque()
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._dropping = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def settled(self) -> bool:
        """Whether all that it was given is written: what is being written waits no more, and is not there
        yet."""
        return not self._waiting and not self._turn.locked()

    def add(self, item: T) -> None:
        """Takes an item; it is written within `delay_s`, if it can be."""
        self._waiting.append(item)
        self._wake.set()
        if len(self._waiting) > self._max_waiting:
            self._drop()

    async def run(self) -> None:
        """Writes what comes, until it is cancelled; then `close`."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._delay_s)
            try:
                await self.flush()
            except SandboxdError as error:
                log.warning("batch.not_written", batch=self._name, waiting=len(self), reason=error.message)
                await asyncio.sleep(self._retry_s)
            except Exception:  # border of a job: it must outlive any fault of one write
                log.exception("batch not written", batch=self._name, waiting=len(self))
                await asyncio.sleep(self._retry_s)

    async def flush(self) -> None:
        """Writes all that waits now. What cannot be written waits on, and the fault of `write` is raised."""
        async with self._turn:
            # Cleared first: an item that is added meanwhile sets it again.
            self._wake.clear()
            try:
                while self._waiting:
                    await self._write_some()
            except BaseException:
                self._wake.set()
                raise
            self._dropping = False

    async def close(self) -> None:
        """The last flush; what cannot be written even now is lost, and said so."""
        try:
            await self.flush()
        except SandboxdError as error:
            log.error("batch.lost", batch=self._name, items=len(self), reason=error.message)
        except Exception:  # border: the daemon ends, whatever the store does
            log.exception("batch lost", batch=self._name, items=len(self))
        if self._waiting:
            self._on_dropped(len(self))
            self._waiting.clear()

    async def _write_some(self) -> None:
        items = list(islice(self._waiting, self._max_rows))
        for _ in items:
            self._waiting.popleft()
        try:
            await self._write(items)
        except BaseException:
            self._waiting.extendleft(reversed(items))
            if len(self._waiting) > self._max_waiting:
                self._drop()
            raise

    def _drop(self) -> None:
        surplus = len(self._waiting) - self._max_waiting
        for _ in range(surplus):
            self._waiting.popleft()
        self._on_dropped(surplus)
        if not self._dropping:
            # Once until it works again: there may be thousands of them in a second.
            self._dropping = True
            log.error("batch.full", batch=self._name, limit=self._max_waiting)
