"""What every route shares: error bodies, request ids, the body limit, drain, access log, lists."""

import asyncio
import itertools
import json
import re
import reprlib
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import structlog
from fastapi import Depends, FastAPI, Header, Query
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandboxd.kit.errors import BadRequestError, SandboxdError, TooLargeError, UnavailableError
from sandboxd.kit.ids import ID_PATTERN, new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.origin import Origin, current_origin
from sandboxd.kit.paging import DEFAULT_LIMIT, MAX_LIMIT, PageParams
from sandboxd.kit.stalled import receiving

log = structlog.get_logger("sandboxd.http")

API_PREFIX = "/v1/"
UNLIMITED_SUFFIXES = ("/files", "/files/archive")
VALUE_SHOWN = 100
TEXT_MAX_LENGTH = 2**30
FIELD_NAME = re.compile(r"\w{1,100}")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
STATUS_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """What every error looks like on the wire; here for the OpenAPI document."""

    error: ErrorDetail


# For the application's `responses`: FastAPI would document its own 422 otherwise, which we never send.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "model": ErrorBody,
        "description": "Error",
        "headers": {
            "X-Request-Id": {"required": True, "schema": {"type": "string"}},
            "Retry-After": {"description": "Seconds, with 429 and 503.", "schema": {"type": "integer"}},
        },
    }
}


class Body(BaseModel):
    """Base of every request body: exact types, and no field that we do not know."""

    # JSON allows lone surrogates; pydantic refuses them only in texts that have a length limit.
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, str_max_length=TEXT_MAX_LENGTH
    )

    log: bool | None = Field(None, description="Record this call where the route supports it.")
    project: str | None = Field(None, max_length=100, description="The key's own project (slug or id).")


async def page_params(
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT,
    after: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> PageParams:
    # A coroutine, because FastAPI sends plain functions to a thread.
    return PageParams(limit=limit, after=after, order=order)


async def known_query_only(request: Request) -> None:
    """A router's dependency: a parameter that no route reads is an error, not silence. A filter that is
    misspelt would otherwise answer with everything."""
    if not request.scope["query_string"]:
        return
    route = request.scope["route"]
    known = sorted(_query_names(route.dependant))
    for name in request.query_params:
        if name not in known:
            shown = _printable(name[:VALUE_SHOWN])
            takes = f"Known ones: {', '.join(known)}." if known else "This route takes none."
            raise BadRequestError(f"'{shown}' is not a known parameter of the query. {takes}", param=shown)


PageQuery = Annotated[PageParams, Depends(page_params)]

# A parameter of every route that makes something: `idempotency_key: IdempotencyKey = None`.
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[ -~]*$",
        description="Makes the request safe to repeat: the same key with the same body makes nothing new."
        " Printable ASCII.",
    ),
]


class BrokenAnswerError(Exception):
    """The end of an answer whose status is out: the connection has to break, and it is no fault of ours."""


