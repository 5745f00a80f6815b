"""Exit codes of the command, and those of a remote program."""

from __future__ import annotations

import signal

from e80_sdk.errors import AuthenticationError, E80Error, NotLoggedInError
from e80_sdk.results import ExecResult

OK = 0
FAILED = 1
CANCELLED = 2
NOT_LOGGED_IN = 4
USAGE = 64
TIMED_OUT = 124
PLATFORM_FAILED = 125
INTERRUPTED = 130


def exit_code_of(error: E80Error, *, platform_failed: int = FAILED) -> int:
    """The exit code for an error; commands that pass on a remote exit code have their own for the
    platform's."""
    if isinstance(error, NotLoggedInError | AuthenticationError):
        return NOT_LOGGED_IN
    return platform_failed


def exit_code_of_program(result: ExecResult) -> int:
    """What the program's end looks like to a shell: its code, 128 + signal, 124 for a timeout."""
    if result.status == "timed_out":
        return TIMED_OUT
    if result.status == "lost":
        return PLATFORM_FAILED
    if result.exit_code is not None and result.status in ("completed", "failed"):
        return result.exit_code
    return 128 + _number(result.signal)


def _number(name: str | None) -> int:
    try:
        return int(signal.Signals[name or "SIGKILL"])
    except KeyError:
        return int(signal.SIGKILL)
