"""Work whose client hangs up is ended; work that is done soon is not even watched."""

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from sandboxd.kit.leaving import unless_left

AFTER_S = 0.02


class Request:
    def __init__(self) -> None:
        self.asked = 0
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        self.asked += 1
        await self.left.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
def request_() -> Any:
    return Request()


async def test_short_work_is_not_watched(request_: Any) -> None:
    assert await unless_left(request_, asyncio.sleep(0, "done"), after_s=AFTER_S) == "done"
    assert request_.asked == 0


async def test_long_work_is_watched_and_left_alone(request_: Any) -> None:
    assert await unless_left(request_, asyncio.sleep(0.1, "done"), after_s=AFTER_S) == "done"
    assert request_.asked == 1


async def test_work_that_is_left_is_cancelled(request_: Any) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    asyncio.get_running_loop().call_later(0.05, request_.left.set)
    with pytest.raises(ClientDisconnect):
        await unless_left(request_, work(), after_s=AFTER_S)
    assert ended == ["cancelled"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_from_elsewhere_stays_one(request_: Any) -> None:
    task = asyncio.ensure_future(unless_left(request_, asyncio.sleep(60), after_s=AFTER_S))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
