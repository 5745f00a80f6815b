"""The sandboxes in memory: what an exec needs to know without asking the store."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from sandboxd.agentlink.client import Agent

MAX_FILE_OPERATIONS = 8
MAX_WATCHES = 4


@dataclass(slots=True)
class LiveSandbox:
    id: str
    # None for a member of the pool.
    project_id: str | None
    agent: Agent
    env: dict[str, str]
    cpus: float
    disk_size_mb: int
    last_active_at: float
    # On the host's monotonic clock; None for a sandbox without an absolute timeout, and for a paused one.
    deadline: float | None
    idle: "Idleness"
    metered: "Metered"
    idle_timeout_s: float | None = None
    paused: bool = False
    # Execs that run; a sandbox at work is not idle. Those without a deadline, servers for the most part, are
    # no work by themselves: they would keep it for ever.
    execs: int = 0
    servers: int = 0
    touched: bool = False
    # Bytes that came in for it and went out from it, and execs that ended: counted up by who serves them.
    bytes_in: int = 0
    bytes_out: int = 0
    execs_ended: int = 0
    # Places for what is done to its files, and for watches, which last. With the execs and the
    # feeds they are fewer than the link has connections.
    file_places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_FILE_OPERATIONS))
    watches: int = 0
    # What requests hold that write to programs in it.
    input_bytes: int = 0
    # Held by what changes the sandbox in several steps: limits, pause, resume.
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def touch(self, now: float) -> None:
        self.last_active_at = now
        self.touched = True


@dataclass(slots=True)
class Idleness:
    """Since when, on the host's monotonic clock, a sandbox has not been used. The time of last use is on the
    wall's clock, which may jump; so only that it has changed counts."""

    since_s: float
    _seen: tuple[float, int, int] | None = None

    def seconds(self, live: LiveSandbox, monotonic: float) -> float:
        """For how long it has been idle; call this often. The first call only takes note."""
        seen = (live.last_active_at, live.bytes_in, live.bytes_out)
        if live.execs > live.servers or live.paused or self._seen not in (None, seen):
            self.since_s = monotonic
        self._seen = seen
        return monotonic - self.since_s


@dataclass(slots=True)
class Metered:
    """What of a sandbox's use has been accounted for. `at_s` is on the monotonic clock."""

    at_s: float
    cpu_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    execs: int = 0
    # Whether the next reading is its first: the one that counts the sandbox itself.
    first: bool = True


class LiveSandboxes:
    """All of this daemon's. Kept in step with the rows by the life cycle, which alone adds and removes."""

    def __init__(self) -> None:
        self._by_id: dict[str, LiveSandbox] = {}

    def add(self, live: LiveSandbox) -> None:
        self._by_id[live.id] = live

    def remove(self, sandbox_id: str) -> LiveSandbox | None:
        return self._by_id.pop(sandbox_id, None)

    def find(self, project_id: str, sandbox_id: str) -> LiveSandbox | None:
        live = self._by_id.get(sandbox_id)
        return live if live is not None and live.project_id == project_id else None

    def get(self, sandbox_id: str) -> LiveSandbox | None:
        return self._by_id.get(sandbox_id)

    def __iter__(self) -> Iterator[LiveSandbox]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)
