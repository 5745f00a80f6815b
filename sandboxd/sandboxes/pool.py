"""The warm pool: sandboxes that run already and belong to nobody, so that a create is one guarded update.

Members are rows like any other, in the state `ready`. How many are kept follows from what was asked for.
"""

import asyncio
import time
from collections import deque

import structlog

from sandboxd.kit.clock import Clock
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.ids import new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.settings import Settings
from sandboxd.runtimes.base import ImageStore
from sandboxd.sandboxes.admission import Admission
from sandboxd.sandboxes.lifecycle import Lifecycle
from sandboxd.sandboxes.limits import Limits
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.states import Reason
from sandboxd.sandboxes.store import Size

log = structlog.get_logger(__name__)

TICK_S = 1.0
# As many as were asked for within the busiest window of the memory: what a burst takes before a refill.
WINDOW_S = 10.0
MEMORY_S = 600.0
MAX_REMEMBERED = 1000
MAX_SIZES = 64
# A refill waits until nobody has claimed for this long, but not for ever.
QUIET_S = 0.15
MAX_QUIET_WAIT_S = 1.0
RETRY_S = 5.0
CHECK_INTERVAL_S = 15.0
CHECK_TIMEOUT_S = 5.0
# Whoever gave no answer is asked again soon: until then nobody may claim it.
RECHECK_S = 2.0
MAX_MISSES = 2


