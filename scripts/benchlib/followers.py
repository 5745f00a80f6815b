"""Many followers of one exec, in a process of their own: raw HTTP, so that they cost as little as can be.

Reads one line of JSON, {host, port, key, path, readers, silent, stdout}, opens `readers` connections that
take every event and `silent` ones that take none, and prints `ready` when the server has begun to answer all
of them. When every reader has `exec.completed` it prints {ended, bytes}: the time by the monotonic clock, and
the size of the streams. It ends when its stdin does. Fails when a reader has not exactly `stdout`.
"""

import asyncio
import base64
import json
import socket
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

_HEAD_S = 60.0


async def _reader(plan: dict[str, Any], begun: asyncio.Semaphore, expected: bytes) -> tuple[float, int]:
    reader, writer = await asyncio.open_connection(plan["host"], plan["port"])
    taken, output = 0, bytearray()
    try:
        writer.write(_request(plan))
        async for text in _events(reader):
            taken += len(text)
            event = json.loads(text.partition(b"data: ")[2] or b'{"type": ""}')
            if event["type"] == "exec.started":
                begun.release()
            elif event["type"] == "exec.stdout.delta":
                delta = event["delta"]
                output += base64.b64decode(delta) if event.get("encoding") == "base64" else delta.encode()
            elif event["type"] == "exec.completed":
                if output != expected:
                    raise SystemExit(f"a follower got {len(output)} bytes, not the {len(expected)} expected")
                return time.monotonic(), taken
            elif event["type"]:
                raise SystemExit(f"a follower was told {text[:500]!r}")
        raise SystemExit(f"a stream ended before the exec did, after {taken} bytes: {bytes(output[-200:])!r}")
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """The events, out of the chunks that the server cuts them into."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:16]:
        raise SystemExit(f"the server answered a follower {head[:300]!r}")
    parts = [b""]
    while size := int(await reader.readline(), 16):
        chunk = (await reader.readexactly(size + 2))[:size]
        parts.append(chunk)
        # Most of a long event holds no end of one: looking through all of it each time would take longest.
        if b"\n\n" in parts[-2][-1:] + chunk:
            *events, rest = b"".join(parts).split(b"\n\n")
            parts = [rest]
            for event in events:
                yield event


def _silent(plan: dict[str, Any]) -> socket.socket:
    """Connected, with an answer that has begun, and that nobody takes."""
    connection = socket.create_connection((plan["host"], plan["port"]), timeout=_HEAD_S)
    connection.sendall(_request(plan))
    head = b""
    while b"exec.started" not in head:
        seen = connection.recv(65536, socket.MSG_PEEK)
        if not seen or (b"\r\n" in seen and b" 200 " not in seen[:16]):
            raise SystemExit(f"the server does not answer a follower: {seen[:300]!r}")
        if seen == head:
            time.sleep(0.005)
        head = seen
    return connection


def _request(plan: dict[str, Any]) -> bytes:
    head = [f"GET {plan['path']} HTTP/1.1", "Host: bench", f"Authorization: Bearer {plan['key']}"]
    return "\r\n".join([*head, "", ""]).encode()


async def _run(plan: dict[str, Any]) -> None:
    begun = asyncio.Semaphore(0)
    silent = [_silent(plan) for _ in range(plan["silent"])]
    expected = plan["stdout"].encode()
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(_reader(plan, begun, expected)) for _ in range(plan["readers"])]
        for _ in readers:
            async with asyncio.timeout(_HEAD_S):
                await begun.acquire()
        print("ready", flush=True)
    ends = [reader.result() for reader in readers]
    print(
        json.dumps({"ended": max(at for at, _ in ends), "bytes": sum(size for _, size in ends)}), flush=True
    )
    sys.stdin.read()
    for connection in silent:
        connection.close()


if __name__ == "__main__":
    asyncio.run(_run(json.loads(sys.stdin.readline())))
