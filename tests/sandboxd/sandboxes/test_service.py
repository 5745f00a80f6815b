"""The life cycle when the runtime fails at each of its steps: nothing stays behind, and the row says why."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandboxd.identity.service import IdentityService, Principal
from sandboxd.kit.clock import SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Exited, Handle, Image, Observation, Owned, Phase
from sandboxd.runtimes.errors import AgentUnreachableError, EngineUnavailableError
from sandboxd.sandboxes.errors import NoFreeSlotError, SandboxNotRunningError
from sandboxd.sandboxes.jobs import Reaper, Sweep
from sandboxd.sandboxes.service import NewSandbox, SandboxService
from sandboxd.sandboxes.states import Reason, Status


class BrokenRuntime:
    """A runtime that fails where it is told to, and remembers what it holds."""

    def __init__(self) -> None:
        self.fail_at = ""
        self.held: dict[str, Phase] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.making = asyncio.Event()

    def _step(self, name: str) -> None:
        if self.fail_at == name:
            raise EngineUnavailableError(f"broken at {name}")

    async def ensure_image(self, ref: str) -> Image:
        return Image(ref, "sha256:1", "3.11.2")

    async def create(self, spec) -> Handle:
        self.held[spec.id] = Phase.RUNNING
        self.making.set()
        await self.gate.wait()
        self._step("create")
        return Handle(spec.id)

    async def delete(self, sandbox_id: str) -> None:
        self._step("delete")
        self.held.pop(sandbox_id, None)

    async def adopt(self, sandbox_id: str, handle: Handle) -> None:
        self._step("adopt")

    async def observe(self, handle: Handle) -> Observation:
        return Observation(self.held.get(handle, Phase.GONE))

    async def list(self) -> list[Owned]:
        return [Owned(name, Handle(name), phase) for name, phase in self.held.items()]

    async def watch(self) -> AsyncIterator[Exited]:
        for name in list(self.held):
            yield Exited(name, Handle(name))

    def leftovers(self) -> set[str]:
        return set(self.held)

    async def dial(self, sandbox_id: str, timeout_s: float):
        raise AgentUnreachableError("no agent here")


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.settings = Settings(state_dir=tmp_path, max_sandboxes=3, start_timeout_s=5)
        self.db = Database(self.settings.database_url)
        self.tasks = TaskOwner()
        self.runtime = BrokenRuntime()
        self.clock = SystemClock()
        self.principal: Principal
        self.service = self.new_service()

    def new_service(self) -> SandboxService:
        service = SandboxService(
            settings=self.settings,
            clock=self.clock,
            db=self.db,
            metrics=Metrics(),
            tasks=self.tasks,
            runtime=self.runtime,
            images=self.runtime,
        )
        service._agent = lambda _sandbox_id: Answering()  # type: ignore[assignment,method-assign,return-value]  # no engine, no agent
        return service

    async def rows(self) -> dict[str, str | None]:
        found, _ = await self.service.list(self.principal.project_id, None, PageParams(limit=100))
        return {row.status: row.termination_reason for row in found}

    def sweep(self, service: SandboxService | None = None) -> Sweep:
        return Sweep(service or self.service, self.db, self.runtime, Metrics())


class Answering:
    """An agent that is there."""

    async def hello(self, timeout_s: float = 1) -> None:
        return None


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.db.migrate()
    identity = IdentityService(world.db, world.clock)
    project = await identity.ensure_project("org", "proj")
    key = await identity.create_key(project.id, "k", actor="tests")
    world.principal = await identity.authenticate(key.key)
    yield world
    await world.tasks.close()
    await world.db.close()


async def test_a_create_that_fails_leaves_only_its_row(world):
    world.runtime.fail_at = "create"
    with pytest.raises(EngineUnavailableError, match="broken at create"):
        await world.service.create(world.principal, NewSandbox())
    assert await world.rows() == {"failed": "runtime_error"}
    assert world.runtime.held == {}
    assert len(world.service.live) == 0


async def test_what_cannot_be_deleted_now_is_deleted_by_the_sweep(world):
    row = await world.service.create(world.principal, NewSandbox())
    world.runtime.fail_at = "delete"
    with pytest.raises(EngineUnavailableError):
        await world.service.end(row.id, Reason.USER)
    assert await world.rows() == {"stopping": "user"}
    world.runtime.fail_at = ""
    await world.sweep().run()
    assert await world.rows() == {"stopped": "user"}
    assert world.runtime.held == {}


async def test_the_sweep_takes_up_what_an_earlier_process_left(world):
    row = await world.service.create(world.principal, NewSandbox(timeout_s=100))
    later = world.new_service()
    await world.sweep(later).run()
    taken = later.live.get(row.id)
    assert taken is not None
    assert taken.deadline == world.service.live.get(row.id).deadline


async def test_the_sweep_ends_what_cannot_be_taken_up(world):
    await world.service.create(world.principal, NewSandbox())
    world.runtime.fail_at = "adopt"
    await world.sweep(world.new_service()).run()
    assert await world.rows() == {"failed": "lost"}
    assert world.runtime.held == {}


async def test_one_that_cannot_be_mended_does_not_keep_the_others_from_it(world):
    first = await world.service.create(world.principal, NewSandbox())
    second = await world.service.create(world.principal, NewSandbox())
    later = world.new_service()
    real = world.runtime.adopt

    async def adopt(sandbox_id: str, handle: Handle) -> None:
        if sandbox_id == first.id:
            raise OSError("what nobody thought of")
        await real(sandbox_id, handle)

    world.runtime.adopt = adopt
    await world.sweep(later).run()
    assert later.live.get(second.id) is not None


async def test_a_create_whose_clean_up_failed_keeps_its_place(world):
    world.runtime.fail_at = "create"
    delete = world.runtime.delete

    async def refuse(_sandbox_id: str) -> None:
        raise EngineUnavailableError("gone for now")

    world.runtime.delete = refuse
    with pytest.raises(EngineUnavailableError, match="broken at create"):
        await world.service.create(world.principal, NewSandbox())
    assert await world.rows() == {"stopping": "runtime_error"}
    world.runtime.delete, world.runtime.fail_at = delete, ""
    assert (await world.service.create(world.principal, NewSandbox())).slot == 1
    await world.sweep().run()
    assert (await world.rows())["failed"] == "runtime_error"


async def test_the_sweep_removes_what_has_no_row_and_spares_what_is_being_made(world):
    world.runtime.held["sbx_nobodys"] = Phase.EXITED
    world.runtime.gate.clear()
    making = asyncio.ensure_future(world.service.create(world.principal, NewSandbox()))
    await world.runtime.making.wait()
    await world.sweep().run()
    assert "sbx_nobodys" not in world.runtime.held
    world.runtime.gate.set()
    assert (await making).status == Status.RUNNING


async def test_a_live_one_whose_container_is_gone_is_ended(world):
    await world.service.create(world.principal, NewSandbox())
    world.runtime.held.clear()
    await world.sweep().run()
    assert await world.rows() == {"failed": "lost"}
    assert len(world.service.live) == 0


async def test_ending_one_that_is_being_made_wins(world):
    world.runtime.gate.clear()
    making = asyncio.ensure_future(world.service.create(world.principal, NewSandbox()))
    await world.runtime.making.wait()
    (sandbox_id,) = world.runtime.held
    ending = asyncio.ensure_future(world.service.end(sandbox_id, Reason.USER))
    while "stopping" not in await world.rows():
        continue
    world.runtime.gate.set()
    assert (await ending).status == Status.STOPPED
    with pytest.raises(SandboxNotRunningError):
        await making
    assert world.runtime.held == {}


async def test_places_are_limited_and_given_back(world):
    rows = [await world.service.create(world.principal, NewSandbox()) for _ in range(3)]
    assert sorted(row.slot for row in rows) == [0, 1, 2]
    with pytest.raises(NoFreeSlotError, match="All 3 places"):
        await world.service.create(world.principal, NewSandbox())
    await world.service.end(rows[1].id, Reason.USER)
    assert (await world.service.create(world.principal, NewSandbox())).slot == 1


async def test_the_reaper_goes_by_the_hosts_clock(world):
    row = await world.service.create(world.principal, NewSandbox(timeout_s=100))
    other = await world.service.create(world.principal, NewSandbox(timeout_s=100))
    world.service.live.get(row.id).deadline = world.clock.monotonic() - 1

    class Jumped(SystemClock):
        def now(self) -> float:
            return super().now() + 10**6

    await Reaper(world.service, Jumped(), Metrics()).tick()
    assert world.service.live.get(row.id) is None
    assert world.service.live.get(other.id) is not None
    assert (await world.service.get(world.principal.project_id, row.id)).termination_reason == "timeout"
