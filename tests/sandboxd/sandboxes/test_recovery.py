"""What a crash, an engine or a store that is away, and a clock that jumps leave behind, and who mends it."""

from typing import Any

import pytest

from sandboxd.kit.clock import Clock
from sandboxd.kit.db import StoreUnavailableError
from sandboxd.kit.metrics import Metrics
from sandboxd.runtimes.base import Phase
from sandboxd.runtimes.errors import EngineUnavailableError
from sandboxd.sandboxes import store
from sandboxd.sandboxes.jobs import Reaper
from sandboxd.sandboxes.limits import NewSandbox
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.service import Repeatable
from sandboxd.sandboxes.states import Status
from tests.sandboxd.sandboxes.world import Node, World

DAY_S = 86_400.0


class TurnedClock:
    """The wall's clock jumps; the host's own goes on."""

    def __init__(self, real: Clock) -> None:
        self.real = real
        self.jump_s = 0.0
        self.passed_s = 0.0

    def now(self) -> float:
        return self.real.now() + self.passed_s + self.jump_s

    def monotonic(self) -> float:
        return self.real.monotonic() + self.passed_s


async def create(world: World, **wanted: Any) -> Sandbox:
    return await world.service.create(world.principal, NewSandbox(**{"timeout_s": 1000.0, **wanted}))


async def half_made(world: World, repeatable: Repeatable) -> str:
    """A row as a daemon leaves it that died over a create."""
    made = await world.service.create(world.principal, NewSandbox(timeout_s=1000.0), repeatable)
    async with world.db.write() as session:
        values = {"status": Status.CREATING, "started_at": None, "handle": None, "metered_at": None}
        await store.change(session, made.id, [Status.RUNNING], values)
    return made.id


async def test_the_key_of_a_create_that_a_crash_cut_short_may_be_used_again(world):
    first = await half_made(world, Repeatable("k", "digest"))
    later = Node(world)
    await later.sweep.run()
    again = [
        await later.service.create(world.principal, NewSandbox(timeout_s=1000.0), Repeatable("k", "digest"))
        for _ in range(2)
    ]
    assert [row.status for row in again] == ["running", "running"]
    assert again[0].id == again[1].id != first


@pytest.mark.parametrize("step", ["adopt", "note_instance"])
async def test_silence_is_no_death(world, monkeypatch, step):
    row = await create(world)
    later = Node(world)
    if step == "adopt":
        world.runtime.fail_at = "adopt"
    else:
        world.runtime.engine = "engine 2"

        async def refuse(_sandbox_id: str) -> None:
            raise StoreUnavailableError("away")

        monkeypatch.setattr(later.lifecycle, "note_instance", refuse)
    await later.sweep.run()
    assert await world.rows() == {"running": None}
    world.runtime.fail_at = ""
    monkeypatch.undo()
    # Long before the next one is due.
    await later.sweep.tick()
    assert later.live.get(row.id) is not None
    calls = len(world.runtime.calls)
    await later.sweep.tick()
    assert len(world.runtime.calls) == calls


async def test_limits_that_no_client_was_told_of_are_taken_back(world):
    row = await create(world, memory_size_mb=256, cpu_mhz=2500)
    world.runtime.limits[row.id] = (4.0, 640)
    await Node(world).sweep.run()
    assert world.runtime.limits[row.id] == (1.0, 256)
    assert "limit_cpus" in world.runtime.calls


@pytest.mark.parametrize(
    ("status", "phase"), [(Status.PAUSED, Phase.RUNNING), (Status.RUNNING, Phase.PAUSED)]
)
async def test_a_freeze_that_went_wrong_is_mended_by_the_sweep(world, status, phase):
    row = await create(world)
    if status is Status.PAUSED:
        await world.service.pause(world.principal, row.id)
    world.runtime.held[row.id] = phase
    live = world.node.live.get(row.id)
    async with live.changing:
        await world.node.sweep.run()
    assert world.runtime.held[row.id] is phase  # somebody is at it
    await world.node.sweep.run()
    expected = Phase.PAUSED if status is Status.PAUSED else Phase.RUNNING
    assert world.runtime.held[row.id] is expected


async def test_a_pause_that_failed_is_taken_back_in_the_agent_too(world):
    row = await create(world)
    world.runtime.fail_at = "pause"
    with pytest.raises(EngineUnavailableError):
        await world.service.pause(world.principal, row.id)
    assert world.runtime.calls[-1] == "resume"
    assert world.runtime.held[row.id] is Phase.RUNNING


