"""The root of all errors that reach a client, and the classes for plain HTTP facts. Slices add their own."""

from collections.abc import Mapping


class SandboxdError(Exception):
    """Something the caller can act on. `kit/http.py` turns it into the error body."""

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})
        if code is not None:
            self.code = code


class BadRequestError(SandboxdError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class UnauthorizedError(SandboxdError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code, headers={"WWW-Authenticate": "Bearer"})


class ForbiddenError(SandboxdError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFoundError(SandboxdError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ConflictError(SandboxdError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class TooLargeError(SandboxdError):
    status = 413
    type = "invalid_request_error"
    code = "too_large"


class UnavailableError(SandboxdError):
    """The request was fine and may be sent again after `retry_after_s`."""

    status = 503
    code = "unavailable"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 1
    ) -> None:
        super().__init__(message, param=param, code=code, headers={"Retry-After": str(retry_after_s)})


class StoreUnavailableError(UnavailableError):
    """The store could not be reached or did not answer in time. Nothing was written, unless the answer to the
    commit itself got lost."""

    code = "store_unavailable"
