"""Execs and those who follow them: who comes back, who does not, and what a dead daemon left."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from sandboxd.agentlink.client import ExecRequest, Known
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError, UnknownExecError
from sandboxd.agentlink.exec_log import Event, Outcome, Output, Started
from sandboxd.identity.errors import IdempotencyConflictError
from sandboxd.kit.clock import SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import BadRequestError, UnavailableError
from sandboxd.kit.ids import new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.errors import AgentUnreachableError
from sandboxd.sandboxes.errors import (
    BusyError,
    ExecNotFoundError,
    ExecOutputGoneError,
    ExecResultGoneError,
    SandboxPausedError,
)
from sandboxd.sandboxes.exec import ExecService
from sandboxd.sandboxes.exec_progress import MAX_FOLLOWERS
from sandboxd.sandboxes.exec_request import NewExec
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.live import Idleness, LiveSandbox, LiveSandboxes, Metered

GRACE_S = 0.1
PROJECT = "proj_1"
EXEC_RUNNING, EXEC_ENDED, EXEC_WRITTEN, EXEC_FORGOTTEN = (new_id("exec") for _ in range(4))


def outcome(reason: str = "exit", exit_code: int | None = 0) -> Outcome:
    return Outcome(reason, exit_code, None, False, None, 1.5, 0.5, 2048)


class Agent:
    """Holds execs in memory; each goes on until the test, or a signal, ends it."""

    def __init__(self) -> None:
        self.execs: dict[str, list[Event]] = {}
        self.changed = asyncio.Condition()
        self.asked = self.starts = self.follows = self.waits = 0
        self.signals: list[str] = []
        self.timers_asked: list[bool] = []
        self.refusal: Exception | None = None
        self.broken = False
        self.held = False
        self.reachable = asyncio.Event()
        self.reachable.set()

    async def start(self, request: ExecRequest) -> AsyncGenerator[tuple[Event, int]]:
        self.asked += 1
        await self.reachable.wait()
        if self.refusal is not None:
            raise self.refusal
        known = request.id in self.execs
        if not known:
            self.starts += 1
            await self.say(request.id, Output(False, b"begun\n"))
        if request.fingerprint is not None:
            finished = isinstance(self.execs[request.id][-1], Outcome)
            yield Started(resumed=known, finished=finished, age_s=2.0 if known else 0.0), 0
        async for item in self.follow(request.id):
            yield item

    async def attach(self, exec_id: str) -> AsyncGenerator[Event]:
        async for event, _ in self.follow(exec_id):
            yield event

    async def wait(self, exec_id: str) -> list[Event]:
        self.waits += 1
        return [event async for event in self.attach(exec_id) if isinstance(event, Outcome)]

    async def follow(self, exec_id: str, offset: int = 0) -> AsyncGenerator[tuple[Event, int]]:
        """Each event takes 100 bytes of the log."""
        self.follows += 1
        if exec_id not in self.execs:
            raise UnknownExecError("unknown")
        at = offset // 100
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda at=at: self.broken or len(self.execs[exec_id]) > at)
            if self.broken:
                raise LinkBrokenError("broken")
            event = self.execs[exec_id][at]
            at += 1
            yield event, at * 100
            if isinstance(event, Outcome):
                return

    async def say(self, exec_id: str, *events: Event) -> None:
        async with self.changed:
            self.execs.setdefault(exec_id, []).extend(events)
            self.changed.notify_all()

    async def end(self, result: Outcome | None = None) -> None:
        for exec_id in self.execs:
            await self.say(exec_id, result or outcome())

    async def break_off(self) -> None:
        async with self.changed:
            self.broken = True
            self.changed.notify_all()

    async def cancel(self, exec_id: str) -> None:
        self.signals.append(exec_id)
        await self.say(exec_id, outcome("killed", None))

    async def read_log(self, exec_id: str) -> list[Event] | None:
        return self.execs.get(exec_id)

    async def timers(self, run: bool) -> None:
        self.timers_asked.append(run)

    async def hello(self) -> Any:
        known = [
            Known(exec_id, "code", keyed=False, finished=isinstance(log[-1], Outcome), age_s=5.0, left_s=60.0)
            for exec_id, log in self.execs.items()
        ]
        return SimpleNamespace(held=self.held, execs=known)


@dataclass
class World:
    agent: Agent
    sandbox: LiveSandbox
    live: LiveSandboxes
    history: History
    make: Callable[[], ExecService]
    draining: list[bool] = field(default_factory=list)

    async def rows(self) -> list[str]:
        rows, _ = await self.history.page(self.sandbox.id, PageParams(order="asc"))
        return [row.status for row in rows]


@pytest.fixture
async def world(settings: Settings, db: Database) -> AsyncIterator[World]:
    agent, live, history, draining = Agent(), LiveSandboxes(), History(db, Metrics()), list[bool]()
    sandbox = LiveSandbox(
        id="sbx_1",
        project_id=PROJECT,
        agent=agent,  # type: ignore[arg-type]  # a fake
        env={},
        cpus=1.0,
        disk_size_mb=64,
        last_active_at=0.0,
        deadline=None,
        idle=Idleness(0.0),
        metered=Metered(0.0),
    )
    live.add(sandbox)
    async with TaskOwner() as tasks:

        def make() -> ExecService:
            """A daemon's service; another one is the daemon after its restart."""
            return ExecService(
                settings=settings,
                clock=SystemClock(),
                metrics=Metrics(),
                tasks=tasks,
                live=live,
                runtime=None,  # type: ignore[arg-type]  # nothing here is overdue
                history=history,
                draining=lambda: bool(draining),
                retry_grace_s=GRACE_S,
            )

        yield World(agent, sandbox, live, history, make, draining)


