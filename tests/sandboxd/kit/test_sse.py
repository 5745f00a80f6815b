"""Event streams: comments into silence, slices, and an end for a client that takes nothing."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from sandboxd.kit.errors import ConflictError
from sandboxd.kit.sse import SLICE, EventStream, resumable_response, with_id


class Connection:
    """What a response is sent over. While `stuck`, it takes nothing; `cut_off` ends that."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.moving = asyncio.Event()
        self.moving.set()
        self.was_cut_off = False

    async def send(self, message: Any) -> None:
        await self.moving.wait()
        self.sent.append(bytes(message.get("body", b"")))

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    def cut_off(self) -> None:
        self.was_cut_off = True
        self.moving.set()

    async def take(self, response: EventStream) -> bytes:
        scope = {"type": "http", "extensions": {"sandboxd.abort": self.cut_off}}
        await asyncio.wait_for(response(scope, self.receive, self.send), 20)
        return b"".join(self.sent)


def quick(chunks: AsyncGenerator[bytes]) -> EventStream:
    return EventStream(chunks, keep_alive_s=0.05, stalled_s=0.15)


async def test_silence_is_filled_with_comments() -> None:
    async def chunks() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"
        await asyncio.sleep(0.3)
        yield b"data: 2\n\n"

    text = await Connection().take(quick(chunks()))
    assert text.startswith(b"data: 1\n\n: keep-alive\n\n")
    assert text.endswith(b": keep-alive\n\ndata: 2\n\n")


async def test_a_big_event_goes_in_slices_and_no_comment_comes_between_them() -> None:
    connection = Connection()
    event = b"data: " + b"x" * (3 * SLICE) + b"\n\n"

    async def chunks() -> AsyncGenerator[bytes]:
        connection.moving.clear()
        asyncio.get_running_loop().call_later(0.12, connection.moving.set)
        yield event

    assert await connection.take(quick(chunks())) == event
    assert max(len(part) for part in connection.sent) <= SLICE


async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    connection = Connection()
    closed: list[bool] = []

    async def chunks() -> AsyncGenerator[bytes]:
        try:
            connection.moving.clear()
            yield b"data: 1\n\n"
        finally:
            closed.append(True)

    await connection.take(quick(chunks()))
    assert (connection.was_cut_off, closed) == (True, [True])


async def test_a_stream_that_fails_ends_in_an_error_without_an_id() -> None:
    async def chunks() -> AsyncGenerator[tuple[int, bytes]]:
        yield 7, with_id(7, b"data: 7\n\n")
        raise ConflictError("It is gone.", code="gone")

    text = await Connection().take(resumable_response(chunks()))
    assert text.startswith(b"id: 7\ndata: 7\n\ndata: ")
    assert b'"sequence_number":8' in text
    assert b'"code":"gone"' in text
