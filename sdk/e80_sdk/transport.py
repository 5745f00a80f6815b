"""HTTP to one server with one key: connection pools per event loop, retries of what is safe, errors of this
SDK."""

from __future__ import annotations

import asyncio
import email.utils
import importlib
import json
import random
import ssl
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from weakref import WeakKeyDictionary

import httpx2

from e80_sdk.config import Connection, is_loopback
from e80_sdk.errors import (
    ConnectionFailedError,
    ConnectionLostError,
    E80Error,
    NotLoggedInError,
    RequestTimeoutError,
    UnexpectedResponseError,
    error_from_body,
)

__all__ = ["Request", "Transport"]

# httpx2 loads these on its first request: 40 ms that would block a running event loop.
for _name in ("anyio._backends._asyncio", "httpcore2._backends.anyio"):
    with suppress(ImportError):
        importlib.import_module(_name)

Params = Mapping[str, str | int]
Content = bytes | Callable[[], AsyncIterable[bytes]]

CONNECT_TIMEOUT_S = 5.0
DEFAULT_TIMEOUT_S = 60.0
MAX_WAIT_S = 30.0
MAX_EVENT_BYTES = 256 * 1024 * 1024
# Below the 5 s after which uvicorn closes an idle connection: a request must not meet a closing socket.
KEEPALIVE_S = 3.0
MAX_CONNECTIONS = 256


@dataclass(frozen=True)
class Request:
    """One request, and what may be done with it.

    `idempotent` says that sending it twice does no harm. `content` may be a function that makes the body
    anew, so that a retry can send it again.
    """

    method: str
    path: str
    params: Params | None = None
    body: Mapping[str, Any] | None = None
    content: Content | None = None
    idempotent: bool = False
    idempotency_key: bool = False
    anonymous: bool = False
    timeout_s: float | None = DEFAULT_TIMEOUT_S


@dataclass
class _Pool:
    client: httpx2.AsyncClient
    users: int = 0


class Transport:
    """Sends requests to one server.

    Connections belong to the event loop that opened them, so there is a pool per running loop, closed when
    its last user leaves; `hold()` keeps it open between requests.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        max_retries: int = 7,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.connection = connection
        self._max_retries = max_retries
        self._sleep = sleep
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @asynccontextmanager
    async def hold(self) -> AsyncGenerator[None]:
        """Keep this loop's connections open inside the block."""
        async with self._client():
            yield

    async def acquire(self) -> None:
        """`hold()` for those who have no block; each call needs one `release()` on the same loop."""
        self._enter()

    async def release(self) -> None:
        """Undo one `acquire()`; the last one closes the connections."""
        await self._leave()

    async def send(self, request: Request) -> dict[str, Any]:
        """Send a request and return the JSON object of the answer.

        Raises:
            E80Error: The class says what happened.
        """
        async with self.open(request) as response:
            raw = await _read(response)
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise UnexpectedResponseError(
                f"{self.connection.base_url} answered {request.method} {request.path} with something that is "
                "not this API; check the base URL",
                status=response.status_code,
                request_id=_request_id(response),
            )
        return body

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncGenerator[httpx2.Response]:
        """Send a request and give its answer unread, to be streamed; errors and retries as in `send`."""
        headers = self._headers(request)
        async with self._client() as client:
            response = await self._send_with_retries(client, request, headers)
            try:
                yield response
            except httpx2.RequestError as exc:
                raise _broken(exc, request, sent=True) from exc
            finally:
                await response.aclose()

    @asynccontextmanager
    async def events(self, request: Request) -> AsyncGenerator[AsyncGenerator[dict[str, Any]]]:
        """Send a request that is answered by server-sent events; gives the decoded events."""
        async with self.open(request) as response:
            events = _events(response, request)
            try:
                yield events
            finally:
                await events.aclose()

    def _headers(self, request: Request) -> dict[str, str]:
        # Uncompressed: Content-Length is then the size of a file, also behind a proxy that likes to compress.
        headers = {"User-Agent": f"e80-sdk/{_version()}", "Accept-Encoding": "identity"}
        if not request.anonymous:
            if self.connection.api_key is None:
                raise NotLoggedInError(self.connection.missing_key())
            headers["Authorization"] = f"Bearer {self.connection.api_key}"
        if request.idempotency_key:
            headers["Idempotency-Key"] = uuid.uuid4().hex
        return headers

    async def _send_with_retries(
        self, client: httpx2.AsyncClient, request: Request, headers: dict[str, str]
    ) -> httpx2.Response:
        attempt, waited_s = 0, 0.0
        while True:
            delay_s: float | None
            cause: Exception | None = None
            try:
                response = await client.send(self._build(client, request, headers), stream=True)
            except httpx2.RequestError as exc:
                error, cause = _broken(exc, request, sent=not isinstance(exc, _NOTHING_SENT)), exc
                delay_s = self._backoff(attempt) if _may_resend(exc, request) else None
            else:
                if response.is_success:
                    return response
                error = await _error_of(response)
                delay_s = self._delay_after(response, request, attempt)
            if delay_s is None or attempt >= self._max_retries or waited_s + delay_s > MAX_WAIT_S:
                raise error from cause
            attempt += 1
            waited_s += delay_s
            await self._sleep(delay_s)

    def _build(self, client: httpx2.AsyncClient, request: Request, headers: dict[str, str]) -> httpx2.Request:
        content = request.content() if callable(request.content) else request.content
        return client.build_request(
            request.method,
            f"{self.connection.base_url}{request.path}",
            params=request.params,
            json=None if request.body is None else dict(request.body),
            content=content,
            headers=headers,
            timeout=httpx2.Timeout(request.timeout_s, connect=CONNECT_TIMEOUT_S),
        )

    def _backoff(self, attempt: int) -> float:
        return min(0.1 * float(2**attempt), 3.0) * random.uniform(0.8, 1.2)

    def _delay_after(self, response: httpx2.Response, request: Request, attempt: int) -> float | None:
        """How long to wait before sending it again, or None when it must not be."""
        if response.status_code in (429, 503):
            asked_s = _retry_after_s(response)
            if asked_s is not None:
                return asked_s
        if request.idempotent and response.status_code in (502, 503, 504):
            return self._backoff(attempt)
        return None

    @asynccontextmanager
    async def _client(self) -> AsyncGenerator[httpx2.AsyncClient]:
        client = self._enter()
        try:
            yield client
        finally:
            await self._leave()

    def _enter(self) -> httpx2.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            pool = self._pools.get(loop)
            if pool is None:
                pool = self._pools[loop] = _Pool(_new_client(self.connection.base_url))
            pool.users += 1
            return pool.client

    async def _leave(self) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            pool = self._pools[loop]
            pool.users -= 1
            if pool.users:
                return
            del self._pools[loop]
        await pool.client.aclose()


