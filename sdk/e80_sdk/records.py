"""What the server tells of execs, contexts, files, events, usage and its audit log. No HTTP in here."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from e80_sdk.errors import UnexpectedResponseError


class _Record:
    """A dataclass that is read from an answer; fields that this version does not know are in its `raw`."""

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Self:
        """Read it from an answer of the API.

        Raises:
            UnexpectedResponseError: A field that it cannot be without is missing.
        """
        known = {item.name for item in fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses
        given = {name: value for name, value in body.items() if name in known} | {"raw": dict(body)}
        try:
            return cls(**given)
        except TypeError as exc:
            raise UnexpectedResponseError(f"the {cls.__name__} in the answer cannot be read: {exc}") from exc


@dataclass(frozen=True)
class ExecInfo(_Record):
    """One exec of a sandbox, running or ended, without its output; `get_exec(id)` gives that.

    `status` is `running` or one of those of `ExecResult`; `kind` is `code` or `command`; `title` is how its
    code or command begins; `context` the id of the context it ran in.
    """

    id: str
    status: str
    sandbox_id: str | None = None
    kind: str | None = None
    title: str | None = None
    context: str | None = None
    background: bool = False
    exit_code: int | None = None
    signal: str | None = None
    error_name: str | None = None
    started_at: float | None = None
    duration_ms: float | None = None
    truncated: bool | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class StdinState(_Record):
    """The input of a program: how many bytes of it were taken so far, and whether it is open."""

    size: int
    open: bool = True
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class ContextInfo(_Record):
    """A context as the server described it. `status` is `idle`, `busy` or `lost`; `executions` is how much
    ran in it."""

    id: str
    status: str
    sandbox_id: str | None = None
    language: str | None = None
    cwd: str | None = None
    executions: int = 0
    created_at: float | None = None
    last_used_at: float | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class FileEntry(_Record):
    """A file or folder of a sandbox.

    `type` is `file`, `directory`, `symlink`, `fifo`, `socket` or `device`; `size` is in bytes, `mode` octal
    text such as `0644`. Bytes of a name that are not UTF-8 are surrogates in `name` and `path`, as Python
    has them in names of files of its own machine.
    """

    path: str
    name: str = ""
    type: str = "file"
    size: int = 0
    mode: str | None = None
    owner: str | None = None
    modified_at: float | None = None
    link_target: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Self:
        """Read it from an answer of the API.

        Raises:
            UnexpectedResponseError: A field that it cannot be without is missing.
        """
        path = exact_path(body)
        if path is None:
            return super().from_body(body)
        return super().from_body({**body, "path": path, "name": path.rsplit("/", 1)[-1]})


@dataclass(frozen=True)
class FileChange(_Record):
    """Something that happened below a watched path: `type` is `created`, `modified`, `deleted`, `moved` (to
    `path`, from `from_path`), or `overflow`: changes were missed, look at the folder anew."""

    type: str
    path: str = ""
    from_path: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class FileUrl(_Record):
    """An address that works without a key until `expires_at`; `method` is `download` or `upload`."""

    url: str
    method: str | None = None
    path: str | None = None
    expires_at: float | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class SandboxEvent(_Record):
    """Something that happened to a sandbox, such as `sandbox.created` or `sandbox.stopped`; the details are
    in `data`."""

    id: str
    type: str
    sandbox_id: str | None = None
    created_at: float | None = None
    data: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class UsageRow(_Record):
    """What was used in the hour or day that begins at `start` (None: in all of the time asked for)."""

    start: float | None = None
    sandbox_seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    execs: int = 0
    sandboxes: int = 0
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Usage:
    """What the project used: all of it in `total`, by the hour or day in `rows`."""

    start: float | None
    end: float | None
    total: UsageRow
    rows: list[UsageRow]
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Usage:
        """Read it from an answer of the API.

        Raises:
            UnexpectedResponseError: There is no total or no data in it.
        """
        total, rows = body.get("total"), body.get("data")
        if not isinstance(total, dict) or not isinstance(rows, list):
            raise UnexpectedResponseError("the usage in the answer has no total or no data")
        made = [UsageRow.from_body(row) for row in rows if isinstance(row, dict)]
        return cls(body.get("from"), body.get("to"), UsageRow.from_body(total), made, dict(body))


@dataclass(frozen=True)
class AuditEntry(_Record):
    """Who changed what: `actor` did `action` to `resource_id`, from the address `client`."""

    id: str
    action: str
    created_at: float | None = None
    actor: str | None = None
    resource_id: str | None = None
    request_id: str | None = None
    client: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


def exact_path(body: Mapping[str, Any], name: str = "path") -> str | None:
    """The path in an answer, byte for byte; None where there is none."""
    encoded, shown = body.get(f"{name}_base64"), body.get(name)
    if isinstance(encoded, str):
        try:
            return base64.b64decode(encoded, validate=True).decode("utf-8", "surrogateescape")
        except binascii.Error as exc:
            raise UnexpectedResponseError(f"{name}_base64 in the answer is not base64") from exc
    return shown if isinstance(shown, str) else None