async def test_members_go_when_the_pool_is_switched_off(world):
    node = Node(world, pool_size=1, pool_max=1)
    await node.fill_pool()
    await Node(world).sweep.run()
    assert world.runtime.held == {}
    async with world.db.read() as session:
        assert not await store.list_alive(session, "node")


async def test_a_member_that_gave_no_answer_is_claimed_by_nobody(world, monkeypatch):
    node = world.node = Node(world, pool_size=1, pool_max=1)
    await node.fill_pool()
    (member,) = world.runtime.held
    world.runtime.fail_at = f"agent {member}"
    await node.pool._check_one(member)
    world.runtime.fail_at = ""
    assert (await create(world)).id != member
    # It was only slow: once it answers it is as good as the others.
    await node.pool._check_one(member)
    assert (await create(world)).id == member


async def test_a_member_that_could_not_be_removed_is_a_member_again(world, monkeypatch):
    node = Node(world, pool_size=1, pool_max=1)
    await node.fill_pool()
    (member,) = world.runtime.held

    def refuse() -> Any:
        raise StoreUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.db, "write", refuse)
        with pytest.raises(StoreUnavailableError):
            await node.pool._remove(member, "surplus")
    assert not node.pool.is_member(member)
    await node.sweep.run()
    assert node.pool.is_member(member)


async def test_an_end_that_could_not_be_written_is_written_whole(world, monkeypatch):
    row = await create(world)
    world.node.live.get(row.id).bytes_in = 100

    def refuse() -> Any:
        raise StoreUnavailableError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.db, "write", refuse)
        await world.service.stop(world.principal, row.id)
        with pytest.raises(StoreUnavailableError):
            await world.node.lifecycle.flush_activity()
    # Its row says that it runs, its container is gone; and yet it is not lost.
    await world.node.sweep.run()
    await world.node.lifecycle.flush_activity()
    await world.node.lifecycle.flush_activity()
    assert await world.rows() == {"stopped": "user"}
    (hour,) = await world.node.lifecycle.meter.hours(world.principal.project_id, 0, 10**6)
    assert (hour.bytes_in, hour.sandboxes) == (100, 1)


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
async def test_a_jump_of_the_walls_clock_ends_nothing_and_is_not_billed(world, jump_s):
    clock = world.clock = TurnedClock(world.clock)
    world.node = Node(world, max_sandboxes=10)
    rows = [await create(world, timeout_s=600.0, idle_timeout_s=300.0) for _ in range(3)]
    paused = await create(world, timeout_s=600.0)
    await world.service.pause(world.principal, paused.id)
    reaper = Reaper(world.node.lifecycle, clock, Metrics())
    await reaper.tick()
    clock.passed_s, clock.jump_s = 100.0, jump_s
    await reaper.tick()
    assert len(world.node.live) == 4
    used = await world.node.lifecycle.meter.hours(world.principal.project_id, 0, 10**6)
    assert sum(hour.sandbox_s for hour in used) == pytest.approx(400, abs=5)
    # The next process has the same deadlines, and bills no day either.
    later = Node(world, max_sandboxes=10)
    await later.sweep.run()
    reaper = Reaper(later.lifecycle, clock, Metrics())
    await reaper.tick()
    assert len(later.live) == 4
    used = await later.lifecycle.meter.hours(world.principal.project_id, 0, 10**6)
    assert sum(hour.sandbox_s for hour in used) == pytest.approx(400, abs=10)
    resumed = await later.service.resume(world.principal, paused.id)
    assert resumed.expires_boot_s is not None
    assert resumed.expires_boot_s - clock.monotonic() == pytest.approx(600, abs=5)
    clock.passed_s += 201.0
    await reaper.tick()
    assert {live.id for live in later.live} == {paused.id}
    for row in rows:
        ended = await later.service.get(world.principal.project_id, row.id)
        assert ended.termination_reason == "idle_timeout"


async def test_a_jump_while_no_daemon_ran_is_not_billed(world):
    """The wall's clock is all that tells how long that was; no sandbox has run longer than its host."""
    clock = world.clock = TurnedClock(world.clock)
    world.node = Node(world)
    await create(world)
    await world.node.lifecycle.meter.tick()
    clock.passed_s, clock.jump_s = 30.0, 10 * DAY_S
    later = Node(world)
    await later.sweep.run()
    used = await later.lifecycle.meter.hours(world.principal.project_id, 0, 10**6)
    assert sum(hour.sandbox_s for hour in used) == pytest.approx(30, abs=5)
