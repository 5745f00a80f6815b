"""What a caller can act on when work with a sandbox is refused."""

from sandboxd.kit.errors import BadRequestError, ConflictError, ForbiddenError, NotFoundError, SandboxdError


class SandboxNotFoundError(NotFoundError):
    code = "sandbox_not_found"

    def __init__(self, sandbox_id: str) -> None:
        super().__init__(f"There is no sandbox {sandbox_id[:64]!r} in this project.", param="id")


class SandboxNotRunningError(ConflictError):
    code = "sandbox_not_running"

    def __init__(self, sandbox_id: str, status: str, reason: str | None) -> None:
        because = f" (termination_reason: {reason})" if reason else ""
        super().__init__(
            f"Sandbox {sandbox_id} is {status}{because}; this needs a running one. Create a new sandbox.",
            param="id",
        )


class LimitError(BadRequestError):
    """A size or time outside of what this server allows; the message names value and range."""

    code = "limit_out_of_range"


class NoFreeSlotError(SandboxdError):
    status = 429
    type = "rate_limit_error"
    code = "too_many_sandboxes"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"All {limit} places for sandboxes on this server are taken; stop some and try again.",
            headers={"Retry-After": "5"},
        )


class BusyError(SandboxdError):
    status = 429
    type = "rate_limit_error"
    code = "too_many_execs"

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; wait for one to end and try again.", headers={"Retry-After": "1"})


class DiskFullError(SandboxdError):
    status = 507
    type = "invalid_request_error"
    code = "disk_full"


class FileNotFound(NotFoundError):
    code = "file_not_found"


class FileForbiddenError(ForbiddenError):
    code = "file_forbidden"
