"""The life cycle when the runtime fails at each of its steps: nothing stays behind, and the row says why."""

import asyncio

import pytest

from sandboxd.identity.errors import IdempotencyConflictError
from sandboxd.kit.clock import SystemClock
from sandboxd.kit.db import StoreUnavailableError
from sandboxd.kit.errors import UnavailableError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams
from sandboxd.runtimes.base import Handle, Phase
from sandboxd.runtimes.errors import (
    AgentUnreachableError,
    EngineUnavailableError,
    LimitBelowUseError,
    RuntimeFaultError,
)
from sandboxd.sandboxes.errors import LimitError, NoFreeSlotError, QuotaError, SandboxNotRunningError
from sandboxd.sandboxes.jobs import Reaper
from sandboxd.sandboxes.limits import NewSandbox
from sandboxd.sandboxes.service import Repeatable
from sandboxd.sandboxes.states import Reason, Status
from tests.sandboxd.sandboxes.world import Node, World


async def create(world: World, **wanted):
    return await world.service.create(world.principal, NewSandbox(**wanted))


async def test_a_create_that_fails_leaves_only_its_row(world):
    world.runtime.fail_at = "create"
    with pytest.raises(EngineUnavailableError, match="broken at create"):
        await create(world)
    assert await world.rows() == {"failed": "runtime_error"}
    assert world.runtime.held == {}
    assert len(world.node.live) == 0


async def test_what_cannot_be_deleted_now_is_deleted_by_the_sweep(world):
    row = await create(world)
    world.runtime.fail_at = "delete"
    with pytest.raises(EngineUnavailableError):
        await world.service.stop(world.principal, row.id)
    assert await world.rows() == {"stopping": "user"}
    world.runtime.fail_at = ""
    await world.node.sweep.run()
    assert await world.rows() == {"stopped": "user"}
    assert world.runtime.held == {}


async def test_the_sweep_takes_up_what_an_earlier_process_left(world):
    row = await create(world, timeout_s=100, idle_timeout_s=50)
    later = Node(world)
    await later.sweep.run()
    taken = later.live.get(row.id)
    assert taken is not None
    assert taken.deadline == world.node.live.get(row.id).deadline
    assert taken.idle_timeout_s == 50


async def test_the_sweep_of_one_node_leaves_the_others_alone(world):
    await create(world)
    other = Node(world, "other")
    world.runtime.held.clear()
    await other.sweep.run()
    assert await world.rows() == {"running": None}


async def test_the_sweep_ends_what_cannot_be_taken_up(world):
    await create(world)
    world.runtime.fail_at, world.runtime.fault = "adopt", RuntimeFaultError
    await Node(world).sweep.run()
    assert await world.rows() == {"failed": "lost"}
    assert world.runtime.held == {}


async def test_one_that_cannot_be_mended_does_not_keep_the_others_from_it(world):
    first, second = await create(world), await create(world)
    later = Node(world)
    real = world.runtime.adopt

    async def adopt(sandbox_id: str, handle: Handle) -> None:
        if sandbox_id == first.id:
            raise OSError("what nobody thought of")
        await real(sandbox_id, handle)

    world.runtime.adopt = adopt
    await later.sweep.run()
    assert later.live.get(second.id) is not None


async def test_a_create_whose_clean_up_failed_keeps_its_place(world):
    world.runtime.fail_at = "create"
    delete = world.runtime.delete

    async def refuse(_sandbox_id: str) -> None:
        raise EngineUnavailableError("gone for now")

    world.runtime.delete = refuse
    with pytest.raises(EngineUnavailableError, match="broken at create"):
        await create(world)
    assert await world.rows() == {"stopping": "runtime_error"}
    world.runtime.delete, world.runtime.fail_at = delete, ""
    assert (await create(world)).slot == 1
    await world.node.sweep.run()
    assert (await world.rows())["failed"] == "runtime_error"


async def test_the_sweep_removes_what_has_no_row_and_spares_what_is_being_made(world):
    world.runtime.held["sbx_nobodys"] = Phase.EXITED
    world.runtime.gate.clear()
    making = asyncio.ensure_future(create(world))
    await world.runtime.making.wait()
    await world.node.sweep.run()
    assert "sbx_nobodys" not in world.runtime.held
    world.runtime.gate.set()
    assert (await making).status == Status.RUNNING


@pytest.mark.parametrize(("engine", "reason"), [("engine 1", "lost"), ("engine 2", "runtime_restart")])
async def test_a_live_one_whose_container_is_gone_is_ended(world, engine, reason):
    await create(world)
    world.runtime.held.clear()
    world.runtime.engine = engine
    await world.node.sweep.run()
    assert await world.rows() == {"failed": reason}
    assert len(world.node.live) == 0