class Drain:
    """Which requests run, and whether new work is still taken."""

    def __init__(self) -> None:
        self.active = False
        self.cancelled = False
        self._running: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def start(self) -> None:
        """From now on the API answers new requests with 503."""
        self.active = True

    def enter(self) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._idle.clear()
        return task

    def leave(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not self._running:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """True as soon as no request runs; False when the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def cancel(self) -> None:
        """End the requests that still run: they answer 503, and streams end in an error event."""
        self.cancelled = True
        for task in self._running:
            task.cancel()


def install(app: FastAPI, *, metrics: Metrics, drain: Drain, max_body_bytes: int) -> None:
    """Put error handlers and the request middleware on `app`. Middleware added later runs outside of it."""
    app.add_exception_handler(SandboxdError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(RequestMiddleware, metrics=metrics, drain=drain, max_body_bytes=max_body_bytes)


def error_body(message: str, type_: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def error_response(error: SandboxdError) -> Response:
    return _json(error.status, error_body(error.message, error.type, error.code, error.param), error.headers)


class RequestMiddleware:
    """Request id, body limit, drain, access log, metrics; and the border where internal faults end."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, drain: Drain, max_body_bytes: int) -> None:
        self.app = app
        self.metrics = metrics
        self.drain = drain
        self.max_body_bytes = max_body_bytes
        metrics.http_in_flight.set_function(lambda: drain.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_at = time.perf_counter()
        request_id, content_length = _read_headers(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("ascii"))]
            await send(message)

        tokens = structlog.contextvars.bind_contextvars(request_id=request_id)
        client = scope["client"][0] if scope.get("client") else None
        origin = current_origin.set(Origin(request_id=request_id, client=client))
        task = self.drain.enter()
        try:
            refusal = self._refusal(scope, content_length)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send_with_id)
            else:
                await self.app(
                    scope, receiving(scope, self._limited(scope, receive, content_length)), send_with_id
                )
        except asyncio.CancelledError:
            if not self.drain.cancelled:
                raise
            # Our own drain ended this request, and nobody above waits to hear of it.
            task.uncancel()
            if status == 0:
                stopped = interrupted(repeatable=scope.get("repeatable", False))
                await error_response(stopped)(scope, receive, send_with_id)
        except ClientDisconnect:
            # It hung up in the middle of its own body: there is nobody to answer.
            log.info("client hung up", method=scope["method"], path=_shown_path(scope))
        except BrokenAnswerError as error:
            # The server closes the connection of an answer that did not come to its end.
            log.warning("answer broke off", path=_shown_path(scope), reason=str(error))
        except Exception:  # border of a request
            log.exception("request failed", method=scope["method"], path=_shown_path(scope))
            # With the head already sent there is no honest end but a broken connection: the server closes it.
            if status == 0:
                body = error_body(internal_message(request_id), "server_error", "internal_error")
                await _json(500, body)(scope, receive, send_with_id)
        finally:
            self.drain.leave(task)
            self._record(scope, status, time.perf_counter() - started_at)
            current_origin.reset(origin)
            structlog.contextvars.reset_contextvars(**tokens)

    def _refusal(self, scope: Scope, content_length: int | None) -> SandboxdError | None:
        path = scope["path"]
        if self.drain.active and path.startswith(API_PREFIX):
            return _stopped()
        if content_length is not None and content_length > self.max_body_bytes:
            if path.endswith(UNLIMITED_SUFFIXES):
                return None
            return _too_large(self.max_body_bytes, content_length)
        return None

    def _limited(self, scope: Scope, receive: Receive, content_length: int | None) -> Receive:
        # The server holds a body to its Content-Length; only chunked ones have to be counted.
        if content_length is not None or scope["path"].endswith(UNLIMITED_SUFFIXES):
            return receive
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                # FastAPI turns whatever else fails while it reads a body into a 400.
                raise HTTPException(413, _too_large(self.max_body_bytes).message)
            return message

        return receive_limited

    def _record(self, scope: Scope, status: int, duration_s: float) -> None:
        path = scope["path"]
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        route = getattr(scope.get("route"), "path_format", "unmatched")
        self.metrics.http_requests.labels(method, route, str(status)).inc()
        self.metrics.http_duration.labels(method, route).observe(duration_s)
        write = log.debug if path in QUIET_PATHS else log.info
        principal = scope.get("principal")
        write(
            "request",
            method=method,
            path=_shown_path(scope),
            route=route,
            status=status,
            duration_ms=round(duration_s * 1000, 2),
            client=current_origin.get().client,
            key_id=getattr(principal, "key_id", None),
            project_id=getattr(principal, "project_id", None),
        )


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SandboxdError)
    if error.status >= 500:
        log.warning("request refused", code=error.code, message=error.message)
    return error_response(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first, *others = error.errors()
    where, *path = first["loc"]
    # Behind the field's name may come names of validators, which are ours and nobody else's.
    inner = itertools.takewhile(lambda part: isinstance(part, int) or FIELD_NAME.fullmatch(part), path[1:])
    param = _printable(".".join(str(part) for part in [*path[:1], *inner])) or None
    if first["type"] == "json_invalid":
        param = None
        message = f"The body is not valid JSON: {first['ctx']['error']} at character {path[0]}."
    elif param is None and first["type"] == "value_error":
        message = f"The body: {first['msg'].removeprefix('Value error, ')}."
    elif param is None:
        message = _bad_body(first)
    elif first["type"] == "missing":
        message = f"'{param}' is missing in the {where}."
    elif first["type"] == "extra_forbidden":
        message = f"'{param}' is not a known field (value {_shown(first['input'])}).{_known_fields(request)}"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        message = f"'{param}' in the {where}: {reason}, not {_shown(first['input'])}."
    if others:
        message += f" More is wrong: {len(others)} other fault{'s' if len(others) > 1 else ''}."
    return error_response(BadRequestError(message, param=param))


def _bad_body(fault: Mapping[str, Any]) -> str:
    value = fault["input"]
    if fault["type"] == "missing":
        what = "is missing"
    elif isinstance(value, bytes):
        what = "has no JSON content type"
    else:
        what = f"is no JSON object but {_shown(value)}"
    return f"The body {what}: send a JSON object with 'Content-Type: application/json'."


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    headers = dict(error.headers or {})
    what = f"{request.method} {_shown_path(request.scope)}"
    if status == 404:
        message = f"There is no route {what}. See /docs for the routes of this server."
    elif status == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request))
        message = f"{what} is not allowed: this path takes {headers['Allow']}."
    elif status == 400:
        message = "The body is not valid JSON: it must be one JSON value in UTF-8, not nested too deeply."
    else:
        message = str(error.detail)
    type_ = "invalid_request_error" if status < 500 else "server_error"
    return _json(status, error_body(message, type_, STATUS_CODES.get(status, "http_error")), headers)


