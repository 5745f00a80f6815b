"""What time shows: how long an event loop was blocked, and when something comes true."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def with_longest_gap(work: Awaitable[T]) -> tuple[T, float]:
    """The result of the work, and the longest time in which the loop ran nothing else."""
    gaps = [0.0]

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    try:
        return await work, max(gaps)
    finally:
        ticking.cancel()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread or task is about to make true."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)
