"""Changing a sandbox, and what the server keeps of the past: pause, update, execs, events, usage, audit."""

import asyncio
from datetime import UTC, datetime

import pytest
from e80_sdk import (
    AsyncEighty80,
    AuditEntry,
    BadRequestError,
    Eighty80,
    ExecInfo,
    SandboxEvent,
    SandboxNotRunningError,
    SandboxPausedError,
    UnexpectedResponseError,
    Usage,
)

from tests.e80_sdk.fake_history import note
from tests.e80_sdk.fake_server import FakeServer, Fault
from tests.e80_sdk.gaps import until


def test_life_of_a_sandbox(login: FakeServer) -> None:
    with Eighty80() as client, client.sandbox(idle_timeout_s=9, labels={"a": "1"}) as sandbox:
        assert sandbox.info.idle_timeout_s == 9
        assert sandbox.pause().status == sandbox.status == "paused"
        with pytest.raises(SandboxPausedError, match="resumed"):
            sandbox.run("true")
        login.faults.append(Fault("POST", "/resume", 0, after=True))
        assert sandbox.resume().status == "running"
        changed = sandbox.update(timeout_s=None, idle_timeout_s=5, labels={"b": "2"}, cpu_mhz=500)
        assert (changed.timeout_s, changed.idle_timeout_s, changed.labels) == (None, 5, {"b": "2"})
        assert login.last("PATCH", sandbox.id).body.keys() == {
            "timeout_s",
            "idle_timeout_s",
            "labels",
            "cpu_mhz",
        }
        with pytest.raises(TypeError, match="did you mean 'memory_size_mb'"):
            sandbox.update(memory_mb=5)  # type: ignore[call-arg]  # the mistake that is meant
        result = sandbox.run("echo hi")
        (ran,) = sandbox.execs()
        assert isinstance(ran, ExecInfo)
        assert (ran.id, ran.status, ran.exit_code) == (result.id, "completed", 0)
        assert sandbox.get_exec(ran.id) == "hi\n"
        sandbox.stop()
        with pytest.raises(SandboxNotRunningError):
            sandbox.pause()
        kinds = [event.type for event in sandbox.events()]
        assert kinds == [f"sandbox.{word}" for word in ("created", "paused", "resumed", "updated", "stopped")]


async def test_the_same_with_pending_calls(login: FakeServer) -> None:
    async with Eighty80() as client, client.sandbox() as sandbox:
        sandbox.pause()
        sandbox.resume()
        assert await sandbox.run("echo after") == "after\n"
        assert (await sandbox.update(labels={"x": "y"})).labels == sandbox.info.labels == {"x": "y"}
        (ran,) = await sandbox.execs()
        assert await sandbox.get_exec(ran.id) == "after\n"
        assert [one.type async for one in sandbox.events(limit=2)] == ["sandbox.created", "sandbox.paused"]
        with pytest.raises(TypeError, match="no option"):
            sandbox.update(nothing=1)  # type: ignore[call-arg]  # the mistake that is meant


def test_lists_by_label_and_status(login: FakeServer) -> None:
    with Eighty80() as client:
        first = client.sandboxes.create(labels={"a": "1", "b": "2"})
        second = client.sandboxes.create(labels={"a": "1"})
        second.pause()
        assert [one.id for one in client.sandboxes.list(labels={"a": "1"})] == [second.id, first.id]
        assert [one.id for one in client.sandboxes.list(labels={"a": "1", "b": "2"})] == [first.id]
        assert [one.id for one in client.sandboxes.list(status="paused")] == [second.id]


def test_usage_and_audit(login: FakeServer) -> None:
    login.audit = [{"id": "aud_1", "action": "apikey.create", "actor": "key_1", "details": {"n": 1}}]
    with Eighty80() as client:
        usage = client.usage(1_700_000_000, datetime(2023, 11, 15, tzinfo=UTC), "day")
        assert isinstance(usage, Usage)
        assert login.last("GET", "/usage").query == "from=1700000000&to=1700006400&bucket=day"
        assert usage.total.cpu_seconds == usage.rows[0].cpu_seconds == 12.5
        assert usage.rows[0].start == 1_700_000_000
        (entry,) = client.audit(action="apikey.create")
        assert isinstance(entry, AuditEntry)
        assert (entry.actor, entry.details) == ("key_1", {"n": 1})
        assert client.audit(action="other") == []


def test_events_are_listed_and_filtered(login: FakeServer) -> None:
    with Eighty80() as client:
        made = client.sandboxes.create()
        other = client.sandboxes.create()
        made.stop()
        assert [one.sandbox_id for one in client.events()] == [made.id, other.id, made.id]
        assert [one.type for one in client.events(order="desc", limit=1)] == ["sandbox.stopped"]
        (stopped,) = client.events(type="sandbox.stopped")
        assert isinstance(stopped, SandboxEvent)
        assert stopped.data == {"reason": "user"}
        assert [one.id for one in client.events(sandbox_id=other.id)] == ["evt_0001"]
        assert [one.id for one in client.events(after="evt_0001")] == ["evt_0002"]
        with pytest.raises(BadRequestError):
            list(client.events(sandbox_id="a/b"))


async def test_following_starts_now_and_survives_breaks(login: FakeServer) -> None:
    note(login, "old", "sbx_x")
    login.event_cuts = [0, 1, 0, 2]
    async with AsyncEighty80() as client:

        async def watch() -> list[str]:
            return [one.id async for one in client.events(follow=True, limit=6)]

        watching = asyncio.create_task(watch())
        await until(lambda: login.count("GET", "/events") == 2)
        for n in range(6):
            note(login, "new", f"sbx_{n}")
            await asyncio.sleep(0.02)
        async with asyncio.timeout(10):
            assert await watching == [f"evt_{n:04d}" for n in range(1, 7)]
    assert login.event_cuts == []


def test_following_for_blocking_callers(login: FakeServer) -> None:
    for n in range(3):
        note(login, "new", f"sbx_{n}")
    with Eighty80() as client:
        following = client.events(follow=True, after="evt_0000")
        assert next(following).id == "evt_0001"
        following.close()  # type: ignore[attr-defined]  # a generator, which is more than it promises
        assert [one.id for one in client.events(follow=True, after="evt_0000", limit=2)] == [
            "evt_0001",
            "evt_0002",
        ]


def test_answers_that_cannot_be_read() -> None:
    with pytest.raises(UnexpectedResponseError, match="SandboxEvent"):
        SandboxEvent.from_body({"id": "evt_1"})
    with pytest.raises(UnexpectedResponseError, match="usage"):
        Usage.from_body({"object": "usage"})
