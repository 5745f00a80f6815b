"""HTTP to one server with one key: connection pools per event loop, retries of what is safe, errors of this
SDK."""

from __future__ import annotations

import asyncio
import email.utils
import importlib
import json
import ssl
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import quote, urlencode
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
from e80_sdk.retries import Attempts, Failure, OnWait, Patience

__all__ = ["Call", "Request", "Transport"]

# httpx2 loads these on its first request: 40 ms that would block a running event loop.
for _name in ("anyio._backends._asyncio", "httpcore2._backends.anyio"):
    with suppress(ImportError):
        importlib.import_module(_name)

Params = Mapping[str, str | int | list[str]]
Content = bytes | Callable[[], AsyncIterable[bytes]]

CONNECT_TIMEOUT_S = 5.0
DEFAULT_TIMEOUT_S = 60.0
MAX_EVENT_BYTES = 256 * 1024 * 1024
# Below the 5 s after which uvicorn closes an idle connection: a request must not meet a closing socket.
KEEPALIVE_S = 3.0
MAX_CONNECTIONS = 256


# These end by themselves when a daemon restarts, and the code tells that nothing else is wrong.
_RESTARTING = ("unavailable", "interrupted")
_BUSY = ("store_unavailable", "engine_unavailable", "agent_unreachable")


@dataclass(frozen=True)
class Request:
    """One request, and what may be done with it.

    `idempotent` says that sending it twice does no harm; a request with an `idempotency_key` (one of its own,
    or True for a new one) may be sent twice too, because the server knows it again. `content` may be a
    function that makes the body anew, so that a retry can send it again. `lasting` says that the answer may
    take long by itself.
    """

    method: str
    path: str
    params: Params | None = None
    body: Mapping[str, Any] | None = None
    content: Content | None = None
    idempotent: bool = False
    idempotency_key: bool | str = False
    anonymous: bool = False
    lasting: bool = False
    timeout_s: float | None = DEFAULT_TIMEOUT_S
    patience_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again after it may have arrived."""
        return self.idempotent or bool(self.idempotency_key)


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
        patience: Patience | None = None,
        on_wait: OnWait | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_wait` is called before each pause, with the error and the seconds of patience left."""
        self.connection = connection
        self.answered = False
        self._patience = patience or Patience()
        self._on_wait = on_wait
        self.sleep = sleep
        self._clock = clock
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

    def call(self, request: Request) -> Call:
        """One logical call, however many attempts it takes: all of them carry the same key.

        Raises:
            NotLoggedInError: There is no API key.
        """
        patience = self._patience
        if request.patience_s is not None:
            patience = replace(patience, total_s=min(request.patience_s, patience.total_s))
        attempts = Attempts(
            patience,
            sleep=self.sleep,
            clock=self._clock,
            on_wait=self._on_wait,
            lasting=request.lasting,
        )
        return Call(self, request, self._headers(request), attempts)

    async def send(self, request: Request) -> dict[str, Any]:
        """Send a request and return the JSON object of the answer.

        Raises:
            E80Error: The class says what happened.
        """
        call = self.call(request)
        async with self._client() as client:
            while True:
                response = await call.answer(client)
                try:
                    raw = await response.aread()
                    break
                except httpx2.RequestError as exc:
                    await call.again(_failure(exc, request, sent=True))
                finally:
                    await response.aclose()
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

    def _headers(self, request: Request) -> dict[str, str]:
        # Uncompressed: Content-Length is then the size of a file, also behind a proxy that likes to compress.
        headers = {"User-Agent": f"e80-sdk/{_version()}", "Accept-Encoding": "identity", **request.headers}
        if not request.anonymous:
            if self.connection.api_key is None:
                raise NotLoggedInError(self.connection.missing_key())
            headers["Authorization"] = f"Bearer {self.connection.api_key}"
        if request.idempotency_key:
            given = request.idempotency_key
            headers["Idempotency-Key"] = given if isinstance(given, str) else uuid.uuid4().hex
        return headers

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


