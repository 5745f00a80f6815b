"""The daemons that share one store. Each holds its own sandboxes: their agents dial its sockets."""

import math

import structlog
from sqlalchemy import delete
from sqlmodel import col, select

from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.upsert import insert
from sandboxd.sandboxes import store
from sandboxd.sandboxes.events import Events
from sandboxd.sandboxes.models import Node, Sandbox
from sandboxd.sandboxes.states import ALIVE, Reason, Status

log = structlog.get_logger(__name__)

BEAT_INTERVAL_S = 5.0
LOST_INTERVAL_S = 300.0
# One that has not been seen for this long does not answer; requests for its sandboxes are refused at once.
SILENT_S = 20.0
# A node may be away for a while, and its sandboxes run on. After this long nobody expects it back.
LOST_S = 3600.0
# For how long a node must itself have been heard in the store without a pause before it gives up another.
SETTLED_S = 60.0
_BATCH = 100


class Nodes:
    def __init__(self, db: Database, clock: Clock, events: Events, node_id: str, url: str) -> None:
        self._db = db
        self._clock = clock
        self._events = events
        self._id = node_id
        self._url = url or None
        self._started_at = clock.now()
        self._others: dict[str, Node] = {}
        # On the monotonic clock: the last beat, and the first of those that came without a long pause.
        self._beat_s = -math.inf
        self._steady_s = -math.inf

    @property
    def alone(self) -> bool:
        """Whether this is the only daemon on the store, as far as is known."""
        return not self._others

    async def beat(self) -> None:
        """A job: shows that this node lives, and looks for the others."""
        now = self._clock.now()
        async with self._db.write() as session:
            table = Node.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
            values = {"id": self._id, "url": self._url, "started_at": self._started_at, "seen_at": now}
            statement = insert(self._db.dialect, table).values(values)
            await session.exec(statement.on_conflict_do_update(index_elements=["id"], set_=values))
            rows = (await session.exec(select(Node).where(Node.id != self._id))).all()
        self._others = {row.id: row for row in rows}
        beat_s = self._clock.monotonic()
        if beat_s - self._beat_s > SILENT_S:
            self._steady_s = beat_s
        self._beat_s = beat_s

    def address_of(self, node_id: str) -> str | None:
        """Where another node is reached; None for one that is silent, or has said no address."""
        node = self._others.get(node_id)
        if node is None or node.seen_at < self._clock.now() - SILENT_S:
            return None
        return node.url

    async def holder(self, project_id: str, sandbox_id: str) -> str | None:
        """The node that holds a project's living sandbox, when it is not this one."""
        async with self._db.read() as session:
            row = await store.find(session, project_id, sandbox_id)
        return row.node_id if row is not None and row.is_alive and row.node_id != self._id else None

    async def give_up_lost(self) -> None:
        """A job: ends in the store what nodes held that will not come back. Should one come back all the
        same, its sweep removes what is left of them."""
        now_s = self._clock.monotonic()
        if now_s - self._beat_s > SILENT_S or now_s - self._steady_s < SETTLED_S:
            return  # it was this node, or the store, that was away: the others must have time to show up
        async with self._db.singleton("lost-nodes") as mine:
            if not mine:
                return
            before = self._clock.now() - LOST_S
            for node in [row for row in self._others.values() if row.seen_at < before]:
                if await self._give_up(node.id) < _BATCH:
                    async with self._db.write() as session:
                        await session.exec(delete(Node).where(col(Node.id) == node.id))

    async def _give_up(self, node_id: str) -> int:
        async with self._db.read() as session:
            rows = (await store.list_alive(session, node_id))[:_BATCH]
        for row in rows:
            async with self._db.write() as session:
                values = {
                    "status": Status.FAILED,
                    "termination_reason": Reason.LOST,
                    "stopped_at": self._clock.now(),
                }
                if row.project_id is None:
                    await session.exec(delete(Sandbox).where(col(Sandbox.id) == row.id))
                elif await store.change(session, row.id, ALIVE, values):
                    await self._events.emit(session, row, "sandbox.failed", reason=Reason.LOST)
        if rows:
            log.warning("node.lost", node_id=node_id, sandboxes=len(rows))
            self._events.wake()
        return len(rows)
