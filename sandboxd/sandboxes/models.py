"""Tables of sandboxes, the dead ones included (each of those says why it ended), and of what happened in
them: execs, events, usage. And the nodes: the daemons that share one store."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, false, text
from sqlmodel import Field

from sandboxd.kit.db import Table
from sandboxd.sandboxes.states import Reason, Status

_ALIVE = text("status IN ('creating', 'ready', 'running', 'paused', 'stopping')")


class Sandbox(Table, table=True):
    __tablename__ = "sandbox"
    __table_args__ = (
        # Two live sandboxes with one slot would have one uid on the host.
        Index("ix_sandbox_slot_alive", "slot", unique=True, sqlite_where=_ALIVE, postgresql_where=_ALIVE),
        Index("ix_sandbox_project_id_status", "project_id", "status"),
        Index("ix_sandbox_project_id_created_at", "project_id", "created_at", "id"),
        # Ended sandboxes stay for weeks: what is asked at each create must not read them all. Not partial
        # ones, which no statement with a parameter for the status can use.
        Index("ix_sandbox_node_id_status", "node_id", "status"),
        Index("ix_sandbox_status_slot", "status", "slot"),
        Index("ix_sandbox_stopped_at", "stopped_at"),
    )

    id: str = Field(primary_key=True, max_length=64)
    # None for a member of the pool: it belongs to nobody until it is claimed.
    project_id: str | None = Field(default=None, max_length=64, foreign_key="project.id")
    # The daemon that holds the sandbox, and the run of its engine that it was last seen in.
    node_id: str = Field(default="", max_length=64, sa_column_kwargs={"server_default": ""})
    engine_instance: str = Field(default="", max_length=128, sa_column_kwargs={"server_default": ""})
    status: str = Field(default=Status.CREATING, max_length=16)
    termination_reason: str | None = Field(default=None, max_length=32)
    slot: int
    # Opaque to everything but the runtime that gave it.
    handle: str | None = Field(default=None, max_length=128)
    runtime: str = Field(max_length=16)
    isolation: int
    image: str = Field(max_length=255)
    image_digest: str = Field(max_length=100)
    cpu_mhz: int
    memory_size_mb: int
    disk_size_mb: int
    labels: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    env: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    # When it became a member of the pool; stays when it is claimed, and tells that it was.
    pooled_at: float | None = None
    created_at: float
    started_at: float | None = None
    last_active_at: float
    expires_at: float | None = None
    stopped_at: float | None = None
    # The deadline on the host's own clock: a jump of the wall clock must not end every sandbox at once.
    boot_id: str = Field(max_length=64)
    expires_boot_s: float | None = None
    last_active_boot_s: float | None = None
    # What was left of the timeout when it was paused.
    remaining_s: float | None = None
    # Up to when its use is in `usage_hour`, and what its CPU clock said then.
    metered_at: float | None = None
    cpu_read_s: float = Field(default=0, sa_column_kwargs={"server_default": "0"})

    @property
    def is_alive(self) -> bool:
        return self.stopped_at is None

    def end(self, status: Status, reason: Reason, at: float) -> None:
        self.status = status
        self.termination_reason = self.termination_reason or reason
        self.stopped_at = at


class Exec(Table, table=True):
    """What ran. Written in groups shortly after the end, and never on the way of an exec."""

    __tablename__ = "exec"
    __table_args__ = (
        Index("ix_exec_sandbox_id_started_at", "sandbox_id", "started_at"),
        Index("ix_exec_started_at", "started_at"),
    )

    id: str = Field(primary_key=True, max_length=64)
    project_id: str = Field(max_length=64)
    sandbox_id: str = Field(max_length=64)
    kind: str = Field(max_length=16)
    # The beginning of what was run, for people who look at a list.
    title: str = Field(default="", max_length=200, sa_column_kwargs={"server_default": ""})
    context_id: str | None = Field(default=None, max_length=64)
    background: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    status: str = Field(max_length=16)
    exit_code: int | None = None
    signal: str | None = Field(default=None, max_length=16)
    error_name: str | None = Field(default=None, max_length=100)
    truncated: bool = False
    started_at: float
    duration_ms: float | None = None
    cpu_ms: float = 0
    max_rss_mb: float = 0


class Event(Table, table=True):
    """One step in the life of a sandbox. `sequence` is the order of commits."""

    __tablename__ = "event"
    __table_args__ = (
        Index("ix_event_project_id_sequence", "project_id", "sequence"),
        Index("ix_event_sandbox_id_sequence", "sandbox_id", "sequence"),
        Index("ix_event_created_at", "created_at"),
        {"sqlite_autoincrement": True},
    )

    # SQLite counts up by itself only what is called INTEGER, which has 64 bits there.
    sequence: int | None = Field(
        default=None, sa_column=Column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    )
    id: str = Field(max_length=64, unique=True)
    project_id: str = Field(max_length=64)
    sandbox_id: str = Field(max_length=64)
    type: str = Field(max_length=32)
    created_at: float
    data: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))


class UsageHour(Table, table=True):
    """What a project used in one hour; `hour` counts hours since 1970, in UTC."""

    __tablename__ = "usage_hour"

    project_id: str = Field(primary_key=True, max_length=64)
    hour: int = Field(primary_key=True)
    sandbox_s: float = 0
    cpu_s: float = 0
    bytes_in: int = Field(default=0, sa_type=BigInteger)
    bytes_out: int = Field(default=0, sa_type=BigInteger)
    execs: int = Field(default=0, sa_type=BigInteger)
    sandboxes: int = Field(default=0, sa_type=BigInteger)


class Node(Table, table=True):
    """One daemon of those that share the store, and where the others reach it."""

    __tablename__ = "node"

    id: str = Field(primary_key=True, max_length=64)
    url: str | None = Field(default=None, max_length=255)
    started_at: float
    seen_at: float
