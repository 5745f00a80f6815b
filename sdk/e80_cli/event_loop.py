"""The event loop of a command, and its signals. Loaded only by commands that talk to a server."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from e80_sdk.client import AsyncEighty80
from e80_sdk.errors import E80Error
from e80_sdk.retries import PATIENCE_S

from e80_cli.exits import INTERRUPTED
from e80_cli.terminal import is_raw

if TYPE_CHECKING:
    from e80_cli.session import Login, Work

FIRST_PATIENCE_S = 10.0
"""A server that never answered may be down for good, or the address wrong; one that did restarts."""
QUIET_PAUSES = 4
"""The first pauses take less than a second: too short to be worth a word."""
ANOTHER_S = 10.0
"""After so long without a pause it is another trouble."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP: the first cancels the work, which then cleans up; the third gives up.

    asyncio's own handling would let the second cancel the cleaning up, and leave a sandbox behind.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[int] | None = None

    def protect(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[int]) -> None:
        """From here on a signal cancels this task."""
        self._loop, self._task = loop, task

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = [(number, signal.signal(number, self._received)) for number in SIGNALS]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        self.first = self.first or number
        if self._loop is None or self._task is None or self._count > 2:
            raise KeyboardInterrupt
        if self._count == 1:
            self._loop.call_soon_threadsafe(self._task.cancel)
        else:
            sys.stderr.write("8080: still cleaning up; once more to leave it undone\n")


def drive(work: Work, login: Login) -> int:
    """Run the work on a loop; a signal ends it and gives 128 + signal."""
    interrupts = _Interrupts()
    with interrupts.installed():
        try:
            return asyncio.run(_main(work, login, interrupts))
        except (asyncio.CancelledError, KeyboardInterrupt):
            return 128 + interrupts.first if interrupts.first else INTERRUPTED


async def _main(work: Work, login: Login, interrupts: _Interrupts) -> int:
    task: asyncio.Task[int] | None = asyncio.current_task()
    assert task is not None
    interrupts.protect(asyncio.get_running_loop(), task)
    given_s = login.patience_s
    async with AsyncEighty80(
        login.api_key,
        login.base_url,
        patience_s=PATIENCE_S if given_s is None else given_s,
        first_patience_s=FIRST_PATIENCE_S if given_s is None else given_s,
        on_wait=_Waiting().tell,
    ) as client:
        return await work(client)


class _Waiting:
    """Tells a person, once for each trouble, why nothing happens."""

    def __init__(self) -> None:
        self._pauses = 0
        self._told_at = 0.0

    def tell(self, error: E80Error, left_s: float) -> None:
        now = time.monotonic()
        self._pauses = self._pauses + 1 if now - self._told_at < ANOTHER_S else 1
        self._told_at = now
        if self._pauses == QUIET_PAUSES and sys.stderr.isatty():
            # The terminal may be raw: there Ctrl-C is for the program, and a line feed is not a new line.
            way_out = "Enter ~ . leaves" if is_raw() else "Ctrl-C ends it"
            sys.stderr.write(f"8080: {error.message}\r\n8080: trying for {left_s:.0f} s more; {way_out}\r\n")
