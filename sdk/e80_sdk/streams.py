"""Output as it arrives, and other things that come one after another, for callers that block. No HTTP in
here."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from e80_sdk.errors import E80Error, UnexpectedResponseError
from e80_sdk.execs import OUTPUT_EVENTS
from e80_sdk.options import OnChunk
from e80_sdk.portal import Portal
from e80_sdk.results import ExecChunk, ExecResult

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
        self._result: ExecResult | None = None
        self._ahead = self._next_event()  # starts the program, and raises here what keeps it from starting

    def __iter__(self) -> Iterator[ExecChunk]:
        while (event := self._take()) is not None:
            if event.get("type") in OUTPUT_EVENTS:
                chunk = ExecChunk.from_event(event)
                self._call_back(chunk)
                yield chunk
            elif event.get("type") == "exec.completed":
                self._result = result_of(event)

    def result(self) -> ExecResult:
        """The result; waits for the end of the program and drops output that was not iterated."""
        try:
            for _ in self:
                pass
        except BaseException:
            self.close()
            raise
        if self._result is None:
            raise E80Error("this stream was closed before its program ended", code="stream_closed")
        return self._result

    def close(self) -> None:
        """Stop following the program."""
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


def result_of(event: dict[str, Any]) -> ExecResult:
    """The result in an `exec.completed` event.

    Raises:
        UnexpectedResponseError: There is none.
    """
    body = event.get("exec")
    if not isinstance(body, dict):
        raise UnexpectedResponseError("the event exec.completed holds no exec")
    return ExecResult.from_body(body)


async def _next(items: AsyncGenerator[T]) -> T | None:
    return await anext(items, None)
