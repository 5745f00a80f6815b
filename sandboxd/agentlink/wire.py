"""Requests and answers on one connection to an agent. Whatever comes back is hostile: bounded first, then
parsed."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

from e80_agent import protocol

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.kit.streams import Stream

CALL_TIMEOUT_S = 10.0
WRITE_CHUNK = 256 * 1024

_NUMBER = (int, float)

Dial = Callable[[float], Awaitable[Stream]]


async def call(
    dial: Dial, header: dict[str, Any], timeout_s: float | None = CALL_TIMEOUT_S, body: bytes = b""
) -> dict[str, Any]:
    """One request with one answer, which says ok; without a time the answer may come whenever. Raises
    AgentRefusedError, LinkBrokenError, and what `dial` raises."""
    stream = await dial(CALL_TIMEOUT_S if timeout_s is None else timeout_s)
    done = False
    try:
        async with asyncio.timeout(timeout_s):
            send(stream, header, body)
            reply = await read_header(stream)
        done = True
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
        raise LinkBrokenError(f"the agent did not answer {header['op']!r}") from error
    finally:
        if done:
            stream.release()
        else:
            stream.close()
    return check(reply)


def send(stream: Stream, header: dict[str, Any], body: bytes) -> None:
    try:
        head = protocol.pack_header(header)
    except protocol.ProtocolError as error:
        raise AgentRefusedError("bad_request", f"arguments and variables are too large: {error}") from error
    stream.writer.write(head + body)


async def read_answer(stream: Stream) -> dict[str, Any] | None:
    """The agent's answer, whenever it comes; None when it hangs up or breaks the protocol instead."""
    try:
        return await read_header(stream)
    except (asyncio.IncompleteReadError, ConnectionError, LinkBrokenError):
        return None


async def send_chunks(
    stream: Stream,
    chunks: AsyncIterable[bytes],
    answer: asyncio.Future[Any],
    timeout_s: float = CALL_TIMEOUT_S,
) -> None:
    """Sends the data unless the agent answers before its end: then there is an error to be read."""
    try:
        async for chunk in chunks:
            for start in range(0, len(chunk), WRITE_CHUNK):
                write_record(stream, protocol.RECORD_DATA, chunk[start : start + WRITE_CHUNK])
                # Waits for the agent only, not for the client: that one may be as slow as it likes.
                async with asyncio.timeout(timeout_s):
                    await stream.writer.drain()
            if answer.done():
                return
        write_record(stream, protocol.RECORD_END, b"")
        async with asyncio.timeout(timeout_s):
            await stream.writer.drain()
    except ConnectionError:
        # The agent hung up: its last word, if there is one, says why.
        return


def write_record(stream: Stream, kind: int, payload: bytes) -> None:
    if stream.writer.is_closing():
        # The sandbox was paused or stopped meanwhile. uvloop takes a write now for a fault of the program.
        raise ConnectionResetError
    stream.writer.write(protocol.pack_record(kind, payload))


async def read_header(stream: Stream) -> dict[str, Any]:
    try:
        size = protocol.header_length(await stream.reader.readexactly(4))
        return protocol.parse_header(await stream.reader.readexactly(size))
    except protocol.ProtocolError as error:
        raise LinkBrokenError(f"the agent broke the protocol: {error}") from error


def check(reply: dict[str, Any]) -> dict[str, Any]:
    if reply.get("ok") is True:
        return reply
    code = reply.get("code")
    if not isinstance(code, str) or code not in protocol.ERROR_CODES:
        raise LinkBrokenError("the agent answered with an unknown error code")
    raise AgentRefusedError(code, text(reply.get("message"), 1000))


async def read_record(stream: Stream) -> tuple[int, bytes]:
    kind, size = protocol.RECORD.unpack(await stream.reader.readexactly(protocol.RECORD.size))
    if size > (protocol.MAX_RESULT if kind == protocol.RECORD_RESULT else protocol.MAX_RECORD):
        raise LinkBrokenError(f"the agent sent a record of {size} bytes, over the cap")
    return kind, await stream.reader.readexactly(size)


def integer(fact: dict[str, Any], name: str) -> int:
    value = fact.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**53) < value < 2**53:
        raise LinkBrokenError(f"the agent sent no number as {name}")
    return value


def count(fact: dict[str, Any], name: str) -> int:
    value = integer(fact, name)
    if value < 0:
        raise LinkBrokenError(f"the agent sent a negative number as {name}")
    return value


def number(fact: dict[str, Any], name: str) -> float:
    """A duration or an amount: finite, and of a size that can be added up."""
    value = fact.get(name)
    if not isinstance(value, _NUMBER) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise LinkBrokenError(f"the agent sent no number as {name}")
    return float(value)


def text(value: object, limit: int) -> str:
    """Text that can be encoded again: lone surrogates, which JSON allows, are replaced."""
    text = value if isinstance(value, str) else ""
    return text[:limit].encode("utf-8", "replace").decode()
