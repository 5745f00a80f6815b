"""What clients can do with sandboxes: create, look at, change, pause, stop."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.identity import audit, idempotency
from sandboxd.identity.service import Principal
from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import SandboxdError, UnavailableError
from sandboxd.kit.ids import new_id
from sandboxd.kit.paging import PageParams
from sandboxd.runtimes.base import ImageStore, Runtime
from sandboxd.runtimes.errors import AgentUnreachableError, SpecRefusedError
from sandboxd.sandboxes import store
from sandboxd.sandboxes.admission import Admission
from sandboxd.sandboxes.errors import SandboxNotFoundError, SandboxNotRunningError, SandboxPausedError
from sandboxd.sandboxes.events import Events
from sandboxd.sandboxes.failpoints import FailPoint
from sandboxd.sandboxes.lifecycle import KEY_SCOPE, Lifecycle
from sandboxd.sandboxes.limits import Limits, NewSandbox
from sandboxd.sandboxes.live import LiveSandbox
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.pool import Pool
from sandboxd.sandboxes.states import Reason, Status
from sandboxd.sandboxes.store import Size

log = structlog.get_logger(__name__)

_POLL_S = 0.1
# How long a repeated request waits for what the first one makes at another daemon.
_FIRST_S = 120.0


@dataclass(frozen=True, slots=True)
class Repeatable:
    """A request's Idempotency-Key, and the digest of its body."""

    key: str
    digest: str


class _Replay(Exception):
    """The key has made a sandbox before; its id is the argument."""


