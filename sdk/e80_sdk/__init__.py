"""The Python SDK: `Eighty80` (client) and `eighty80_app` (app builder).

Public names are loaded on first use: the HTTP stack and FastAPI cost 0.1 s and 0.3 s to import, and a
program (the CLI above all) should pay only for what it touches.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e80_sdk.app import Eighty80App, eighty80_app
    from e80_sdk.client import AsyncEighty80, Eighty80
    from e80_sdk.contexts import AsyncContext, Context
    from e80_sdk.errors import (
        AuthenticationError,
        BadArchiveError,
        BadRequestError,
        ConfigError,
        ConflictError,
        ConnectionFailedError,
        ConnectionLostError,
        ContextLostError,
        DiskFullError,
        E80Error,
        ExecResultGoneError,
        IdempotencyConflictError,
        IdempotencyReplayedError,
        NotAwaitedError,
        NotFoundError,
        NotLoggedInError,
        PermissionDeniedError,
        QuotaExceededError,
        RateLimitError,
        RequestTimeoutError,
        SandboxNotRunningError,
        SandboxPausedError,
        ServerError,
        StdinClosedError,
        StdinFullError,
        TooLargeError,
        ToolArgumentError,
        UnavailableError,
        UnexpectedResponseError,
    )
    from e80_sdk.files import AsyncFiles, Files
    from e80_sdk.mime import Result
    from e80_sdk.pending import Pending
    from e80_sdk.processes import AsyncProcess, Process
    from e80_sdk.records import (
        AuditEntry,
        ContextInfo,
        ExecInfo,
        FileChange,
        FileEntry,
        SandboxEvent,
        Usage,
        UsageRow,
    )
    from e80_sdk.results import ExecChunk, ExecError, ExecResult, SandboxInfo
    from e80_sdk.sandbox import AsyncSandbox, Sandbox
    from e80_sdk.streams import ExecStream

_HOMES = {
    "e80_sdk.app": ("Eighty80App", "eighty80_app"),
    "e80_sdk.client": ("AsyncEighty80", "Eighty80"),
    "e80_sdk.contexts": ("AsyncContext", "Context"),
    "e80_sdk.errors": (
        "AuthenticationError",
        "BadArchiveError",
        "BadRequestError",
        "ConfigError",
        "ConflictError",
        "ConnectionFailedError",
        "ConnectionLostError",
        "ContextLostError",
        "DiskFullError",
        "E80Error",
        "ExecResultGoneError",
        "IdempotencyConflictError",
        "IdempotencyReplayedError",
        "NotAwaitedError",
        "NotFoundError",
        "NotLoggedInError",
        "PermissionDeniedError",
        "QuotaExceededError",
        "RateLimitError",
        "RequestTimeoutError",
        "SandboxNotRunningError",
        "SandboxPausedError",
        "ServerError",
        "StdinClosedError",
        "StdinFullError",
        "ToolArgumentError",
        "TooLargeError",
        "UnavailableError",
        "UnexpectedResponseError",
    ),
    "e80_sdk.files": ("AsyncFiles", "Files"),
    "e80_sdk.mime": ("Result",),
    "e80_sdk.pending": ("Pending",),
    "e80_sdk.processes": ("AsyncProcess", "Process"),
    "e80_sdk.records": (
        "AuditEntry",
        "ContextInfo",
        "ExecInfo",
        "FileChange",
        "FileEntry",
        "SandboxEvent",
        "Usage",
        "UsageRow",
    ),
    "e80_sdk.results": ("ExecChunk", "ExecError", "ExecResult", "SandboxInfo"),
    "e80_sdk.sandbox": ("AsyncSandbox", "Sandbox"),
    "e80_sdk.streams": ("ExecStream",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncContext",
    "AsyncEighty80",
    "AsyncFiles",
    "AsyncProcess",
    "AsyncSandbox",
    "AuditEntry",
    "AuthenticationError",
    "BadArchiveError",
    "BadRequestError",
    "ConfigError",
    "ConflictError",
    "ConnectionFailedError",
    "ConnectionLostError",
    "Context",
    "ContextInfo",
    "ContextLostError",
    "DiskFullError",
    "E80Error",
    "Eighty80",
    "Eighty80App",
    "ExecChunk",
    "ExecError",
    "ExecInfo",
    "ExecResult",
    "ExecResultGoneError",
    "ExecStream",
    "FileChange",
    "FileEntry",
    "Files",
    "IdempotencyConflictError",
    "IdempotencyReplayedError",
    "NotAwaitedError",
    "NotFoundError",
    "NotLoggedInError",
    "Pending",
    "PermissionDeniedError",
    "Process",
    "QuotaExceededError",
    "RateLimitError",
    "RequestTimeoutError",
    "Result",
    "Sandbox",
    "SandboxEvent",
    "SandboxInfo",
    "SandboxNotRunningError",
    "SandboxPausedError",
    "ServerError",
    "StdinClosedError",
    "StdinFullError",
    "TooLargeError",
    "ToolArgumentError",
    "UnavailableError",
    "UnexpectedResponseError",
    "Usage",
    "UsageRow",
    "eighty80_app",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'e80_sdk' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
