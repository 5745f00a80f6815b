"""Loops beside the requests: deadlines, the sweep that mends what a crash left, exits, warm-up."""

import asyncio
from collections import deque
from collections.abc import Awaitable

import structlog

from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.metrics import Metrics
from sandboxd.runtimes.base import Handle, Phase, Runtime
from sandboxd.sandboxes import store
from sandboxd.sandboxes.live import LiveSandbox
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.service import SandboxService
from sandboxd.sandboxes.states import ALIVE, Reason, Status

log = structlog.get_logger(__name__)

REAP_INTERVAL_S = 0.5
SWEEP_INTERVAL_S = 60.0
FLUSH_INTERVAL_S = 5.0
GAUGE_INTERVAL_S = 2.0
WATCH_RETRY_S = 1.0
_QUIET_POLL_S = 0.2
_WARM_DELAY_S = 0.3
_WARM_TIMEOUT_S = 10.0
_MAX_WAITING = 1000


class Reaper:
    """Ends sandboxes whose time is over."""

    def __init__(self, service: SandboxService, clock: Clock, metrics: Metrics) -> None:
        self._service = service
        self._clock = clock
        self._metrics = metrics

    async def tick(self) -> None:
        now = self._clock.monotonic()
        due = [
            live.id
            for live in self._service.live
            if live.deadline is not None and live.deadline <= now and not self._service.is_busy(live.id)
        ]
        results = await asyncio.gather(
            *(self._service.end(sandbox_id, Reason.TIMEOUT) for sandbox_id in due), return_exceptions=True
        )
        for sandbox_id, result in zip(due, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("reaper.failed", sandbox_id=sandbox_id, reason=str(result))
            else:
                self._metrics.reaper_actions.labels("timeout").inc()


class Sweep:
    """Makes rows and engine agree again. It knows only what carries this installation's mark."""

    def __init__(self, service: SandboxService, db: Database, runtime: Runtime, metrics: Metrics) -> None:
        self._service = service
        self._db = db
        self._runtime = runtime
        self._metrics = metrics

    async def run(self) -> None:
        """One pass; at start it also takes up every sandbox that an earlier process left running."""
        # Rows first: each of them that runs has its container by the time the engine is asked.
        async with self._db.read() as session:
            alive = {row.id: row for row in await store.list_alive(session)}
        owned = {item.sandbox_id: item for item in await self._runtime.list()}
        for row in alive.values():
            if self._service.is_busy(row.id):
                continue
            found = owned.get(row.id)
            await self._guarded(row.id, self._mend(row, None if found is None else found.phase))
        for sandbox_id in (set(owned) | self._runtime.leftovers()) - set(alive):
            if not self._service.is_busy(sandbox_id):
                await self._guarded(sandbox_id, self._remove(sandbox_id))

    async def _guarded(self, sandbox_id: str, work: Awaitable[None]) -> None:
        # A border: one sandbox that cannot be mended now must not keep the others from it.
        try:
            await work
        except SandboxdError as error:
            log.warning("sweep.failed", sandbox_id=sandbox_id, reason=error.message)
        except Exception:
            log.exception("sweep failed", sandbox_id=sandbox_id)

    async def _mend(self, row: Sandbox, phase: Phase | None) -> None:
        if self._service.live.get(row.id) is not None:
            # It came to life here, maybe after our look at the rows: only its end would be news.
            if phase is not Phase.RUNNING and row.status == Status.RUNNING:
                await self._end(row, Reason.LOST if phase is None else Reason.RUNTIME_ERROR, "drop_dead")
        elif row.status == Status.STOPPING:
            await self._end(row, Reason.USER, "finish_stop")
        elif row.status == Status.CREATING:
            await self._end(row, Reason.LOST, "drop_half_made")
        elif phase is not Phase.RUNNING:
            await self._end(row, Reason.LOST if phase is None else Reason.RUNTIME_ERROR, "drop_dead")
        else:
            try:
                await self._service.adopt(row)
            except SandboxdError as error:
                log.warning("sweep.cannot_adopt", sandbox_id=row.id, reason=error.message)
                await self._end(row, Reason.LOST, "drop_dead")
            else:
                self._count("adopt", row.id)

    async def _end(self, row: Sandbox, reason: Reason, action: str) -> None:
        self._count(action, row.id)
        await self._service.end(row.id, reason)

    async def _remove(self, sandbox_id: str) -> None:
        async with self._db.read() as session:
            still = {row.id for row in await store.list_alive(session)}
        if sandbox_id in still:
            return  # it came to life after our first look
        self._count("remove_leftover", sandbox_id)
        await self._runtime.delete(sandbox_id)

    def _count(self, action: str, sandbox_id: str) -> None:
        log.info("sweep", action=action, sandbox_id=sandbox_id)
        self._metrics.reaper_actions.labels(action).inc()


class ExitWatcher:
    """Follows the engine's events: a sandbox that ends by itself is ended here, with the reason."""

    def __init__(self, service: SandboxService, runtime: Runtime, sweep: Sweep) -> None:
        self._service = service
        self._runtime = runtime
        self._sweep = sweep

    async def run(self) -> None:
        while True:
            try:
                async for exited in self._runtime.watch():
                    await self._ended(exited.sandbox_id, exited.handle)
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

    async def _ended(self, sandbox_id: str, handle: Handle) -> None:
        if self._service.is_busy(sandbox_id) or self._service.live.get(sandbox_id) is None:
            return
        facts = await self._runtime.observe(handle)
        if facts.phase is Phase.RUNNING:
            return
        await self._service.end(sandbox_id, Reason.OOM if facts.oom_killed else Reason.RUNTIME_ERROR)


class Warmer:
    """Has sandboxes load the heavy libraries, one at a time and while nothing is being created: a load is
    most of a second of CPU, and priorities do not reach across the sandboxes' CPU groups."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service
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
                while self._service.creating:  # noqa: ASYNC110 - an event would cost every create
                    await asyncio.sleep(_QUIET_POLL_S)
                await self._warm(self._waiting.popleft())

    async def _warm(self, sandbox_id: str) -> None:
        live = self._service.live.get(sandbox_id)
        if live is None:
            return
        try:
            if await live.agent.warm():
                return
            async with asyncio.timeout(_WARM_TIMEOUT_S):
                while self._service.live.get(sandbox_id) is not None:
                    if (await live.agent.hello()).warm:
                        return
                    await asyncio.sleep(_QUIET_POLL_S)
        except (SandboxdError, TimeoutError) as error:
            # Nothing is lost but speed: imports then happen in the run itself.
            log.info("warm.failed", sandbox_id=sandbox_id, reason=str(error))


class Gauges:
    """Counts for the metrics, asked from the store."""

    def __init__(self, db: Database, metrics: Metrics) -> None:
        self._db = db
        self._metrics = metrics

    async def tick(self) -> None:
        async with self._db.read() as session:
            counts = await store.count_alive(session)
        for status in ALIVE:
            self._metrics.sandboxes.labels(status).set(counts.get(status, 0))
