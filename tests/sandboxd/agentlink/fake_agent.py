"""An agent that says what a test wants it to say, byte by byte."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from e80_agent import protocol

# What to do with one connection.
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class FakeStream:
    """The daemon's end of a connection; counts what becomes of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.released = 0
        self.closed = 0

    def release(self) -> None:
        self.released += 1
        self.writer.close()

    def close(self) -> None:
        self.closed += 1
        self.writer.close()


class FakeAgent:
    """Plays one script per connection, in their order, and the last of them for all that follow."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.streams: list[FakeStream] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def dial(self, _timeout_s: float) -> FakeStream:
        ours, theirs = socket.socketpair()
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self._tasks.append(asyncio.ensure_future(self._play(script, theirs)))
        stream = FakeStream(*await asyncio.open_unix_connection(sock=ours))
        self.streams.append(stream)
        return stream

    async def _play(self, script: Script, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the daemon hung up on it, as it should
        finally:
            writer.close()

    async def __aenter__(self) -> "FakeAgent":
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self.streams:
            stream.writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # So that every transport is really closed before the loop is.
        await asyncio.sleep(0)


def says(data: bytes, hang_up: bool = True) -> Script:
    """Reads one request and sends these bytes, whatever was asked."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)
        await writer.drain()
        if not hang_up:
            await reader.read()

    return script


async def read_request(reader: asyncio.StreamReader) -> dict[str, Any]:
    size = protocol.header_length(await reader.readexactly(4))
    header = protocol.parse_header(await reader.readexactly(size))
    await reader.readexactly(header.get("body", 0))
    return header
