"""What calls give back: exec results, stream chunks, sandbox facts. No HTTP in here."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from e80_sdk.errors import UnexpectedResponseError
from e80_sdk.mime import Result, preformatted

ALIVE = ("creating", "running", "paused", "stopping")
_CUT_SHORT = ("timed_out", "killed", "oom", "lost")


@dataclass(frozen=True)
class ExecError:
    """The exception that ended the program, as text from inside the sandbox."""

    name: str
    value: str
    traceback: str


class ExecResult(str):
    """What a program printed, and how it ended.

    As a `str` it is what a person or a model wants to read: stdout, the results as text, and after a failure
    the traceback (stderr where there is no traceback; a line like `[timed_out]` where the program was cut
    short). In a notebook it shows with its pictures and tables.

    Attributes:
        id: Id of the exec.
        stdout: Standard output.
        stderr: Standard error.
        exit_code: Exit code, or None when a signal ended it.
        status: `completed`, `failed`, `timed_out`, `killed`, `oom` or `lost`; or `running`.
        signal: Name of the signal that ended it, or None.
        error: The exception that ended the program, or None.
        results: What code in a context showed, each a `Result`: its last value, pictures, tables.
        duration_ms: How long it ran.
        truncated: Whether output beyond the cap was cut.
        output_path: Folder in the sandbox with all of a truncated output, or None.
        usage: `cpu_ms` and `max_rss_mb`.
        raw: The whole answer as the server sent it.
    """

    id: str
    stdout: str
    stderr: str
    exit_code: int | None
    status: str
    signal: str | None
    error: ExecError | None
    results: list[Result]
    duration_ms: float
    truncated: bool
    output_path: str | None
    usage: dict[str, Any]
    raw: dict[str, Any]

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ExecResult:
        """Read an exec from an answer of the API.

        Raises:
            UnexpectedResponseError: A field is missing or has the wrong type.
        """
        try:
            error = body.get("error")
            failure = None if error is None else ExecError(*(str(error[key] or "") for key in _ERROR_FIELDS))
            status, stdout, stderr = str(body["status"]), str(body["stdout"] or ""), str(body["stderr"] or "")
            exit_code = None if body["exit_code"] is None else int(body["exit_code"])
            duration_ms = float(body["duration_ms"] or 0)
            results = [Result(bundle) for bundle in body.get("results") or () if isinstance(bundle, dict)]
        except (KeyError, TypeError, ValueError) as exc:
            raise UnexpectedResponseError(f"the exec in the answer cannot be read: {exc!r}") from exc
        made = cls(_readable(status, stdout, stderr, failure, results))
        made.id = str(body.get("id") or "")
        made.stdout, made.stderr, made.status, made.error = stdout, stderr, status, failure
        made.results = results
        made.exit_code, made.duration_ms = exit_code, duration_ms
        made.signal = None if body.get("signal") is None else str(body["signal"])
        made.truncated = bool(body.get("truncated"))
        made.output_path = None if body.get("output_path") is None else str(body["output_path"])
        made.usage = dict(body.get("usage") or {})
        made.raw = dict(body)
        return made

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> ExecResult:
        """Read the exec in an `exec.completed` event.

        Raises:
            UnexpectedResponseError: There is none, or it cannot be read.
        """
        body = event.get("exec")
        if not isinstance(body, dict):
            raise UnexpectedResponseError("the event exec.completed holds no exec")
        return cls.from_body(body)

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself with exit code 0."""
        return self.status == "completed"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        made = {"text/plain": str(self)}
        if any(set(result.data) - {"text/plain"} for result in self.results):
            after = _readable(self.status, "", self.stderr, self.error, []) if not self.ok else ""
            parts = [preformatted(self.stdout)] if self.stdout else []
            parts += [result.as_html() for result in self.results]
            made["text/html"] = "\n".join([*parts, *([preformatted(after)] if after else [])])
        return made


