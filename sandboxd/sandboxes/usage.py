"""What projects use: time of sandboxes, CPU, bytes. Metered while a sandbox lives, kept by the hour."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import structlog
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.upsert import insert
from sandboxd.runtimes.base import Runtime
from sandboxd.sandboxes import store
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.models import Sandbox, UsageHour
from sandboxd.sandboxes.states import ALIVE

log = structlog.get_logger(__name__)

METER_INTERVAL_S = 60.0
HOUR_S = 3600
# Sandboxes metered in one transaction, so that no write holds up the others for long.
_BATCH = 100
COLUMNS = ("sandbox_s", "cpu_s", "bytes_in", "bytes_out", "execs", "sandboxes")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one sandbox has used since the last reading."""

    sandbox_id: str
    project_id: str
    until: float
    seconds: float
    cpu_s: float
    cpu_read_s: float
    bytes_in: int
    bytes_out: int
    execs: int
    sandboxes: int


class Meter:
    def __init__(self, db: Database, clock: Clock, runtime: Runtime, live: LiveSandboxes) -> None:
        self._db = db
        self._clock = clock
        self._runtime = runtime
        self._live = live
        # Two at a time would both write what has been used since the last reading.
        self._writing = asyncio.Lock()

    async def begin(self, live: LiveSandbox) -> None:
        """What the sandbox has used up to now is nobody's: it was in the pool."""
        live.metered.at_s = self._clock.monotonic()
        live.metered.cpu_s = await self._cpu_s(live, live.metered.cpu_s)

    async def tick(self, project_id: str | None = None) -> None:
        """Writes down what the sandboxes (of one project) have used since the last time."""
        due = [
            live
            for live in self._live
            if live.project_id is not None and project_id in (None, live.project_id)
        ]
        for start in range(0, len(due), _BATCH):
            async with self._writing:
                readings = [await self.read(live) for live in due[start : start + _BATCH]]
                try:
                    async with self._db.write() as session:
                        await self.write(session, readings)
                except SandboxdError:
                    for live, reading in zip(due[start:], readings, strict=False):
                        _put_back(live, reading)
                    raise

    async def read(self, live: LiveSandbox) -> Reading:
        """Takes what has been used since the last reading; it must then be written, once."""
        assert live.project_id is not None
        cpu_s = await self._cpu_s(live, live.metered.cpu_s)
        now, metered = self._clock.monotonic(), live.metered
        reading = Reading(
            sandbox_id=live.id,
            project_id=live.project_id,
            until=self._clock.now(),
            seconds=max(0.0, now - metered.at_s),
            cpu_s=max(0.0, cpu_s - metered.cpu_s),
            cpu_read_s=cpu_s,
            bytes_in=live.bytes_in - metered.bytes_in,
            bytes_out=live.bytes_out - metered.bytes_out,
            execs=live.execs_ended - metered.execs,
            sandboxes=int(metered.first),
        )
        metered.first = False
        metered.at_s, metered.cpu_s = now, cpu_s
        metered.bytes_in, metered.bytes_out, metered.execs = live.bytes_in, live.bytes_out, live.execs_ended
        return reading

    def unread(self, row: Sandbox) -> Reading | None:
        """For one that ended while no daemon looked: the sandbox itself still counts. Of its last seconds
        nobody knows how many there were."""
        if row.project_id is None or row.started_at is None or row.metered_at != row.started_at:
            return None
        return Reading(row.id, row.project_id, row.started_at, 0.0, 0.0, row.cpu_read_s, 0, 0, 0, 1)

    async def write(self, session: AsyncSession, readings: Iterable[Reading]) -> None:
        hours: dict[tuple[str, int], UsageHour] = {}

        def at(project_id: str, hour: int) -> UsageHour:
            return hours.setdefault((project_id, hour), UsageHour(project_id=project_id, hour=hour))

        for reading in readings:
            for hour, seconds in _by_hour(reading.until - reading.seconds, reading.until):
                at(reading.project_id, hour).sandbox_s += seconds
            last = at(reading.project_id, int(reading.until // HOUR_S))
            last.cpu_s += reading.cpu_s
            last.bytes_in += reading.bytes_in
            last.bytes_out += reading.bytes_out
            last.execs += reading.execs
            last.sandboxes += reading.sandboxes
            values = {"metered_at": reading.until, "cpu_read_s": reading.cpu_read_s}
            await store.change(session, reading.sandbox_id, ALIVE, values)
        # In one order everywhere: two daemons must not wait for each other's rows.
        for _, row in sorted(hours.items()):
            await self._add(session, row)

    async def hours(self, project_id: str, first: int, last: int) -> Sequence[UsageHour]:
        """The project's use from hour `first` up to but without `last`, up to this moment."""
        await self.tick(project_id)
        query = select(UsageHour).where(
            UsageHour.project_id == project_id, col(UsageHour.hour) >= first, col(UsageHour.hour) < last
        )
        async with self._db.read() as session:
            return (await session.exec(query.order_by(col(UsageHour.hour)))).all()

    async def _add(self, session: AsyncSession, row: UsageHour) -> None:
        table = UsageHour.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
        statement = insert(self._db.dialect, table).values(row.model_dump())
        sums = {name: table.c[name] + statement.excluded[name] for name in COLUMNS}
        await session.exec(statement.on_conflict_do_update(index_elements=["project_id", "hour"], set_=sums))

    async def _cpu_s(self, live: LiveSandbox, otherwise: float) -> float:
        try:
            usage = await self._runtime.usage(live.id)
        except SandboxdError as error:
            log.info("usage.unknown", sandbox_id=live.id, reason=error.message)
            return otherwise
        return otherwise if usage is None else usage.cpu_s


def _by_hour(start: float, end: float) -> Iterable[tuple[int, float]]:
    """A stretch of time cut at full hours: (hour, seconds in it)."""
    while start < end:
        hour = int(start // HOUR_S)
        until = min(end, (hour + 1) * HOUR_S)
        yield hour, until - start
        start = until


def _put_back(live: LiveSandbox, reading: Reading) -> None:
    live.metered.at_s -= reading.seconds
    live.metered.cpu_s -= reading.cpu_s
    live.metered.bytes_in -= reading.bytes_in
    live.metered.bytes_out -= reading.bytes_out
    live.metered.execs -= reading.execs
    live.metered.first = bool(reading.sandboxes)
