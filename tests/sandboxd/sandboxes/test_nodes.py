"""Nodes: who is there, who is silent, and what becomes of the sandboxes of one that does not come back."""

from sandboxd.kit.paging import PageParams
from sandboxd.sandboxes import store
from sandboxd.sandboxes.limits import NewSandbox
from sandboxd.sandboxes.nodes import BEAT_INTERVAL_S, LOST_S, SETTLED_S, SILENT_S, Nodes
from tests.sandboxd.sandboxes.world import Node, World


def nodes(world: World, name: str, url: str = "") -> Nodes:
    return Nodes(world.db, world.clock, world.node.events, name, url)


async def beat_on(clock, *beating: Nodes) -> None:
    """They show that they live, until each may judge of others."""
    for node in beating:
        await node.beat()
    for _ in range(int(SETTLED_S / BEAT_INTERVAL_S)):
        clock.advance(BEAT_INTERVAL_S)
        for node in beating:
            await node.beat()


async def test_nodes_find_one_another_and_notice_silence(world, clock):
    world.clock = clock
    here, there = nodes(world, "node", "http://here:1"), nodes(world, "other", "http://there:2")
    await here.beat()
    assert here.alone
    await there.beat()
    await here.beat()
    assert not here.alone
    assert here.address_of("other") == "http://there:2"
    assert here.address_of("nobody") is None
    clock.advance(SILENT_S + 1)
    await here.beat()
    assert here.address_of("other") is None
    await there.beat()
    await here.beat()
    assert here.address_of("other") == "http://there:2"


async def test_only_another_nodes_living_sandboxes_of_the_own_project_have_a_holder(world):
    other = Node(world, "other")
    mine = await world.service.create(world.principal, NewSandbox())
    theirs = await other.service.create(world.principal, NewSandbox())
    here, project = nodes(world, "node"), world.principal.project_id
    assert await here.holder(project, theirs.id) == "other"
    assert await here.holder(project, mine.id) is None
    assert await here.holder("proj_other", theirs.id) is None
    await other.service.stop(world.principal, theirs.id)
    assert await here.holder(project, theirs.id) is None


async def test_a_node_that_does_not_come_back_is_given_up_and_cleans_up_if_it_does(world, clock):
    world.clock = clock
    world.node = Node(world)
    other = Node(world, "other", pool_size=1, pool_max=1)
    await other.fill_pool()
    lost = await other.service.create(world.principal, NewSandbox(memory_size_mb=100))
    kept = await world.service.create(world.principal, NewSandbox())
    here, there = nodes(world, "node"), nodes(world, "other")
    await there.beat()
    clock.advance(LOST_S - 1 - SETTLED_S)
    await beat_on(clock, here)
    await here.give_up_lost()
    assert await world.rows() == {"running": None}
    clock.advance(2)
    await here.give_up_lost()
    rows = {
        row.id: row for row in (await world.service.list(world.principal.project_id, None, PageParams()))[0]
    }
    assert (rows[lost.id].status, rows[lost.id].termination_reason) == ("failed", "lost")
    assert rows[kept.id].status == "running"
    told, _ = await world.node.events.list(world.principal.project_id, PageParams(), sandbox_id=lost.id)
    assert (told[0].type, told[0].data) == ("sandbox.failed", {"reason": "lost"})
    async with world.db.read() as session:
        assert await store.list_alive(session, "other") == []
    await here.beat()
    assert here.alone
    # It comes back after all.
    back = Node(world, "other")
    await back.sweep.run()
    assert lost.id not in world.runtime.held


async def test_after_a_long_outage_of_the_store_nobody_is_given_up_in_haste(world, clock):
    world.clock = clock
    world.node, other = Node(world), Node(world, "other")
    await other.service.create(world.principal, NewSandbox())
    here, there = nodes(world, "node"), nodes(world, "other")
    await beat_on(clock, there, here)
    clock.advance(LOST_S + 1)
    # It knows of no beat of the other's for an hour; but it has not been heard itself either.
    await here.give_up_lost()
    await here.beat()
    await here.give_up_lost()
    await beat_on(clock, there, here)
    await here.give_up_lost()
    assert await world.rows() == {"running": None}
