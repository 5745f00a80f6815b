"""The running sandboxes in memory: what an exec needs to know without asking the store."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sandboxd.agentlink.client import Agent


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
    # On the host's monotonic clock; None for a sandbox without an absolute timeout.
    deadline: float | None
    idle_timeout_s: float | None = None
    paused: bool = False
    # Bytes that came in for it and went out from it, and execs that ended, since they were last metered.
    bytes_in: int = 0
    bytes_out: int = 0
    execs_ended: int = 0
    # Running execs and open transfers: a sandbox at work is not idle.
    execs: int = field(default=0)
    touched: bool = field(default=False)

    def touch(self, now: float) -> None:
        self.last_active_at = now
        self.touched = True


class LiveSandboxes:
    """All of this daemon's. Kept in step with the rows by the service, which alone adds and removes."""

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
