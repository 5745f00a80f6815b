"""What a hostile client tries on the way to another node: paths that turn into others, endless bodies, taking
all connections."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from sandboxd.kit.ids import new_id
from sandboxd.sandboxes.forward import ForwardMiddleware
from sandboxd.sandboxes.live import LiveSandboxes

SANDBOX = f"/v1/sandboxes/{new_id('sbx')}"


class Neighbour:
    """Another node: it notes the first line of each request, and answers when it may."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.heads: list[bytes] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.alone = False
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readline())
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        await self.may_answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    async def holder(self, project_id: str, sandbox_id: str) -> str:
        return "other"

    def address_of(self, node_id: str) -> str:
        return self.url


@pytest.fixture
async def neighbour() -> AsyncIterator[Neighbour]:
    node = Neighbour()
    server = await asyncio.start_server(node.serve, "127.0.0.1", 0)
    node.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield node
    server.close()


@pytest.fixture
def door(neighbour: Neighbour) -> ForwardMiddleware:
    async def here(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})

    nodes: Any = neighbour
    return ForwardMiddleware(here, nodes=nodes, live=LiveSandboxes())


async def ask(
    door: ForwardMiddleware, path: str, *, query: bytes = b"", method: str = "POST", receive: Any = None
) -> int:
    """The status that a client of project `proj` gets."""
    status: int = (await answer(door, path, query=query, method=method, receive=receive))["status"]
    return status


async def answer(
    door: ForwardMiddleware, path: str, *, query: bytes = b"", method: str = "POST", receive: Any = None
) -> dict[str, Any]:
    """The head of the answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def nothing() -> Any:
        await asyncio.Event().wait()

    headers = [(b"x-forwarded-for", b"6.6.6.6"), (b"connection", b"close")]
    if receive is not None:
        headers.append((b"transfer-encoding", b"chunked"))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": headers,
        "client": ("10.0.0.7", 1234),
        "principal": SimpleNamespace(project_id="proj"),
    }
    await door(scope, receive or nothing, send)
    return sent[0]


async def test_a_plain_request_is_handed_on(door, neighbour):
    assert await ask(door, f"{SANDBOX}/exec", query=b"a=%2F") == 200
    assert neighbour.asked == [f"POST {SANDBOX}/exec?a=%2F HTTP/1.1\r\n".encode()]
    # The client's address is the one that this node saw, whatever it says of it.
    assert b"x-forwarded-for: 10.0.0.7\r\n" in neighbour.heads[0].lower()
    assert b"6.6.6.6" not in neighbour.heads[0]


@pytest.mark.parametrize(
    "rest", ["/../../../metrics", "/..", "/./exec", "//exec", "/exec/", "/%2e%2e/x", "/exec?x", "/a b", "/é"]
)
async def test_paths_that_would_turn_into_others_stay_here(door, neighbour, rest):
    assert await ask(door, SANDBOX + rest, method="GET") == 404
    assert neighbour.asked == []


async def test_a_query_that_no_url_can_hold_is_refused(door, neighbour):
    assert await ask(door, f"{SANDBOX}/exec", query=b"a=\x7f") == 400
    assert neighbour.asked == []


async def test_a_body_over_the_limit_is_refused_while_it_is_handed_on(door):
    async def endless() -> Any:
        raise HTTPException(413, "The body is too large")

    assert await ask(door, f"{SANDBOX}/exec", receive=endless) == 413


async def test_one_project_cannot_take_all_connections(door, neighbour, monkeypatch):
    monkeypatch.setattr("sandboxd.sandboxes.forward.MAX_PROJECT_CONNECTIONS", 2)
    neighbour.may_answer.clear()
    waiting = [asyncio.ensure_future(ask(door, f"{SANDBOX}/exec")) for _ in range(2)]
    await asyncio.sleep(0)
    assert await ask(door, f"{SANDBOX}/exec") == 429
    neighbour.may_answer.set()
    assert await asyncio.gather(*waiting) == [200, 200]
    assert await ask(door, f"{SANDBOX}/exec") == 200


async def test_only_what_was_never_sent_may_be_sent_again(door, neighbour):
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    neighbour.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    broken = await answer(door, f"{SANDBOX}/exec")
    server.close()
    await server.wait_closed()
    refused = await answer(door, f"{SANDBOX}/exec")
    assert (broken["status"], refused["status"]) == (503, 503)
    assert b"retry-after" not in dict(broken["headers"])
    assert dict(refused["headers"])[b"retry-after"] == b"1"
