"""Memory, rows and engine that have come apart: an answer was lost, or a row was changed elsewhere."""

from contextlib import asynccontextmanager

import pytest

from sandboxd.kit.db import StoreUnavailableError
from sandboxd.kit.errors import UnavailableError
from sandboxd.runtimes.base import Phase
from sandboxd.sandboxes import store
from sandboxd.sandboxes.limits import NewSandbox
from sandboxd.sandboxes.pool import Pool
from sandboxd.sandboxes.states import ALIVE, Reason, Status
from tests.sandboxd.sandboxes.world import Node, World

GIVEN_UP = {"status": Status.FAILED, "termination_reason": Reason.LOST, "stopped_at": 1.0}


async def create(world: World, **wanted):
    return await world.service.create(world.principal, NewSandbox(**wanted))


def lose_answers(world: World, patch) -> None:
    """The next commits are made, but nobody hears of it."""
    write = world.db.write

    @asynccontextmanager
    async def lost():
        async with write() as session:
            yield session
        raise StoreUnavailableError("the connection broke")

    patch.setattr(world.db, "write", lost)


async def hours(world: World):
    return await world.node.lifecycle.meter.hours(world.principal.project_id, 0, 10**6)


async def test_what_another_node_gave_up_is_forgotten_and_no_longer_billed(world):
    row = await create(world, timeout_s=100)
    async with world.db.write() as session:
        await store.change(session, row.id, ALIVE, GIVEN_UP)
    await world.node.sweep.run()
    assert world.runtime.held == {}
    assert len(world.node.live) == 0


async def test_to_end_what_has_ended_removes_it_from_memory(world):
    row = await create(world)
    async with world.db.write() as session:
        await store.change(session, row.id, ALIVE, GIVEN_UP)
    ended = await world.node.lifecycle.end(row.id, Reason.TIMEOUT)
    assert ended.termination_reason == "lost"
    assert len(world.node.live) == 0


async def test_one_that_was_stopped_while_it_was_taken_up_stays_dead(world):
    row = await create(world)
    later = Node(world)
    await world.service.stop(world.principal, row.id)
    row.status = Status.RUNNING
    with pytest.raises(UnavailableError, match="while it was taken up"):
        await later.lifecycle.adopt(row, Phase.RUNNING)
    assert len(later.live) == 0


async def test_an_end_whose_answer_was_lost_is_not_billed_twice(world, monkeypatch):
    row = await create(world)
    world.node.live.get(row.id).bytes_in = 100
    with monkeypatch.context() as patch:
        lose_answers(world, patch)
        await world.service.stop(world.principal, row.id)
    assert world.node.lifecycle.is_busy(row.id)
    await world.node.lifecycle.flush_activity()
    assert not world.node.lifecycle.is_busy(row.id)
    assert await world.rows() == {"stopped": "user"}
    (hour,) = await hours(world)
    assert (hour.bytes_in, hour.sandboxes) == (100, 1)


async def pool_of_one(world: World) -> str:
    world.settings = world.settings.model_copy(
        update={"pool_size": 1, "pool_max": 1, "warm_libraries": False}
    )
    world.node = Node(world)
    await world.node.fill_pool()
    (member,) = world.runtime.held
    return member


async def test_an_end_of_a_pools_member_whose_answer_was_lost_is_forgotten(world, monkeypatch):
    member = await pool_of_one(world)
    with monkeypatch.context() as patch:
        lose_answers(world, patch)
        await world.node.lifecycle.end(member, Reason.SURPLUS)
    await world.node.lifecycle.flush_activity()
    assert not world.node.lifecycle.is_busy(member)


async def test_a_claim_whose_answer_was_lost_is_its_projects_and_ends_in_time(world, monkeypatch):
    member = await pool_of_one(world)
    with monkeypatch.context() as patch:
        lose_answers(world, patch)
        with pytest.raises(StoreUnavailableError):
            await create(world, timeout_s=60)
    await world.node.sweep.run()
    live = world.node.live.find(world.principal.project_id, member)
    assert live is not None
    assert live.deadline is not None
    assert world.node.pool.gone() == [member]


async def test_a_pause_whose_answer_was_lost_is_made(world, monkeypatch):
    row = await create(world)
    with monkeypatch.context() as patch:
        lose_answers(world, patch)
        with pytest.raises(StoreUnavailableError):
            await world.service.pause(world.principal, row.id)
    await world.node.sweep.run()
    live = world.node.live.get(row.id)
    assert (live.paused, live.deadline) == (True, None)
    assert world.runtime.held[row.id] is Phase.PAUSED
    resumed = await world.service.resume(world.principal, row.id)
    assert live.deadline == resumed.expires_boot_s


async def test_a_resume_whose_answer_was_lost_is_known_after_a_sweep(world, monkeypatch):
    row = await create(world)
    await world.service.pause(world.principal, row.id)
    taken_up = []
    world.node.lifecycle.on_adopted.append(taken_up.append)
    with monkeypatch.context() as patch:
        lose_answers(world, patch)
        with pytest.raises(StoreUnavailableError):
            await world.service.resume(world.principal, row.id)
    await world.node.sweep.run()
    live = await world.service.running(world.principal.project_id, row.id)
    assert live.deadline is not None
    assert taken_up == [live]


async def test_limits_are_those_of_the_row_when_the_answer_was_lost(world, monkeypatch):
    row = await create(world)
    with monkeypatch.context() as patch:
        lose_answers(world, patch)
        with pytest.raises(StoreUnavailableError):
            await world.service.update(
                world.principal, row.id, {"memory_size_mb": 200, "idle_timeout_s": 7.0}
            )
    assert (await world.service.get(world.principal.project_id, row.id)).memory_size_mb == 200
    assert world.runtime.limits[row.id][1] == 200
    assert world.node.live.get(row.id).idle_timeout_s == 7


async def test_a_miss_of_one_that_was_claimed_meanwhile_is_not_kept(world):
    member = await pool_of_one(world)
    pool: Pool = world.node.pool
    world.runtime.fail_at = f"agent {member}"
    pool._ready.clear()
    await pool._check_one(member)
    assert pool.doubtful() == []
