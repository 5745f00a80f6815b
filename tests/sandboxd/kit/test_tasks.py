import asyncio

import pytest
from structlog.testing import capture_logs

from sandboxd.kit.errors import UnavailableError
from sandboxd.kit.tasks import TaskOwner


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # a log line sets no event
            await asyncio.sleep(0.001)


async def test_a_failing_task_is_logged_with_its_name():
    async def fail() -> None:
        raise ValueError("boom")

    with capture_logs() as logs:
        async with TaskOwner() as owner:
            task = owner.start("breaks", fail())
            await until(task.done)
            await until(lambda: logs)
    assert [(entry["event"], entry["task"]) for entry in logs] == [("task failed", "breaks")]


async def test_a_repeated_task_survives_a_failing_tick():
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 1:
            raise ValueError("boom")

    with capture_logs() as logs:
        async with TaskOwner() as owner:
            owner.every(0.001, "ticker", tick)
            await until(lambda: ticks >= 3)
    assert [(entry["event"], entry["task"]) for entry in logs] == [("job tick failed", "ticker")]


async def test_a_known_fault_of_a_tick_is_logged_without_a_traceback():
    async def tick() -> None:
        raise UnavailableError("the store is away")

    with capture_logs() as logs:
        async with TaskOwner() as owner:
            owner.every(0.001, "ticker", tick)
            await until(lambda: logs)
    assert (logs[0]["log_level"], logs[0]["reason"]) == ("warning", "the store is away")
    assert "exc_info" not in logs[0]


async def test_close_cancels_and_waits():
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    owner = TaskOwner()
    owner.start("work", work())
    await asyncio.sleep(0)
    await owner.close()
    assert ended.is_set()
    await owner.close()


async def test_nothing_starts_after_close():
    owner = TaskOwner()
    await owner.close()
    with pytest.raises(RuntimeError, match="'late'"):
        owner.start("late", asyncio.sleep(0))
