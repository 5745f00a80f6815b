"""Idempotency keys: what a request with such a key has made, so that sending it again makes nothing new.
Knows the table only; a slice's service decides what a repeated request gets."""

import hashlib
import json

from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.identity.errors import IdempotencyConflictError
from sandboxd.identity.models import IdempotencyKey

# How long a repeated request is recognised, at least.
KEPT_S = 24 * 3600.0


def request_digest(body: BaseModel) -> str:
    """SHA-256 of what the body says: the order of its fields and spelt-out defaults change nothing."""
    said = body.model_dump(exclude_defaults=True)
    # Escaped to ASCII, as JSON may carry halves of characters that have no UTF-8.
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


async def find(session: AsyncSession, project_id: str, scope: str, key: str) -> IdempotencyKey | None:
    """What an earlier request of the project with this key has made. `scope` names the kind of request."""
    query = select(IdempotencyKey).where(
        IdempotencyKey.project_id == project_id, IdempotencyKey.scope == scope, IdempotencyKey.key == key
    )
    return (await session.exec(query)).first()


async def insert(
    session: AsyncSession, *, project_id: str, scope: str, key: str, digest: str, resource_id: str, at: float
) -> IdempotencyKey | None:
    """Claims the key for what this transaction makes. None when it is ours now; else the row of the request
    that was first, which may have come between `find` and here: then make nothing."""
    row = IdempotencyKey(
        project_id=project_id,
        scope=scope,
        key=key,
        request_sha256=digest,
        resource_id=resource_id,
        created_at=at,
    )
    try:
        # A savepoint: the transaction lives on when the key is taken.
        async with session.begin_nested():
            session.add(row)
            await session.flush()
    except IntegrityError:
        first = await find(session, project_id, scope, key)
        if first is None:
            raise
        return first
    return None


def check_same(row: IdempotencyKey, digest: str) -> None:
    """Refuses a key that came before with another body."""
    if row.request_sha256 != digest:
        raise IdempotencyConflictError(row.key)


async def release(session: AsyncSession, project_id: str, scope: str, resource_id: str) -> None:
    """Frees the key of a request whose `resource_id` came to nothing after all."""
    await session.exec(
        delete(IdempotencyKey).where(
            col(IdempotencyKey.project_id) == project_id,
            col(IdempotencyKey.scope) == scope,
            col(IdempotencyKey.resource_id) == resource_id,
        )
    )


async def forget(session: AsyncSession, before: float) -> None:
    """Deletes the keys that were first used before that time."""
    await session.exec(delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < before))
