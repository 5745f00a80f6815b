"""What happened to sandboxes, in the order of commits: written with each change, listed, followed."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sqlalchemy import delete, func
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import BadRequestError, UnavailableError
from sandboxd.kit.ids import new_id
from sandboxd.kit.paging import PageParams, split
from sandboxd.sandboxes.errors import FollowersError
from sandboxd.sandboxes.models import Event, Sandbox

MAX_FOLLOWERS = 500
# Of one project: each looks into the store at every change, and none may take all places.
MAX_PROJECT_FOLLOWERS = 50
POLL_INTERVAL_S = 1.0
KEEP_ALIVE_S = 15.0
_BATCH = 200


class Events:
    """`closing` tells that the daemon is about to stop: followers are then let go."""

    def __init__(self, db: Database, clock: Clock, closing: Callable[[], bool]) -> None:
        self._db = db
        self._clock = clock
        self._closing = closing
        self._changed = asyncio.Event()
        self._followers: Counter[str] = Counter()
        self._last = 0

    async def emit(self, session: AsyncSession, row: Sandbox, type: str, **data: Any) -> None:
        """Adds an event to the transaction; call it last, and `wake` after the commit. Members of the pool
        have no events: they are nobody's."""
        if row.project_id is None:
            return
        # Events become visible in the order of their numbers, also when several daemons write.
        await self._db.serialize(session, "event")
        session.add(
            Event(
                id=new_id("evt"),
                project_id=row.project_id,
                sandbox_id=row.id,
                type=type,
                created_at=self._clock.now(),
                data=data,
            )
        )

    def wake(self) -> None:
        """Lets followers look at once."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def poll(self) -> None:
        """A job: wakes followers for what another daemon on the same store wrote, and when this one stops."""
        if not self._followers:
            return
        async with self._db.read() as session:
            last = (await session.exec(select(func.max(Event.sequence)))).one() or 0
        if last != self._last or self._closing():
            self._last = last
            self.wake()

    async def list(
        self, project_id: str, params: PageParams, sandbox_id: str | None = None, type: str | None = None
    ) -> tuple[list[Event], bool]:
        async with self._db.read() as session:
            query = _query(project_id, sandbox_id, type)
            if params.after is not None:
                position = await _sequence_of(session, project_id, params.after)
                column = col(Event.sequence)
                query = query.where(column > position if params.order == "asc" else column < position)
            order = col(Event.sequence).asc() if params.order == "asc" else col(Event.sequence).desc()
            rows = (await session.exec(query.order_by(order).limit(params.limit + 1))).all()
        return split(rows, params)

    async def follow(
        self, project_id: str, after: str | None, sandbox_id: str | None = None, type: str | None = None
    ) -> AsyncGenerator[Event | None]:
        """Events after the one named, or from now on, as they come; None now and then when there are none,
        so that the consumer can show that it lives. Ends in UnavailableError when the daemon stops."""
        self._check_room(project_id)
        async with self._db.read() as session:
            if after is not None:
                position = await _sequence_of(session, project_id, after)
            else:
                position = (await session.exec(select(func.max(Event.sequence)))).one() or 0
        # Others may have come meanwhile.
        self._check_room(project_id)
        return self._follow(project_id, position, sandbox_id, type)

    async def _follow(
        self, project_id: str, position: int, sandbox_id: str | None, type: str | None
    ) -> AsyncGenerator[Event | None]:
        self._followers[project_id] += 1
        try:
            while True:
                # Taken before the look: what comes during it must not be missed.
                changed = self._changed
                query = _query(project_id, sandbox_id, type).where(col(Event.sequence) > position)
                async with self._db.read() as session:
                    rows = (await session.exec(query.order_by(col(Event.sequence)).limit(_BATCH))).all()
                for row in rows:
                    assert row.sequence is not None
                    position = row.sequence
                    yield row
                if rows:
                    continue
                if self._closing():
                    raise UnavailableError("The server is shutting down; follow again from the last event.")
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        await changed.wait()
                except TimeoutError:
                    yield None
        finally:
            self._followers[project_id] -= 1
            if not self._followers[project_id]:
                del self._followers[project_id]

    def _check_room(self, project_id: str) -> None:
        if self._followers[project_id] >= MAX_PROJECT_FOLLOWERS:
            raise FollowersError(f"{MAX_PROJECT_FOLLOWERS} clients of the project follow events, the limit")
        if self._followers.total() >= MAX_FOLLOWERS:
            raise FollowersError(f"{MAX_FOLLOWERS} clients follow events already, the limit")


async def prune(session: AsyncSession, before: float, limit: int) -> int:
    """Removes events before a time; tells how many, and is to be called again while that is not 0."""
    old = select(Event.sequence).where(Event.created_at < before).limit(limit)
    return (await session.exec(delete(Event).where(col(Event.sequence).in_(old)))).rowcount


def _query(project_id: str, sandbox_id: str | None, type: str | None) -> Any:
    query = select(Event).where(Event.project_id == project_id)
    if sandbox_id is not None:
        query = query.where(Event.sandbox_id == sandbox_id)
    if type is not None:
        query = query.where(Event.type == type)
    return query


async def _sequence_of(session: AsyncSession, project_id: str, event_id: str) -> int:
    query = select(Event.sequence).where(Event.id == event_id, Event.project_id == project_id)
    found = (await session.exec(query)).first()
    if found is None:
        raise BadRequestError(
            f"'after' names no event of this project that is still kept: {event_id!r}. Leave it away to "
            "start from now, or list the events for one to start from.",
            param="after",
        )
    return found