async def test_one_that_lived_through_a_restart_of_the_engine_may_still_be_lost_later(world):
    row = await create(world)
    world.runtime.engine = "engine 2"
    await world.node.sweep.run()
    assert (await world.service.get(world.principal.project_id, row.id)).status == Status.RUNNING
    world.runtime.held.clear()
    await world.node.sweep.run()
    assert await world.rows() == {"failed": "lost"}


async def test_ending_one_that_is_being_made_wins(world):
    world.runtime.gate.clear()
    making = asyncio.ensure_future(create(world))
    await world.runtime.making.wait()
    (sandbox_id,) = world.runtime.held
    ending = asyncio.ensure_future(world.service.stop(world.principal, sandbox_id))
    while "stopping" not in await world.rows():
        continue
    world.runtime.gate.set()
    assert (await ending).status == Status.STOPPED
    with pytest.raises(SandboxNotRunningError):
        await making
    assert world.runtime.held == {}


async def test_places_are_limited_and_given_back(world):
    rows = [await create(world) for _ in range(3)]
    assert sorted(row.slot for row in rows) == [0, 1, 2]
    with pytest.raises(NoFreeSlotError, match="All 3 places"):
        await create(world)
    await world.node.lifecycle.end(rows[1].id, Reason.USER)
    assert (await create(world)).slot == 1


async def test_the_reaper_goes_by_the_hosts_clock(world):
    row, other = await create(world, timeout_s=100), await create(world, timeout_s=100)
    world.node.live.get(row.id).deadline = world.clock.monotonic() - 1

    class Jumped(SystemClock):
        def now(self) -> float:
            return super().now() + 10**6

    await Reaper(world.node.lifecycle, Jumped(), Metrics()).tick()
    assert world.node.live.get(row.id) is None
    assert world.node.live.get(other.id) is not None
    assert (await world.service.get(world.principal.project_id, row.id)).termination_reason == "timeout"


async def test_only_use_keeps_a_sandbox_from_its_idle_timeout(world, clock):
    world.clock = clock
    world.node = Node(world)
    used, idle, busy, none = [
        await Node.create_for(world, idle_timeout_s=limit) for limit in (10, 10, 10, None)
    ]
    world.node.live.get(busy.id).execs = 1
    reaper = Reaper(world.node.lifecycle, clock, Metrics())
    for _ in range(4):
        await reaper.tick()
        clock.advance(4)
        await world.service.running(world.principal.project_id, used.id)
        await world.service.get(world.principal.project_id, idle.id)  # a look is no use
    await reaper.tick()
    assert {live.id for live in world.node.live} == {used.id, busy.id, none.id}
    ended = await world.service.get(world.principal.project_id, idle.id)
    assert (ended.status, ended.termination_reason) == ("stopped", "idle_timeout")


async def test_a_paused_sandbox_keeps_what_was_left_of_its_time(world, clock):
    world.clock = clock
    world.node = Node(world)
    row = await Node.create_for(world, timeout_s=100, idle_timeout_s=20)
    reaper = Reaper(world.node.lifecycle, clock, Metrics())
    clock.advance(10)
    paused = await world.service.pause(world.principal, row.id)
    assert (paused.status, paused.remaining_s, paused.expires_at) == ("paused", 90, None)
    assert (await world.service.pause(world.principal, row.id)).status == "paused"
    with pytest.raises(SandboxNotRunningError):
        await world.service.running(world.principal.project_id, row.id)
    clock.advance(10_000)
    await reaper.tick()
    resumed = await world.service.resume(world.principal, row.id)
    assert (resumed.status, resumed.expires_at) == ("running", clock.now() + 90)
    assert world.runtime.held[row.id] is Phase.RUNNING
    clock.advance(91)
    await reaper.tick()
    assert await world.rows() == {"stopped": "timeout"}


async def test_a_pause_that_fails_leaves_it_running(world):
    row = await create(world, timeout_s=100)
    world.runtime.fail_at = "pause"
    with pytest.raises(EngineUnavailableError):
        await world.service.pause(world.principal, row.id)
    assert await world.rows() == {"running": None}
    live = await world.service.running(world.principal.project_id, row.id)
    assert live.deadline is not None


async def test_a_new_process_finishes_a_pause_and_keeps_its_time(world):
    row = await create(world, timeout_s=100)
    await world.service.pause(world.principal, row.id)
    world.runtime.held[row.id] = Phase.RUNNING  # it died before the freeze
    later = Node(world)
    await later.sweep.run()
    assert world.runtime.held[row.id] is Phase.PAUSED
    resumed = await later.service.resume(world.principal, row.id)
    assert resumed.expires_at - world.clock.now() == pytest.approx(100, abs=1)


