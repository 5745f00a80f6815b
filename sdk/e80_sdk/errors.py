"""Every error the SDK raises. One root, one class per fact that a caller can act on; no import of the HTTP
stack."""

from __future__ import annotations


class E80Error(Exception):
    """Root of all errors of this SDK.

    Attributes:
        message: What failed, with which value, and what to do next.
        code: Short machine-readable name of the fact, such as `not_found`.
        status: HTTP status of the answer, or None when no answer came.
        request_id: Id of the request in the server's log, or None.
        param: The request field at fault, or None.
        type: The family of the error as the server names it, or None.
    """

    default_code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        param: str | None = None,
        type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.status = status
        self.request_id = request_id
        self.param = param
        self.type = type


class NotLoggedInError(E80Error):
    """No API key was found, or the one that was found belongs to another server. Nothing was sent."""

    default_code = "not_logged_in"


class ConfigError(E80Error):
    """A configuration file or a base URL cannot be used."""

    default_code = "config_invalid"


class ConnectionFailedError(E80Error):
    """The server could not be reached; nothing was sent."""

    default_code = "connection_failed"


class ConnectionLostError(E80Error):
    """The connection broke after the request was sent, or a stream ended before its result, and it could not
    be taken up again: what the server did is unknown."""

    default_code = "connection_lost"


class RequestTimeoutError(E80Error):
    """No answer came within the deadline: what the server did is unknown."""

    default_code = "request_timeout"


class UnexpectedResponseError(E80Error):
    """The answer is not one of this API: something else listens there, or its version differs."""

    default_code = "unexpected_response"


class BadRequestError(E80Error):
    """400: a field of the request is wrong; `param` names it."""

    default_code = "invalid_request"


class AuthenticationError(E80Error):
    """401: the API key is missing, malformed, unknown or revoked."""

    default_code = "unauthorized"


class PermissionDeniedError(E80Error):
    """403: the key may not do this."""

    default_code = "forbidden"


class NotFoundError(E80Error):
    """404: no such thing in this project."""

    default_code = "not_found"


class ConflictError(E80Error):
    """409: the state of the thing does not allow it."""

    default_code = "conflict"


class SandboxNotRunningError(ConflictError):
    """409: work was asked of a sandbox that does not run; the message says why it ended."""

    default_code = "sandbox_not_running"


class SandboxPausedError(ConflictError):
    """409: the sandbox is paused; `resume()` it. What ran in it goes on then."""

    default_code = "sandbox_paused"


class IdempotencyConflictError(ConflictError):
    """409: this idempotency key was used before, for something else. Nothing was done."""

    default_code = "idempotency_conflict"


class IdempotencyReplayedError(ConflictError):
    """409: this was done already, under the same idempotency key, and its answer is shown only once; the
    message names what was made."""

    default_code = "idempotency_replayed"


class ExecResultGoneError(ConflictError):
    """409: the program ran, once, and its output is no longer kept. It was not run again."""

    default_code = "exec_result_gone"


class ContextLostError(ConflictError):
    """409: the process of this context has ended and its state is gone; `restart()` gives it a new one."""

    default_code = "context_lost"


class StdinClosedError(ConflictError):
    """409: the program's input is not open: it has ended, or was not started with `stdin_open` or `pty`."""

    default_code = "stdin_closed"


class StdinFullError(ConflictError):
    """409: the program does not read its input; the message says how much of it was taken."""

    default_code = "stdin_full"


class BadArchiveError(E80Error):
    """An archive is broken, cut short, or holds something that would land outside of its folder."""

    default_code = "bad_archive"


class DiskFullError(E80Error):
    """507: the sandbox's workspace is full."""

    default_code = "disk_full"


class TooLargeError(E80Error):
    """413: the body is over the server's limit."""

    default_code = "too_large"


class RateLimitError(E80Error):
    """429: too many requests; `retry_after_s` says when to come back."""

    default_code = "rate_limited"
    retry_after_s: float | None = None


class QuotaExceededError(RateLimitError):
    """429: the project, or the server, has as many sandboxes or as much of something as it may have."""

    default_code = "quota_exceeded"


class ServerError(E80Error):
    """5xx: a fault of the server; `request_id` finds it in the server's log."""

    default_code = "internal_error"


class UnavailableError(ServerError):
    """503: the server cannot take work now (starting, draining, full); `retry_after_s` says when to come
    back."""

    default_code = "unavailable"
    retry_after_s: float | None = None


class NotAwaitedError(E80Error, AttributeError, TypeError):
    """A `Pending` was used as if it were its value. Write `await` before the call.

    It is an `AttributeError` too, so that `hasattr` and friends keep working on a `Pending`.
    """

    default_code = "not_awaited"


class ToolArgumentError(E80Error, ValueError):
    """The arguments of a tool call do not fit its schema; the message names each field at fault."""

    default_code = "tool_arguments_invalid"


_BY_STATUS: dict[int, type[E80Error]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: TooLargeError,
    429: RateLimitError,
    503: UnavailableError,
}
_BY_CODE: dict[str, type[E80Error]] = {
    "sandbox_not_running": SandboxNotRunningError,
    "sandbox_paused": SandboxPausedError,
    "idempotency_conflict": IdempotencyConflictError,
    "idempotency_replayed": IdempotencyReplayedError,
    "exec_result_gone": ExecResultGoneError,
    "context_lost": ContextLostError,
    "stdin_closed": StdinClosedError,
    "stdin_full": StdinFullError,
    "bad_archive": BadArchiveError,
    "disk_full": DiskFullError,
    "quota_exceeded": QuotaExceededError,
    "too_many_sandboxes": QuotaExceededError,
}
# An error at the end of a stream comes without its status.
_UNAVAILABLE = ("unavailable", "interrupted", "store_unavailable", "engine_unavailable", "agent_unreachable")


def error_from_body(
    status: int, body: object, *, request_id: str | None, retry_after_s: float | None = None
) -> E80Error:
    """The exception for an error answer: `body` is the decoded JSON, or None when it was not JSON."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return UnexpectedResponseError(
            f"the server answered {status} without an error of this API; check the base URL",
            status=status,
            request_id=request_id,
        )
    code = _text(error.get("code"))
    by_status = _BY_STATUS.get(status, ServerError if status >= 500 else E80Error)
    cls = _BY_CODE.get(code or "", UnavailableError if status == 500 and code in _UNAVAILABLE else by_status)
    made = cls(
        str(error.get("message") or f"the server answered {status}"),
        code=code,
        status=status,
        request_id=request_id,
        param=_text(error.get("param")),
        type=_text(error.get("type")),
    )
    if isinstance(made, RateLimitError | UnavailableError):
        made.retry_after_s = retry_after_s
    return made


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
