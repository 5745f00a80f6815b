"""Bodies of the key routes."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field

from sandboxd.identity.models import ApiKey, AuditEntry
from sandboxd.kit.http import Body
from sandboxd.kit.paging import Resource


def _printable(name: str) -> str:
    if name != name.strip() or not name.isprintable():
        raise ValueError("must be printable text without space around it")
    return name


class CreateKeyBody(Body):
    name: Annotated[str, AfterValidator(_printable)] = Field("unnamed", min_length=1, max_length=100)


class ApiKeyOut(Resource):
    object: Literal["apikey"] = "apikey"
    name: str
    prefix: str
    created_at: int
    last_used_at: int | None
    revoked_at: int | None

    @classmethod
    def of(cls, row: ApiKey, **extra: str) -> Self:
        return cls(
            id=row.id,
            name=row.name,
            prefix=row.prefix,
            created_at=int(row.created_at),
            last_used_at=_seconds(row.last_used_at),
            revoked_at=_seconds(row.revoked_at),
            **extra,
        )


class CreatedKeyOut(ApiKeyOut):
    key: str = Field(description="The secret. It is shown in this answer only.")


class AuditEntryOut(Resource):
    object: Literal["audit_entry"] = "audit_entry"
    created_at: int
    actor: str = Field(description="The API key's id, or the part of the server that acted by itself.")
    action: str
    resource_id: str
    request_id: str | None
    client: str | None = Field(description="The peer's address as the server saw it.")
    details: dict[str, Any]

    @classmethod
    def of(cls, row: AuditEntry) -> Self:
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            actor=row.actor,
            action=row.action,
            resource_id=row.resource_id,
            request_id=row.request_id,
            client=row.client,
            details=row.details,
        )


def _seconds(value: float | None) -> int | None:
    return None if value is None else int(value)
