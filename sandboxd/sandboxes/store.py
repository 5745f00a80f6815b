"""Queries of sandboxes. What a client names is always looked up within its project."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import func, update
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit.paging import PageParams, paged, split
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.states import ALIVE, Status


async def find(session: AsyncSession, project_id: str, sandbox_id: str) -> Sandbox | None:
    query = select(Sandbox).where(Sandbox.id == sandbox_id, Sandbox.project_id == project_id)
    return (await session.exec(query)).first()


async def list_page(
    session: AsyncSession, project_id: str, statuses: Iterable[str] | None, params: PageParams
) -> tuple[list[Sandbox], bool]:
    query = select(Sandbox).where(Sandbox.project_id == project_id)
    if statuses is not None:
        query = query.where(col(Sandbox.status).in_(list(statuses)))
    return split((await session.exec(paged(query, col(Sandbox.id), params))).all(), params)


async def list_alive(session: AsyncSession) -> Sequence[Sandbox]:
    return (await session.exec(select(Sandbox).where(col(Sandbox.status).in_(ALIVE)))).all()


async def count_alive(session: AsyncSession) -> dict[str, int]:
    query = (
        select(Sandbox.status, func.count()).where(col(Sandbox.status).in_(ALIVE)).group_by(Sandbox.status)
    )
    return dict((await session.exec(query)).all())


async def taken_slots(session: AsyncSession) -> set[int]:
    return set((await session.exec(select(Sandbox.slot).where(col(Sandbox.status).in_(ALIVE)))).all())


async def change(
    session: AsyncSession, sandbox_id: str, expected: Iterable[Status], values: dict[str, Any]
) -> bool:
    """Writes `values` if the row is still in one of the `expected` states; False when it has moved on."""
    statement = (
        update(Sandbox)
        .where(col(Sandbox.id) == sandbox_id, col(Sandbox.status).in_(list(expected)))
        .values(**values)
    )
    result = await session.exec(statement)
    return bool(result.rowcount)


async def get(session: AsyncSession, sandbox_id: str) -> Sandbox:
    """A row known to exist; for the daemon's own work, never for what a client names."""
    return (await session.exec(select(Sandbox).where(Sandbox.id == sandbox_id))).one()