class SandboxService:
    def __init__(
        self,
        *,
        clock: Clock,
        db: Database,
        runtime: Runtime,
        images: ImageStore,
        lifecycle: Lifecycle,
        limits: Limits,
        pool: Pool,
        admission: Admission,
        events: Events,
    ) -> None:
        self._clock = clock
        self._db = db
        self._runtime = runtime
        self._images = images
        self._lifecycle = lifecycle
        self._limits = limits
        self._pool = pool
        self._admission = admission
        self._events = events
        self.live = lifecycle.live
        # Claims under way.
        self._claiming = 0

    async def create(
        self, principal: Principal, wanted: NewSandbox, repeatable: Repeatable | None = None
    ) -> Sandbox:
        """A new sandbox: running, or with `wait` false on its way. Nothing is left of one that failed but
        its row, which says why. A repeated request gets the sandbox of the first."""
        size = self._limits.size(wanted)
        try:
            if self._pool.ready(size) and self._lifecycle.has_place(self._claiming):
                claimed = await self._claim(principal, wanted, size, repeatable)
                if claimed is not None:
                    return claimed
            return await self._create_cold(principal, wanted, size, repeatable)
        except _Replay as replay:
            return await self._first_result(principal, str(replay), wait=wanted.wait)

    async def get(self, project_id: str, sandbox_id: str) -> Sandbox:
        async with self._db.read() as session:
            row = await store.find(session, project_id, sandbox_id)
        if row is None:
            raise SandboxNotFoundError(sandbox_id)
        return self._lifecycle.patched(row)

    async def list(
        self,
        project_id: str,
        statuses: Sequence[str] | None,
        params: PageParams,
        labels: Mapping[str, str] | None = None,
    ) -> tuple[list[Sandbox], bool]:
        async with self._db.read() as session:
            rows, more = await store.list_page(session, project_id, statuses, labels or {}, params)
        return [self._lifecycle.patched(row) for row in rows], more

    async def stop(self, principal: Principal, sandbox_id: str) -> Sandbox:
        """Ends a sandbox; one that has ended is returned as it is."""
        row = await self.get(principal.project_id, sandbox_id)
        if not row.is_alive:
            return row
        if row.node_id != self._lifecycle.node_id:
            # Only its node can end it: the row alone would say "stopped" of something that runs on.
            raise UnavailableError(f"Sandbox {row.id} is held by another node, {row.node_id}; try again.")
        return await self._lifecycle.end(row.id, Reason.USER, principal)

    async def running(self, project_id: str, sandbox_id: str) -> LiveSandbox:
        """The running sandbox that a client named. Raises SandboxNotFoundError, SandboxNotRunningError."""
        live = self.live.find(project_id, sandbox_id)
        if live is not None and not live.paused:
            live.touch(self._clock.now())
            return live
        row = await self.get(project_id, sandbox_id)
        if row.status == Status.RUNNING:
            raise UnavailableError(f"Sandbox {row.id} is not taken up yet after a restart; try again.")
        raise SandboxNotRunningError(row.id, row.status, row.termination_reason)

    @asynccontextmanager
    async def linked(self, project_id: str, sandbox_id: str) -> AsyncIterator[LiveSandbox]:
        """The running sandbox, for a call to its agent. When that breaks because the sandbox has ended or was
        paused meanwhile, it says so: raises SandboxNotRunningError, SandboxPausedError, too."""
        live = await self.running(project_id, sandbox_id)
        try:
            yield live
        except (LinkBrokenError, AgentUnreachableError) as error:
            if live.paused:
                raise SandboxPausedError(live.id) from error
            await self.running(project_id, sandbox_id)
            raise

    async def update(self, principal: Principal, sandbox_id: str, changes: Mapping[str, Any]) -> Sandbox:
        """Changes what `changes` names: timeout_s (from now), idle_timeout_s, labels, cpu_mhz,
        memory_size_mb. All of it, or nothing and an error."""
        row, live = await self._held(principal.project_id, sandbox_id)
        self._check(changes)
        if not changes:  # the body named `network` alone, and there is one kind of it
            return row
        async with live.changing:
            row, live = await self._held(principal.project_id, sandbox_id)
            cpu_mhz = changes.get("cpu_mhz", row.cpu_mhz)
            memory_size_mb = changes.get("memory_size_mb", row.memory_size_mb)
            resized = (cpu_mhz, memory_size_mb) != (row.cpu_mhz, row.memory_size_mb)
            growth = (cpu_mhz - row.cpu_mhz, memory_size_mb - row.memory_size_mb)
            if resized:
                await self._check_growth(principal, row, growth)
                async with self._unless_ended(principal, row):
                    await self._runtime.update(row.id, self._lifecycle.cpus(cpu_mhz), memory_size_mb)
                live.cpus = self._lifecycle.cpus(cpu_mhz)
            self._lifecycle.fail_points.reach(FailPoint.UPDATE_APPLIED)
            values = {
                name: changes[name]
                for name in ("idle_timeout_s", "labels", "cpu_mhz", "memory_size_mb")
                if name in changes
            }
            if "timeout_s" in changes:
                values |= self._timeout(row, changes["timeout_s"])
            try:
                row = await self._write(
                    principal, row, Status(row.status), values, "update", sorted(changes), growth
                )
            except SandboxdError:
                # Only the answer may have been lost: the limits are those of the row, whichever it is.
                with suppress(SandboxdError):
                    row = await self.get(principal.project_id, row.id)
                if resized and self.live.get(row.id) is live:
                    live.cpus = self._lifecycle.cpus(row.cpu_mhz)
                    await self._runtime.update(row.id, live.cpus, row.memory_size_mb)
                raise
            finally:
                live.idle_timeout_s = row.idle_timeout_s
                live.deadline = row.expires_boot_s
        return row

    async def pause(self, principal: Principal, sandbox_id: str) -> Sandbox:
        """Freezes a sandbox, memory kept: neither its time nor its idleness runs on. Idempotent."""
        row, live = await self._held(principal.project_id, sandbox_id)
        if not self._lifecycle.capabilities.pause:
            raise SpecRefusedError(
                f"The runtime {row.runtime} of this server cannot pause sandboxes.", param="id"
            )
        async with live.changing:
            row, live = await self._held(principal.project_id, sandbox_id)
            if row.status == Status.PAUSED:
                return row
            left = row.expires_boot_s
            values = {
                "status": Status.PAUSED,
                "remaining_s": None if left is None else max(0.0, left - self._clock.monotonic()),
                "expires_at": None,
                "expires_boot_s": None,
            }
            row = await self._write(principal, row, Status.RUNNING, values, "pause", [])
            live.paused, live.deadline = True, None
            self._lifecycle.fail_points.reach(FailPoint.PAUSE_MARKED)
            try:
                await self._lifecycle.freeze(row.id)
            except SandboxdError:
                # It may be frozen all the same. Should this fail, too, the sweep does it.
                with suppress(SandboxdError):
                    await self._lifecycle.thaw(row.id)
                row = await self._write(principal, row, Status.PAUSED, self._resumed(row), "resume", [])
                live.paused, live.deadline = False, row.expires_boot_s
                raise
            self._lifecycle.fail_points.reach(FailPoint.PAUSE_FROZEN)
        return row

    async def resume(self, principal: Principal, sandbox_id: str) -> Sandbox:
        """Lets a paused sandbox go on with what was left of its time. Idempotent."""
        row, live = await self._held(principal.project_id, sandbox_id)
        async with live.changing:
            row, live = await self._held(principal.project_id, sandbox_id)
            if row.status == Status.RUNNING:
                return row
            async with self._unless_ended(principal, row):
                await self._lifecycle.thaw(row.id)
            row = await self._write(principal, row, Status.PAUSED, self._resumed(row), "resume", [])
            live.paused, live.deadline = False, row.expires_boot_s
            live.touch(self._clock.now())
            self._lifecycle.fail_points.reach(FailPoint.RESUME_RUNNING)
            for hook in self._lifecycle.on_adopted:
                hook(live)
        return row

    async def _claim(
        self, principal: Principal, wanted: NewSandbox, size: Size, repeatable: Repeatable | None
    ) -> Sandbox | None:
        """A sandbox out of the pool, or None when there is none left."""
        now = self._clock.now()
        values: dict[str, Any] = {
            "status": Status.RUNNING,
            "project_id": principal.project_id,
            "labels": dict(wanted.labels),
            "env": dict(wanted.env),
            "timeout_s": wanted.timeout_s,
            "idle_timeout_s": wanted.idle_timeout_s,
            "created_at": now,
            "started_at": now,
            "last_active_at": now,
            "last_active_boot_s": self._clock.monotonic(),
            "metered_at": now,
            **self._lifecycle.timer(wanted.timeout_s),
        }
        self._claiming += 1
        try:
            async with self._db.write() as session:
                await self._check_new(session, principal, size, repeatable)
                row = await store.claim(session, self._lifecycle.node_id, size, self._pool.doubtful(), values)
                if row is None:
                    return None
                await self._record_new(session, principal, row.id, repeatable)
                await self._events.emit(session, row, "sandbox.created")
                await self._events.emit(session, row, "sandbox.running")
            self._lifecycle.fail_points.reach(FailPoint.CLAIM_CLAIMED)
            self._events.wake()
            self._pool.asked(size, row)
            await self._lifecycle.claimed(row)
        finally:
            self._claiming -= 1
        return row

    async def _create_cold(
        self, principal: Principal, wanted: NewSandbox, size: Size, repeatable: Repeatable | None
    ) -> Sandbox:
        if repeatable is not None:
            # What was made before needs neither an image nor room.
            async with self._db.read() as session:
                await self._check_first(session, principal, repeatable)
        image = await self._images.ensure_image(size.image)
        await self._admission.wait()
        now = self._clock.now()
        row = Sandbox(
            id=new_id("sbx"),
            project_id=principal.project_id,
            node_id=self._lifecycle.node_id,
            slot=0,
            runtime=size.runtime,
            isolation=self._lifecycle.capabilities.isolation_level,
            image=size.image,
            image_digest=image.digest,
            labels=dict(wanted.labels),
            env=dict(wanted.env),
            timeout_s=wanted.timeout_s,
            idle_timeout_s=wanted.idle_timeout_s,
            created_at=now,
            last_active_at=now,
            boot_id=self._lifecycle.boot_id,
            cpu_mhz=size.cpu_mhz,
            memory_size_mb=size.memory_size_mb,
            disk_size_mb=size.disk_size_mb,
        )

        async def also(session: AsyncSession) -> None:
            await self._check_new(session, principal, size, repeatable)
            await self._record_new(session, principal, row.id, repeatable)

        await self._lifecycle.insert(row, also)
        task = self._lifecycle.start(row)
        task.add_done_callback(lambda done: self._learn(size, done))
        # A client that hangs up, or a drain, must not leave half a sandbox behind.
        return await asyncio.shield(task) if wanted.wait else row

    def _learn(self, size: Size, done: asyncio.Task[Sandbox]) -> None:
        # Only from what came to life: refills of an image that cannot start would keep the pool from others.
        if not done.cancelled() and done.exception() is None:
            self._pool.asked(size, None)

    async def _check_new(
        self, session: AsyncSession, principal: Principal, size: Size, repeatable: Repeatable | None
    ) -> None:
        # Two creates at once must not each see room for one: they take turns.
        await self._db.serialize(session, f"quota_{principal.project_id}")
        # Behind that: the same request may have just been served, and have taken the last of the quota.
        if repeatable is not None:
            await self._check_first(session, principal, repeatable)
        await self._limits.check_quota(
            session, principal, sandboxes=1, cpu_mhz=size.cpu_mhz, memory_size_mb=size.memory_size_mb
        )

    async def _check_first(self, session: AsyncSession, principal: Principal, repeatable: Repeatable) -> None:
        first = await idempotency.find(session, principal.project_id, KEY_SCOPE, repeatable.key)
        if first is not None:
            idempotency.check_same(first, repeatable.digest)
            raise _Replay(first.resource_id)

    async def _record_new(
        self, session: AsyncSession, principal: Principal, sandbox_id: str, repeatable: Repeatable | None
    ) -> None:
        now = self._clock.now()
        if repeatable is not None:
            first = await idempotency.insert(
                session,
                project_id=principal.project_id,
                scope=KEY_SCOPE,
                key=repeatable.key,
                digest=repeatable.digest,
                resource_id=sandbox_id,
                at=now,
            )
            if first is not None:
                idempotency.check_same(first, repeatable.digest)
                raise _Replay(first.resource_id)
        _record(session, principal, "create", sandbox_id, now)

    async def _first_result(self, principal: Principal, sandbox_id: str, *, wait: bool) -> Sandbox:
        """What the first request with a key got, or is about to get."""
        made = await self._lifecycle.result_of(sandbox_id) if wait else None
        if made is not None:
            return made
        row = await self.get(principal.project_id, sandbox_id)
        # On its way at another daemon on the same store, or just written here.
        deadline = self._clock.monotonic() + _FIRST_S
        while wait and row.status == Status.CREATING and self._clock.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
            row = await self.get(principal.project_id, sandbox_id)
        return row

    async def _held(self, project_id: str, sandbox_id: str) -> tuple[Sandbox, LiveSandbox]:
        """A sandbox that runs or is paused, with what is in memory of it."""
        # In this order: a stop marks the row before it forgets what is in memory.
        live = self.live.find(project_id, sandbox_id)
        row = await self.get(project_id, sandbox_id)
        if row.status not in (Status.RUNNING, Status.PAUSED):
            raise SandboxNotRunningError(row.id, row.status, row.termination_reason)
        if live is None:
            raise UnavailableError(f"Sandbox {row.id} is not taken up yet after a restart; try again.")
        return row, live

    @asynccontextmanager
    async def _unless_ended(self, principal: Principal, row: Sandbox) -> AsyncIterator[None]:
        """A stop does not wait for a change under way: what fails because of it is the client's own doing."""
        try:
            yield
        except SandboxdError as error:
            row = await self.get(principal.project_id, row.id)
            if row.status not in (Status.RUNNING, Status.PAUSED):
                raise SandboxNotRunningError(row.id, row.status, row.termination_reason) from error
            raise

    def _check(self, changes: Mapping[str, Any]) -> None:
        if "timeout_s" in changes:
            self._limits.timeout(changes["timeout_s"])
        self._limits.idle_timeout(changes.get("idle_timeout_s"))
        if "cpu_mhz" in changes:
            self._limits.cpu(changes["cpu_mhz"])
        if "memory_size_mb" in changes:
            self._limits.memory(changes["memory_size_mb"])

    async def _check_growth(self, principal: Principal, row: Sandbox, growth: tuple[int, int]) -> None:
        """Before the engine is asked; what counts is the same question in the transaction that writes it."""
        if not self._lifecycle.capabilities.update:
            raise SpecRefusedError(f"The runtime {row.runtime} of this server cannot change limits.")
        async with self._db.read() as session:
            await self._check_quota(session, principal, growth)

    async def _check_quota(
        self, session: AsyncSession, principal: Principal, growth: tuple[int, int]
    ) -> None:
        cpu_mhz, memory_size_mb = growth
        await self._limits.check_quota(
            session, principal, sandboxes=0, cpu_mhz=cpu_mhz, memory_size_mb=memory_size_mb
        )

    def _timeout(self, row: Sandbox, timeout_s: float | None) -> dict[str, Any]:
        if row.status == Status.PAUSED:
            return {"timeout_s": timeout_s, "remaining_s": timeout_s}
        return {"timeout_s": timeout_s, **self._lifecycle.timer(timeout_s)}

    def _resumed(self, row: Sandbox) -> dict[str, Any]:
        return {"status": Status.RUNNING, "remaining_s": None, **self._lifecycle.timer(row.remaining_s)}

    async def _write(
        self,
        principal: Principal,
        row: Sandbox,
        expected: Status,
        values: Mapping[str, Any],
        verb: str,
        fields: Sequence[str],
        growth: tuple[int, int] = (0, 0),
    ) -> Sandbox:
        """Changes the row if it is still in the state that was read, with its event and audit entry.
        `growth` is what it takes more of CPU and memory: two at once must not each see room for one."""
        async with self._db.write() as session:
            if max(growth) > 0:
                await self._db.serialize(session, f"quota_{principal.project_id}")
                await self._check_quota(session, principal, growth)
            changed = await store.change(session, row.id, [expected], dict(values))
            row = await store.get(session, row.id)
            if changed:
                _record(session, principal, verb, row.id, self._clock.now(), fields)
                data = {"fields": list(fields)} if fields else {}
                await self._events.emit(session, row, f"sandbox.{_PAST[verb]}", **data)
        if not changed:
            raise SandboxNotRunningError(row.id, row.status, row.termination_reason)
        self._events.wake()
        return row


_PAST = {"update": "updated", "pause": "paused", "resume": "resumed"}


def _record(
    session: AsyncSession,
    principal: Principal,
    verb: str,
    sandbox_id: str,
    at: float,
    fields: Sequence[str] = (),
) -> None:
    details = {"fields": list(fields)} if fields else {}
    audit.record(
        session,
        project_id=principal.project_id,
        actor=principal.key_id,
        action=f"sandbox.{verb}",
        resource_id=sandbox_id,
        at=at,
        **details,
    )
