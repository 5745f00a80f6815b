"""Hands requests for a sandbox on to the daemon that holds it, where several share one store: a client may
talk to any of them."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator

import httpx2
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from sandboxd.kit.errors import BadRequestError, SandboxdError, TooLargeError, UnavailableError
from sandboxd.kit.http import error_response
from sandboxd.kit.ids import ID_PATTERN
from sandboxd.kit.tasks import TaskOwner
from sandboxd.sandboxes.errors import BusyError
from sandboxd.sandboxes.live import LiveSandboxes
from sandboxd.sandboxes.nodes import Nodes

log = structlog.get_logger(__name__)

# What needs the sandbox itself; what only reads the store is answered by any node.
# Plain segments only: with dots, empty ones or escapes the other node would be asked for something else.
_PATH = re.compile(rf"/v1/sandboxes/({ID_PATTERN.strip('^$')})((?:/[a-z0-9_]+)*)")
_FROM_THE_STORE = ("", "/events")
# The same for any method. A signed URL names the host that the client used: the other node does not know it.
_FROM_ANYWHERE = ("/files/urls",)
FORWARDED = b"x-sandboxd-forwarded"
CONNECT_TIMEOUT_S = 5.0
# For one connection to fall silent: an exec may say nothing for as long as it may run.
READ_TIMEOUT_S = 7200.0
MAX_CONNECTIONS = 1024
# Of one project, so that its long execs leave connections to the others.
MAX_PROJECT_CONNECTIONS = 512
_NOTHING_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_HOP_BY_HOP = frozenset([b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"])

# Who asks, as this node sees it: what the client says of that is not handed on.
_CLIENT = b"x-forwarded-for"
_OURS = frozenset([b"host", _CLIENT])


class ForwardMiddleware:
    """Runs inside of authentication: it acts on paths of the caller's own project only."""

    def __init__(self, app: ASGIApp, *, nodes: Nodes, live: LiveSandboxes) -> None:
        self.app = app
        self.nodes = nodes
        self.live = live
        self._client: httpx2.AsyncClient | None = None
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        try:
            node_id = await self._holder(scope)
        except SandboxdError as error:
            await error_response(error)(scope, receive, send)
            return
        if node_id is None:
            await self.app(scope, receive, send)
            return
        address = self.nodes.address_of(node_id)
        if address is None:
            unreachable = UnavailableError(
                f"The sandbox is held by the server's node {node_id}, which cannot be reached now: it is "
                "down, or its SANDBOXD_NODE_URL is not set.",
                code="node_unavailable",
                retry_after_s=5,
            )
            await error_response(unreachable)(scope, receive, send)
            return
        project_id = scope["principal"].project_id
        if self._under_way[project_id] >= MAX_PROJECT_CONNECTIONS:
            busy = BusyError(
                f"{MAX_PROJECT_CONNECTIONS} requests of the project are at other nodes, the limit"
            )
            await error_response(busy)(scope, receive, send)
            return
        self._under_way[project_id] += 1
        try:
            await self._forward(address, scope, receive, send)
        finally:
            self._under_way[project_id] -= 1
            if not self._under_way[project_id]:
                del self._under_way[project_id]

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            if self._client is not None:
                await self._client.aclose()

    async def _holder(self, scope: Scope) -> str | None:
        if scope["type"] != "http" or self.nodes.alone:
            return None
        found = _PATH.fullmatch(scope["path"])
        if found is None or self.live.get(found[1]) is not None:
            return None
        if (scope["method"] == "GET" and (found[2] or "") in _FROM_THE_STORE) or found[2] in _FROM_ANYWHERE:
            return None
        if any(name == FORWARDED for name, _ in scope["headers"]):
            return None  # the other node says that it is ours; going round in circles helps nobody
        principal = scope.get("principal")
        return None if principal is None else await self.nodes.holder(principal.project_id, found[1])

    async def _forward(self, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        if self._client is None:
            limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=32)
            timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S)
            self._client = httpx2.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        query = scope["query_string"].decode("latin-1")
        headers = [pair for pair in scope["headers"] if pair[0] not in _HOP_BY_HOP | _OURS]
        headers.append((FORWARDED, b"1"))
        if scope.get("client"):
            headers.append((_CLIENT, scope["client"][0].encode()))
        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
        url = f"{address.rstrip('/')}{scope['path']}" + (f"?{query}" if query else "")
        sent = asyncio.Event()
        content = _body(receive, sent) if has_body else None
        if not has_body:
            sent.set()
        try:
            request = self._client.build_request(scope["method"], url, headers=headers, content=content)
        except httpx2.InvalidURL as error:
            await error_response(BadRequestError(f"The URL is not valid: {error}"))(scope, receive, send)
            return
        started = False
        try:
            response = await self._answer(request, receive, sent)
            try:
                started = True
                kept = [(k.lower(), v) for k, v in response.headers.raw if k.lower() not in _HOP_BY_HOP]
                # This server's own middleware puts its id on the answer.
                kept = [pair for pair in kept if pair[0] not in (b"x-request-id", b"date", b"server")]
                await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
                await self._copy(response, receive, send)
            finally:
                await response.aclose()
        except HTTPException as error:
            # The body turned out to be too large while it was read.
            if started:
                raise
            await error_response(TooLargeError(error.detail))(scope, receive, send)
        except httpx2.HTTPError as error:
            log.warning("forward.failed", address=address, reason=str(error) or type(error).__name__)
            if started:
                raise  # the answer has begun: a broken connection is the honest end
            await error_response(_unanswered(error))(scope, receive, send)

    async def _answer(
        self, request: httpx2.Request, receive: Receive, sent: asyncio.Event
    ) -> httpx2.Response:
        """The head of the other node's answer. Raises ClientDisconnect when the client does not wait for it:
        the other node sees its connection closed, and may end what it was doing."""
        client = self._client
        assert client is not None

        async def send() -> httpx2.Response | httpx2.HTTPError | HTTPException:
            try:
                return await client.send(request, stream=True)
            except (httpx2.HTTPError, HTTPException) as error:
                return error  # for the one who asked, not for the log

        async with TaskOwner() as tasks:
            sending: asyncio.Task[httpx2.Response | httpx2.HTTPError | HTTPException]
            sending = tasks.start("forward", send())
            leaving = tasks.start("watch the client", _left(receive, sent))
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            answer = sending.result()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _copy(self, response: httpx2.Response, receive: Receive, send: Send) -> None:
        async def copy() -> None:
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def watch() -> None:
            # A client that goes away must not leave the other node talking to nobody.
            while (await receive())["type"] != "http.disconnect":
                continue
            copying.cancel()

        async with asyncio.TaskGroup() as group:
            copying = group.create_task(copy())
            watching = group.create_task(watch())
            await asyncio.wait([copying])
            watching.cancel()


def _unanswered(error: httpx2.HTTPError) -> UnavailableError:
    if isinstance(error, _NOTHING_SENT):
        return UnavailableError(
            "The node that holds the sandbox cannot be reached; nothing was sent to it. Try again.",
            code="node_unavailable",
        )
    unknown = UnavailableError(
        "The node that holds the sandbox did not answer; whether the request took effect is not known.",
        code="node_unavailable",
    )
    # No Retry-After: clients take it for leave to send anything again.
    unknown.headers.clear()
    return unknown


async def _left(receive: Receive, sent: asyncio.Event) -> None:
    # Until then what comes is the body.
    await sent.wait()
    while (await receive())["type"] != "http.disconnect":
        continue


async def _body(receive: Receive, sent: asyncio.Event) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise httpx2.WriteError("the client hung up in the middle of its body")
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            sent.set()
            return
