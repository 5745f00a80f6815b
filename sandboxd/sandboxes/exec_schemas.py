"""Bodies of the exec routes."""

import base64
import binascii
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from sandboxd.kit.http import Body
from sandboxd.kit.ids import ID_PATTERN
from sandboxd.kit.paging import Resource
from sandboxd.sandboxes.exec_input import SIGNALS
from sandboxd.sandboxes.exec_request import HOME, NewExec, Pty
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.schemas import Argument, Env, Text
from sandboxd.sandboxes.states import ExecStatus

EndStatus = Literal["completed", "failed", "timed_out", "killed", "oom", "lost"]
AnyStatus = EndStatus | Literal["running"]
# What one argument of a program can hold: the kernel's limit.
_MAX_BASH = 128 * 1024 - 1
_OF_A_CONTEXT = ("cwd", "env", "user", "fresh", "stdin", "stdin_open", "background", "pty")


def _user(value: str) -> str:
    if value not in ("user", "nobody"):
        raise ValueError(
            "must be 'user' or 'nobody': code of tenants runs as no other user of the sandbox, least of all"
            " as root"
        )
    return value


User = Annotated[str, AfterValidator(_user), WithJsonSchema({"type": "string", "enum": ["user", "nobody"]})]
Rows = Annotated[int, Field(ge=1, le=1000)]