class Demand:
    """When sandboxes of one size were asked for."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MAX_REMEMBERED)

    def note(self, now: float) -> None:
        self._times.append(now)

    def peak(self, now: float) -> int:
        """The most that came within one window, of what is remembered."""
        while self._times and self._times[0] < now - MEMORY_S:
            self._times.popleft()
        times, start, most = list(self._times), 0, 0
        for end, at in enumerate(times):
            while times[start] < at - WINDOW_S:
                start += 1
            most = max(most, end - start + 1)
        return most


class Pool:
    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        lifecycle: Lifecycle,
        limits: Limits,
        images: ImageStore,
        admission: Admission,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._limits = limits
        self._images = images
        self._admission = admission
        self._ready: dict[str, Sandbox] = {}
        self._misses: dict[str, int] = {}
        self._demand: dict[Size, Demand] = {}
        self._digests: dict[str, str] = {}
        self._broken_until: dict[Size, float] = {}
        self._wake = asyncio.Event()
        self._last_claim_s = 0.0
        self._checked_s = 0.0

    @property
    def enabled(self) -> bool:
        return self._settings.pool_max > 0

    def ready(self, size: Size) -> bool:
        """Whether a claim is worth the try."""
        return any(size_of(row) == size for row in self._ready.values())

    def add(self, row: Sandbox) -> None:
        """A member that has been started, or was taken up after a restart of the daemon."""
        self._ready[row.id] = row

    def gone(self) -> list[str]:
        """Members of which the life cycle knows that they have ended, or are somebody's."""
        found = {sandbox_id: self._lifecycle.live.get(sandbox_id) for sandbox_id in self._ready}
        return [name for name, live in found.items() if live is None or live.project_id is not None]

    def doubtful(self) -> list[str]:
        """Members that nobody may claim: they have ended, or gave no answer when they were last asked."""
        return [*self.gone(), *self._misses]

    def is_member(self, sandbox_id: str) -> bool:
        return sandbox_id in self._ready

    def asked(self, size: Size, claimed: Sandbox | None) -> None:
        """Notes a create, and what came of it: demand is what the pool learns its sizes from."""
        if not self.enabled:
            return
        self._last_claim_s = time.monotonic()
        demand = self._demand.setdefault(size, Demand())
        demand.note(self._clock.monotonic())
        if len(self._demand) > MAX_SIZES:
            del self._demand[next(iter(self._demand))]
        self._metrics.pool_claims.labels("miss" if claimed is None else "hit").inc()
        if claimed is not None:
            self._ready.pop(claimed.id, None)
            if claimed.pooled_at is not None:
                self._metrics.pool_age.observe(max(0.0, self._clock.now() - claimed.pooled_at))
        self._wake.set()

    async def run(self) -> None:
        """A job: keeps the pool at its targets, one step at a time."""
        while True:
            try:
                busy = await self._step()
            except SandboxdError as error:
                log.warning("pool.failed", reason=error.message)
                busy = False
            except Exception:  # border of a job: it must outlive any fault of one step
                log.exception("pool failed")
                busy = False
            if not busy:
                self._wake.clear()
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    def targets(self) -> dict[Size, int]:
        """How many of each size to hold: the default's least, the rest by demand, all within the bound."""
        now = self._clock.monotonic()
        default = self._limits.default_size()
        wanted = {size: demand.peak(now) for size, demand in self._demand.items()}
        room = self._settings.pool_max
        # The operator's word first: whatever else clients ask for, it does not push that out.
        targets = {default: min(self._settings.pool_size, room)}
        room -= targets[default]
        wanted[default] = max(0, wanted.get(default, 0) - targets[default])
        left = sorted(((size, count) for size, count in wanted.items() if count), key=lambda item: -item[1])
        # The sizes most asked for first, but no one of them may push the others out entirely.
        for others, (size, count) in zip(range(len(left) - 1, -1, -1), left, strict=True):
            share = min(count, room, max(1, room - others))
            targets[size] = targets.get(size, 0) + share
            room -= share
        return {size: count for size, count in targets.items() if count}

    async def _step(self) -> bool:
        """One refill or one removal; False when there was nothing to do."""
        for sandbox_id in self.gone():
            self._forget(sandbox_id)
        await self._check()
        targets = self.targets()
        held: dict[Size, list[Sandbox]] = {}
        for row in self._ready.values():
            held.setdefault(size_of(row), []).append(row)
        self._metrics.pool_ready.set(len(self._ready))
        self._metrics.pool_target.set(sum(targets.values()))
        surplus = self._surplus(held, targets)
        if surplus is not None:
            row, reason = surplus
            await self._remove(row.id, reason)
            return True
        if self._admission.shortage() is not None:
            return False
        now = time.monotonic()
        self._broken_until = {size: until for size, until in self._broken_until.items() if until > now}
        for size, target in targets.items():
            if len(held.get(size, [])) < target and size not in self._broken_until:
                await self._quiet()
                return await self._refill(size)
        return False

    def _surplus(
        self, held: dict[Size, list[Sandbox]], targets: dict[Size, int]
    ) -> tuple[Sandbox, str] | None:
        for size, rows in held.items():
            for row in rows:
                if self._digests.get(size.image, row.image_digest) != row.image_digest:
                    return row, "image"
            if len(rows) > targets.get(size, 0):
                return rows[-1], "surplus"
            if self._admission.shortage() is not None:
                # What the pool holds is the first thing that a full host can do without.
                return rows[-1], "host_full"
        return None

    async def _refill(self, size: Size) -> bool:
        started = time.perf_counter()
        try:
            image = await self._images.ensure_image(size.image)
            self._digests[size.image] = image.digest
            row = await self._lifecycle.insert(self._new_row(size, image.digest), _nothing)
            row = await asyncio.shield(self._lifecycle.start(row))
        except SandboxdError as error:
            log.warning("pool.refill_failed", image=size.image, reason=error.message)
            self._broken_until[size] = time.monotonic() + RETRY_S
            return False
        self.add(row)
        self._metrics.pool_refill_duration.observe(time.perf_counter() - started)
        return True

    def _new_row(self, size: Size, digest: str) -> Sandbox:
        now = self._clock.now()
        return Sandbox(
            id=new_id("sbx"),
            node_id=self._lifecycle.node_id,
            slot=0,
            runtime=size.runtime,
            isolation=self._lifecycle.capabilities.isolation_level,
            image=size.image,
            image_digest=digest,
            cpu_mhz=size.cpu_mhz,
            memory_size_mb=size.memory_size_mb,
            disk_size_mb=size.disk_size_mb,
            created_at=now,
            last_active_at=now,
            boot_id=self._lifecycle.boot_id,
        )

    async def _quiet(self) -> None:
        """A start takes most of a core: not while clients create sandboxes and are about to use them."""
        deadline = time.monotonic() + MAX_QUIET_WAIT_S
        while time.monotonic() < deadline:
            left = QUIET_S - (time.monotonic() - self._last_claim_s)
            if left <= 0 and not self._lifecycle.creating:
                return
            await asyncio.sleep(max(left, 0.02))

    async def _check(self) -> None:
        """Members that do not answer are replaced before a client meets them, and so are those of an image
        that has been built anew. The question also keeps their warm interpreter from being ended."""
        interval_s = RECHECK_S if self._misses else CHECK_INTERVAL_S
        if time.monotonic() - self._checked_s < interval_s:
            return
        self._checked_s = time.monotonic()
        for image in {row.image for row in self._ready.values()}:
            self._digests[image] = (await self._images.ensure_image(image)).digest
        await asyncio.gather(*(self._check_one(sandbox_id) for sandbox_id in list(self._ready)))

    async def _check_one(self, sandbox_id: str) -> None:
        live = self._lifecycle.live.get(sandbox_id)
        if live is None:
            return
        try:
            if self._settings.warm_libraries:
                await live.agent.warm()
            else:
                await live.agent.hello(CHECK_TIMEOUT_S)
            self._misses.pop(sandbox_id, None)
        except SandboxdError as error:
            if sandbox_id not in self._ready:
                return  # claimed or removed meanwhile
            self._misses[sandbox_id] = self._misses.get(sandbox_id, 0) + 1
            log.warning("pool.no_answer", sandbox_id=sandbox_id, reason=error.message)
            if self._misses[sandbox_id] >= MAX_MISSES:
                await self._remove(sandbox_id, "dead")

    async def _remove(self, sandbox_id: str, reason: str) -> None:
        # Not a member from here on; a claim that is under way finds it in the store, or does not.
        self._forget(sandbox_id)
        if await self._lifecycle.end_ready(sandbox_id, Reason.LOST if reason == "dead" else Reason.SURPLUS):
            log.info("pool.removed", sandbox_id=sandbox_id, reason=reason)
            self._metrics.pool_removals.labels(reason).inc()

    def _forget(self, sandbox_id: str) -> None:
        self._ready.pop(sandbox_id, None)
        self._misses.pop(sandbox_id, None)


def size_of(row: Sandbox) -> Size:
    return Size(
        image=row.image,
        cpu_mhz=row.cpu_mhz,
        memory_size_mb=row.memory_size_mb,
        disk_size_mb=row.disk_size_mb,
        runtime=row.runtime,
    )


async def _nothing(_session: object) -> None:
    return None