def _allowed_methods(request: Request) -> list[str]:
    # Starlette names the methods of the first matching route only; a path has one route per method.
    methods: set[str] = set()
    for context in iter_route_contexts(request.app.routes):
        pattern = getattr(context, "path_regex", None)
        if context.methods and pattern is not None and pattern.match(request.scope["path"]):
            methods |= context.methods
    return sorted(methods)


def _known_fields(request: Request) -> str:
    field = getattr(request.scope.get("route"), "body_field", None)
    model = field.field_info.annotation if field is not None else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return ""
    return f" Known fields: {', '.join(sorted(model.model_fields))}."


def _read_headers(scope: Scope) -> tuple[str, int | None]:
    request_id: str | None = None
    content_length: int | None = None
    chunked = False
    for name, value in scope["headers"]:
        if name == b"content-length":
            content_length = int(value) if value.isdigit() and len(value) < 19 else None
        elif name == b"transfer-encoding":
            chunked = True
        elif name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            request_id = value.decode("ascii")
    return request_id or new_id("req"), None if chunked else content_length


def _too_large(limit: int, size: int | None = None) -> TooLargeError:
    sent = f"has {size} bytes" if size is not None else "is too large"
    return TooLargeError(
        f"The body {sent}; this server takes at most {limit} bytes."
        " Send big data as files: PUT /v1/sandboxes/{id}/files."
    )


def interrupted(*, repeatable: bool = False) -> SandboxdError:
    if repeatable:
        return UnavailableError(
            "The server was stopped while this request ran. Send it again with the same Idempotency-Key.",
            code="interrupted",
        )
    # No Retry-After: the request had begun, and doing it twice may be worse than not at all.
    error = UnavailableError(
        "The server was stopped while this request ran; how far it got is not known.", code="interrupted"
    )
    error.headers.clear()
    return error


def _stopped() -> UnavailableError:
    return UnavailableError("The server is shutting down and takes no new work. Send the request again.")


def internal_message(request_id: str) -> str:
    return f"Internal error. The server's log has the details under request id {request_id}."


def _query_names(dependant: Dependant) -> set[str]:
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(inner) for inner in dependant.dependencies))


def _shown_path(scope: Scope) -> str:
    return _printable(scope["path"][:200])


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = json.dumps(value[: VALUE_SHOWN + 1])
    elif value is None or isinstance(value, bool | int | float):
        text = json.dumps(value)
    else:
        text = reprlib.repr(value)
    return text if len(text) <= VALUE_SHOWN else text[:VALUE_SHOWN] + "..."


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _json(status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(content), status, headers, "application/json")


def dump(content: Mapping[str, Any]) -> bytes:
    # Escaped to ASCII: a lone surrogate (legal in JSON text) cannot be encoded as UTF-8.
    return json.dumps(content, separators=(",", ":")).encode("ascii")
