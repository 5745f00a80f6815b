"""A world without an engine: a runtime that fails where it is told to, agents that answer, and daemons on a
real store."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sandboxd.identity.service import Principal, Quota
from sandboxd.kit.clock import SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Capabilities, Exited, Handle, Image, Observation, Owned, Phase, Usage
from sandboxd.runtimes.errors import AgentUnreachableError, EngineUnavailableError, LimitBelowUseError
from sandboxd.sandboxes.admission import Admission
from sandboxd.sandboxes.events import Events
from sandboxd.sandboxes.jobs import Sweep
from sandboxd.sandboxes.lifecycle import Lifecycle
from sandboxd.sandboxes.limits import Limits, NewSandbox
from sandboxd.sandboxes.pool import Pool
from sandboxd.sandboxes.service import SandboxService


class BrokenRuntime:
    """A runtime that fails where it is told to, and remembers what it holds."""

    def __init__(self) -> None:
        self.fail_at = ""
        self.fault: type[SandboxdError] = EngineUnavailableError
        self.held: dict[str, Phase] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.making = asyncio.Event()
        self.calls: list[str] = []
        self.limits: dict[str, tuple[float, int]] = {}
        self.cpu_s: dict[str, float] = {}
        self.background: dict[str, bool] = {}
        self.engine = "engine 1"
        self.digest = "sha256:1"

    def _step(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_at == name:
            raise self.fault(f"broken at {name}")

    async def ensure_image(self, ref: str) -> Image:
        self._step("ensure_image")
        return Image(ref, self.digest, "3.11.2")

    async def create(self, spec: Any) -> Handle:
        self.held[spec.id] = Phase.RUNNING
        self.background[spec.id] = spec.background
        self.making.set()
        await self.gate.wait()
        self._step("create")
        return Handle(spec.id)

    async def delete(self, sandbox_id: str) -> None:
        self._step("delete")
        self.held.pop(sandbox_id, None)

    async def adopt(self, sandbox_id: str, handle: Handle) -> None:
        self._step("adopt")

    async def pause(self, sandbox_id: str) -> None:
        self._step("pause")
        self.held[sandbox_id] = Phase.PAUSED

    async def resume(self, sandbox_id: str) -> None:
        self._step("resume")
        self.held[sandbox_id] = Phase.RUNNING

    async def update(self, sandbox_id: str, cpus: float, memory_mb: int) -> None:
        self._step("update")
        if memory_mb < 100:
            raise LimitBelowUseError("100 MB are in use")
        self.limits[sandbox_id] = (cpus, memory_mb)

    async def set_background(self, sandbox_id: str, background: bool) -> None:
        self.background[sandbox_id] = background

    async def limit_cpus(self, sandbox_id: str, cpus: float | None) -> None:
        self._step("limit_cpus")

    async def usage(self, sandbox_id: str) -> Usage | None:
        if sandbox_id not in self.held:
            return None
        _, memory_mb = self.limits.get(sandbox_id, (1.0, None))
        return Usage(self.cpu_s.get(sandbox_id, 0.0), 10.0, memory_mb)

    async def instance(self) -> str:
        return self.engine

    async def observe(self, handle: Handle) -> Observation:
        return Observation(self.held.get(handle, Phase.GONE))

    async def list(self) -> list[Owned]:
        return [Owned(name, Handle(name), phase) for name, phase in self.held.items()]

    async def watch(self) -> AsyncIterator[Exited]:
        for name in list(self.held):
            yield Exited(name, Handle(name))

    def leftovers(self) -> set[str]:
        return set(self.held)

    async def dial(self, sandbox_id: str, timeout_s: float) -> Any:
        raise AgentUnreachableError("no agent here")


class Answering:
    """An agent that is there, or not."""

    def __init__(self, runtime: BrokenRuntime, sandbox_id: str) -> None:
        self._runtime = runtime
        self._id = sandbox_id

    async def hello(self, timeout_s: float = 1) -> None:
        self._answer()

    async def warm(self) -> bool:
        self._answer()
        return True

    async def timers(self, *, run: bool) -> None:
        self._answer()

    def _answer(self) -> None:
        if self._runtime.fail_at == f"agent {self._id}":
            raise AgentUnreachableError("it does not answer")


class Node:
    """What one daemon is made of, without HTTP."""

    def __init__(self, world: "World", name: str = "node", **settings: Any) -> None:
        self.settings = world.settings.model_copy(update=settings)
        self.metrics = Metrics()
        self.events = Events(world.db, world.clock, closing=lambda: self.closing)
        self.closing = False
        runtime: Any = world.runtime
        self.lifecycle = Lifecycle(
            settings=self.settings,
            clock=world.clock,
            db=world.db,
            metrics=self.metrics,
            tasks=world.tasks,
            runtime=runtime,
            events=self.events,
            node_id=name,
        )
        self.lifecycle.engine_instance = world.runtime.engine
        self.lifecycle.capabilities = Capabilities("runc", 0, pause=True, update=True)
        self.lifecycle._agent = lambda sandbox_id: Answering(world.runtime, sandbox_id)  # type: ignore[assignment,method-assign,return-value]  # no engine, no agent
        self.limits = Limits(self.settings)
        self.admission = Admission(self.settings, self.metrics, starting=lambda: self.lifecycle.creating)
        self.pool = Pool(
            settings=self.settings,
            clock=world.clock,
            metrics=self.metrics,
            lifecycle=self.lifecycle,
            limits=self.limits,
            images=runtime,
            admission=self.admission,
        )
        self.service = SandboxService(
            clock=world.clock,
            db=world.db,
            runtime=runtime,
            images=runtime,
            lifecycle=self.lifecycle,
            limits=self.limits,
            pool=self.pool,
            admission=self.admission,
            events=self.events,
        )
        self.live = self.lifecycle.live
        self.sweep = Sweep(self.lifecycle, world.db, runtime, self.metrics, self.pool)

    @staticmethod
    async def create_for(world: "World", **wanted: Any) -> Any:
        """A sandbox with more places than the world has by itself."""
        node = world.node
        node.lifecycle._settings = node.settings.model_copy(update={"max_sandboxes": 100})
        return await node.service.create(world.principal, NewSandbox(**wanted))

    async def fill_pool(self) -> None:
        """Lets the pool work until it has nothing more to do."""
        while await self.pool._step():
            continue


class World:
    def __init__(self, tmp_path: Path, db: Database) -> None:
        self.settings = Settings(
            state_dir=tmp_path,
            run_dir=tmp_path / "run",
            max_sandboxes=3,
            start_timeout_s=5,
            pool_max=0,
            min_free_memory_mb=0,
            min_free_disk_mb=0,
            min_free_processes=0,
            min_free_inotify=0,
        )
        self.db = db
        self.tasks = TaskOwner()
        self.runtime = BrokenRuntime()
        self.clock: Any = SystemClock()
        self.principal = Principal("key_1", "", "proj", "org")
        self.node = Node(self)

    @property
    def service(self) -> SandboxService:
        return self.node.service

    def quota(self, **limits: int) -> Principal:
        """The principal with quotas of its project's own."""
        return Principal(
            self.principal.key_id, self.principal.project_id, "proj", "org", quota=Quota(**limits)
        )

    async def rows(self) -> dict[str, str | None]:
        found, _ = await self.service.list(self.principal.project_id, None, PageParams(limit=100))
        return {row.status: row.termination_reason for row in found}
