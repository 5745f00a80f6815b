"""Queries of identity. Every read of keys is bound to one project."""

from collections.abc import Mapping

from sqlalchemy import update
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.identity.models import ApiKey, AuditEntry, Organization, Project, Secret
from sandboxd.kit.paging import PageParams, paged, split


async def find_organization(session: AsyncSession, slug: str) -> Organization | None:
    return (await session.exec(select(Organization).where(Organization.slug == slug))).first()


async def find_project(session: AsyncSession, organization_id: str, slug: str) -> Project | None:
    query = select(Project).where(Project.organization_id == organization_id, Project.slug == slug)
    return (await session.exec(query)).first()


async def find_active_key(session: AsyncSession, secret_sha256: str) -> tuple[ApiKey, Project] | None:
    query = (
        select(ApiKey, Project)
        .join(Project)
        .where(ApiKey.secret_sha256 == secret_sha256, col(ApiKey.revoked_at).is_(None))
    )
    return (await session.exec(query)).first()


async def find_active_key_by_id(session: AsyncSession, key_id: str) -> tuple[ApiKey, Project] | None:
    query = select(ApiKey, Project).join(Project).where(ApiKey.id == key_id, col(ApiKey.revoked_at).is_(None))
    return (await session.exec(query)).first()


async def find_secret(session: AsyncSession, name: str) -> Secret | None:
    return (await session.exec(select(Secret).where(Secret.name == name))).first()


async def is_active(session: AsyncSession, key_id: str) -> bool:
    query = select(ApiKey.id).where(ApiKey.id == key_id, col(ApiKey.revoked_at).is_(None))
    return (await session.exec(query)).first() is not None


async def find_key(session: AsyncSession, project_id: str, key_id: str) -> ApiKey | None:
    query = select(ApiKey).where(ApiKey.id == key_id, ApiKey.project_id == project_id)
    return (await session.exec(query)).first()


async def list_keys(session: AsyncSession, project_id: str, params: PageParams) -> tuple[list[ApiKey], bool]:
    query = paged(select(ApiKey).where(ApiKey.project_id == project_id), col(ApiKey.id), params)
    return split((await session.exec(query)).all(), params)


async def revoke(session: AsyncSession, project_id: str, key_id: str, at: float) -> bool:
    """Whether the key is revoked now and was not before; guarded, as two requests may come at once."""
    result = await session.exec(
        update(ApiKey)
        .where(
            col(ApiKey.id) == key_id, col(ApiKey.project_id) == project_id, col(ApiKey.revoked_at).is_(None)
        )
        .values(revoked_at=at)
    )
    return result.rowcount == 1


async def list_audit(
    session: AsyncSession, project_id: str, action: str | None, resource_id: str | None, params: PageParams
) -> tuple[list[AuditEntry], bool]:
    query = select(AuditEntry).where(AuditEntry.project_id == project_id)
    if action is not None:
        query = query.where(AuditEntry.action == action)
    if resource_id is not None:
        query = query.where(AuditEntry.resource_id == resource_id)
    return split((await session.exec(paged(query, col(AuditEntry.id), params))).all(), params)


async def set_last_used(session: AsyncSession, times: Mapping[str, float]) -> None:
    # In one order everywhere: two daemons must not wait for each other's rows.
    for key_id, used_at in sorted(times.items()):
        await session.exec(update(ApiKey).where(col(ApiKey.id) == key_id).values(last_used_at=used_at))