_NOTHING_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)


def _new_client(base_url: str) -> httpx2.AsyncClient:
    local = is_loopback(base_url)
    # Loading the certificate store takes 40 ms of a blocked loop; plain HTTP has no use for it, and an
    # empty store refuses every certificate should one ever be asked for.
    verify = True if base_url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx2.AsyncClient(
        verify=verify,
        trust_env=not local,
        limits=httpx2.Limits(
            max_connections=MAX_CONNECTIONS, max_keepalive_connections=64, keepalive_expiry=KEEPALIVE_S
        ),
    )


def _may_resend(exc: httpx2.RequestError, request: Request) -> bool:
    if isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout):
        return True
    return request.idempotent and isinstance(exc, httpx2.NetworkError | httpx2.RemoteProtocolError)


def _broken(exc: httpx2.RequestError, request: Request, *, sent: bool) -> E80Error:
    what = f"{request.method} {exc.request.url.scheme}://{exc.request.url.netloc.decode()}{request.path}"
    reason = str(exc) or type(exc).__name__
    if not sent:
        server = f"{exc.request.url.scheme}://{exc.request.url.netloc.decode()}"
        return ConnectionFailedError(
            f"cannot reach the server at {server} ({reason}); is it running, and is the base URL right?"
        )
    if isinstance(exc, httpx2.TimeoutException):
        return RequestTimeoutError(f"no answer to {what} within {request.timeout_s:g} s")
    return ConnectionLostError(
        f"the connection broke during {what} ({reason}); whether it took effect is unknown"
    )


async def _read(response: httpx2.Response) -> bytes:
    return await response.aread()


async def _error_of(response: httpx2.Response) -> E80Error:
    try:
        body = json.loads(await _read(response))
    except (ValueError, httpx2.RequestError):
        body = None
    finally:
        await response.aclose()
    return error_from_body(
        response.status_code,
        body,
        request_id=_request_id(response),
        retry_after_s=_retry_after_s(response),
    )


def _request_id(response: httpx2.Response) -> str | None:
    value = response.headers.get("x-request-id")
    return None if value is None else str(value)


def _retry_after_s(response: httpx2.Response) -> float | None:
    value = response.headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


async def _events(response: httpx2.Response, request: Request) -> AsyncGenerator[dict[str, Any]]:
    source = httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES)
    async for event in source:
        try:
            data = event.json()
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise UnexpectedResponseError(
                f"an event of {request.path} is not a JSON object", request_id=_request_id(response)
            )
        if data.get("type") == "error":
            raise error_from_body(int(_status_in(data)), data, request_id=_request_id(response))
        yield data


def _status_in(event: Mapping[str, Any]) -> int:
    error = event.get("error")
    status = error.get("status") if isinstance(error, dict) else None
    return status if isinstance(status, int) else 500


def _version() -> str:
    try:
        return version("e80")
    except PackageNotFoundError:
        return "unknown"
