"""Ends work whose client has hung up."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from sandboxd.kit.tasks import TaskOwner

T = TypeVar("T")

# Work that is done sooner is not watched, and pays nothing.
WATCH_AFTER_S = 0.25


async def unless_left(request: Request, work: Coroutine[Any, Any, T], *, after_s: float = WATCH_AFTER_S) -> T:
    """What `work` returns, unless the client hangs up before: then `work` is cancelled and this raises
    ClientDisconnect. The request's body has to have been read."""
    task = asyncio.current_task()
    assert task is not None
    watch = _Watch(request, task)
    timer = asyncio.get_running_loop().call_later(after_s, watch.start)
    try:
        return await work
    except asyncio.CancelledError:
        if not watch.left or task.cancelling() > 1:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        timer.cancel()
        await watch.close()


class _Watch:
    def __init__(self, request: Request, task: asyncio.Task[Any]) -> None:
        self.left = False
        self._request = request
        self._task = task
        self._tasks: TaskOwner | None = None

    def start(self) -> None:
        self._tasks = TaskOwner()
        self._tasks.start("watch the client", self._run())

    async def close(self) -> None:
        if self._tasks is not None:
            await self._tasks.close()

    async def _run(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            continue
        self.left = True
        self._task.cancel()
