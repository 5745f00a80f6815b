"""Usage: every second, byte and exec is in one hour of one project, once."""

import pytest

from sandboxd.kit.db import StoreUnavailableError
from sandboxd.sandboxes.limits import NewSandbox
from sandboxd.sandboxes.usage import HOUR_S
from tests.sandboxd.sandboxes.world import Node, World


@pytest.fixture
def turned(world: World, clock) -> World:
    clock.time = 1_000 * HOUR_S - 600.0  # ten minutes to a full hour
    world.clock = clock
    world.node = Node(world)
    return world


async def hours(world: World) -> dict[int, tuple[float, float]]:
    rows = await world.node.lifecycle.meter.hours(world.principal.project_id, 0, 10**6)
    return {row.hour: (round(row.sandbox_s, 3), round(row.cpu_s, 3)) for row in rows}


async def test_time_is_cut_at_full_hours(turned, clock):
    row = await turned.service.create(turned.principal, NewSandbox(timeout_s=10_000))
    clock.advance(900)
    turned.runtime.cpu_s[row.id] = 5
    await turned.service.stop(turned.principal, row.id)
    assert await hours(turned) == {999: (600, 0), 1000: (300, 5)}


async def test_metering_in_between_changes_nothing(turned, clock):
    row = await turned.service.create(turned.principal, NewSandbox(timeout_s=10_000))
    for second in range(9):
        clock.advance(100)
        turned.runtime.cpu_s[row.id] = second + 1
        await turned.node.lifecycle.meter.tick()
    await turned.service.stop(turned.principal, row.id)
    # CPU goes to the hour in which it was read, and the sixth reading is at the full hour.
    assert await hours(turned) == {999: (600, 5), 1000: (300, 4)}


async def test_what_a_member_of_the_pool_used_is_nobodys(turned, clock):
    node = turned.node = Node(turned, pool_size=1, pool_max=1)
    await node.fill_pool()
    (member,) = turned.runtime.held
    turned.runtime.cpu_s[member] = 2
    clock.advance(100)
    row = await node.service.create(turned.principal, NewSandbox())
    assert row.id == member
    turned.runtime.cpu_s[member] = 3
    clock.advance(10)
    assert await hours(turned) == {999: (10, 1)}


async def test_bytes_and_execs_are_counted_and_survive_a_store_that_is_away(turned, monkeypatch):
    row = await turned.service.create(turned.principal, NewSandbox())
    live = turned.node.live.get(row.id)
    live.bytes_in, live.bytes_out, live.execs_ended = 10, 20, 3
    write = turned.db.write

    def refuse():
        raise StoreUnavailableError("away")

    monkeypatch.setattr(turned.db, "write", refuse)
    with pytest.raises(StoreUnavailableError):
        await turned.node.lifecycle.meter.tick()
    monkeypatch.setattr(turned.db, "write", write)
    live.bytes_in += 1
    (hour,) = await turned.node.lifecycle.meter.hours(turned.principal.project_id, 0, 10**6)
    assert (hour.bytes_in, hour.bytes_out, hour.execs, hour.sandboxes) == (11, 20, 3, 1)


async def test_the_time_while_no_daemon_ran_is_metered_too(turned, clock):
    row = await turned.service.create(turned.principal, NewSandbox(timeout_s=10_000))
    turned.runtime.cpu_s[row.id] = 1
    await turned.node.lifecycle.meter.tick()
    clock.advance(300)
    turned.runtime.cpu_s[row.id] = 4
    turned.node = Node(turned)
    await turned.node.sweep.run()
    assert await hours(turned) == {999: (300, 4)}


async def test_a_clock_that_jumps_is_not_time(turned, clock):
    await turned.service.create(turned.principal, NewSandbox(timeout_s=10_000))
    monotonic = clock.monotonic()
    clock.monotonic = lambda: monotonic + 50
    clock.advance(86_400)
    assert sum(seconds for seconds, _ in (await hours(turned)).values()) == 50
