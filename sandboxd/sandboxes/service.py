"""The life of a sandbox: created, running, stopped. Every change of a row is guarded by the state it was in,
and no database session is open while the runtime or an agent is called."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from sqlalchemy.exc import IntegrityError

from sandboxd.agentlink.client import Agent
from sandboxd.identity.service import Principal
from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import SandboxdError, UnavailableError
from sandboxd.kit.ids import new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Handle, Image, ImageStore, Runtime, SandboxSpec
from sandboxd.runtimes.errors import RuntimeFaultError
from sandboxd.sandboxes import store
from sandboxd.sandboxes.errors import (
    LimitError,
    NoFreeSlotError,
    SandboxNotFoundError,
    SandboxNotRunningError,
)
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.states import ALIVE, Reason, Status

log = structlog.get_logger(__name__)

_SLOT_TRIES = 5


@dataclass(frozen=True, slots=True)
class NewSandbox:
    """What a client asks for; None where it leaves the choice to the server."""

    image: str | None = None
    cpu_mhz: int | None = None
    memory_size_mb: int | None = None
    disk_size_mb: int | None = None
    gpu_count: int = 0
    timeout_s: float | None = 300
    labels: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    wait: bool = True


@dataclass(frozen=True, slots=True)
class _Limits:
    cpu_mhz: int
    memory_size_mb: int
    disk_size_mb: int


class SandboxService:
    """What can be done with sandboxes. `isolation` is the level that the runtime reported at start."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        db: Database,
        metrics: Metrics,
        tasks: TaskOwner,
        runtime: Runtime,
        images: ImageStore,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._db = db
        self._metrics = metrics
        self._tasks = tasks
        self._runtime = runtime
        self._images = images
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._starts = asyncio.Semaphore(settings.concurrent_starts)
        self._busy: dict[str, asyncio.Task[Sandbox]] = {}
        self.isolation = 0
        self.live = LiveSandboxes()
        self.on_running: Callable[[LiveSandbox], None] = lambda _live: None

    async def create(self, principal: Principal, wanted: NewSandbox) -> Sandbox:
        """A new sandbox: running, or with `wait` false on its way. Nothing is left of one that failed but
        its row, which says why."""
        limits = self._limits(wanted)
        image = await self._images.ensure_image(wanted.image or self._settings.default_image)
        row = await self._insert(principal, wanted, limits, image)
        task = self._tasks.start(f"create {row.id}", self._start(row))
        self._busy[row.id] = task
        task.add_done_callback(lambda _task: self._busy.pop(row.id, None))
        if not wanted.wait:
            return row
        # A client that hangs up, or a drain, must not leave half a sandbox behind.
        return await asyncio.shield(task)

    async def get(self, project_id: str, sandbox_id: str) -> Sandbox:
        async with self._db.read() as session:
            row = await store.find(session, project_id, sandbox_id)
        if row is None:
            raise SandboxNotFoundError(sandbox_id)
        return row

    async def list(
        self, project_id: str, statuses: Sequence[str] | None, params: PageParams
    ) -> tuple[list[Sandbox], bool]:
        async with self._db.read() as session:
            return await store.list_page(session, project_id, statuses, params)

    async def stop(self, project_id: str, sandbox_id: str) -> Sandbox:
        """Ends a sandbox; one that has ended is returned as it is."""
        row = await self.get(project_id, sandbox_id)
        return await self.end(row.id, Reason.USER)

    async def end(self, sandbox_id: str, reason: Reason) -> Sandbox:
        """Ends a sandbox for `reason`. Callers at the same time wait for the same end."""
        task = self._busy.get(sandbox_id)
        if task is not None and task.get_name().startswith("create "):
            # The row is marked first, so that the create sees it and does not come to life.
            async with self._db.write() as session:
                await store.change(
                    session,
                    sandbox_id,
                    [Status.CREATING],
                    {"status": Status.STOPPING, "termination_reason": reason},
                )
            await asyncio.wait([task])
            task = self._busy.get(sandbox_id)
        if task is None:
            task = self._tasks.start(f"end {sandbox_id}", self._end(sandbox_id, reason))
            self._busy[sandbox_id] = task
            task.add_done_callback(lambda _task: self._busy.pop(sandbox_id, None))
        return await asyncio.shield(task)

    async def running(self, project_id: str, sandbox_id: str) -> LiveSandbox:
        """The running sandbox that a client named. Raises SandboxNotFoundError, SandboxNotRunningError."""
        live = self.live.find(project_id, sandbox_id)
        if live is not None:
            live.touch(self._clock.now())
            return live
        row = await self.get(project_id, sandbox_id)
        if row.status == Status.RUNNING:
            raise UnavailableError(f"Sandbox {row.id} is not taken up yet after a restart; try again.")
        raise SandboxNotRunningError(row.id, row.status, row.termination_reason)

    async def settle(self, timeout_s: float) -> None:
        """Waits for creates and ends on their way, before the daemon stops."""
        if self._busy:
            await asyncio.wait(self._busy.values(), timeout=timeout_s)

    def is_busy(self, sandbox_id: str) -> bool:
        """Whether this process is creating or ending it right now."""
        return sandbox_id in self._busy

    @property
    def creating(self) -> int:
        return sum(1 for task in self._busy.values() if task.get_name().startswith("create "))

    async def adopt(self, row: Sandbox) -> None:
        """Takes up a running sandbox of an earlier process. Raises RuntimeFaultError when that fails."""
        if row.handle is None:
            raise RuntimeFaultError(f"sandbox {row.id} has no handle")
        await self._runtime.adopt(row.id, Handle(row.handle))
        deadline = row.expires_boot_s if row.boot_id == self._boot_id else self._clock.monotonic()
        self._go_live(row, deadline)

    async def flush_activity(self) -> None:
        """Writes the times of last use that have changed; they are kept in memory on the way of an exec."""
        touched = [live for live in self.live if live.touched]
        if not touched:
            return
        async with self._db.write() as session:
            for live in touched:
                live.touched = False
                await store.change(session, live.id, ALIVE, {"last_active_at": live.last_active_at})

    def _limits(self, wanted: NewSandbox) -> _Limits:
        settings = self._settings
        if wanted.gpu_count != 0:
            raise LimitError(
                f"gpu_count {wanted.gpu_count}: this server has no GPU runtime, ask for 0", param="gpu_count"
            )
        if wanted.timeout_s is None and not settings.allow_no_timeout:
            raise LimitError(
                "timeout_s null: sandboxes without a timeout are not allowed here, "
                f"ask for up to {settings.max_timeout_s}",
                param="timeout_s",
            )
        if wanted.timeout_s is not None:
            _within("timeout_s", wanted.timeout_s, 1, settings.max_timeout_s)
        return _Limits(
            cpu_mhz=_within("cpu_mhz", wanted.cpu_mhz, 100, settings.max_cpu_mhz, settings.cpu_mhz),
            memory_size_mb=_within(
                "memory_size_mb",
                wanted.memory_size_mb,
                64,
                settings.max_memory_size_mb,
                settings.memory_size_mb,
            ),
            disk_size_mb=_within(
                "disk_size_mb", wanted.disk_size_mb, 16, settings.max_disk_size_mb, settings.disk_size_mb
            ),
        )

    async def _insert(
        self, principal: Principal, wanted: NewSandbox, limits: _Limits, image: Image
    ) -> Sandbox:
        for _ in range(_SLOT_TRIES):
            now = self._clock.now()
            try:
                async with self._db.write() as session:
                    row = Sandbox(
                        id=new_id("sbx"),
                        project_id=principal.project_id,
                        slot=_first_free(await store.taken_slots(session), self._settings.max_sandboxes),
                        runtime=self._settings.runtime,
                        isolation=self.isolation,
                        image=wanted.image or self._settings.default_image,
                        image_digest=image.digest,
                        labels=wanted.labels,
                        env=wanted.env,
                        timeout_s=wanted.timeout_s,
                        created_at=now,
                        last_active_at=now,
                        boot_id=self._boot_id,
                        cpu_mhz=limits.cpu_mhz,
                        memory_size_mb=limits.memory_size_mb,
                        disk_size_mb=limits.disk_size_mb,
                    )
                    session.add(row)
                return row
            except IntegrityError:
                # Another daemon on the same store took the slot between our look and our write.
                continue
        raise NoFreeSlotError(self._settings.max_sandboxes)

    async def _start(self, row: Sandbox) -> Sandbox:
        structlog.contextvars.bind_contextvars(sandbox_id=row.id)
        started = time.perf_counter()
        try:
            # More at once would only make each slower; the wait for a turn does not count as its start.
            async with self._starts, asyncio.timeout(self._settings.start_timeout_s):
                handle = await self._runtime.create(self._spec(row))
                self._observe_phase("runtime", started)
                agent = self._agent(row.id)
                await agent.hello(self._settings.start_timeout_s)
                self._observe_phase("agent", started)
            running = await self._mark_running(row, handle)
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

    async def _mark_running(self, row: Sandbox, handle: Handle) -> Sandbox:
        now, monotonic = self._clock.now(), self._clock.monotonic()
        values = {
            "status": Status.RUNNING,
            "handle": handle,
            "started_at": now,
            "last_active_at": now,
            "expires_at": None if row.timeout_s is None else now + row.timeout_s,
            "expires_boot_s": None if row.timeout_s is None else monotonic + row.timeout_s,
        }
        async with self._db.write() as session:
            alive = await store.change(session, row.id, [Status.CREATING], values)
            row = await store.get(session, row.id)
        if not alive:
            raise SandboxNotRunningError(row.id, row.status, row.termination_reason)
        self._go_live(row, row.expires_boot_s)
        return row

    def _go_live(self, row: Sandbox, deadline: float | None) -> None:
        live = LiveSandbox(
            id=row.id,
            project_id=row.project_id,
            agent=self._agent(row.id),
            env=row.env,
            cpus=self._cpus(row),
            disk_size_mb=row.disk_size_mb,
            last_active_at=row.last_active_at,
            deadline=deadline,
        )
        self.live.add(live)
        self.on_running(live)

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
            elif kept.status == Status.STOPPING:
                kept.end(Status.STOPPED, Reason.USER, self._clock.now())
            else:
                kept.end(Status.FAILED, Reason.RUNTIME_ERROR, self._clock.now())
            session.add(kept)

    async def _end(self, sandbox_id: str, reason: Reason) -> Sandbox:
        structlog.contextvars.bind_contextvars(sandbox_id=sandbox_id)
        async with self._db.write() as session:
            await store.change(
                session,
                sandbox_id,
                [Status.CREATING, Status.RUNNING],
                {"status": Status.STOPPING, "termination_reason": reason},
            )
            row = await store.get(session, sandbox_id)
        if not row.is_alive:
            return row
        self.live.remove(sandbox_id)
        await self._runtime.delete(sandbox_id)
        failed = row.termination_reason in (Reason.OOM, Reason.RUNTIME_ERROR, Reason.LOST)
        async with self._db.write() as session:
            row = await store.get(session, sandbox_id)
            if row.is_alive:
                row.end(Status.FAILED if failed else Status.STOPPED, reason, self._clock.now())
                session.add(row)
        log.info("sandbox.ended", reason=row.termination_reason)
        return row

    def _agent(self, sandbox_id: str) -> Agent:
        return Agent(lambda timeout_s: self._runtime.dial(sandbox_id, timeout_s))

    def _cpus(self, row: Sandbox) -> float:
        return row.cpu_mhz / self._settings.reference_cpu_mhz

    def _spec(self, row: Sandbox) -> SandboxSpec:
        return SandboxSpec(
            id=row.id,
            project_id=row.project_id,
            image=row.image_digest,
            cpus=self._cpus(row),
            memory_mb=row.memory_size_mb,
            disk_mb=row.disk_size_mb,
            max_files=self._settings.max_files,
            max_processes=self._settings.max_processes,
            uid=self._settings.first_uid + row.slot,
            runtime=row.runtime,
        )

    def _observe_phase(self, phase: str, started: float) -> None:
        self._metrics.sandbox_create_duration.labels(phase).observe(time.perf_counter() - started)


def _within(name: str, value: float | None, low: int, high: int, default: int = 0) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise LimitError(f"{name} {value:g}: must be from {low} to {high} on this server", param=name)
    return int(value)


def _first_free(taken: set[int], limit: int) -> int:
    for slot in range(limit):
        if slot not in taken:
            return slot
    raise NoFreeSlotError(limit)


def _first(error: BaseException) -> BaseException:
    """The fault itself; of a group, its first member."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _describe(error: BaseException) -> str:
    first = _first(error)
    return f"{type(first).__name__}: {first}"[:500]
