"""What a caller can act on when work with a sandbox is refused."""

from sandboxd.kit.errors import (
    BadRequestError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    SandboxdError,
    UnavailableError,
)


class SandboxNotFoundError(NotFoundError):
    code = "sandbox_not_found"

    def __init__(self, sandbox_id: str) -> None:
        super().__init__(f"There is no sandbox {sandbox_id[:64]!r} in this project.", param="id")


class SandboxNotRunningError(ConflictError):
    code = "sandbox_not_running"

    def __init__(self, sandbox_id: str, status: str, reason: str | None) -> None:
        because = f" (termination_reason: {reason})" if reason else ""
        paused = status == "paused"
        super().__init__(
            f"Sandbox {sandbox_id} is {status}{because}; this needs a running one. "
            f"{'Resume it first' if paused else 'Create a new sandbox'}.",
            param="id",
            code="sandbox_paused" if paused else None,
        )


class SandboxPausedError(ConflictError):
    code = "sandbox_paused"

    def __init__(self, sandbox_id: str) -> None:
        super().__init__(
            f"Sandbox {sandbox_id} was paused while this ran; it goes on when the sandbox is resumed.",
            param="id",
        )


class ExecNotFoundError(NotFoundError):
    code = "exec_not_found"

    def __init__(self, exec_id: str) -> None:
        super().__init__(f"There is no exec {exec_id[:64]!r} in this sandbox.", param="exec_id")


class ExecResultGoneError(ConflictError):
    """A repeated request whose first result is no longer kept."""

    code = "exec_result_gone"

    def __init__(self, exec_id: str, status: str | None) -> None:
        ended = f" and ended as {status}" if status else ""
        super().__init__(
            f"This Idempotency-Key has run exec {exec_id}{ended}. Its output is no longer kept, and it was "
            "not run again; send a new key to run it again.",
            param="Idempotency-Key",
        )


class ExecOutputGoneError(NotFoundError):
    """Nothing to replay: the sandbox no longer has what the exec wrote."""

    code = "exec_output_gone"

    def __init__(self, exec_id: str, status: str) -> None:
        super().__init__(
            f"Exec {exec_id} has ended ({status}) and its output is no longer kept. "
            f"GET .../execs/{exec_id} has the rest of its result.",
            param="exec_id",
        )


class StdinClosedError(ConflictError):
    code = "stdin_closed"

    def __init__(self, exec_id: str, why: str) -> None:
        super().__init__(
            f"The stdin of exec {exec_id} is closed: {why}. Start an exec with 'stdin_open' to write to it.",
            param="exec_id",
        )


class StdinFullError(ConflictError):
    code = "stdin_full"

    def __init__(self, exec_id: str, taken: int, size: int, waited_s: float) -> None:
        super().__init__(
            f"Exec {exec_id} has not read its stdin for {waited_s:g} s: {taken} bytes of 'data' were taken, "
            f"{size} in all. Send the rest with 'offset' {size} when it reads again.",
            param="data",
        )


class StdinOffsetError(BadRequestError):
    def __init__(self, offset: int, size: int) -> None:
        super().__init__(
            f"'offset' {offset} is beyond the {size} bytes that stdin was given so far; send those first.",
            param="offset",
        )


class NoTerminalError(ConflictError):
    code = "no_terminal"

    def __init__(self, exec_id: str) -> None:
        super().__init__(
            f"Exec {exec_id} has no terminal, or has ended. Start a command with 'pty' to have one.",
            param="exec_id",
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


class QuotaError(SandboxdError):
    """The project has as much as it may have at once."""

    status = 429
    type = "rate_limit_error"
    code = "quota_exceeded"

    def __init__(self, name: str, *, limit: int, held: int, wanted: int) -> None:
        header = name.replace("_", "-")
        super().__init__(
            f"The project's quota of {name} is {limit}; it has {held} and this asks for {wanted} more. "
            "Stop some sandboxes and try again.",
            param=None if name == "sandboxes" else name,
            headers={
                "Retry-After": "5",
                f"x-ratelimit-limit-{header}": str(limit),
                f"x-ratelimit-remaining-{header}": str(max(0, limit - held)),
            },
        )


class HostFullError(UnavailableError):
    """The host has too little of something to start another sandbox."""

    code = "host_full"


class BusyError(SandboxdError):
    status = 429
    type = "rate_limit_error"
    code = "too_many_execs"

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; wait for one to end and try again.", headers={"Retry-After": "1"})


class ContextNotFoundError(NotFoundError):
    code = "context_not_found"

    def __init__(self, context_id: str) -> None:
        super().__init__(f"There is no context {context_id[:64]!r} in this sandbox.", param="context_id")


class ContextBusyError(BusyError):
    code = "context_busy"


class FollowersError(BusyError):
    code = "too_many_followers"


class FilesBusyError(BusyError):
    code = "too_many_file_operations"


class RangeError(SandboxdError):
    """A part of a file that begins behind its end."""

    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"

    def __init__(self, size: int) -> None:
        super().__init__(
            f"The file has {size} bytes, and the range asked for is behind them.",
            param="Range",
            headers={"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"},
        )


class DiskFullError(SandboxdError):
    status = 507
    type = "invalid_request_error"
    code = "disk_full"


class FileNotFound(NotFoundError):
    code = "file_not_found"


class FileForbiddenError(ForbiddenError):
    code = "file_forbidden"
