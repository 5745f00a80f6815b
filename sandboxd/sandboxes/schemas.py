"""Bodies of the sandbox routes."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sandboxd.kit.http import Body
from sandboxd.kit.paging import Resource
from sandboxd.sandboxes.limits import NewSandbox
from sandboxd.sandboxes.models import Sandbox

MAX_ENV_BYTES = 64 * 1024
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LABEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def _text(value: str) -> str:
    """Text that has bytes: JSON can carry halves of characters, which no program could be given."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"is not text: lone surrogate at character {error.start}") from None
    return value


def _argument(value: str) -> str:
    if "\0" in _text(value):
        raise ValueError("holds a NUL character, which no argument, path or variable can")
    return value


def _env(value: dict[str, str]) -> dict[str, str]:
    for name, item in value.items():
        if not _ENV_NAME.fullmatch(name):
            raise ValueError(f"{name[:60]!r} is not the name of a variable (letters, digits, underscores)")
        _argument(item)
    if sum(len(name) + len(item.encode()) + 2 for name, item in value.items()) > MAX_ENV_BYTES:
        raise ValueError(f"all variables together take more than {MAX_ENV_BYTES} bytes")
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    for name, item in value.items():
        if not LABEL_NAME.fullmatch(name):
            raise ValueError(
                f"{name[:60]!r} is not a label name (1 to 128 of letters, digits, '.', '_', '/', '-')"
            )
        if len(_argument(item)) > 256:
            raise ValueError(f"the value of {name!r} is longer than 256 characters")
    return value


Text = Annotated[str, AfterValidator(_text)]
Argument = Annotated[str, AfterValidator(_argument)]
Env = Annotated[dict[str, str], AfterValidator(_env)]
Labels = Annotated[dict[str, str], Field(max_length=64), AfterValidator(_labels)]


class Network(BaseModel):
    """The outside world as a sandbox sees it: none of it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    mode: Literal["none"] = "none"


class CreateSandboxBody(Body):
    image: Annotated[Argument, Field(min_length=1, max_length=255)] | None = Field(
        None, description="Name of an image in the engine; the server's default when not given."
    )
    cpu_mhz: int | None = Field(
        None, description="Share of CPU; 2500 is one core unless the server says otherwise."
    )
    memory_size_mb: int | None = Field(None, description="Memory limit; there is no swap.")
    disk_size_mb: int | None = Field(None, description="Size of the workspace: /home/user and /tmp.")
    gpu_count: int = Field(0, description="This server has no GPU runtime: 0.")
    timeout_s: float | None = Field(
        300,
        gt=0,
        description="Seconds until the sandbox is stopped; null for none where the server allows it.",
    )
    idle_timeout_s: float | None = Field(
        None, gt=0, description="Seconds without any use until the sandbox is stopped; null for never."
    )
    labels: Labels = Field(default_factory=dict)
    env: Env = Field(default_factory=dict, description="Variables of everything that runs in the sandbox.")
    network: Network = Field(default_factory=Network)
    wait: bool = Field(True, description="Answer when the sandbox runs, not when it is only on its way.")

    def wanted(self) -> NewSandbox:
        return NewSandbox(
            image=self.image,
            cpu_mhz=self.cpu_mhz,
            memory_size_mb=self.memory_size_mb,
            disk_size_mb=self.disk_size_mb,
            gpu_count=self.gpu_count,
            timeout_s=self.timeout_s,
            idle_timeout_s=self.idle_timeout_s,
            labels=self.labels,
            env=self.env,
            wait=self.wait,
        )


class PatchSandboxBody(Body):
    """What is not named stays as it is."""

    timeout_s: float | None = Field(
        None, gt=0, description="Seconds from now until it is stopped; null for none where that is allowed."
    )
    idle_timeout_s: float | None = Field(None, gt=0, description="Null switches it off.")
    labels: Labels = Field(default_factory=dict, description="Replaces all of them.")
    cpu_mhz: int = Field(0, description="Share of CPU.")
    memory_size_mb: int = Field(0, description="Memory limit; not below what is in use.")
    network: Network = Field(default_factory=Network)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set - {"project", "log"}:
            raise ValueError("names nothing to change")
        return self

    def changes(self) -> dict[str, Any]:
        """What was named, and only that."""
        return self.model_dump(include=self.model_fields_set - {"project", "log", "network"})


class SandboxOut(Resource):
    object: Literal["sandbox"] = "sandbox"
    status: str
    termination_reason: str | None
    image: str
    cpu_mhz: int
    memory_size_mb: int
    disk_size_mb: int
    gpu_count: int = 0
    network: dict[str, str]
    labels: dict[str, str]
    env: list[str] = Field(description="Names only.")
    timeout_s: float | None
    idle_timeout_s: float | None
    created_at: int
    started_at: int | None
    last_active_at: int
    expires_at: int | None
    stopped_at: int | None
    isolation: int = Field(description="0 runc, 1 runc with user namespaces, 2 gVisor.")
    project: str

    @classmethod
    def of(cls, row: Sandbox, project: str, last_active_at: float | None = None) -> Self:
        return cls(
            id=row.id,
            status=row.status,
            termination_reason=row.termination_reason,
            image=row.image,
            cpu_mhz=row.cpu_mhz,
            memory_size_mb=row.memory_size_mb,
            disk_size_mb=row.disk_size_mb,
            network={"mode": "none"},
            labels=row.labels,
            env=sorted(row.env),
            timeout_s=row.timeout_s,
            idle_timeout_s=row.idle_timeout_s,
            created_at=int(row.created_at),
            started_at=_seconds(row.started_at),
            last_active_at=int(last_active_at or row.last_active_at),
            expires_at=_seconds(row.expires_at),
            stopped_at=_seconds(row.stopped_at),
            isolation=row.isolation,
            project=project,
        )


class EmptyBody(Body):
    """For what takes no options: stop, pause, resume."""


def _seconds(value: float | None) -> int | None:
    return None if value is None else int(value)