async def test_a_paused_sandbox_can_be_stopped(world):
    row = await create(world)
    await world.service.pause(world.principal, row.id)
    assert (await world.service.stop(world.principal, row.id)).status == Status.STOPPED


@pytest.mark.parametrize("verb", ["pause", "resume", "update"])
async def test_a_change_that_a_stop_comes_between_is_refused_as_one_of_a_stopped_sandbox(
    world, monkeypatch, verb
):
    row = await create(world)
    if verb == "resume":
        await world.service.pause(world.principal, row.id)

    async def stopped_meanwhile(sandbox_id, *_):
        await world.service.stop(world.principal, sandbox_id)
        raise AgentUnreachableError(f"sandbox {sandbox_id} is not served by this daemon")

    monkeypatch.setattr(world.runtime, verb, stopped_meanwhile)
    change = [{"memory_size_mb": row.memory_size_mb * 2}] if verb == "update" else []
    with pytest.raises(SandboxNotRunningError, match="user"):
        await getattr(world.service, verb)(world.principal, row.id, *change)
    assert (await world.service.get(world.principal.project_id, row.id)).status == Status.STOPPED


async def test_patch_changes_what_is_named_and_only_that(world):
    row = await create(world, timeout_s=100, labels={"a": "1"})
    changed = await world.service.update(
        world.principal, row.id, {"timeout_s": 500, "memory_size_mb": 200, "idle_timeout_s": 9}
    )
    assert changed.expires_at - world.clock.now() == pytest.approx(500, abs=1)
    assert (changed.memory_size_mb, changed.cpu_mhz, changed.labels) == (200, row.cpu_mhz, {"a": "1"})
    assert world.runtime.limits[row.id] == (1.0, 200)
    assert world.node.live.get(row.id).idle_timeout_s == 9
    off = await world.service.update(world.principal, row.id, {"idle_timeout_s": None, "labels": {}})
    assert (off.idle_timeout_s, off.labels) == (None, {})
    assert (await world.service.update(world.principal, row.id, {})).id == row.id


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"memory_size_mb": 99}, LimitBelowUseError),
        ({"memory_size_mb": 10**9}, LimitError),
        ({"timeout_s": None}, LimitError),
        ({"idle_timeout_s": 10**9}, LimitError),
        ({"cpu_mhz": 1}, LimitError),
    ],
)
async def test_a_patch_is_done_as_a_whole_or_not_at_all(world, changes, error):
    row = await create(world)
    with pytest.raises(error):
        await world.service.update(world.principal, row.id, {"labels": {"x": "y"}, **changes})
    assert (await world.service.get(world.principal.project_id, row.id)).labels == {}


async def test_a_key_makes_one_sandbox_however_often_and_fast_it_is_sent(world):
    again = Repeatable("k", "digest")
    rows = await asyncio.gather(
        *(world.service.create(world.principal, NewSandbox(), again) for _ in range(50))
    )
    assert len({row.id for row in rows}) == 1
    assert {row.status for row in rows} == {"running"}
    assert len(world.runtime.held) == 1
    with pytest.raises(IdempotencyConflictError):
        await world.service.create(world.principal, NewSandbox(), Repeatable("k", "other"))


async def test_a_key_whose_create_failed_may_be_used_again(world):
    again = Repeatable("k", "digest")
    world.runtime.fail_at = "create"
    with pytest.raises(EngineUnavailableError):
        await world.service.create(world.principal, NewSandbox(), again)
    world.runtime.fail_at = ""
    assert (await world.service.create(world.principal, NewSandbox(), again)).status == "running"


async def test_a_projects_quota_holds_whoever_asks_at_once(world):
    world.settings = world.settings.model_copy(update={"max_sandboxes": 100})
    world.node = Node(world)
    principal = world.quota(sandboxes=5)
    results = await asyncio.gather(
        *(world.service.create(principal, NewSandbox()) for _ in range(12)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, QuotaError)]
    assert (len(refused), len(world.runtime.held)) == (7, 5)
    assert refused[0].headers["Retry-After"]
    assert refused[0].headers["x-ratelimit-limit-sandboxes"] == "5"


async def test_quotas_count_cpu_and_memory_and_growth(world):
    principal = world.quota(memory_size_mb=1024, cpu_mhz=5000)
    row = await world.service.create(principal, NewSandbox(memory_size_mb=600))
    with pytest.raises(QuotaError, match="memory_size_mb is 1024; it has 600 and this asks for 512"):
        await world.service.create(principal, NewSandbox())
    with pytest.raises(QuotaError, match="cpu_mhz"):
        await world.service.update(principal, row.id, {"cpu_mhz": 6000})
    assert (await world.service.update(principal, row.id, {"memory_size_mb": 1024})).memory_size_mb == 1024


