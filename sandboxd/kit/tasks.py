"""Background tasks with one owner: named, logged when they fail, ended together."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import structlog

from sandboxd.kit.errors import SandboxdError

log = structlog.get_logger(__name__)


class TaskOwner:
    """Start tasks here instead of with `asyncio.create_task`; `close` cancels and awaits what still runs."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        """Whether nothing can be started any more."""
        return self._closed

    def start(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task. Its failure is logged; await the returned task to see it as well."""
        if self._closed:
            work.close()
            raise RuntimeError(f"task {name!r} cannot start: its owner is closed")
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def every(self, interval_s: float, name: str, tick: Callable[[], Awaitable[object]]) -> asyncio.Task[Any]:
        """Call `tick` again and again, `interval_s` after it last ended. A failing tick is logged."""
        return self.start(name, _repeat(interval_s, name, tick))

    async def close(self) -> None:
        """Cancel everything and wait for its end. May be called twice."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, SandboxdError):
            # A fact with a message of its own, not a fault of ours: no traceback.
            log.warning("task failed", task=task.get_name(), reason=error.message)
        else:
            log.error("task failed", task=task.get_name(), exc_info=error)


async def _repeat(interval_s: float, name: str, tick: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(interval_s)
        try:
            await tick()
        except SandboxdError as error:
            log.warning("job tick failed", task=name, reason=error.message)
        except Exception:  # border of a job tick: the loop must outlive it
            log.exception("job tick failed", task=name)
