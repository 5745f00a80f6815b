"""A thread with an event loop of its own, for callers that block. Works where a loop runs already, as in a
notebook."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
CLEANUP_S = 30.0


class Portal:
    """Runs coroutines for blocking callers. The thread starts with the first call and ends with `close()`,
    with the last reference, or with the program. After a fork the child starts a thread of its own."""

    def __init__(self, resources: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        """`resources` is entered on the loop before the first call and left after the last."""
        self._resources = resources
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None

    def call(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a coroutine function and block until its result.

        An interrupt (Ctrl-C) cancels the coroutine and waits until it has cleaned up.
        """
        thread = self._running()
        if threading.current_thread() is thread.thread:
            raise RuntimeError(
                "a blocking call was made from the SDK's own event loop; use `async with` there"
            )
        outcome: Future[T] = Future()
        task: list[asyncio.Task[T]] = []

        def start() -> None:
            task.append(thread.loop.create_task(function(*args, **kwargs)))
            task[0].add_done_callback(lambda done: _copy(done, outcome))

        thread.loop.call_soon_threadsafe(start)
        try:
            return outcome.result()
        except BaseException:
            if not outcome.done():
                thread.loop.call_soon_threadsafe(lambda: task[0].cancel())
                wait([outcome], timeout=CLEANUP_S)
            raise

    def close(self) -> None:
        """End the thread. A later call starts a new one."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    def _running(self) -> _LoopThread:
        with self._lock:
            if self._thread is None or self._thread.pid != os.getpid():
                self._thread = _LoopThread(self._resources)
                weakref.finalize(self, self._thread.close)
            return self._thread


class _LoopThread:
    def __init__(self, resources: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self.pid = os.getpid()
        self._resources = resources
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="e80-sdk", daemon=True)
        self.thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop the loop; safe to call twice, from any thread, and from a forked child (which has no such
        thread)."""
        if self.pid != os.getpid() or not self.thread.is_alive():
            return
        try:
            self.loop.call_soon_threadsafe(self._stop.set)
        except RuntimeError:  # the loop closed in between
            return
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout=CLEANUP_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as exc:
            if self._ready.is_set():
                raise
            self._failure = exc  # raised where the thread was started
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with self._resources():
            self._ready.set()
            await self._stop.wait()


def _copy(task: asyncio.Task[T], outcome: Future[T]) -> None:
    if task.cancelled():
        outcome.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())
