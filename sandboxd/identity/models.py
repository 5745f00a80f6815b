"""Tables of identity. A key's secret is never stored, only its SHA-256."""

from sqlalchemy import UniqueConstraint
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
