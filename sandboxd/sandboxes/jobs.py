"""Loops beside the requests: deadlines, the sweep that mends what a crash left, exits, warm-up, retention."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable

import structlog

from sandboxd.identity import idempotency
from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import SandboxdError, UnavailableError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Exited, Phase, Runtime
from sandboxd.sandboxes import events, store
from sandboxd.sandboxes.lifecycle import Lifecycle
from sandboxd.sandboxes.live import LiveSandbox
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.pool import Pool
from sandboxd.sandboxes.states import ALIVE, Reason, Status

log = structlog.get_logger(__name__)

REAP_INTERVAL_S = 0.5
SWEEP_INTERVAL_S = 60.0
SWEEP_RETRY_S = 5.0
FLUSH_INTERVAL_S = 5.0
GAUGE_INTERVAL_S = 2.0
WATCH_RETRY_S = 1.0
RETENTION_INTERVAL_S = 600.0
RETENTION_BATCH = 500
DAY_S = 86_400.0
# How long an engine that is going down may still answer after the first of its containers has ended.
ENGINE_GRACE_S = 1.0
_QUIET_POLL_S = 0.2
_WARM_DELAY_S = 0.3
_WARM_TIMEOUT_S = 10.0
_MAX_WAITING = 1000


class Reaper:
    """Ends sandboxes whose time is over, and those that nobody has used for too long."""

    def __init__(self, lifecycle: Lifecycle, clock: Clock, metrics: Metrics) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._metrics = metrics

    async def tick(self) -> None:
        now = self._clock.monotonic()
        due: dict[str, Reason] = {}
        for live in self._lifecycle.live:
            idle_s = live.idle.seconds(live, now)
            if live.project_id is None or live.paused or self._lifecycle.is_busy(live.id):
                continue
            if live.deadline is not None and live.deadline <= now:
                due[live.id] = Reason.TIMEOUT
            elif live.idle_timeout_s is not None and idle_s >= live.idle_timeout_s:
                due[live.id] = Reason.IDLE_TIMEOUT
        results = await asyncio.gather(
            *(self._lifecycle.end(sandbox_id, reason) for sandbox_id, reason in due.items()),
            return_exceptions=True,
        )
        for (sandbox_id, reason), result in zip(due.items(), results, strict=True):
            if isinstance(result, BaseException):
                log.warning("reaper.failed", sandbox_id=sandbox_id, reason=str(result))
            else:
                self._metrics.reaper_actions.labels(reason).inc()


class Sweep:
    """Makes rows and engine agree again. It knows only what carries this installation's mark."""

    def __init__(
        self, lifecycle: Lifecycle, db: Database, runtime: Runtime, metrics: Metrics, pool: Pool
    ) -> None:
        self._lifecycle = lifecycle
        self._db = db
        self._runtime = runtime
        self._metrics = metrics
        self._pool = pool
        # Two at once would both take up the same sandbox.
        self._one = asyncio.Lock()
        self._last_s = time.monotonic()
        self._unfinished = False

    async def tick(self) -> None:
        """A job, called every SWEEP_RETRY_S: a pass when one is due, or when the last could not mend all."""
        if self._unfinished or time.monotonic() - self._last_s >= SWEEP_INTERVAL_S:
            await self.run()

    async def run(self) -> None:
        """One pass; at start it also takes up every sandbox that an earlier process left running."""
        async with self._one:
            self._unfinished = True
            await self._run()
            self._last_s = time.monotonic()

    async def end_all(self) -> int:
        """Ends every sandbox of this node, the pool's too; how many were somebody's. Run a pass before."""
        async with self._db.read() as session:
            rows = await store.list_alive(session, self._lifecycle.node_id)
        results = await asyncio.gather(
            *(self._lifecycle.end(row.id, Reason.USER) for row in rows), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return sum(row.project_id is not None for row in rows)

    async def _run(self) -> None:
        self._lifecycle.engine_instance = await self._runtime.instance()
        # Rows first: each of them that runs has its container by the time the engine is asked.
        async with self._db.read() as session:
            alive = {row.id: row for row in await store.list_alive(session, self._lifecycle.node_id)}
        owned = {item.sandbox_id: item for item in await self._runtime.list()}
        self._unfinished = False
        for row in alive.values():
            if self._lifecycle.is_busy(row.id):
                continue
            found = owned.get(row.id)
            await self._guarded(row.id, self._mend(row, None if found is None else found.phase))
        for sandbox_id in (set(owned) | self._runtime.leftovers()) - set(alive):
            if not self._lifecycle.is_busy(sandbox_id):
                await self._guarded(sandbox_id, self._remove(sandbox_id))

    async def _guarded(self, sandbox_id: str, work: Awaitable[None]) -> None:
        # A border: one sandbox that cannot be mended now must not keep the others from it.
        try:
            await work
        except SandboxdError as error:
            self._unfinished = True
            log.warning("sweep.failed", sandbox_id=sandbox_id, reason=error.message)
        except Exception:
            log.exception("sweep failed", sandbox_id=sandbox_id)

    async def _mend(self, row: Sandbox, phase: Phase | None) -> None:
        here = phase in (Phase.RUNNING, Phase.PAUSED)
        live = self._lifecycle.live.get(row.id)
        if live is not None:
            await self._mend_live(row, live, phase)
        elif row.status == Status.STOPPING:
            await self._end(row, Reason.USER, "finish_stop")
        elif row.status == Status.CREATING:
            await self._end(row, Reason.LOST, "drop_half_made")
        elif row.status == Status.READY and not self._pool.enabled:
            await self._end(row, Reason.SURPLUS, "drop_surplus")
        elif phase is None or not here:
            await self._drop_dead(row, phase)
        else:
            try:
                await self._lifecycle.adopt(row, phase)
            except SandboxdError as error:
                if isinstance(error, UnavailableError) and row.status != Status.READY:
                    # Engine, agent or store gave no answer, which says nothing about the sandbox: next time.
                    raise
                log.warning("sweep.cannot_adopt", sandbox_id=row.id, reason=error.message)
                await self._end(row, Reason.LOST, "drop_dead")
            else:
                if row.status == Status.READY:
                    self._pool.add(row)
                self._count("adopt", row.id)

    async def _mend_live(self, row: Sandbox, live: LiveSandbox, phase: Phase | None) -> None:
        # It may have come to life here after our look at the rows: then only its end would be news.
        if phase not in (Phase.RUNNING, Phase.PAUSED):
            if row.status not in (Status.CREATING, Status.STOPPING):
                await self._drop_dead(row, phase)
            return
        if row.engine_instance != self._lifecycle.engine_instance:
            await self._lifecycle.note_instance(row.id)
        if row.status == Status.READY and live.project_id is None and not self._pool.is_member(row.id):
            # It was to be removed, and the store could not be told.
            self._pool.add(row)
        # The row is of a while ago; what is settled then is read again.
        said = (row.project_id, row.status == Status.PAUSED, phase is Phase.PAUSED)
        if said != (live.project_id, live.paused, live.paused) and not live.changing.locked():
            async with live.changing:
                await self._lifecycle.settle_live(live)

    async def _drop_dead(self, row: Sandbox, phase: Phase | None) -> None:
        if row.engine_instance != self._lifecycle.engine_instance:
            reason = Reason.RUNTIME_RESTART
        else:
            reason = Reason.LOST if phase is None else Reason.RUNTIME_ERROR
        await self._end(row, reason, "drop_dead")

    async def _end(self, row: Sandbox, reason: Reason, action: str) -> None:
        self._count(action, row.id)
        await self._lifecycle.end(row.id, reason)

    async def _remove(self, sandbox_id: str) -> None:
        async with self._db.read() as session:
            still = {row.id for row in await store.list_alive(session, self._lifecycle.node_id)}
        if sandbox_id in still:
            return  # it came to life after our first look
        self._count("remove_leftover", sandbox_id)
        await self._lifecycle.forget(sandbox_id)

    def _count(self, action: str, sandbox_id: str) -> None:
        log.info("sweep", action=action, sandbox_id=sandbox_id)
        self._metrics.reaper_actions.labels(action).inc()


class ExitWatcher:
    """Follows the engine's events: a sandbox that ends by itself is ended here, with the reason."""

    def __init__(self, lifecycle: Lifecycle, runtime: Runtime, sweep: Sweep, tasks: TaskOwner) -> None:
        self._lifecycle = lifecycle
        self._runtime = runtime
        self._sweep = sweep
        self._tasks = tasks

    async def run(self) -> None:
        while True:
            try:
                async for exited in self._runtime.watch():
                    if not self._lifecycle.is_busy(exited.sandbox_id):
                        self._tasks.start(f"exit {exited.sandbox_id}", self._ended(exited))
                log.info("watch.ended")
            except SandboxdError as error:
                log.warning("watch.lost", reason=error.message)
            except Exception:  # border of a job: it must outlive any fault of one event
                log.exception("watch failed")
            await asyncio.sleep(WATCH_RETRY_S)
            # Exits that happened while nobody watched.
            try:
                await self._sweep.run()
            except SandboxdError as error:
                log.warning("sweep.failed", reason=error.message)
            except Exception:  # border of a job
                log.exception("sweep failed")

    async def _ended(self, exited: Exited) -> None:
        facts = await self._runtime.observe(exited.handle)
        if facts.phase in (Phase.RUNNING, Phase.PAUSED):
            return
        reason = Reason.OOM if facts.oom_killed else Reason.RUNTIME_ERROR
        if reason is Reason.RUNTIME_ERROR:
            # An engine that is going down ends its containers first. Then it is the sweep that tells why.
            await asyncio.sleep(ENGINE_GRACE_S)
            if await self._runtime.instance() != self._lifecycle.engine_instance:
                return
        if self._lifecycle.live.get(exited.sandbox_id) is not None:
            await self._lifecycle.end(exited.sandbox_id, reason)


class Warmer:
    """Has sandboxes load the heavy libraries, one at a time and while nothing is being created: a load is
    most of a second of CPU, and priorities do not reach across the sandboxes' CPU groups."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._waiting: deque[str] = deque(maxlen=_MAX_WAITING)
        self._wake = asyncio.Event()

    def add(self, live: LiveSandbox) -> None:
        self._waiting.append(live.id)
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await asyncio.sleep(_WARM_DELAY_S)
                while self._lifecycle.creating:  # noqa: ASYNC110 - an event would cost every create
                    await asyncio.sleep(_QUIET_POLL_S)
                await self._warm(self._waiting.popleft())

    async def _warm(self, sandbox_id: str) -> None:
        live = self._lifecycle.live.get(sandbox_id)
        if live is None:
            return
        try:
            if await live.agent.warm():
                return
            async with asyncio.timeout(_WARM_TIMEOUT_S):
                while self._lifecycle.live.get(sandbox_id) is not None:
                    # A second of CPU that nobody waits for, until somebody runs something beside it.
                    if live.project_id is not None:
                        await self._lifecycle.give_way(sandbox_id, way=live.execs == 0)
                    if (await live.agent.hello()).warm:
                        return
                    await asyncio.sleep(_QUIET_POLL_S)
        except (SandboxdError, TimeoutError) as error:
            # Nothing is lost but speed: imports then happen in the run itself.
            log.info("warm.failed", sandbox_id=sandbox_id, reason=str(error))
        finally:
            if live.project_id is not None and self._lifecycle.live.get(sandbox_id) is live:
                await self._lifecycle.give_way(sandbox_id, way=False)


class Gauges:
    """Counts for the metrics, asked from the store."""

    def __init__(self, db: Database, metrics: Metrics, node_id: str) -> None:
        self._db = db
        self._metrics = metrics
        self._node_id = node_id

    async def tick(self) -> None:
        async with self._db.read() as session:
            counts = await store.count_alive(session, self._node_id)
        for status in ALIVE:
            self._metrics.sandboxes.labels(status).set(counts.get(status, 0))


class Retention:
    """Forgets what is over and old. Of the daemons on one store only one does it at a time."""

    def __init__(self, db: Database, clock: Clock, days: float) -> None:
        self._db = db
        self._clock = clock
        self._days = days

    async def tick(self) -> None:
        async with self._db.singleton("retention") as mine:
            if not mine:
                return
            before = self._clock.now() - self._days * DAY_S
            for prune in (store.prune, events.prune):
                # In pieces: no other write waits long for one of them.
                pruned = 1
                while pruned:
                    async with self._db.write() as session:
                        pruned = await prune(session, before, RETENTION_BATCH)
            async with self._db.write() as session:
                await idempotency.forget(session, self._clock.now() - idempotency.KEPT_S)
