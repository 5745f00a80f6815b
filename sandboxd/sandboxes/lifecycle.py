"""How a sandbox comes to life and how it ends. Every change of a row is guarded by the state it was in, and
no database session is open while the runtime or an agent is called."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import IntegrityError
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.agentlink.client import Agent
from sandboxd.identity import audit, idempotency
from sandboxd.identity.service import Principal
from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database, StoreUnavailableError
from sandboxd.kit.errors import SandboxdError, UnavailableError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Capabilities, Handle, Phase, Runtime, SandboxSpec
from sandboxd.runtimes.errors import RuntimeFaultError
from sandboxd.sandboxes import store
from sandboxd.sandboxes.errors import NoFreeSlotError, SandboxNotRunningError
from sandboxd.sandboxes.events import Events
from sandboxd.sandboxes.failpoints import FailPoint, FailPoints
from sandboxd.sandboxes.live import Idleness, LiveSandbox, LiveSandboxes, Metered
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.states import ALIVE, FAILURES, Reason, Status
from sandboxd.sandboxes.usage import Meter, Reading

log = structlog.get_logger(__name__)

# Of the Idempotency-Keys that make sandboxes.
KEY_SCOPE = "sandbox"
_SLOT_TRIES = 10
# Uids and, with them, slots end there.
_MAX_SLOTS = 60_000

Also = Callable[[AsyncSession], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _UnwrittenEnd:
    """How a sandbox ended while the store could not be told."""

    reason: Reason
    at: float
    reading: Reading | None
    by: Principal | None


class Lifecycle:
    """`live` are the sandboxes of this daemon; `node_id` marks its rows. The daemon fills in
    `capabilities` and `engine_instance` when the runtime has been opened."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        db: Database,
        metrics: Metrics,
        tasks: TaskOwner,
        runtime: Runtime,
        events: Events,
        node_id: str,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._db = db
        self._metrics = metrics
        self._tasks = tasks
        self._runtime = runtime
        self._events = events
        self._starts = asyncio.Semaphore(settings.concurrent_starts)
        self._busy: dict[str, asyncio.Task[Sandbox]] = {}
        # Ends that the store could not be told of.
        self._unwritten: dict[str, _UnwrittenEnd] = {}
        self.fail_points = FailPoints(settings.fail_point)
        self.node_id = node_id
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.capabilities = Capabilities(runtime=settings.runtime, isolation_level=0)
        self.engine_instance = ""
        self.live = LiveSandboxes()
        self.meter = Meter(db, clock, runtime, self.live)
        # Called with each sandbox that came to life, and with each that was taken up after a restart.
        self.on_live: list[Callable[[LiveSandbox], None]] = []
        self.on_adopted: list[Callable[[LiveSandbox], None]] = []

    async def insert(self, row: Sandbox, also: Also) -> Sandbox:
        """Writes the row of a sandbox that is to be started, with a place of its own, and in the same
        transaction what `also` writes. Raises NoFreeSlotError."""
        limit = self._settings.max_sandboxes
        for _ in range(_SLOT_TRIES):
            try:
                async with self._db.write() as session:
                    await also(session)
                    # One after the other: two at once would both take the last place, and the same slot.
                    await self._db.serialize(session, "slots")
                    if row.project_id and await store.count_held(session, self.node_id) >= limit:
                        raise NoFreeSlotError(limit)
                    row.slot = _first_free(await store.taken_slots(session))
                    session.add(row)
                    await session.flush()
                    await self._events.emit(session, row, "sandbox.created")
                break
            except IntegrityError:
                # Another daemon on the same store took the slot, or the key, between our look and our write.
                continue
        else:
            raise NoFreeSlotError(limit)
        self._events.wake()
        self.fail_points.reach(FailPoint.CREATE_INSERTED)
        return row

    def start(self, row: Sandbox) -> asyncio.Task[Sandbox]:
        """Starts the sandbox of a new row, in a task that no caller's end can stop half-way; shield it when
        you await it."""
        return self._begin(f"create {row.id}", row.id, self._start(row))

    async def end(self, sandbox_id: str, reason: Reason, principal: Principal | None = None) -> Sandbox:
        """Ends a sandbox for `reason`, by order of `principal` or on the daemon's own account. Callers at
        the same time wait for the same end; one that has ended is returned as it is."""
        task = self._busy.get(sandbox_id)
        if task is not None and task.get_name().startswith("create "):
            # The row is marked first, so that the create sees it and does not come to life.
            await self._mark_stopping(sandbox_id, [Status.CREATING], reason, principal)
            await asyncio.wait([task])
            task = self._busy.get(sandbox_id)
        if task is None:
            task = self._begin(f"end {sandbox_id}", sandbox_id, self._end(sandbox_id, reason, principal))
        return await asyncio.shield(task)

    async def end_ready(self, sandbox_id: str, reason: Reason) -> bool:
        """Ends a member of the pool, unless it has just been claimed."""
        async with self._db.write() as session:
            values = {"status": Status.STOPPING, "termination_reason": reason}
            if not await store.change(session, sandbox_id, [Status.READY], values):
                return False
        await self.end(sandbox_id, reason)
        return True

    async def claimed(self, row: Sandbox) -> None:
        """A member of the pool now belongs to a project: what is in memory learns of it."""
        live = self.live.get(row.id)
        if live is None:
            return  # it died in this very moment
        live.project_id, live.env = row.project_id, row.env
        live.deadline, live.idle_timeout_s = row.expires_boot_s, row.idle_timeout_s
        live.touch(row.last_active_at)
        live.idle.since_s = self._clock.monotonic()
        await self.give_way(row.id, way=False)
        await self.meter.begin(live)

    async def adopt(self, row: Sandbox, phase: Phase) -> None:
        """Takes up a sandbox of an earlier process. Raises SandboxdError when that fails."""
        if row.handle is None:
            raise RuntimeFaultError(f"sandbox {row.id} has no handle")
        await self._runtime.adopt(row.id, Handle(row.handle))
        await self._hold_to_limits(row)
        await self.freeze_or_thaw(row, phase)
        if row.engine_instance != self.engine_instance:
            await self.note_instance(row.id)
        async with self._db.read() as session:
            now = await store.look(session, row.id)
        if now is None or now.status != row.status or self.is_busy(row.id):
            raise UnavailableError(f"sandbox {row.id} was stopped while it was taken up")
        live = self._go_live(row, self._deadline(row))
        for hook in self.on_adopted:
            hook(live)

    async def forget(self, sandbox_id: str) -> None:
        """Removes what the store has no living row of: a leftover, or one that another node has given up."""
        self.live.remove(sandbox_id)
        await self._runtime.delete(sandbox_id)

    async def freeze_or_thaw(self, row: Sandbox, phase: Phase) -> None:
        """Brings the engine to what the row says: a daemon died, or a call failed, on its way into the
        freezer or out of it."""
        if row.status == Status.PAUSED and phase is Phase.RUNNING:
            await self.freeze(row.id)
        elif row.status != Status.PAUSED and phase is Phase.PAUSED:
            await self.thaw(row.id)

    async def settle_live(self, live: LiveSandbox) -> None:
        """Brings one that is live here, and the engine, to what its row says: a call failed half-way, or the
        answer to a commit was lost. The caller holds its `changing`."""
        async with self._db.read() as session:
            row = await store.get(session, live.id)
        if row.handle is None or row.status not in (Status.READY, Status.RUNNING, Status.PAUSED):
            return
        was_paused = live.paused
        if row.status != Status.READY:  # and no claim can be under way
            if live.project_id is None:
                await self.claimed(row)
            live.paused, live.deadline = row.status == Status.PAUSED, self._deadline(row)
        found = await self._runtime.observe(Handle(row.handle))
        await self.freeze_or_thaw(row, found.phase)
        if was_paused and not live.paused:
            for hook in self.on_adopted:
                hook(live)

    async def freeze(self, sandbox_id: str) -> None:
        try:
            await self._agent(sandbox_id).timers(run=False)
        except SandboxdError as error:
            # It may be too busy to answer; then its execs' time goes on, and the freeze is what counts.
            log.warning("pause.timers_go_on", sandbox_id=sandbox_id, reason=error.message)
        await self._runtime.pause(sandbox_id)

    async def thaw(self, sandbox_id: str) -> None:
        await self._runtime.resume(sandbox_id)
        self.fail_points.reach(FailPoint.RESUME_THAWED)
        await self._agent(sandbox_id).timers(run=True)

    async def give_way(self, sandbox_id: str, *, way: bool) -> None:
        """Whether others go first when the CPU is short. A sandbox that cannot be told is as it was."""
        try:
            await self._runtime.set_background(sandbox_id, background=way)
        except SandboxdError as error:
            log.warning("sandbox.keeps_its_share", sandbox_id=sandbox_id, reason=error.message)

    async def note_instance(self, sandbox_id: str) -> None:
        """Writes down that the sandbox has lived to see this run of the engine."""
        async with self._db.write() as session:
            await store.change(session, sandbox_id, ALIVE, {"engine_instance": self.engine_instance})

    async def take_over(self) -> None:
        """Once, at start: the rows of a release that knew no nodes are this node's."""
        async with self._db.write() as session:
            await store.take_over(session, self.node_id)

    async def flush_activity(self) -> None:
        """A job: writes ends that could not be written when they happened, and the times of last use, which
        are kept in memory on the way of an exec."""
        await self._write_ends()
        touched = [live for live in self.live if live.touched]
        if not touched:
            return
        for live in touched:
            live.touched = False
        try:
            async with self._db.write() as session:
                for live in touched:
                    values = {"last_active_at": live.last_active_at, "last_active_boot_s": live.idle.since_s}
                    await store.change(session, live.id, ALIVE, values)
        except StoreUnavailableError:
            for live in touched:
                live.touched = True
            raise

    def has_place(self, others: int) -> bool:
        """Whether a project may have another sandbox of this node's, by what is in memory; `others` are about
        to be claimed. In doubt there is none, and `insert` knows."""
        held = sum(live.project_id is not None for live in self.live)
        return held + self.creating + others < self._settings.max_sandboxes

    def is_busy(self, sandbox_id: str) -> bool:
        """Whether this process is creating or ending it right now, or knows an end that its row does not."""
        return sandbox_id in self._busy or sandbox_id in self._unwritten

    @property
    def creating(self) -> int:
        return sum(1 for task in self._busy.values() if task.get_name().startswith("create "))

    async def result_of(self, sandbox_id: str) -> Sandbox | None:
        """Waits for the create of this sandbox, if it is on its way here."""
        task = self._busy.get(sandbox_id)
        if task is None or not task.get_name().startswith("create "):
            return None
        return await asyncio.shield(task)

    async def settle(self, timeout_s: float) -> None:
        """Waits for creates and ends on their way, before the daemon stops."""
        if self._busy:
            await asyncio.wait(self._busy.values(), timeout=timeout_s)

    def patched(self, row: Sandbox) -> Sandbox:
        """The row with what the store could not be told yet."""
        unwritten = self._unwritten.get(row.id)
        if unwritten is not None and row.is_alive:
            row.end(_end_status(unwritten.reason), unwritten.reason, unwritten.at)
        return row

    async def _write_ends(self) -> None:
        """Tells the store of ends that it could not be told of when they happened."""
        for sandbox_id, end in list(self._unwritten.items()):
            # Of a commit whose answer was lost nobody knew: then all of it is there, the reading too.
            async with self._db.write() as session:
                row = await store.look(session, sandbox_id)
                if row is not None and row.is_alive:
                    if end.reading is not None:
                        await self.meter.write(session, [end.reading])
                    if row.status != Status.STOPPING and end.by is not None:
                        self._record_stop(session, end.by, sandbox_id)
                    await self._close(session, row, end.reason, end.at)
            del self._unwritten[sandbox_id]
            self._events.wake()

    def spec(self, row: Sandbox) -> SandboxSpec:
        return SandboxSpec(
            id=row.id,
            project_id=row.project_id,
            image=row.image_digest,
            cpus=self.cpus(row.cpu_mhz),
            memory_mb=row.memory_size_mb,
            disk_mb=row.disk_size_mb,
            max_files=self._settings.max_files,
            max_processes=self._settings.max_processes,
            uid=self._settings.first_uid + row.slot,
            runtime=row.runtime,
            background=row.project_id is None,
        )

    def cpus(self, cpu_mhz: int) -> float:
        return cpu_mhz / self._settings.reference_cpu_mhz

    def timer(self, timeout_s: float | None) -> dict[str, Any]:
        """The columns of a timeout that begins now."""
        return {
            "expires_at": None if timeout_s is None else self._clock.now() + timeout_s,
            "expires_boot_s": None if timeout_s is None else self._clock.monotonic() + timeout_s,
            "boot_id": self.boot_id,
        }

    def _begin(self, name: str, sandbox_id: str, work: Any) -> asyncio.Task[Sandbox]:
        task: asyncio.Task[Sandbox] = self._tasks.start(name, work)
        self._busy[sandbox_id] = task
        task.add_done_callback(lambda _task: self._busy.pop(sandbox_id, None))
        return task

    async def _start(self, row: Sandbox) -> Sandbox:
        structlog.contextvars.bind_contextvars(sandbox_id=row.id)
        started = time.perf_counter()
        try:
            # More at once would only make each slower; the wait for a turn does not count as its start.
            async with self._starts, asyncio.timeout(self._settings.start_timeout_s):
                handle = await self._runtime.create(self.spec(row))
                self._observe_phase("runtime", started)
                self.fail_points.reach(FailPoint.CREATE_MADE)
                await self._agent(row.id).hello(self._settings.start_timeout_s)
                self._observe_phase("agent", started)
                self.fail_points.reach(FailPoint.CREATE_ANSWERED)
            running = await self._mark_started(row, handle)
        except BaseException as error:
            await self._undo(row, error)
            cause = _first(error)
            if isinstance(cause, (SandboxdError, asyncio.CancelledError)):
                raise cause from None
            raise RuntimeFaultError(f"sandbox {row.id} could not be started: {_describe(error)}") from error
        self._metrics.sandbox_creates.labels("running").inc()
        log.info(
            "sandbox.running", duration_ms=round((time.perf_counter() - started) * 1000, 1), image=row.image
        )
        return running

    async def _mark_started(self, row: Sandbox, handle: Handle) -> Sandbox:
        now = self._clock.now()
        values = {"handle": handle, "engine_instance": self.engine_instance, "last_active_at": now}
        values |= {"last_active_boot_s": self._clock.monotonic()}
        if row.project_id is None:
            values |= {"status": Status.READY, "pooled_at": now}
        else:
            values |= {"status": Status.RUNNING, "started_at": now, "metered_at": now}
            values |= self.timer(row.timeout_s)
        async with self._db.write() as session:
            alive = await store.change(session, row.id, [Status.CREATING], values)
            row = await store.get(session, row.id)
            if alive and row.project_id is not None:
                await self._events.emit(session, row, "sandbox.running")
        if not alive:
            raise SandboxNotRunningError(row.id, row.status, row.termination_reason)
        self._events.wake()
        self._go_live(row, row.expires_boot_s)
        self.fail_points.reach(FailPoint.CREATE_RUNNING)
        return row

    async def _hold_to_limits(self, row: Sandbox) -> None:
        """A daemon that died may have told the engine of limits that no client was told of."""
        try:
            await self._runtime.limit_cpus(row.id, self.cpus(row.cpu_mhz))
            if row.project_id is not None:
                await self.give_way(row.id, way=False)
            usage = await self._runtime.usage(row.id)
            if usage is not None and usage.memory_limit_mb not in (None, row.memory_size_mb):
                await self._runtime.update(row.id, self.cpus(row.cpu_mhz), row.memory_size_mb)
        except SandboxdError as error:
            log.warning("adopt.other_limits", sandbox_id=row.id, reason=error.message)

    def _go_live(self, row: Sandbox, deadline: float | None) -> LiveSandbox:
        monotonic = self._clock.monotonic()
        live = LiveSandbox(
            id=row.id,
            project_id=row.project_id,
            agent=self._agent(row.id),
            env=row.env,
            cpus=self.cpus(row.cpu_mhz),
            disk_size_mb=row.disk_size_mb,
            last_active_at=row.last_active_at,
            deadline=deadline,
            idle=Idleness(since_s=self._idle_since(row)),
            metered=Metered(
                at_s=monotonic - self._unmetered_s(row),
                cpu_s=row.cpu_read_s,
                first=row.metered_at is None or row.metered_at == row.started_at,
            ),
            idle_timeout_s=row.idle_timeout_s,
            paused=row.status == Status.PAUSED,
        )
        self.live.add(live)
        for hook in self.on_live:
            hook(live)
        return live

    def _deadline(self, row: Sandbox) -> float | None:
        if row.timeout_s is None or row.status in (Status.PAUSED, Status.READY):
            return None
        return row.expires_boot_s if row.boot_id == self.boot_id else self._clock.monotonic()

    def _unmetered_s(self, row: Sandbox) -> float:
        """What passed between the last metering and now: all of it, when this is a sandbox taken up."""
        if row.metered_at is None:
            return 0.0
        now = self._clock.now()
        passed_s = now - row.metered_at
        if row.boot_id == self.boot_id and row.expires_at is not None and row.expires_boot_s is not None:
            # The deadline is on both clocks, and tells how far the wall's has jumped. In doubt, less.
            jump_s = now - self._clock.monotonic() - (row.expires_at - row.expires_boot_s)
            passed_s = min(passed_s, passed_s - jump_s)
        return max(0.0, passed_s)

    def _idle_since(self, row: Sandbox) -> float:
        if row.last_active_boot_s is None or row.boot_id != self.boot_id:
            return self._clock.monotonic()
        return row.last_active_boot_s

    async def _undo(self, row: Sandbox, error: BaseException) -> None:
        """After a create that failed at any step: nothing stays in the engine, and the row says so."""
        self._metrics.sandbox_creates.labels("failed").inc()
        log.warning("sandbox.create_failed", reason=_describe(error))
        gone = True
        try:
            await self._runtime.delete(row.id)
        except SandboxdError as fault:
            log.warning("sandbox.cleanup_failed", reason=fault.message)
            gone = False
        async with self._db.write() as session:
            kept = await store.get(session, row.id)
            if not gone:
                # Its place stays taken, uid and all, until the sweep has removed what is left.
                kept.status, kept.termination_reason = Status.STOPPING, Reason.RUNTIME_ERROR
                await self._release_key(session, kept)
            else:
                stopped = kept.status == Status.STOPPING
                why = Reason.USER if stopped else Reason.RUNTIME_ERROR
                await self._close(session, kept, why, self._clock.now())
        self._events.wake()

    async def _end(self, sandbox_id: str, reason: Reason, principal: Principal | None) -> Sandbox:
        structlog.contextvars.bind_contextvars(sandbox_id=sandbox_id)
        try:
            row = await self._mark_stopping(sandbox_id, ALIVE, reason, principal)
        except StoreUnavailableError:
            if self.live.get(sandbox_id) is None:
                raise
            # A full disk must not keep anybody from stopping a sandbox.
            log.warning("the store cannot be told of a stop; it goes on")
            async with self._db.read() as session:
                row = await store.get(session, sandbox_id)
            row.termination_reason = row.termination_reason or reason
        live = self.live.remove(sandbox_id)
        if not row.is_alive:
            return row
        self.fail_points.reach(FailPoint.STOP_MARKED)
        if live is not None:
            reading = await self.meter.read(live) if live.project_id is not None else None
        else:
            reading = self.meter.unread(row)
        await self._runtime.delete(sandbox_id)
        self.fail_points.reach(FailPoint.STOP_DELETED)
        why = Reason(row.termination_reason or reason)
        try:
            async with self._db.write() as session:
                if reading is not None:
                    await self.meter.write(session, [reading])
                ended = await store.get(session, sandbox_id)
                if ended.is_alive:
                    await self._close(session, ended, why, self._clock.now())
            row = ended
        except StoreUnavailableError:
            # `ended` is of no use: what was read in a transaction that failed is forgotten.
            self._unwritten[sandbox_id] = _UnwrittenEnd(why, self._clock.now(), reading, principal)
            row = self.patched(row)
        self._events.wake()
        self.fail_points.reach(FailPoint.STOP_ENDED)
        log.info("sandbox.ended", reason=why)
        return row

    async def _mark_stopping(
        self,
        sandbox_id: str,
        expected: tuple[Status, ...] | list[Status],
        reason: Reason,
        by: Principal | None,
    ) -> Sandbox:
        async with self._db.write() as session:
            values = {"status": Status.STOPPING, "termination_reason": reason}
            still = [status for status in expected if status != Status.STOPPING]
            marked = await store.change(session, sandbox_id, still, values)
            row = await store.get(session, sandbox_id)
            if marked and by is not None:
                self._record_stop(session, by, sandbox_id)
        return row

    def _record_stop(self, session: AsyncSession, by: Principal, sandbox_id: str) -> None:
        audit.record(
            session,
            project_id=by.project_id,
            actor=by.key_id,
            action="sandbox.stop",
            resource_id=sandbox_id,
            at=self._clock.now(),
        )

    async def _close(self, session: AsyncSession, row: Sandbox, reason: Reason, at: float) -> None:
        """The last change of a row: it says why it ended. A member of the pool leaves no row."""
        if row.project_id is None:
            await session.delete(row)
            row.end(_end_status(reason), reason, at)
            return
        row.end(_end_status(reason), reason, at)
        session.add(row)
        await session.flush()
        await self._release_key(session, row)
        await self._events.emit(session, row, f"sandbox.{row.status}", reason=row.termination_reason)

    async def _release_key(self, session: AsyncSession, row: Sandbox) -> None:
        """The key of a create that came to nothing is free again: the next try may succeed."""
        if row.started_at is None and row.project_id is not None:
            await idempotency.release(session, row.project_id, KEY_SCOPE, row.id)

    def _agent(self, sandbox_id: str) -> Agent:
        return Agent(lambda timeout_s: self._runtime.dial(sandbox_id, timeout_s))

    def _observe_phase(self, phase: str, started: float) -> None:
        self._metrics.sandbox_create_duration.labels(phase).observe(time.perf_counter() - started)


def _end_status(reason: Reason) -> Status:
    return Status.FAILED if reason in FAILURES else Status.STOPPED


def _first_free(taken: set[int]) -> int:
    for slot in range(_MAX_SLOTS):
        if slot not in taken:
            return slot
    raise NoFreeSlotError(_MAX_SLOTS)


def _first(error: BaseException) -> BaseException:
    """The fault itself; of a group, its first member."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _describe(error: BaseException) -> str:
    first = _first(error)
    return f"{type(first).__name__}: {first}"[:500]
