"""What ran: rows of execs, written in groups after the fact and read by sandbox. No exec waits for a row."""

from collections.abc import Iterable, Sequence
from typing import Any

import structlog
from sqlalchemy import Executable, and_, or_
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col, select

from sandboxd.kit import upsert
from sandboxd.kit.batch import Batch
from sandboxd.kit.db import Database
from sandboxd.kit.errors import BadRequestError, SandboxdError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams, split
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.states import ExecStatus

log = structlog.get_logger(__name__)

# A row with one of these may still be told better; every other status is the exec's last.
OPEN = (ExecStatus.RUNNING, ExecStatus.LOST)

Row = dict[str, Any]


class History:
    """Writes through `batch`, whose loop the application runs."""

    def __init__(self, db: Database, metrics: Metrics) -> None:
        self._db = db
        self._metrics = metrics
        # Made once: that takes as long as to write a dozen rows.
        self._statement = _make_upsert(db.dialect)
        self.batch = Batch[Row]("execs", self._write, metrics.exec_rows_dropped.inc)

    def add(self, row: Row) -> None:
        """Takes a row, all columns of the table, to be written soon. One that has ended is never changed."""
        self.batch.add(row)

    async def write(self, row: Row) -> None:
        """Writes a row at once: it is in the store when this returns. Raises StoreUnavailableError."""
        await self._upsert([row])

    async def close(self) -> None:
        await self.batch.close()

    async def find(self, sandbox_id: str, exec_id: str) -> Exec | None:
        await self._catch_up()
        async with self._db.read() as session:
            query = select(Exec).where(Exec.id == exec_id, Exec.sandbox_id == sandbox_id)
            return (await session.exec(query)).first()

    async def page(
        self, sandbox_id: str, params: PageParams, statuses: Iterable[str] | None = None
    ) -> tuple[list[Exec], bool]:
        """By the time of their start: the ids of execs with a key tell nothing of it."""
        await self._catch_up()
        started, exec_id = col(Exec.started_at), col(Exec.id)
        query = select(Exec).where(Exec.sandbox_id == sandbox_id)
        if statuses is not None:
            query = query.where(col(Exec.status).in_([str(status) for status in statuses]))
        async with self._db.read() as session:
            if params.after is not None:
                known = select(Exec).where(Exec.id == params.after, Exec.sandbox_id == sandbox_id)
                last = (await session.exec(known)).first()
                if last is None:
                    raise BadRequestError(
                        f"'after' names no exec of sandbox {sandbox_id}: {params.after!r}.", param="after"
                    )
                beyond = (started > last.started_at, exec_id > last.id)
                if params.order == "desc":
                    beyond = (started < last.started_at, exec_id < last.id)
                query = query.where(or_(beyond[0], and_(started == last.started_at, beyond[1])))
            order = (started, exec_id) if params.order == "asc" else (started.desc(), exec_id.desc())
            rows = (await session.exec(query.order_by(*order).limit(params.limit + 1))).all()
        return split(rows, params)

    async def ended(self, exec_ids: Iterable[str]) -> set[str]:
        """Those of the execs whose last status is known."""
        await self._catch_up()
        async with self._db.read() as session:
            query = select(Exec.id).where(
                col(Exec.id).in_(list(exec_ids)), col(Exec.status).not_in([str(status) for status in OPEN])
            )
            return set((await session.exec(query)).all())

    async def running(self, sandbox_id: str) -> Sequence[Exec]:
        """Execs of which the end is not written."""
        async with self._db.read() as session:
            query = select(Exec).where(Exec.sandbox_id == sandbox_id, Exec.status == ExecStatus.RUNNING)
            return (await session.exec(query)).all()

    async def _catch_up(self) -> None:
        """So that a reader finds what ended just now; he finds the rest when the store cannot be written."""
        if self.batch.settled:
            return
        try:
            await self.batch.flush()
        except SandboxdError as error:
            log.warning("history.behind", reason=error.message)

    async def _write(self, rows: Sequence[Row]) -> None:
        # PostgreSQL refuses one row twice in a statement: the start and the end of an exec may come together.
        latest = list({row["id"]: row for row in rows}.values())
        try:
            await self._upsert(latest)
        except SQLAlchemyError:
            # The store works, but will not have one of these: the others must not wait behind it for ever.
            for row in latest:
                await self._write_one(row)

    async def _write_one(self, row: Row) -> None:
        try:
            await self._upsert([row])
        except SQLAlchemyError as error:
            log.error("history.row_refused", exec_id=row["id"], reason=str(error)[:300])
            self._metrics.exec_rows_dropped.inc()

    async def _upsert(self, rows: list[Row]) -> None:
        async with self._db.write() as session:
            connection = await session.connection()
            await connection.execute(self._statement, rows)


def _make_upsert(dialect: str) -> Executable:
    insert = upsert.insert(dialect, Exec)
    statement: Executable = insert.on_conflict_do_update(
        index_elements=["id"],
        set_={name: insert.excluded[name] for name in Exec.model_fields if name != "id"},
        # Not IN: its parameters are expanded for each row apart, which a statement for many cannot do.
        # And an agent's word about an id counts for its own sandbox only.
        where=and_(
            col(Exec.sandbox_id) == insert.excluded.sandbox_id,
            or_(*(col(Exec.status) == str(status) for status in OPEN)),
        ),
    )
    return statement
