"""Server-sent events: how they are written, numbered, sent; what a client that does not read may cost."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.http import dump, error_body, internal_message, interrupted
from sandboxd.kit.leaving import unless_left
from sandboxd.kit.stalled import ABORT, STALLED_S, cut_of
from sandboxd.kit.tasks import TaskOwner

log = structlog.get_logger("sandboxd.http")

# For the `content` of a response that can be a stream: what each event is.
EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {
                "id": {"type": "string", "description": "The sequence_number, where one can come back."},
                "data": {"type": "string", "description": "JSON with type and sequence_number."},
            },
            "required": ["data"],
        }
    }
}
# The type of an event that is none: a comment, so that neither side takes the silence for an end.
KEEP_ALIVE = ""
KEEP_ALIVE_BYTES = b": keep-alive\n\n"
KEEP_ALIVE_S = 15.0
# What is written at once. With what the connection holds at most before it asks to wait, this is all that a
# client that does not read keeps in memory: less than 64 KiB.
SLICE = 8 * 1024
WRITE_BUFFER = 8 * 1024
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Events = AsyncGenerator[tuple[str, Mapping[str, Any]]]
Chunks = AsyncGenerator[bytes | memoryview]


class Protocol(HttpToolsProtocol):
    """The server's, with a smaller buffer for writes, and a way to cut off a client that does not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]  # our own


def sse_event(type: str, sequence_number: int, /, **data: Any) -> bytes:
    """One server-sent event."""
    event = {"type": type, "sequence_number": sequence_number, **data}
    return b"data: " + dump(event) + b"\n\n"


def with_id(sequence_number: int, event: bytes) -> bytes:
    """The event with its number as its id: a client that reconnects by itself names it in Last-Event-ID."""
    return b"id: %d\n%b" % (sequence_number, event)


def sse_response(events: Events) -> "EventStream":
    """Stream events, numbered from 0. When `events` fails, the last event is an `error`, and the fault is
    logged."""
    return EventStream(_numbered(events))


def resumable_response(chunks: AsyncGenerator[tuple[int, bytes]]) -> "EventStream":
    """Stream events that are encoded already, each chunk with the number of its last one. When `chunks`
    fails, the last event is an `error`, without an id."""
    return EventStream(_guarded(chunks))


async def _numbered(events: Events) -> Chunks:
    number = 0
    try:
        async for type_, data in events:
            if type_ == KEEP_ALIVE:
                yield KEEP_ALIVE_BYTES
                continue
            yield sse_event(type_, number, **data)
            number += 1
    except (Exception, asyncio.CancelledError) as error:  # border of a request whose head is sent
        yield _error_event(error, number)
        if isinstance(error, asyncio.CancelledError):
            raise
    finally:
        await events.aclose()


async def _guarded(chunks: AsyncGenerator[tuple[int, bytes]]) -> Chunks:
    number = -1
    try:
        async for number, chunk in chunks:  # noqa: B007  # the last one is needed below
            yield chunk
    except (Exception, asyncio.CancelledError) as error:  # border of a request whose head is sent
        yield _error_event(error, number + 1)
        if isinstance(error, asyncio.CancelledError):
            raise
    finally:
        await chunks.aclose()


def _error_event(error: BaseException, number: int) -> bytes:
    """The last event of a stream that failed: it must not seem to have ended well."""
    if isinstance(error, asyncio.CancelledError):
        # The drain is over, or the client is gone; in the first case it still reads this.
        error = interrupted()
    status = 500
    if isinstance(error, SandboxdError):
        body, status = error_body(error.message, error.type, error.code, error.param), error.status
    else:
        log.error("stream failed", exc_info=error)
        request_id = structlog.contextvars.get_contextvars().get("request_id", "unknown")
        body = error_body(internal_message(request_id), "server_error", "internal_error")
    # The answer's own status is 200.
    return sse_event("error", number, error={**body["error"], "status": status})


class EventStream(StreamingResponse):
    """Sends chunks in slices, comments into silence, and gives up a client that takes nothing."""

    media_type = "text/event-stream"

    def __init__(
        self, chunks: Chunks, *, keep_alive_s: float = KEEP_ALIVE_S, stalled_s: float = STALLED_S
    ) -> None:
        super().__init__(chunks, headers=_HEADERS)
        self._keep_alive_s = keep_alive_s
        self._stalled_s = stalled_s
        self._chunks = chunks
        self._cut_off: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._cut_off = cut_of(scope)
        # Without a task group: two tasks for each stream would be a fifth of what a follower costs.
        with suppress(ClientDisconnect):
            await unless_left(Request(scope, receive), self.stream_response(send))

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        beat = _Beat(send, self._cut_off, self._keep_alive_s, self._stalled_s)
        try:
            async for chunk in self._chunks:
                async with beat.sending():
                    await _send_slices(send, chunk)
        finally:
            await beat.close()
            await self._chunks.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_slices(send: Send, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk)
    for start in range(0, len(view), SLICE):
        await send({"type": "http.response.body", "body": view[start : start + SLICE], "more_body": True})


class _Beat:
    """Sends a comment whenever the stream was silent for a while, and cuts off a client that takes nothing.
    Costs no task until then, and no timer for each event."""

    def __init__(
        self, send: Send, cut_off: Callable[[], None] | None, keep_alive_s: float, stalled_s: float
    ) -> None:
        self._send = send
        self._cut_off = cut_off
        self._keep_alive_s = keep_alive_s
        self._stalled_s = stalled_s
        self._free = asyncio.Lock()
        self._tasks = TaskOwner()
        self._loop = asyncio.get_running_loop()
        # When what is sent now was begun, or what was sent last had been taken.
        self._since = self._loop.time()
        self._timer = self._loop.call_later(keep_alive_s, self._look)

    @asynccontextmanager
    async def sending(self) -> AsyncGenerator[None]:
        async with self._free:
            self._since = self._loop.time()
            yield
            self._since = self._loop.time()

    async def close(self) -> None:
        self._timer.cancel()
        await self._tasks.close()

    def _look(self) -> None:
        quiet_s = self._loop.time() - self._since
        next_s = self._keep_alive_s
        if self._free.locked():
            if quiet_s >= self._stalled_s and self._cut_off is not None:
                self._cut_off()
        elif quiet_s < self._keep_alive_s:
            next_s -= quiet_s
        else:
            self._tasks.start("keep-alive", self._say())
        self._timer = self._loop.call_later(next_s, self._look)

    async def _say(self) -> None:
        async with self.sending():
            await self._send({"type": "http.response.body", "body": KEEP_ALIVE_BYTES, "more_body": True})
