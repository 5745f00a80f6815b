"""Tables of identity. A key's secret is never stored, only its SHA-256."""

from typing import Any

from sqlalchemy import JSON, Column, Index, UniqueConstraint
from sqlmodel import Field

from sandboxd.kit.db import Table


class Organization(Table, table=True):
    __tablename__ = "organization"

    id: str = Field(primary_key=True, max_length=64)
    slug: str = Field(max_length=63, unique=True)
    created_at: float


class Project(Table, table=True):
    __tablename__ = "project"
    __table_args__ = (UniqueConstraint("organization_id", "slug"),)

    id: str = Field(primary_key=True, max_length=64)
    organization_id: str = Field(max_length=64, foreign_key="organization.id")
    slug: str = Field(max_length=63)
    created_at: float
    # Quotas over all of its sandboxes that live; None where only the server's own limits hold.
    max_sandboxes: int | None = None
    max_cpu_mhz: int | None = None
    max_memory_size_mb: int | None = None


class ApiKey(Table, table=True):
    __tablename__ = "api_key"

    id: str = Field(primary_key=True, max_length=64)
    project_id: str = Field(max_length=64, foreign_key="project.id", index=True)
    name: str = Field(max_length=100)
    prefix: str = Field(max_length=32)
    secret_sha256: str = Field(max_length=64, unique=True)
    created_at: float
    last_used_at: float | None = None
    revoked_at: float | None = None


class IdempotencyKey(Table, table=True):
    """What a request with an Idempotency-Key has made, so that sending it again makes nothing new."""

    __tablename__ = "idempotency_key"
    __table_args__ = (Index("ix_idempotency_key_created_at", "created_at"),)

    project_id: str = Field(primary_key=True, max_length=64, foreign_key="project.id")
    scope: str = Field(primary_key=True, max_length=32)
    key: str = Field(primary_key=True, max_length=255)
    request_sha256: str = Field(max_length=64)
    resource_id: str = Field(max_length=64)
    created_at: float


class AuditEntry(Table, table=True):
    """Who did what to which thing. The database itself refuses to change or delete an entry."""

    __tablename__ = "audit_entry"
    __table_args__ = (Index("ix_audit_entry_project_id_id", "project_id", "id"),)

    id: str = Field(primary_key=True, max_length=64)
    created_at: float
    project_id: str = Field(max_length=64)
    # The API key's id, or the part of the daemon that acted by itself.
    actor: str = Field(max_length=64)
    action: str = Field(max_length=64)
    resource_id: str = Field(max_length=64)
    request_id: str | None = Field(default=None, max_length=64)
    client: str | None = Field(default=None, max_length=64)
    details: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))


class Secret(Table, table=True):
    """A random value that every daemon on the store signs and checks with."""

    __tablename__ = "secret"

    name: str = Field(primary_key=True, max_length=32)
    value: str = Field(max_length=128)
    created_at: float
