"""The pool: claims never meet, sizes follow demand within the bound, and nothing dead is handed out."""

import asyncio

import pytest

from sandboxd.runtimes.base import Phase
from sandboxd.runtimes.errors import EngineUnavailableError
from sandboxd.sandboxes import store
from sandboxd.sandboxes.errors import NoFreeSlotError, QuotaError
from sandboxd.sandboxes.limits import NewSandbox
from sandboxd.sandboxes.pool import MEMORY_S, Demand
from sandboxd.sandboxes.service import Repeatable
from sandboxd.sandboxes.states import Status
from tests.sandboxd.sandboxes.world import Node, World


@pytest.fixture
async def pooled(world: World) -> World:
    world.settings = world.settings.model_copy(
        update={"pool_size": 3, "pool_max": 6, "max_sandboxes": 100, "warm_libraries": False}
    )
    world.node = Node(world)
    await world.node.fill_pool()
    return world


async def test_a_claim_makes_no_call_to_the_engine_and_takes_on_what_was_asked_for(pooled):
    before, members = len(pooled.runtime.calls), set(pooled.runtime.held)
    row = await pooled.service.create(
        pooled.principal,
        NewSandbox(labels={"a": "b"}, env={"X": "1"}, timeout_s=77, idle_timeout_s=11),
    )
    assert pooled.runtime.calls[before:] == []
    assert row.id in members
    assert (row.status, row.labels, row.timeout_s) == ("running", {"a": "b"}, 77)
    assert row.created_at == row.started_at
    assert row.expires_at - pooled.clock.now() == pytest.approx(77, abs=1)
    live = await pooled.service.running(pooled.principal.project_id, row.id)
    assert (live.env, live.idle_timeout_s) == ({"X": "1"}, 11)
    assert live.deadline is not None


async def test_nobody_sees_a_member(pooled):
    assert await pooled.rows() == {}
    member = next(iter(pooled.runtime.held))
    assert pooled.node.live.find(pooled.principal.project_id, member) is None


async def test_no_member_is_claimed_twice_whoever_claims_at_once(pooled):
    # Three daemons' worth of claimers on one pool, more of them than there are members.
    nodes = [pooled.node, Node(pooled), Node(pooled)]
    for node in nodes[1:]:
        await node.sweep.run()
    members = set(pooled.runtime.held)

    async def claim(node: Node, number: int) -> str | None:
        size = node.limits.default_size()
        values = {"status": Status.RUNNING, "project_id": pooled.principal.project_id}
        async with pooled.db.write() as session:
            row = await store.claim(session, "node", size, [], values)
        return None if row is None else row.id

    claims = [claim(nodes[number % 3], number) for number in range(20)]
    got = [name for name in await asyncio.gather(*claims) if name is not None]
    assert sorted(got) == sorted(members)


async def test_two_daemons_on_one_store_hand_out_their_own(pooled):
    other = Node(pooled, "other")
    await other.fill_pool()
    creates = [
        node.service.create(pooled.principal, NewSandbox()) for _ in range(3) for node in (pooled.node, other)
    ]
    rows = await asyncio.gather(*creates)
    assert len({row.id for row in rows}) == 6
    assert sorted(row.node_id for row in rows) == ["node"] * 3 + ["other"] * 3
    assert len({row.slot for row in rows}) == 6


async def test_another_size_is_a_miss_and_its_demand_is_learned(pooled):
    row = await pooled.service.create(pooled.principal, NewSandbox(memory_size_mb=300))
    assert row.pooled_at is None
    await pooled.node.fill_pool()
    again = await pooled.service.create(pooled.principal, NewSandbox(memory_size_mb=300))
    assert again.pooled_at is not None


async def test_targets_follow_demand_stay_in_the_bound_and_leave_room_for_each_size(pooled):
    pool = pooled.node.pool
    default = pooled.node.limits.default_size()
    other = pooled.node.limits.size(NewSandbox(memory_size_mb=300))
    assert pool.targets() == {default: 3}
    for _ in range(50):
        pool.asked(default, None)
    pool.asked(other, None)
    assert pool.targets() == {default: 5, other: 1}


async def test_many_odd_sizes_do_not_push_out_what_the_operator_wants(pooled):
    pool = pooled.node.pool
    default = pooled.node.limits.default_size()
    for times in (1, 9):
        for memory_size_mb in range(100, 150):
            for _ in range(times):
                pool.asked(pooled.node.limits.size(NewSandbox(memory_size_mb=memory_size_mb)), None)
        assert pool.targets()[default] == 3
        assert sum(pool.targets().values()) == 6
    often = pooled.node.limits.size(NewSandbox(memory_size_mb=300))
    for _ in range(20):
        pool.asked(often, None)
    assert pool.targets()[often] >= 1


async def test_creates_that_fail_or_are_refused_make_no_demand(pooled):
    size = NewSandbox(memory_size_mb=300)
    pooled.runtime.fail_at = "create"
    with pytest.raises(EngineUnavailableError):
        await pooled.service.create(pooled.principal, size)
    pooled.runtime.fail_at = ""
    with pytest.raises(QuotaError):
        await pooled.service.create(pooled.quota(sandboxes=0), size)
    assert pooled.node.pool.targets() == {pooled.node.limits.default_size(): 3}


def test_demand_is_the_busiest_window_and_is_forgotten():
    demand = Demand()
    for at in (0, 1, 2, 100, 105, 109, 111, 300):
        demand.note(at)
    assert demand.peak(300) == 3
    assert demand.peak(300 + MEMORY_S - 1) == 1
    assert demand.peak(301 + MEMORY_S) == 0