async def test_two_that_grow_at_once_do_not_share_the_same_room(world):
    principal = world.quota(memory_size_mb=1000)
    rows = [await world.service.create(principal, NewSandbox(memory_size_mb=300)) for _ in range(3)]
    results = await asyncio.gather(
        *(world.service.update(principal, row.id, {"memory_size_mb": 400}) for row in rows),
        return_exceptions=True,
    )
    assert [type(result) for result in results if isinstance(result, BaseException)] == [QuotaError] * 2
    # What was refused is as small as before in the engine, too.
    assert sorted(memory_mb for _, memory_mb in world.runtime.limits.values()) in (
        [400],
        [300, 400],
        [300, 300, 400],
    )


async def test_a_stop_at_another_node_does_not_say_stopped_of_what_runs_on(world):
    # A client may say that its request was handed on already, and so reach a node that holds nothing of it.
    row = await create(world)
    with pytest.raises(UnavailableError, match="held by another node"):
        await Node(world, "other").service.stop(world.principal, row.id)
    assert (await world.service.get(world.principal.project_id, row.id)).status == "running"
    assert list(world.runtime.held) == [row.id]


async def test_lists_filter_by_labels_and_keep_the_order_of_creation(world):
    rows = [await create(world, labels={"n": str(n), "a/b.c": "x y"}) for n in range(3)]
    project = world.principal.project_id
    found, _ = await world.service.list(project, None, PageParams(), {"n": "1", "a/b.c": "x y"})
    assert [row.id for row in found] == [rows[1].id]
    assert (await world.service.list(project, None, PageParams(), {"n": "9"}))[0] == []
    page, more = await world.service.list(project, None, PageParams(limit=2))
    assert ([row.id for row in page], more) == ([rows[2].id, rows[1].id], True)
    rest, more = await world.service.list(project, None, PageParams(limit=2, after=page[-1].id))
    assert ([row.id for row in rest], more) == ([rows[0].id], False)


async def test_a_stop_goes_through_although_the_store_cannot_be_written(world, monkeypatch):
    row = await create(world)
    write = world.db.write

    def refuse():
        raise StoreUnavailableError("the disk is full")

    monkeypatch.setattr(world.db, "write", refuse)
    stopped = await world.service.stop(world.principal, row.id)
    assert (stopped.status, stopped.termination_reason) == ("stopped", "user")
    assert world.runtime.held == {}
    assert (await world.service.get(world.principal.project_id, row.id)).status == "stopped"
    monkeypatch.setattr(world.db, "write", write)
    await world.node.lifecycle.flush_activity()
    later = Node(world)
    assert (await later.service.get(world.principal.project_id, row.id)).status == "stopped"


async def test_creates_at_once_take_no_more_places_than_there_are(world):
    made = await asyncio.gather(*(create(world) for _ in range(12)), return_exceptions=True)
    assert sum(isinstance(row, NoFreeSlotError) for row in made) == 9
    assert len(world.node.live) == 3


async def test_a_repeated_create_needs_no_room(world):
    again = Repeatable("key", "digest")
    row = await world.service.create(world.principal, NewSandbox(), again)
    world.node.admission.shortage = lambda: ("memory", "too little")
    world.runtime.fail_at = "ensure_image"
    assert (await world.service.create(world.principal, NewSandbox(), again)).id == row.id


async def test_a_create_sent_twice_at_once_makes_one_within_a_quota_of_one(world):
    principal, again = world.quota(sandboxes=1), Repeatable("key", "digest")
    made = await asyncio.gather(
        *(world.service.create(principal, NewSandbox(), again) for _ in range(4)), return_exceptions=True
    )
    assert {row.id for row in made} == set(world.runtime.held)
    assert {row.status for row in made} == {"running"}


async def test_a_pause_that_fails_and_cannot_be_taken_back_is_made_by_the_sweep(world, monkeypatch):
    row = await create(world)
    world.runtime.fail_at = "pause"
    write = world.service._write

    async def once(principal, row, expected, values, verb, fields):
        if verb == "resume":
            raise StoreUnavailableError("the store is away")
        return await write(principal, row, expected, values, verb, fields)

    monkeypatch.setattr(world.service, "_write", once)
    with pytest.raises(StoreUnavailableError):
        await world.service.pause(world.principal, row.id)
    world.runtime.fail_at = ""
    await world.node.sweep.run()
    assert await world.rows() == {"paused": None}
    assert world.runtime.held[row.id] is Phase.PAUSED
