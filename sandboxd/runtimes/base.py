"""The runtime contract: what every driver offers, in words that name no engine.

No exec, terminal or file call is in it: those are the agent protocol over `dial()`. Handles are opaque to
everything above a driver.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NewType, Protocol

from sandboxd.kit.streams import Stream

Handle = NewType("Handle", str)


class Phase(StrEnum):
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    # The engine says that there is no such sandbox; an engine that does not answer raises instead.
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """All that a driver needs to make one sandbox. Sizes in MiB, CPU in cores."""

    id: str
    project_id: str | None
    image: str
    cpus: float
    memory_mb: int
    disk_mb: int
    max_files: int
    max_processes: int
    uid: int
    runtime: str
    # Whether it is to give way to those that are used: for sandboxes that wait in the pool.
    background: bool = False

    @property
    def nobody_uid(self) -> int:
        """The host uid of the sandbox's second user. Slots, and so first uids, end at 60000."""
        return self.uid + 60000

    @property
    def nobody_processes(self) -> int:
        """What its second user may start, on top of `max_processes`."""
        return max(16, self.max_processes // 4)


@dataclass(frozen=True, slots=True)
class Observation:
    phase: Phase
    oom_killed: bool = False
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Owned:
    """A sandbox of this installation as the engine knows it."""

    sandbox_id: str
    handle: Handle
    phase: Phase


@dataclass(frozen=True, slots=True)
class Exited:
    """Something in the engine ended by itself."""

    sandbox_id: str
    handle: Handle


@dataclass(frozen=True, slots=True)
class Usage:
    """What a sandbox has used since its start, and uses now; and the limit that holds, where it is known."""

    cpu_s: float
    memory_mb: float
    memory_limit_mb: int | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """An image that sandboxes can start from: its content's digest, and the agent can run in it."""

    ref: str
    digest: str
    python: str


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the self-check: what was found, what it means, and how to mend it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    runtime: str
    isolation_level: int
    pause: bool = False
    # Whether `update` can change the limits of a running sandbox.
    update: bool = False
    snapshot: bool = False
    checks: Sequence[Check] = field(default_factory=tuple)


class Runtime(Protocol):
    """Makes, ends, observes and reaches sandboxes. Every call has a deadline of its own; all raise
    EngineUnavailableError when the engine does not answer."""

    async def start(self) -> None:
        """Opens the driver. Raises RuntimeFaultError when this engine cannot serve (see the message)."""

    async def close(self) -> None:
        """Closes connections and listeners; sandboxes live on. May be called twice."""

    async def ping(self) -> None: ...

    async def capabilities(self) -> Capabilities: ...

    async def create(self, spec: SandboxSpec) -> Handle:
        """Makes and starts a sandbox. Idempotent by spec.id: one that exists is adopted."""

    async def delete(self, sandbox_id: str) -> None:
        """Ends the sandbox and removes all its traces. Idempotent: a missing one is success."""

    async def adopt(self, sandbox_id: str, handle: Handle) -> None:
        """Takes up a sandbox that an earlier process of this daemon made: its agent redials."""

    async def observe(self, handle: Handle) -> Observation: ...

    async def list(self) -> Sequence[Owned]:
        """The sandboxes of this installation and no others."""

    def watch(self) -> AsyncIterator[Exited]:
        """Sandboxes that end by themselves, as they do; ends when the engine hangs up. When called again it
        begins where it ended, as far as the engine remembers: some may then be told twice."""

    async def limit_cpus(self, sandbox_id: str, cpus: float | None) -> None:
        """Changes a running sandbox's share of CPU, in cores; None for as good as no limit."""

    async def set_background(self, sandbox_id: str, background: bool) -> None:
        """Whether the sandbox gets little CPU while others want it. Cheap enough for every claim; raises
        RuntimeFaultError where the kernel's accounts of it cannot be reached."""

    async def update(self, sandbox_id: str, cpus: float, memory_mb: int) -> None:
        """Changes a sandbox's limits while it runs, to both values or to neither. Raises LimitBelowUseError
        when it uses more memory than `memory_mb` now, SpecRefusedError where this runtime cannot."""

    async def pause(self, sandbox_id: str) -> None:
        """Freezes all of its processes, memory kept, and hangs up its connections. Idempotent."""

    async def resume(self, sandbox_id: str) -> None:
        """Lets it go on; its agent dials again. Idempotent."""

    async def usage(self, sandbox_id: str) -> Usage | None:
        """Read from the kernel's accounts, cheap enough for every claim; None for one that is not there."""

    async def instance(self) -> str:
        """Names this run of the engine: another name after the engine, or the host, was started again."""

    def leftovers(self) -> set[str]:
        """Sandbox ids of which the driver still holds something on this host, alive or not."""

    async def dial(self, sandbox_id: str, timeout_s: float) -> Stream:
        """A connection to the sandbox's agent. Raises AgentUnreachableError after `timeout_s`."""


class ImageStore(Protocol):
    async def ensure_image(self, ref: str) -> Image:
        """The image behind a name, ready to start from. Raises ImageNotFoundError, ImageUnusableError."""
