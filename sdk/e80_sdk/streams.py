"""Programs that are followed to their end, for both faces, and other things that come one after another. No
HTTP in here."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, nullcontext
from types import TracebackType
from typing import Any, Self, TypeVar

from e80_sdk.errors import E80Error
from e80_sdk.execs import ExecApi
from e80_sdk.options import OnChunk, Program
from e80_sdk.pending import Calls, Emit, Pending
from e80_sdk.portal import Portal
from e80_sdk.results import ExecChunk, ExecReader, ExecResult

T = TypeVar("T")


class ExecStream:
    """A program's output as it arrives, for blocking callers: iterate it for `ExecChunk`s, then ask
    `result()`."""

    def __init__(
        self, portal: Portal, events: AsyncGenerator[dict[str, Any]], callback: OnChunk | None = None
    ) -> None:
        self._portal = portal
        self._events = events
        self._callback = callback
        self._reader = ExecReader()
        self._ahead = self._next_event()  # starts the program, and raises here what keeps it from starting

    def __iter__(self) -> Iterator[ExecChunk]:
        while (event := self._take()) is not None:
            chunk = self._reader.chunk(event)
            if chunk is not None:
                self._call_back(chunk)
                yield chunk

    def result(self) -> ExecResult:
        """The result; waits for the end of the program and drops output that was not iterated."""
        try:
            for _ in self:
                pass
        except BaseException:
            self.close()
            raise
        if self._reader.result is None:
            raise E80Error("this stream was closed before its program ended", code="stream_closed")
        return self._reader.result

    def close(self) -> None:
        """End the program, if it runs still, and the stream."""
        self._portal.call(self._events.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> dict[str, Any] | None:
        event, self._ahead = self._ahead, None
        return event if event is not None else self._next_event()

    def _next_event(self) -> dict[str, Any] | None:
        return self._portal.call(_next, self._events)

    def _call_back(self, chunk: ExecChunk) -> None:
        called = None if self._callback is None else self._callback(chunk)
        if inspect.iscoroutine(called):
            called.close()
            raise TypeError(
                "on_stdout and on_stderr must be plain functions here; use `async with` for coroutines"
            )


def iterate(portal: Portal, items: AsyncGenerator[T]) -> Iterator[T]:
    """The items one by one; the generator is closed when the iterator is."""
    try:
        while (item := portal.call(_next, items)) is not None:
            yield item
    finally:
        portal.call(items.aclose)


def run_blocking(
    execs: ExecApi, portal: Portal, sandbox_id: str, program: Program, *, stream: bool
) -> ExecResult | ExecStream:
    """Run a program for a caller that blocks."""
    if not stream and program.on_chunk is None:
        return portal.call(execs.run, sandbox_id, program.body, key=program.key)
    following = ExecStream(portal, execs.events(sandbox_id, program.body, key=program.key), program.on_chunk)
    return following if stream else following.result()


def run_pending(
    execs: ExecApi,
    calls: Calls,
    sandbox_id: str,
    label: str,
    program: Program,
    *,
    stream: bool,
    turn: asyncio.Lock | None = None,
) -> Pending[ExecResult]:
    """Start a program for an asynchronous caller; with `turn` it waits for its turn."""

    async def follow(emit: Emit | None) -> ExecResult:
        async with turn or nullcontext():
            if emit is None and program.on_chunk is None:
                return await execs.run(sandbox_id, program.body, key=program.key)
            return await _follow(execs.events(sandbox_id, program.body, key=program.key), program, emit)

    if stream:
        return calls.start_stream(label, follow)
    return calls.start(label, lambda: follow(None))


async def _follow(events: AsyncGenerator[dict[str, Any]], program: Program, emit: Emit | None) -> ExecResult:
    reader = ExecReader()
    async with aclosing(events):
        async for event in events:
            chunk = reader.chunk(event)
            if chunk is None:
                continue
            if program.on_chunk and isinstance(called := program.on_chunk(chunk), Awaitable):
                await called
            if emit is not None:
                await emit(chunk)
    assert reader.result is not None  # events() raises when the stream ends without it
    return reader.result


async def _next(items: AsyncGenerator[T]) -> T | None:
    return await anext(items, None)
