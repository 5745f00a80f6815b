"""The table of sandboxes, the dead ones included: each of those says why it ended."""

from sqlalchemy import JSON, Column, Index, text
from sqlmodel import Field

from sandboxd.kit.db import Table
from sandboxd.sandboxes.states import Reason, Status

_ALIVE = text("status IN ('creating', 'running', 'stopping')")


class Sandbox(Table, table=True):
    __tablename__ = "sandbox"
    __table_args__ = (
        # Two live sandboxes with one slot would have one uid on the host.
        Index("ix_sandbox_slot_alive", "slot", unique=True, sqlite_where=_ALIVE, postgresql_where=_ALIVE),
        Index("ix_sandbox_project_id_status", "project_id", "status"),
    )

    id: str = Field(primary_key=True, max_length=64)
    project_id: str = Field(max_length=64, foreign_key="project.id")
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
    created_at: float
    started_at: float | None = None
    last_active_at: float
    expires_at: float | None = None
    stopped_at: float | None = None
    # The deadline on the host's own clock: a jump of the wall clock must not end every sandbox at once.
    boot_id: str = Field(max_length=64)
    expires_boot_s: float | None = None

    @property
    def is_alive(self) -> bool:
        return self.stopped_at is None

    def end(self, status: Status, reason: Reason, at: float) -> None:
        self.status = status
        self.termination_reason = self.termination_reason or reason
        self.stopped_at = at
