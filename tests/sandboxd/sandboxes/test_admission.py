"""Admission: a start waits for room and is refused with the reason; metrics tell."""

import asyncio

import psutil
import pytest

from sandboxd.kit.metrics import Metrics
from sandboxd.sandboxes.admission import MAX_WAITING, Admission
from sandboxd.sandboxes.errors import HostFullError
from sandboxd.sandboxes.limits import NewSandbox
from tests.sandboxd.sandboxes.world import Node

HUGE = 2**40


def admission(world, starting: int = 0, **settings) -> tuple[Admission, Metrics]:
    metrics = Metrics()
    changed = world.settings.model_copy(update={"admission_wait_s": 0, **settings})
    return Admission(changed, metrics, starting=lambda: starting), metrics


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("setting", "resource"),
    [
        ("min_free_memory_mb", "memory"),
        ("min_free_disk_mb", "disk"),
        ("min_free_processes", "processes"),
        ("min_free_inotify", "inotify"),
    ],
)
async def test_each_resource_is_guarded(world, setting, resource):
    guard, metrics = admission(world, **{setting: HUGE})
    with pytest.raises(HostFullError, match=f"no room for another sandbox: .*under {HUGE}") as raised:
        await guard.wait()
    assert raised.value.status == 503
    assert raised.value.headers["Retry-After"]
    assert f'sandboxd_admission_refusals_total{{resource="{resource}"}} 1.0' in metrics.render().decode()
    fine, _ = admission(world)
    await fine.wait()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_is_on_its_way_counts_already(world):
    available_mb = psutil.virtual_memory().available // 2**20
    guard, _ = admission(world, min_free_memory_mb=available_mb // 2)
    assert guard.shortage() is None
    guard, _ = admission(world, starting=available_mb, min_free_memory_mb=available_mb // 2)
    assert guard.shortage()[0] == "memory"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_create_waits_for_room_and_a_claim_needs_none(world):
    world.settings = world.settings.model_copy(update={"pool_size": 1, "pool_max": 1, "admission_wait_s": 30})
    node = world.node = Node(world)
    await node.fill_pool()
    shortage = ("memory", "too little")
    node.admission.shortage = lambda: shortage
    assert (await node.service.create(world.principal, NewSandbox())).pooled_at is not None
    waiting = asyncio.ensure_future(node.service.create(world.principal, NewSandbox()))
    waits = 'admission_waits_total{resource="memory"} 1.0'
    while waits not in node.metrics.render().decode():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    assert len(world.runtime.held) == 1
    shortage = None
    assert (await waiting).status == "running"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_create_refused_for_want_of_room_leaves_nothing(world):
    node = Node(world, min_free_memory_mb=HUGE, admission_wait_s=0)
    with pytest.raises(HostFullError):
        await node.service.create(world.principal, NewSandbox())
    assert await world.rows() == {}
    assert world.runtime.held == {}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_flood_on_a_full_host_does_not_wait(world):
    guard, _ = admission(world, admission_wait_s=600, min_free_memory_mb=HUGE)
    waits = [asyncio.ensure_future(guard.wait()) for _ in range(MAX_WAITING + 20)]
    done, waiting = await asyncio.wait(waits, timeout=0.1)
    assert (len(done), len(waiting)) == (20, MAX_WAITING)
    assert {type(wait.exception()) for wait in done} == {HostFullError}
    for wait in waiting:
        wait.cancel()
    await asyncio.wait(waiting)
    assert guard._waiting == 0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_inotify_instances_of_root_are_counted(world):
    guard, _ = admission(world)
    await guard.count_inotify()
    assert 0 <= guard._inotify_used < 10_000