class ExecChunk(str):
    """A piece of output as it arrives: text, with the exact bytes beside it.

    Attributes:
        stream: `stdout`, `stderr`, or `result` for something that code in a context showed.
        data: The bytes; the text holds replacement characters where they are not UTF-8.
        result: What was shown, where `stream` is `result`; the text is its plain text.
        missed_bytes: How much output before this piece is not kept any more and was missed.
    """

    stream: str
    data: bytes
    result: Result | None = None
    missed_bytes: int = 0

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> ExecChunk:
        """Read an `exec.stdout.delta`, `exec.stderr.delta` or `exec.result` event.

        Raises:
            UnexpectedResponseError: It cannot be read.
        """
        if event.get("type") == "exec.result":
            return cls._of_result(event)
        try:
            delta = event["delta"]
            if event.get("encoding") == "base64":
                data = base64.b64decode(delta, validate=True)
                chunk = cls(data.decode("utf-8", "replace"))
            else:
                chunk = cls(delta)
                data = delta.encode("utf-8", "surrogatepass")
        except (KeyError, TypeError, AttributeError, binascii.Error) as exc:
            raise UnexpectedResponseError(f"an output event cannot be read: {exc!r}") from exc
        chunk.data = data
        chunk.stream = "stderr" if event.get("type") == "exec.stderr.delta" else "stdout"
        return chunk

    @classmethod
    def _of_result(cls, event: Mapping[str, Any]) -> ExecChunk:
        bundle = event.get("result")
        if not isinstance(bundle, dict):
            raise UnexpectedResponseError("the event exec.result holds no result")
        result = Result(bundle)
        chunk = cls(f"{result!r}\n")
        chunk.stream, chunk.result, chunk.data = "result", result, chunk.encode("utf-8", "surrogatepass")
        return chunk


class ExecReader:
    """Reads the events of one exec.

    Attributes:
        result: The result, once it has come.
        last: Number of the last event before it.
    """

    def __init__(self) -> None:
        self.result: ExecResult | None = None
        self.last: int | None = None
        self._missed_bytes = 0

    def chunk(self, event: Mapping[str, Any]) -> ExecChunk | None:
        """The output in the next event, if there is any.

        Raises:
            UnexpectedResponseError: The event cannot be read.
        """
        kind, number, missed = event.get("type"), event.get("sequence_number"), event.get("missed_bytes")
        if kind == "exec.completed":
            self.result = ExecResult.from_event(event)
            return None
        self.last = number if isinstance(number, int) else self.last
        if kind == "exec.gap" and isinstance(missed, int):
            self._missed_bytes += missed
        elif kind in _OUTPUT_EVENTS:
            chunk = ExecChunk.from_event(event)
            if self._missed_bytes:
                chunk.missed_bytes, self._missed_bytes = self._missed_bytes, 0
            return chunk
        return None


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox as the server described it. Fields that this version does not know are in `raw`."""

    id: str
    status: str
    termination_reason: str | None = None
    image: str | None = None
    cpu_mhz: int | None = None
    memory_size_mb: int | None = None
    disk_size_mb: int | None = None
    gpu_count: int | None = None
    network: dict[str, Any] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    env: list[str] = field(default_factory=list)
    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    created_at: float | None = None
    started_at: float | None = None
    last_active_at: float | None = None
    expires_at: float | None = None
    stopped_at: float | None = None
    isolation: Any = None
    project: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> SandboxInfo:
        """Read a sandbox from an answer of the API.

        Raises:
            UnexpectedResponseError: There is no id or status in it.
        """
        if not isinstance(body.get("id"), str) or not isinstance(body.get("status"), str):
            raise UnexpectedResponseError("the sandbox in the answer has no id or status")
        known = {item.name for item in fields(cls)} - {"raw"}
        return cls(**{key: value for key, value in body.items() if key in known}, raw=dict(body))

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.status in ALIVE


_OUTPUT_EVENTS = ("exec.stdout.delta", "exec.stderr.delta", "exec.result")
_ERROR_FIELDS = ("name", "value", "traceback")


def _readable(
    status: str, stdout: str, stderr: str, error: ExecError | None, results: Sequence[Result]
) -> str:
    parts = [stdout, *(repr(result) for result in results)]
    if status != "completed":
        parts.append(error.traceback if error and error.traceback else stderr)
    if status in _CUT_SHORT:
        parts.append(f"[{status}]")
    text = ""
    for part in parts:
        text += part if not text or text.endswith("\n") or not part else f"\n{part}"
    return text
