"""Queries of sandboxes. What a client names is always looked up within its project."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, tuple_, update
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit.ids import is_id
from sandboxd.kit.paging import PageParams, split
from sandboxd.sandboxes.errors import SandboxNotFoundError
from sandboxd.sandboxes.models import Exec, Sandbox
from sandboxd.sandboxes.states import ALIVE, Status

# All that a project has and that takes room on the host.
_TAKES_ROOM = (Status.CREATING, Status.RUNNING, Status.PAUSED, Status.STOPPING)


@dataclass(frozen=True, slots=True)
class Size:
    """What members of one pool have in common: a claim must match in all of it."""

    image: str
    cpu_mhz: int
    memory_size_mb: int
    disk_size_mb: int
    runtime: str


@dataclass(frozen=True, slots=True)
class Held:
    """What a project's sandboxes take together."""

    sandboxes: int
    cpu_mhz: int
    memory_size_mb: int


async def find(session: AsyncSession, project_id: str, sandbox_id: str) -> Sandbox | None:
    if not is_id(sandbox_id):
        return None
    query = select(Sandbox).where(Sandbox.id == sandbox_id, Sandbox.project_id == project_id)
    return (await session.exec(query)).first()


async def list_page(
    session: AsyncSession,
    project_id: str,
    statuses: Iterable[str] | None,
    labels: Mapping[str, str],
    params: PageParams,
) -> tuple[list[Sandbox], bool]:
    """One page, by the time of creation. Not by id: a sandbox out of the pool has an id older than itself."""
    if any("\0" in value for value in labels.values()):
        return [], False  # no label has one, and PostgreSQL cannot be asked for it
    order = tuple_(col(Sandbox.created_at), col(Sandbox.id))
    query = select(Sandbox).where(Sandbox.project_id == project_id)
    if statuses is not None:
        query = query.where(col(Sandbox.status).in_(list(statuses)))
    for name, value in labels.items():
        query = query.where(col(Sandbox.labels)[name].as_string() == value)
    if params.after is not None:
        after = (
            select(Sandbox.created_at, Sandbox.id)
            .where(Sandbox.id == params.after, Sandbox.project_id == project_id)
            .scalar_subquery()
        )
        query = query.where(order > after if params.order == "asc" else order < after)
    columns = (col(Sandbox.created_at), col(Sandbox.id))
    query = query.order_by(*(item.asc() if params.order == "asc" else item.desc() for item in columns))
    return split((await session.exec(query.limit(params.limit + 1))).all(), params)


async def list_alive(session: AsyncSession, node_id: str) -> Sequence[Sandbox]:
    query = select(Sandbox).where(col(Sandbox.status).in_(ALIVE), Sandbox.node_id == node_id)
    return (await session.exec(query)).all()


async def count_alive(session: AsyncSession, node_id: str) -> dict[str, int]:
    query = (
        select(Sandbox.status, func.count())
        .where(col(Sandbox.status).in_(ALIVE), Sandbox.node_id == node_id)
        .group_by(Sandbox.status)
    )
    return dict((await session.exec(query)).all())


async def count_held(session: AsyncSession, node_id: str) -> int:
    """Sandboxes of all projects that this node has; members of the pool make way for them."""
    query = select(func.count()).where(
        col(Sandbox.status).in_(_TAKES_ROOM), Sandbox.node_id == node_id, col(Sandbox.project_id).is_not(None)
    )
    return (await session.exec(query)).one()


async def held_by(session: AsyncSession, project_id: str) -> Held:
    query = select(
        func.count(),
        func.coalesce(func.sum(Sandbox.cpu_mhz), 0),
        func.coalesce(func.sum(Sandbox.memory_size_mb), 0),
    ).where(Sandbox.project_id == project_id, col(Sandbox.status).in_(_TAKES_ROOM))
    sandboxes, cpu_mhz, memory_size_mb = (await session.exec(query)).one()
    return Held(sandboxes, int(cpu_mhz), int(memory_size_mb))


async def taken_slots(session: AsyncSession) -> set[int]:
    return set((await session.exec(select(Sandbox.slot).where(col(Sandbox.status).in_(ALIVE)))).all())


async def claim(
    session: AsyncSession, node_id: str, size: Size, without: Iterable[str], values: dict[str, Any]
) -> Sandbox | None:
    """Takes the oldest member of the pool that fits, in one guarded statement; None when there is none.
    Members that another transaction is just taking are passed over, not waited for."""
    oldest = (
        select(Sandbox.id)
        .where(
            Sandbox.status == Status.READY,
            Sandbox.node_id == node_id,
            Sandbox.image == size.image,
            Sandbox.cpu_mhz == size.cpu_mhz,
            Sandbox.memory_size_mb == size.memory_size_mb,
            Sandbox.disk_size_mb == size.disk_size_mb,
            Sandbox.runtime == size.runtime,
            col(Sandbox.id).not_in(list(without)),
        )
        .order_by(col(Sandbox.pooled_at))
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    statement = (
        update(Sandbox)
        .where(col(Sandbox.id) == oldest, col(Sandbox.status) == Status.READY)
        .values(**values)
        .returning(Sandbox)
        .execution_options(synchronize_session=False)
    )
    return (await session.exec(statement)).scalars().first()


async def change(
    session: AsyncSession, sandbox_id: str, expected: Iterable[Status], values: dict[str, Any]
) -> bool:
    """Writes `values` if the row is still in one of the `expected` states; False when it has moved on."""
    statement = (
        update(Sandbox)
        .where(col(Sandbox.id) == sandbox_id, col(Sandbox.status).in_(list(expected)))
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    result = await session.exec(statement)
    return bool(result.rowcount)


async def get(session: AsyncSession, sandbox_id: str) -> Sandbox:
    """As `look`, for a row that should be there. Raises SandboxNotFoundError."""
    row = await look(session, sandbox_id)
    if row is None:
        raise SandboxNotFoundError(sandbox_id)
    return row


async def look(session: AsyncSession, sandbox_id: str) -> Sandbox | None:
    """For the daemon's own work, never for what a client names. A member of the pool leaves no row, and one
    that has ended is forgotten some day."""
    return (await session.exec(select(Sandbox).where(Sandbox.id == sandbox_id))).first()


async def take_over(session: AsyncSession, node_id: str) -> None:
    """Gives the rows of a release that knew no nodes to the one there was."""
    await session.exec(update(Sandbox).where(col(Sandbox.node_id) == "").values(node_id=node_id))


async def prune(session: AsyncSession, before: float, limit: int) -> int:
    """Removes sandboxes that ended before a time, and execs that began before it; tells how many, and is
    to be called again while that is not 0."""
    old = select(Sandbox.id).where(col(Sandbox.stopped_at) < before).limit(limit)
    gone = (await session.exec(delete(Sandbox).where(col(Sandbox.id).in_(old)))).rowcount
    old = select(Exec.id).where(Exec.started_at < before).limit(limit)
    return gone + (await session.exec(delete(Exec).where(col(Exec.id).in_(old)))).rowcount