async def test_a_burst_beyond_the_pool_is_served_all_the_same(pooled):
    rows = await asyncio.gather(*(pooled.service.create(pooled.principal, NewSandbox()) for _ in range(10)))
    assert len({row.id for row in rows}) == 10
    assert sum(row.pooled_at is not None for row in rows) == 3


async def test_a_member_that_does_not_answer_is_replaced(pooled):
    pool = pooled.node.pool
    dead = next(iter(pooled.runtime.held))
    pooled.runtime.fail_at = f"agent {dead}"
    for _ in range(2):
        pool._checked_s = 0
        await pool._check()
    assert dead not in pooled.runtime.held
    await pooled.node.fill_pool()
    assert len(pooled.runtime.held) == 3


async def test_a_member_that_has_ended_is_not_handed_out(pooled):
    dead = next(iter(pooled.runtime.held))
    pooled.node.live.remove(dead)  # its end has begun, and its row is not written yet
    rows = [await pooled.service.create(pooled.principal, NewSandbox()) for _ in range(3)]
    assert dead not in {row.id for row in rows}


async def test_members_of_an_image_that_was_built_anew_are_replaced(pooled):
    old = set(pooled.runtime.held)
    pooled.runtime.digest = "sha256:2"
    pooled.node.pool._checked_s = 0
    await pooled.node.fill_pool()
    assert len(pooled.runtime.held) == 3
    assert not old & set(pooled.runtime.held)
    row = await pooled.service.create(pooled.principal, NewSandbox())
    assert row.image_digest == "sha256:2"


async def test_a_new_process_takes_the_pool_up(pooled):
    later = Node(pooled)
    await later.sweep.run()
    row = await later.service.create(pooled.principal, NewSandbox())
    assert row.pooled_at is not None


async def test_members_left_half_made_are_removed_without_a_trace(pooled):
    pooled.runtime.held.clear()
    later = Node(pooled)
    await later.sweep.run()
    async with pooled.db.read() as session:
        assert await store.list_alive(session, "node") == []
    assert await pooled.rows() == {}


async def test_the_pool_makes_way_on_a_full_host(pooled):
    pooled.node.admission.shortage = lambda: ("memory", "too little")
    await pooled.node.fill_pool()
    assert pooled.runtime.held == {}


async def test_an_image_that_cannot_start_does_not_keep_the_others_from_it(pooled):
    # A refill that fails is not tried again at once.
    pooled.runtime.fail_at = "create"
    await pooled.service.create(pooled.principal, NewSandbox())
    await pooled.node.fill_pool()
    assert pooled.runtime.calls.count("create") == 4
    assert list(pooled.runtime.held.values()) == [Phase.RUNNING] * 3


async def test_places_of_members_are_not_the_clients(pooled):
    node = Node(pooled, max_sandboxes=3)
    await node.sweep.run()
    rows = [await node.service.create(pooled.principal, NewSandbox(memory_size_mb=100)) for _ in range(3)]
    assert len(rows) == 3


async def test_a_repeated_claim_is_the_same_sandbox(pooled):
    again = Repeatable("k", "d")
    rows = await asyncio.gather(
        *(pooled.service.create(pooled.principal, NewSandbox(), again) for _ in range(20))
    )
    assert len({row.id for row in rows}) == 1
    await pooled.node.fill_pool()
    assert len(pooled.runtime.held) == 4


async def test_metrics_tell_hits_misses_and_age(pooled):
    for memory_size_mb in (512, 512, 300):
        await pooled.service.create(pooled.principal, NewSandbox(memory_size_mb=memory_size_mb))
    text = pooled.node.metrics.render().decode()
    assert 'sandboxd_pool_claims_total{result="hit"} 2.0' in text
    assert 'sandboxd_pool_claims_total{result="miss"} 1.0' in text
    assert "sandboxd_pool_age_seconds_count 2.0" in text
    assert "sandboxd_pool_refill_duration_seconds_count 3.0" in text


async def test_members_stay_in_the_background_until_they_are_claimed(pooled):
    assert set(pooled.runtime.background.values()) == {True}
    row = await pooled.service.create(pooled.principal, NewSandbox())
    assert pooled.runtime.background[row.id] is False
    cold = await pooled.service.create(pooled.principal, NewSandbox(memory_size_mb=100))
    assert pooled.runtime.background[cold.id] is False


async def test_one_that_was_claimed_as_the_daemon_died_comes_to_the_front(pooled):
    row = await pooled.service.create(pooled.principal, NewSandbox())
    pooled.runtime.background[row.id] = True
    await Node(pooled).sweep.run()
    assert pooled.runtime.background[row.id] is False


async def test_claims_are_held_to_the_places_of_the_server(pooled):
    node = pooled.node = Node(pooled, max_sandboxes=4)
    await node.sweep.run()
    made = await asyncio.gather(
        *(node.service.create(pooled.principal, NewSandbox()) for _ in range(4)), return_exceptions=True
    )
    assert [row for row in made if isinstance(row, BaseException)] == []
    assert sum(row.pooled_at is not None for row in made) == 3
    await node.fill_pool()
    with pytest.raises(NoFreeSlotError):
        await node.service.create(pooled.principal, NewSandbox())
    await node.service.stop(pooled.principal, made[0].id)
    assert (await node.service.create(pooled.principal, NewSandbox())).pooled_at is not None
