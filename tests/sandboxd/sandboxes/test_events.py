"""Events: one for each step and in its order, listed and followed, for their own project only."""

import asyncio

import pytest

from sandboxd.kit.errors import BadRequestError, UnavailableError
from sandboxd.kit.paging import PageParams
from sandboxd.runtimes.errors import EngineUnavailableError
from sandboxd.sandboxes.errors import FollowersError
from sandboxd.sandboxes.limits import NewSandbox
from tests.sandboxd.sandboxes.world import Node, World

ALL = PageParams(limit=100, order="asc")


async def types(world: World, **filters) -> list[str]:
    rows, _ = await world.node.events.list(world.principal.project_id, ALL, **filters)
    return [row.type for row in rows]


async def live_a_life(world: World) -> str:
    row = await world.service.create(world.principal, NewSandbox())
    await world.service.pause(world.principal, row.id)
    await world.service.resume(world.principal, row.id)
    await world.service.update(world.principal, row.id, {"labels": {"a": "b"}, "timeout_s": 5})
    await world.service.stop(world.principal, row.id)
    return row.id


async def test_a_life_is_told_step_by_step(world):
    sandbox_id = await live_a_life(world)
    told = ["created", "running", "paused", "resumed", "updated", "stopped"]
    assert await types(world) == [f"sandbox.{step}" for step in told]
    assert await types(world, sandbox_id=sandbox_id, type="sandbox.paused") == ["sandbox.paused"]
    rows, _ = await world.node.events.list(world.principal.project_id, ALL)
    assert [row.data for row in rows[:4]] == [{}, {}, {}, {}]
    assert rows[4].data == {"fields": ["labels", "timeout_s"]}
    assert rows[5].data == {"reason": "user"}


async def test_a_claim_tells_the_same_and_the_pool_tells_nothing(world):
    node = world.node = Node(world, pool_size=1, pool_max=1)
    await node.fill_pool()
    assert await types(world) == []
    await node.service.create(world.principal, NewSandbox())
    assert await types(world) == ["sandbox.created", "sandbox.running"]


async def test_a_create_that_fails_is_told(world):
    world.runtime.fail_at = "create"
    with pytest.raises(EngineUnavailableError):
        await world.service.create(world.principal, NewSandbox())
    assert await types(world) == ["sandbox.created", "sandbox.failed"]


async def test_pages_go_both_ways(world):
    await live_a_life(world)
    rows, more = await world.node.events.list(world.principal.project_id, PageParams(limit=4))
    assert rows[0].type == "sandbox.stopped"
    rest, more_again = await world.node.events.list(
        world.principal.project_id, PageParams(limit=4, after=rows[-1].id)
    )
    assert (more, more_again, [row.type for row in rest]) == (
        True,
        False,
        ["sandbox.running", "sandbox.created"],
    )
    assert (await world.node.events.list("proj_other", ALL))[0] == []
    with pytest.raises(BadRequestError, match="'after' names no event"):
        await world.node.events.list("proj_other", PageParams(after=rows[0].id))


async def test_a_follower_misses_nothing_and_gets_nothing_twice(world):
    await world.service.create(world.principal, NewSandbox())
    rows, _ = await world.node.events.list(world.principal.project_id, ALL)
    seen, all_seen = [], asyncio.Event()

    async def follow() -> None:
        async for row in await world.node.events.follow(world.principal.project_id, rows[0].id):
            seen.append(row.type)
            if len(seen) == 7:
                all_seen.set()

    following = asyncio.ensure_future(follow())
    await live_a_life(world)
    async with asyncio.timeout(10):
        await all_seen.wait()
    assert seen == (await types(world))[1:]
    world.node.closing = True
    world.node.events.wake()
    with pytest.raises(UnavailableError, match="follow again"):
        await following


async def test_a_follower_hears_of_what_another_daemon_wrote(world):
    other = Node(world, "other")
    following = await other.events.follow(world.principal.project_id, None)
    waiting = asyncio.ensure_future(anext(following))
    await asyncio.sleep(0.05)
    await world.service.create(world.principal, NewSandbox())
    await other.events.poll()
    async with asyncio.timeout(5):
        assert (await waiting).type == "sandbox.created"
    await following.aclose()


async def test_one_project_cannot_take_all_places_of_followers(world, monkeypatch):
    monkeypatch.setattr("sandboxd.sandboxes.events.MAX_FOLLOWERS", 4)
    monkeypatch.setattr("sandboxd.sandboxes.events.MAX_PROJECT_FOLLOWERS", 3)
    events, project, other = world.node.events, world.principal.project_id, "proj_other"

    async def follow(project_id: str) -> asyncio.Task:
        waiting = asyncio.ensure_future(anext(await events.follow(project_id, None)))
        await asyncio.sleep(0)
        return waiting

    mine = [await follow(project) for _ in range(3)]
    with pytest.raises(FollowersError, match="3 clients of the project"):
        await follow(project)
    theirs = await follow(other)
    with pytest.raises(FollowersError, match="4 clients follow"):
        await follow(other)
    # Whoever leaves gives the place back.
    for waiting in (*mine, theirs):
        waiting.cancel()
    await asyncio.gather(*mine, theirs, return_exceptions=True)
    assert not events._followers