class Call:
    """One logical call and its attempts. Made by `Transport.call`."""

    def __init__(
        self, transport: Transport, request: Request, headers: dict[str, str], attempts: Attempts
    ) -> None:
        self.request = request
        self._transport = transport
        self._headers = headers
        self._attempts = attempts

    async def answer(self, client: httpx2.AsyncClient) -> httpx2.Response:
        """The head of a good answer, after as many attempts as it takes.

        Raises:
            E80Error: The class says what happened.
        """
        failed: Failure | None = None
        while True:
            try:
                return await self._attempt(client, failed)
            except Failure as failure:
                failed = failure
            await self.again(failed)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[httpx2.Response]:
        """One answer, unread. What breaks while it is read comes out of the block as a `Failure`; `again`
        decides what then."""
        async with self._transport._client() as client:
            response = await self.answer(client)
            try:
                yield response
            except httpx2.RequestError as exc:
                raise _failure(exc, self.request, sent=True) from exc
            finally:
                await response.aclose()

    @asynccontextmanager
    async def events(self) -> AsyncGenerator[AsyncGenerator[dict[str, Any]]]:
        """The decoded server-sent events of one answer. Iterating raises `Failure` when the stream breaks or
        ends in an error; `again` decides what then."""
        async with self._transport._client() as client:
            response = await self.answer(client)
            events = _events(response, self.request)
            try:
                yield events
            finally:
                await events.aclose()
                await response.aclose()

    def turn(self, request: Request) -> None:
        """Ask for this from now on; the patience for the trouble that there is goes on."""
        self.request = request
        self._headers = self._transport._headers(request)

    def progress(self) -> None:
        """Something new arrived: whatever trouble there was is over."""
        self._attempts.progress()

    async def again(self, failure: Failure) -> None:
        """Pause before the next attempt, or raise the error of the failure."""
        await self._attempts.again(failure, known=self._transport.answered)

    async def _attempt(self, client: httpx2.AsyncClient, failed: Failure | None) -> httpx2.Response:
        self._attempts.begin()
        try:
            built = self._build(client)
        except E80Error as exc:
            if failed is None:
                raise
            # The body cannot be made a second time, and that is the lesser part of the news.
            raise _unrepeatable(failed.error, exc) from exc
        try:
            response = await client.send(built, stream=True)
        except httpx2.RequestError as exc:
            raise _failure(exc, self.request, sent=not isinstance(exc, _NOTHING_SENT)) from exc
        self._transport.answered = True
        if response.is_success:
            return response
        raise _refusal(response, await _error_of(response), self.request)

    def _build(self, client: httpx2.AsyncClient) -> httpx2.Request:
        request = self.request
        content = request.content() if callable(request.content) else request.content
        # A name that is not UTF-8 is text with surrogates here, and its own bytes on the wire.
        query = urlencode(request.params or {}, doseq=True, errors="surrogateescape", quote_via=quote)
        return client.build_request(
            request.method,
            f"{self._transport.connection.base_url}{request.path}{'?' if query else ''}{query}",
            json=None if request.body is None else dict(request.body),
            content=content,
            headers=self._headers,
            timeout=httpx2.Timeout(request.timeout_s, connect=CONNECT_TIMEOUT_S),
        )


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


def _failure(exc: httpx2.RequestError, request: Request, *, sent: bool) -> Failure:
    """What a request that got no whole answer means, and whether it may be sent again."""
    server = f"{exc.request.url.scheme}://{exc.request.url.netloc.decode()}"
    what = f"{request.method} {server}{request.path}"
    reason = str(exc) or type(exc).__name__
    if not sent:
        message = f"cannot reach the server at {server} ({reason}); is it running, and is the base URL right?"
        return Failure(
            ConnectionFailedError(message),
            resend=isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout),
        )
    if isinstance(exc, httpx2.TimeoutException):
        # The time that the caller allowed is used up.
        return Failure(
            RequestTimeoutError(f"no answer to {what} within {request.timeout_s:g} s"), resend=False
        )
    message = f"the connection broke during {what} ({reason}); whether it took effect is unknown"
    if not request.repeatable:
        message += ", and it was not sent again because that could do it twice"
    # An illegal answer comes from something that speaks no HTTP, and would come again.
    broken = isinstance(exc, httpx2.NetworkError | httpx2.RemoteProtocolError) and "illegal" not in reason
    return Failure(ConnectionLostError(message), resend=request.repeatable and broken, broken=True)


def _refusal(response: httpx2.Response, error: E80Error, request: Request) -> Failure:
    """What an error answer means, and whether the request may be sent again."""
    status, asked_s = response.status_code, _retry_after_s(response)
    if status == 429:
        return Failure(error, resend=asked_s is not None, asked_s=asked_s, busy=True)
    # A gateway in front of a daemon that restarts has a body of its own.
    busy = not isinstance(error, UnexpectedResponseError) and error.code not in _RESTARTING
    if status == 503 and asked_s is not None:
        # Whoever names a time to come back has not begun.
        return Failure(error, resend=True, asked_s=asked_s, busy=busy)
    return Failure(error, resend=request.repeatable and status in (502, 503, 504), busy=busy)


def _unrepeatable(error: E80Error, reason: E80Error) -> E80Error:
    error.message += f"; it was not sent again: {reason.message}"
    error.args = (error.message,)
    return error


async def _error_of(response: httpx2.Response) -> E80Error:
    try:
        body = json.loads(await response.aread())
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
    try:
        async for event in source:
            yield _decoded(event, response, request)
    except httpx2.RequestError as exc:
        raise _failure(exc, request, sent=True) from exc


def _decoded(event: httpx2.ServerSentEvent, response: httpx2.Response, request: Request) -> dict[str, Any]:
    try:
        data = event.json()
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise UnexpectedResponseError(
            f"an event of {request.path} is not a JSON object", request_id=_request_id(response)
        )
    if data.get("type") == "error":
        error = error_from_body(int(_status_in(data)), data, request_id=_request_id(response))
        busy = error.code in _BUSY or error.status == 429
        passing = busy or error.code in _RESTARTING
        raise Failure(error, resend=request.repeatable and passing, busy=busy, broken=True)
    return data


def _status_in(event: Mapping[str, Any]) -> int:
    error = event.get("error")
    status = error.get("status") if isinstance(error, dict) else None
    return status if isinstance(status, int) else 500


def _version() -> str:
    try:
        return version("e80")
    except PackageNotFoundError:
        return "unknown"