@pytest.fixture
def execs(world: World) -> ExecService:
    return world.make()


async def begin(execs: ExecService, world: World, key: str | None, stream: bool = True) -> Any:
    """A stream that has told of its first output."""
    events = execs.stream(world.sandbox, NewExec(code="x", stream=stream), key)
    assert told(await anext(events)) == ["exec.started"]
    assert b'"delta":"begun\\n"' in (await anext(events))[1]
    return events


def told(chunk: tuple[int, bytes]) -> list[str]:
    """The types of the events in a chunk of a stream."""
    return [json.loads(line[6:])["type"] for line in chunk[1].decode().splitlines() if line[:6] == "data: "]


async def eventually(what: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 - what is awaited tells nobody
            await asyncio.sleep(0.005)


async def test_a_stream_without_a_key_ends_its_exec_when_it_is_left(execs, world):
    events = await begin(execs, world, None)
    await events.aclose()
    await eventually(lambda: world.sandbox.execs == 0)
    assert len(world.agent.signals) == 1
    assert await world.rows() == ["killed"]
    assert (world.sandbox.execs_ended, world.sandbox.bytes_out) == (1, 6)


async def test_an_exec_with_a_key_waits_for_who_comes_back(execs, world):
    for _ in range(3):
        events = await begin(execs, world, "key")
        await events.aclose()
        assert world.sandbox.execs == 1
        await asyncio.sleep(GRACE_S / 2)
    events = await begin(execs, world, "key")
    # Followed again, it has all the time there is.
    await asyncio.sleep(GRACE_S * 2)
    await world.agent.end()
    assert [type_ async for chunk in events for type_ in told(chunk)] == ["exec.completed"]
    assert (world.agent.starts, world.agent.signals) == (1, [])
    assert await world.rows() == ["completed"]
    assert (world.sandbox.execs, world.sandbox.execs_ended) == (0, 1)


async def test_an_exec_with_a_key_that_nobody_comes_back_to_is_ended(execs, world):
    events = await begin(execs, world, "key")
    await events.aclose()
    await eventually(lambda: world.sandbox.execs == 0)
    assert len(world.agent.signals) == 1
    assert await world.rows() == ["killed"]


async def test_nothing_is_ended_while_nobody_can_come_back(execs, world):
    world.draining.append(True)
    events = await begin(execs, world, "key")
    await events.aclose()
    await asyncio.sleep(GRACE_S * 2)
    assert world.agent.signals == []
    assert world.sandbox.execs == 1


async def test_requests_at_once_follow_one_exec_and_it_counts_once(execs, world):
    streams = [await begin(execs, world, "key") for _ in range(3)]
    plain = asyncio.ensure_future(execs.run(world.sandbox, NewExec(code="x"), "key"))
    await asyncio.sleep(0)
    assert world.sandbox.execs == 1
    await streams.pop().aclose()
    await world.agent.end()
    for stream in streams:
        assert [type_ async for chunk in stream for type_ in told(chunk)] == ["exec.completed"]
    assert (await plain)["stdout"] == "begun\n"
    assert (world.agent.starts, world.sandbox.execs_ended, world.sandbox.bytes_out) == (1, 1, 6)
    assert await world.rows() == ["completed"]


async def test_followers_and_execs_have_a_bound(execs, world, settings):
    streams = [await begin(execs, world, "key") for _ in range(MAX_FOLLOWERS)]
    with pytest.raises(BusyError, match="followed by"):
        execs.stream(world.sandbox, NewExec(code="x", stream=True), "key")
    world.sandbox.execs = settings.max_execs
    with pytest.raises(BusyError, match="the limit"):
        execs.stream(world.sandbox, NewExec(code="x", stream=True), "other")
    for stream in streams:
        await stream.aclose()


async def test_a_repeated_request_gets_the_result_and_counts_nothing(execs, world):
    first = asyncio.ensure_future(execs.run(world.sandbox, NewExec(code="x"), "key"))
    await eventually(lambda: world.agent.execs)
    await world.agent.end()
    # The repeated request may well be told of the end before the first one is.
    again = await execs.run(world.sandbox, NewExec(code="x"), "key")
    assert (await execs.run(world.sandbox, NewExec(code="x"), "key"))["stdout"] == again["stdout"]
    assert again["stdout"] == (await first)["stdout"]
    assert again["id"] == (await first)["id"]
    assert again["started_at"] < (await first)["started_at"]
    assert world.sandbox.execs_ended == 1
    assert await world.rows() == ["completed"]


async def test_a_key_with_another_body_is_refused_and_the_exec_goes_on(execs, world):
    events = await begin(execs, world, "key")
    await events.aclose()
    world.agent.refusal = AgentRefusedError("exec_differs", "")
    with pytest.raises(IdempotencyConflictError):
        await execs.run(world.sandbox, NewExec(code="y"), "key")
    # The refusal brings no time: it is ended when it would have been.
    await eventually(lambda: world.sandbox.execs == 0)
    assert await world.rows() == ["killed"]


async def test_a_result_that_is_gone_is_told_with_its_status(execs, world):
    world.agent.refusal = AgentRefusedError("exec_gone", "")
    with pytest.raises(ExecResultGoneError) as caught:
        await execs.run(world.sandbox, NewExec(code="x"), "key")
    assert caught.value.status == 409
    assert (world.sandbox.execs, await world.rows()) == (0, [])


async def test_an_agent_that_was_never_reached_leaves_no_trace(execs, world):
    world.agent.refusal = AgentUnreachableError("no")
    with pytest.raises(AgentUnreachableError):
        await execs.run(world.sandbox, NewExec(code="x"))
    world.sandbox.paused = True
    with pytest.raises(SandboxPausedError):
        await execs.run(world.sandbox, NewExec(code="x"))
    assert (world.sandbox.execs, await world.rows()) == (0, [])


async def test_a_pause_is_no_loss_and_a_resume_takes_the_exec_up(execs, world):
    events = await begin(execs, world, None)
    world.sandbox.paused = True
    await world.agent.break_off()
    with pytest.raises(SandboxPausedError):
        await anext(events)
    assert world.sandbox.execs == 0
    world.sandbox.paused = world.agent.broken = False
    await execs.recover(world.sandbox)
    assert world.sandbox.execs == 1
    await world.agent.end()
    await eventually(lambda: world.sandbox.execs == 0)
    assert await world.rows() == ["completed"]
    assert world.agent.signals == []


@pytest.mark.parametrize(("gone", "status"), [(True, "killed"), (False, "lost")])
async def test_a_link_that_is_lost_for_good(execs, world, gone, status):
    task = asyncio.ensure_future(execs.run(world.sandbox, NewExec(code="x")))
    await eventually(lambda: world.agent.execs)
    if gone:
        world.live.remove(world.sandbox.id)
    await world.agent.break_off()
    assert (await task)["status"] == status
    assert await world.rows() == [status]


async def test_a_restarted_daemon_takes_up_what_runs_and_what_ended_meanwhile(world):
    for exec_id in (EXEC_RUNNING, EXEC_ENDED, EXEC_WRITTEN):
        await world.agent.say(exec_id, Output(False, b"out"))
    await world.agent.say(EXEC_ENDED, outcome(exit_code=3))
    await world.agent.say(EXEC_WRITTEN, outcome())
    before = world.make()
    await before.recover(world.sandbox)
    await eventually(lambda: world.sandbox.execs == 1)
    assert sorted(await world.rows()) == ["completed", "failed"]
    # The next one finds these rows written; a row whose exec the agent does not know is lost.
    world.sandbox.execs = world.sandbox.execs_ended = 0
    row = (await world.history.find(world.sandbox.id, EXEC_ENDED)).model_dump()  # type: ignore[union-attr]
    world.history.add({**row, "id": EXEC_FORGOTTEN, "status": "running"})
    await world.history.batch.flush()
    world.agent.held = True
    after = world.make()
    await after.recover(world.sandbox)
    assert (world.sandbox.execs, world.agent.timers_asked) == (1, [True])
    assert sorted(await world.rows()) == ["completed", "failed", "lost"]
    await world.agent.say(EXEC_RUNNING, outcome())
    await eventually(lambda: world.sandbox.execs <= 0)
    assert sorted(await world.rows()) == ["completed", "completed", "failed", "lost"]


async def test_a_request_that_comes_back_to_a_restarted_daemon_takes_over(world):
    before = world.make()
    events = await begin(before, world, "key")
    after = world.make()
    await after.recover(world.sandbox)
    again = await begin(after, world, "key")
    await world.agent.end()
    assert [type_ async for chunk in again for type_ in told(chunk)] == ["exec.completed"]
    assert (world.agent.starts, await world.rows()) == (1, ["completed"])
    await events.aclose()


async def test_ids_that_are_none_of_ours_are_not_taken_up(world):
    mine = new_id("exec")
    for hostile in ("", "\0", "exec_" + "\0" * 34, "../exec", f"{mine}\n", "é" * 39, mine):
        await world.agent.say(hostile, outcome())
    await world.make().recover(world.sandbox)
    rows, _ = await world.history.page(world.sandbox.id, PageParams())
    assert [row.id for row in rows] == [mine]
    assert world.sandbox.execs == 0


async def test_members_of_the_pool_are_left_alone(execs, world):
    world.sandbox.project_id = None
    world.agent.hello = None  # type: ignore[method-assign]  # would fail
    await execs.recover(world.sandbox)


async def test_one_exec_with_its_output_without_it_and_without_its_sandbox(execs, world):
    with pytest.raises(ExecNotFoundError):
        await execs.get(PROJECT, world.sandbox.id, "exec_none", alive=True)
    events = await begin(execs, world, "key")
    [exec_id] = world.agent.execs
    so_far = await execs.get(PROJECT, world.sandbox.id, exec_id, alive=True)
    assert (so_far["status"], so_far["stdout"], so_far["duration_ms"]) == ("running", "begun\n", None)
    with pytest.raises(ExecNotFoundError):
        await execs.get(PROJECT, "sbx_other", exec_id, alive=True)
    await world.agent.end(outcome(exit_code=4))
    async for _ in events:
        continue
    kept = await execs.get(PROJECT, world.sandbox.id, exec_id, alive=True)
    assert (kept["status"], kept["exit_code"], kept["output_kept"]) == ("failed", 4, True)
    world.agent.execs.clear()
    bare = await execs.get(PROJECT, world.sandbox.id, exec_id, alive=True)
    assert (bare["status"], bare["exit_code"], bare["output_kept"]) == ("failed", 4, False)
    assert (bare["stdout"], bare["duration_ms"], bare["usage"]["max_rss_mb"]) == (None, 1.5, 2.0)
    assert kept.keys() == bare.keys() == so_far.keys()


async def test_an_exec_whose_sandbox_ended_unseen_was_killed(execs, world):
    await world.agent.say(EXEC_ENDED, Output(False, b"out"), outcome())
    await execs.recover(world.sandbox)
    await eventually(lambda: world.sandbox.execs == 0)
    row = (await world.history.find(world.sandbox.id, EXEC_ENDED)).model_dump()  # type: ignore[union-attr]
    world.history.add({**row, "id": EXEC_FORGOTTEN, "status": "running"})
    world.live.remove(world.sandbox.id)
    found = await execs.get(PROJECT, world.sandbox.id, EXEC_FORGOTTEN, alive=False)
    assert (found["status"], found["output_kept"]) == ("killed", False)


def test_the_fingerprint_is_of_what_runs_not_of_how_it_is_told() -> None:
    body = NewExec(code="x", env={"A": "1", "B": "2"})
    assert body.fingerprint() == NewExec(code="x", env={"B": "2", "A": "1"}, stream=True).fingerprint()
    others = [NewExec(code="y"), NewExec(command="x"), NewExec(code="x", stdin="1"), NewExec(code="x")]
    assert len({body.fingerprint(), *(other.fingerprint() for other in others)}) == 5


async def test_a_background_exec_is_in_the_store_before_it_starts(execs, world):
    rows: list[list[str]] = []
    begin_at_agent = world.agent.start

    async def start(request: ExecRequest) -> AsyncGenerator[tuple[Event, int]]:
        rows.append(await world.rows())
        async for item in begin_at_agent(request):
            yield item

    world.agent.start = start
    result = await execs.start(world.sandbox, NewExec(command="serve", background=True))
    assert (result["status"], result["background"], rows) == ("running", True, [["running"]])
    # Nobody follows it: its end is waited for, and its output left where it is.
    await eventually(lambda: world.agent.waits == 1)
    assert (world.sandbox.execs, world.sandbox.servers) == (1, 1)
    await asyncio.sleep(GRACE_S * 2)
    assert world.agent.signals == []
    await world.agent.end()
    await eventually(lambda: world.sandbox.execs == 0)
    row = await world.history.find(world.sandbox.id, result["id"])
    assert row is not None
    assert (row.status, row.title, row.background, world.sandbox.servers) == ("completed", "serve", True, 0)


async def test_one_without_a_deadline_is_no_use_of_its_sandbox(execs, world):
    idle = world.sandbox.idle
    await execs.start(world.sandbox, NewExec(command="serve", background=True))
    idle.seconds(world.sandbox, 100.0)
    idle.seconds(world.sandbox, 101.0)
    assert idle.seconds(world.sandbox, 150.0) == 150.0
    await execs.start(world.sandbox, NewExec(command="job", background=True, timeout_s=5))
    assert idle.seconds(world.sandbox, 200.0) == 0.0
    assert idle.seconds(world.sandbox, 300.0) == 0.0


async def test_a_background_exec_that_the_agent_refuses_is_known_to_have_failed(execs, world):
    world.agent.refusal = AgentRefusedError("busy", "full")
    with pytest.raises(BusyError):
        await execs.start(world.sandbox, NewExec(command="serve", background=True))
    assert (world.sandbox.execs, await world.rows()) == (0, ["failed"])


async def test_a_plain_request_without_a_key_that_is_left_ends_its_exec(execs, world):
    task = asyncio.ensure_future(execs.run(world.sandbox, NewExec(code="x")))
    await eventually(lambda: world.agent.execs)
    task.cancel()
    await eventually(lambda: world.sandbox.execs == 0)
    assert (len(world.agent.signals), await world.rows()) == (1, ["killed"])


async def follow(
    execs: ExecService, world: World, exec_id: str, after: int = -1, allowed: Any = None
) -> list[dict[str, Any]]:
    async def always() -> None:
        return None

    chunks = await execs.follow(
        PROJECT, world.sandbox.id, exec_id, after, f"key of {allowed}", allowed or always, alive=True
    )
    return [json.loads(line[6:]) async for _, chunk in chunks for line in chunk.decode().splitlines()[1::3]]


async def following(execs: ExecService, count: int) -> None:
    await eventually(lambda: execs._feeds._followers.total() == count)


async def test_followers_share_one_reading_and_come_in_anywhere(execs, world):
    started = await execs.start(world.sandbox, NewExec(command="serve", background=True))
    followers = [asyncio.ensure_future(follow(execs, world, started["id"])) for _ in range(50)]
    await following(execs, 50)
    before = world.agent.follows
    await world.agent.say(started["id"], Output(True, b"more"))
    late = asyncio.ensure_future(follow(execs, world, started["id"], after=100))
    await following(execs, 51)
    await world.agent.end()
    for follower in followers:
        told = await follower
        assert [event["sequence_number"] for event in told] == [0, 100, 200, 300]
        assert told[-1]["exec"]["stdout"] == "begun\n"
    assert [event["sequence_number"] for event in await late] == [200, 300]
    assert world.agent.follows == before
    await eventually(lambda: world.sandbox.execs == 0)
    assert world.sandbox.execs_ended == 1


async def test_an_exec_with_a_key_goes_on_while_somebody_follows_its_events(execs, world):
    events = await begin(execs, world, "key")
    (exec_id,) = world.agent.execs
    follower = asyncio.ensure_future(follow(execs, world, exec_id))
    await following(execs, 1)
    await events.aclose()
    await asyncio.sleep(GRACE_S * 3)
    assert world.agent.signals == []
    await world.agent.end()
    assert (await follower)[-1]["exec"]["status"] == "completed"


async def test_a_follower_keeps_no_exec_alive_that_was_left_for_good(execs, world):
    events = await begin(execs, world, None)
    (exec_id,) = world.agent.execs
    follower = asyncio.ensure_future(follow(execs, world, exec_id))
    await following(execs, 1)
    await events.aclose()
    assert (await follower)[-1]["exec"]["status"] == "killed"


async def test_followers_end_with_the_daemon_and_with_their_key(execs, world):
    started = await execs.start(world.sandbox, NewExec(command="serve", background=True))
    asked: list[int] = []

    async def revoked() -> None:
        asked.append(1)
        raise BusyError("revoked")

    follower = asyncio.ensure_future(follow(execs, world, started["id"], allowed=revoked))
    await eventually(lambda: world.agent.follows >= 1)
    await asyncio.sleep(1.05)
    await world.agent.say(started["id"], Output(False, b"secret"))
    with pytest.raises(BusyError, match="revoked"):
        await follower
    other = asyncio.ensure_future(follow(execs, world, started["id"]))
    await asyncio.sleep(0.05)
    world.draining.append(True)
    await execs.tick()
    with pytest.raises(UnavailableError, match="follow again"):
        await other


async def test_a_pause_is_waited_out_by_followers(execs, world):
    started = await execs.start(world.sandbox, NewExec(command="serve", background=True))
    follower = asyncio.ensure_future(follow(execs, world, started["id"]))
    await eventually(lambda: world.agent.follows >= 1)
    world.sandbox.paused = True
    await world.agent.break_off()
    await eventually(lambda: world.sandbox.execs == 0)
    world.sandbox.paused = world.agent.broken = False
    await execs.recover(world.sandbox)
    await world.agent.say(started["id"], Output(False, b"again"))
    await world.agent.end()
    told = await follower
    assert "".join(event.get("delta", "") for event in told) == "begun\nagain"
    assert told[-1]["type"] == "exec.completed"


async def test_there_is_nothing_to_follow_of_what_is_not_kept(execs, world):
    with pytest.raises(ExecNotFoundError):
        await follow(execs, world, new_id("exec"))
    started = await execs.start(world.sandbox, NewExec(command="serve", background=True))
    await world.agent.end()
    await eventually(lambda: world.sandbox.execs == 0)
    with pytest.raises(BadRequestError, match="beyond the last event"):
        await follow(execs, world, started["id"], after=1_000_000)
    world.live.remove(world.sandbox.id)
    with pytest.raises(ExecOutputGoneError, match="completed"):
        await follow(execs, world, started["id"])


async def test_who_follows_an_exec_before_the_sandbox_knows_it_is_told_to_come_again(execs, world):
    """Its id is in the list before it starts."""

    async def asked_in_vain() -> None:
        raise BusyError("asked again and again")

    world.agent.reachable.clear()
    start = asyncio.ensure_future(execs.start(world.sandbox, NewExec(command="serve", background=True)))
    await eventually(lambda: world.agent.asked)
    (listed,), _ = await execs.page(world.sandbox.id, PageParams(), "running", alive=True)
    with pytest.raises(UnavailableError, match="follow again"):
        await follow(execs, world, listed.id, allowed=asked_in_vain)
    world.agent.reachable.set()
    await start
    follower = asyncio.ensure_future(follow(execs, world, listed.id))
    await world.agent.end()
    assert (await follower)[-1]["type"] == "exec.completed"


async def test_a_follower_whose_feed_is_gone_before_it_reads_is_told_to_come_again(execs, world):
    started = await execs.start(world.sandbox, NewExec(command="serve", background=True))
    execs._feeds._linger_s = 0.0
    chunks = await execs.follow(PROJECT, world.sandbox.id, started["id"], -1, "key", None, alive=True)
    await eventually(lambda: len(execs._feeds) == 0)
    assert told(await anext(chunks))[0] == "exec.started"
    with pytest.raises(UnavailableError, match="follow again"):
        await asyncio.wait_for(anext(chunks), 5)


async def test_what_runs_is_listed_at_once_and_by_status(execs, world):
    events = await begin(execs, world, None)
    rows, _ = await execs.page(world.sandbox.id, PageParams(), "running", alive=True)
    assert [row.title for row in rows] == ["x"]
    assert (await execs.page(world.sandbox.id, PageParams(), "completed", alive=True))[0] == []
    # Of a sandbox that ended unseen nothing runs, and what did was killed.
    assert (await execs.page(world.sandbox.id, PageParams(), "running", alive=False))[0] == []
    assert len((await execs.page(world.sandbox.id, PageParams(), "killed", alive=False))[0]) == 1
    await events.aclose()