class PtyBody(BaseModel):
    """A terminal for a command."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    rows: Rows = 24
    cols: Rows = 80
    term: str = Field("xterm-256color", pattern=r"^[A-Za-z0-9._+-]{1,64}$")


class ExecBody(Body):
    code: Text | None = Field(None, description="What to run. Give this or `command`.")
    language: Literal["python", "bash"] = Field("python", description="Of `code`, outside of contexts.")
    command: Argument | Annotated[list[Argument], Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="A list is the program and its arguments; a string is run by `bash -lc`."
    )
    context: Annotated[str, Field(pattern=ID_PATTERN)] | None = Field(
        None, description="Run `code` in this context, after what waits there."
    )
    cwd: Annotated[Argument, Field(min_length=1, max_length=4096)] | None = Field(
        None, description=f"Working directory; {HOME} when not given, /tmp for `nobody`."
    )
    env: Env = Field(default_factory=dict)
    user: User = Field("user", description="`nobody` can write to /tmp only.")
    stdin: Text = Field("", description="Given to the program; without it stdin is closed.")
    stdin_open: bool = Field(False, description="Leave stdin open after that, for more.")
    pty: PtyBody | None = Field(None, description="Run `command` in a terminal; all output is stdout.")
    timeout_s: float | None = Field(
        None, gt=0, description="Seconds; the server's default when not given, none for `background`."
    )
    background: bool = Field(False, description="Answer at once; it goes on whoever leaves.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    fresh: bool = Field(False, description="Start a new Python instead of forking one that waits.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.code is None) == (self.command is None):
            raise ValueError("give either 'code' or 'command', and not both")
        if self.command is not None:
            self._check_command(self.command)
        elif self.pty is not None:
            raise ValueError("'pty' is for 'command', such as \"bash\"; 'code' has no terminal")
        elif self.language == "bash" and self.context is None:
            self._check_bash(self.code or "")
        if self.context is not None:
            self._check_context()
        if self.background and self.stream:
            raise ValueError(
                "'background' answers at once: follow it by GET .../execs/{id}/events instead of 'stream'"
            )
        if "timeout_s" in self.model_fields_set and self.timeout_s is None and not self.background:
            raise ValueError(
                "'timeout_s' is null, which is for 'background' only; leave it away for the default"
            )
        return self

    def _check_command(self, command: str | list[str]) -> None:
        if not (command if isinstance(command, str) else command[0]):
            raise ValueError("'command' is empty")
        if self.fresh:
            raise ValueError("'fresh' is for 'code'; a command is always a new process")
        if self.context is not None:
            raise ValueError("'context' is for 'code'; a command is a process of its own")
        if "language" in self.model_fields_set:
            raise ValueError("'language' is for 'code'; a string as 'command' is run by bash")

    def _check_bash(self, code: str) -> None:
        if self.fresh:
            raise ValueError("'fresh' is for Python; bash is always a new process")
        if "\0" in code:
            raise ValueError("'code' holds a NUL character, which bash cannot be given")
        if len(code.encode()) > _MAX_BASH:
            raise ValueError(
                f"'code' for bash is longer than {_MAX_BASH} bytes: write it to a file and run that"
            )

    def _check_context(self) -> None:
        given = [name for name in _OF_A_CONTEXT if name in self.model_fields_set]
        if given:
            raise ValueError(
                f"'{given[0]}' is not for code in a context, which has its own from its start: leave it away"
            )

    def wanted(self) -> NewExec:
        return NewExec(
            code=self.code,
            language=self.language,
            command=self.command,
            context=self.context,
            cwd=self.cwd,
            env=self.env,
            user=self.user,
            stdin=self.stdin,
            stdin_open=self.stdin_open,
            pty=None if self.pty is None else Pty(self.pty.rows, self.pty.cols, self.pty.term),
            timeout_s=self.timeout_s,
            background=self.background,
            stream=self.stream,
            fresh=self.fresh,
        )


class StdinBody(Body):
    data: Text = ""
    encoding: Literal["utf-8", "base64"] = Field("utf-8", description="Of `data`.")
    close: bool = Field(False, description="Close stdin after `data`.")
    offset: int | None = Field(
        None,
        ge=0,
        le=2**53 - 1,
        description="Where `data` begins in all of stdin: what of it was taken before is skipped, so that the"
        " request can be sent again. Without it `data` follows on what was taken.",
    )

    @model_validator(mode="after")
    def _decodable(self) -> Self:
        self.decoded()
        return self

    def decoded(self) -> bytes:
        if self.encoding == "utf-8":
            return self.data.encode()
        try:
            return base64.b64decode(self.data.encode(), validate=True)
        except binascii.Error as error:
            raise ValueError(f"'data' is not base64: {error}") from None


class StdinOut(BaseModel):
    object: Literal["sandbox.exec.stdin"] = "sandbox.exec.stdin"
    exec_id: str
    size: int = Field(description="Bytes taken so far, all requests together.")
    open: bool


def _signal(value: object) -> int:
    number = value
    if isinstance(value, str):
        name = value.upper()
        number = SIGNALS.get(name.removeprefix("SIG"))
    if type(number) is not int or number not in SIGNALS.values():
        raise ValueError("must be a signal's name or number: 'SIGTERM', 'TERM' or 15")
    return number


Signal = Annotated[
    int,
    BeforeValidator(_signal),
    WithJsonSchema({"anyOf": [{"type": "string", "examples": ["SIGTERM"]}, {"type": "integer"}]}),
]


class SignalBody(Body):
    signal: Signal = Field(description="SIGKILL ends all that the exec started.")


class SignalOut(BaseModel):
    object: Literal["sandbox.exec.signal"] = "sandbox.exec.signal"
    exec_id: str
    signal: str
    delivered: bool = Field(description="False for an exec that had ended.")


class ResizeBody(Body):
    rows: Rows
    cols: Rows


class ResizeOut(BaseModel):
    object: Literal["sandbox.exec.size"] = "sandbox.exec.size"
    exec_id: str
    rows: int
    cols: int


class ExecErrorOut(BaseModel):
    name: str
    value: str
    traceback: str


class ExecUsageOut(BaseModel):
    cpu_ms: float
    max_rss_mb: float


class ExecOut(BaseModel):
    """The result of an exec. Built as a plain dict on the way of every call; this documents it."""

    id: str
    object: Literal["sandbox.exec"] = "sandbox.exec"
    sandbox_id: str
    status: AnyStatus = Field(description="`running` with `background` only.")
    exit_code: int | None
    signal: str | None
    stdout: str
    stderr: str
    truncated: bool
    output_path: str | None = Field(description="Folder in the sandbox with all of a truncated output.")
    results: list[dict[str, Any]] = Field(description="MIME bundles, from contexts.")
    error: ExecErrorOut | None
    context: str | None
    background: bool
    started_at: float
    duration_ms: float | None
    usage: ExecUsageOut


class PastErrorOut(BaseModel):
    name: str
    value: str | None
    traceback: str | None


class PastExecOut(BaseModel):
    """An exec that was started before: its result as far as it is kept, or what there is of it so far."""

    id: str
    object: Literal["sandbox.exec"] = "sandbox.exec"
    sandbox_id: str
    kind: Literal["code", "command"]
    status: AnyStatus
    exit_code: int | None
    signal: str | None
    output_kept: bool = Field(description="Whether the sandbox still has what it wrote.")
    stdout: str | None
    stderr: str | None
    truncated: bool
    output_path: str | None
    results: list[dict[str, Any]] | None
    error: PastErrorOut | None
    context: str | None
    background: bool
    started_at: float
    duration_ms: float | None
    usage: ExecUsageOut


class ExecEntryOut(Resource):
    """One exec in the list of a sandbox's execs."""

    object: Literal["sandbox.exec"] = "sandbox.exec"
    sandbox_id: str
    kind: str
    title: str = Field(description="The first 200 characters of what was run.")
    context: str | None
    background: bool
    status: str
    exit_code: int | None
    signal: str | None
    error_name: str | None
    truncated: bool
    started_at: float
    duration_ms: float | None
    usage: ExecUsageOut

    @classmethod
    def of(cls, row: Exec, *, alive: bool) -> Self:
        # Nobody writes the end of an exec whose sandbox ended while no daemon was there.
        unwritten = row.status == ExecStatus.RUNNING and not alive
        return cls(
            id=row.id,
            sandbox_id=row.sandbox_id,
            kind=row.kind,
            title=row.title,
            context=row.context_id,
            background=row.background,
            status=ExecStatus.KILLED if unwritten else row.status,
            exit_code=row.exit_code,
            signal=row.signal,
            error_name=row.error_name,
            truncated=row.truncated,
            started_at=round(row.started_at, 3),
            duration_ms=row.duration_ms,
            usage=ExecUsageOut(cpu_ms=row.cpu_ms, max_rss_mb=row.max_rss_mb),
        )
