"""Bodies of the exec routes."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from sandboxd.kit.http import Body
from sandboxd.kit.paging import Resource
from sandboxd.sandboxes.exec import HOME, NewExec
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.schemas import Argument, Env, Text
from sandboxd.sandboxes.states import ExecStatus

EndStatus = Literal["completed", "failed", "timed_out", "killed", "oom", "lost"]
AnyStatus = EndStatus | Literal["running"]


class ExecBody(Body):
    code: Text | None = Field(None, description="Python to run. Give this or `command`.")
    language: Literal["python"] = "python"
    command: Argument | Annotated[list[Argument], Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="A list is the program and its arguments; a string is run by `bash -lc`."
    )
    cwd: Argument = Field(HOME, min_length=1, max_length=4096)
    env: Env = Field(default_factory=dict)
    stdin: Text = Field("", description="Given to the program; without it stdin is closed.")
    timeout_s: float | None = Field(None, gt=0, description="Seconds; the server's default when not given.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    fresh: bool = Field(False, description="Start a new Python instead of forking one that waits.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.code is None) == (self.command is None):
            raise ValueError("give either 'code' or 'command', and not both")
        if self.command is not None and not (
            self.command if isinstance(self.command, str) else self.command[0]
        ):
            raise ValueError("'command' is empty")
        if self.command is not None and self.fresh:
            raise ValueError("'fresh' is for 'code'; a command is always a new process")
        return self

    def wanted(self) -> NewExec:
        return NewExec(
            code=self.code,
            command=self.command,
            cwd=self.cwd,
            env=self.env,
            stdin=self.stdin,
            timeout_s=self.timeout_s,
            stream=self.stream,
            fresh=self.fresh,
        )


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
    status: EndStatus
    exit_code: int | None
    signal: str | None
    stdout: str
    stderr: str
    truncated: bool
    output_path: str | None = Field(description="Folder in the sandbox with all of a truncated output.")
    error: ExecErrorOut | None
    started_at: float
    duration_ms: float
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
    error: PastErrorOut | None
    started_at: float
    duration_ms: float | None
    usage: ExecUsageOut


class ExecEntryOut(Resource):
    """One exec in the list of a sandbox's execs."""

    object: Literal["sandbox.exec"] = "sandbox.exec"
    sandbox_id: str
    kind: str
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
            status=ExecStatus.KILLED if unwritten else row.status,
            exit_code=row.exit_code,
            signal=row.signal,
            error_name=row.error_name,
            truncated=row.truncated,
            started_at=round(row.started_at, 3),
            duration_ms=row.duration_ms,
            usage=ExecUsageOut(cpu_ms=row.cpu_ms, max_rss_mb=row.max_rss_mb),
        )
