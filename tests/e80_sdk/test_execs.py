"""An exec whose stream breaks anywhere: nothing of its output is lost, nothing comes twice, and it runs
once."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from e80_sdk import (
    ConnectionLostError,
    Eighty80,
    ExecChunk,
    ExecResultGoneError,
    NotFoundError,
    SandboxPausedError,
    UnavailableError,
    UnexpectedResponseError,
)
from e80_sdk.api import SandboxApi
from e80_sdk.config import Connection
from e80_sdk.retries import Patience
from e80_sdk.transport import Transport
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e80_sdk.fake_server import FakeServer, Fault, Switch, fresh_fake
from tests.e80_sdk.gaps import until

WAYS = st.sampled_from(["drop", "end", "interrupted", "unavailable"])
SSE = {"Content-Type": "text/event-stream"}
PIECES = st.lists(
    st.tuples(
        st.sampled_from(["stdout", "stderr"]),
        st.one_of(st.binary(min_size=1), st.text(min_size=1).map(str.encode)),
    ),
    max_size=12,
)


def make_api(fake: FakeServer, **options: Any) -> SandboxApi:
    connection = Connection(fake.base_url, fake.api_key, "argument", "argument")
    return SandboxApi(Transport(connection, sleep=lambda _: asyncio.sleep(0), **options))


async def events_of(api: SandboxApi, **body: Any) -> tuple[list[dict[str, Any]], str]:
    info = await api.create({})
    async with aclosing(api.execs.events(info.id, body or {"command": "true"})) as events:
        return [event async for event in events], info.id


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=PIECES, cuts=st.lists(st.tuples(st.integers(0, 16), WAYS), max_size=8), lost=st.integers(0, 2))
def test_cuts_anywhere_lose_nothing_and_double_nothing(
    server: tuple[str, Switch], script: list[tuple[str, bytes]], cuts: list[tuple[int, str]], lost: int
) -> None:
    with fresh_fake(*server) as fake:
        fake.script, fake.cuts = script, list(cuts)
        fake.faults.append(Fault("POST", "/exec", 0, after=True, times=lost))
        events, _ = asyncio.run(events_of(make_api(fake)))
    kinds = [event["type"] for event in events]
    assert kinds[0] == "exec.started"
    assert kinds[-1] == "exec.completed"
    assert kinds.count("exec.started") == kinds.count("exec.completed") == 1
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers)), "the same event has the same number on every stream"
    for name in ("stdout", "stderr"):
        chunks = [ExecChunk.from_event(one) for one in events if one["type"] == f"exec.{name}.delta"]
        assert all(chunks), "no empty pieces"
        assert b"".join(chunk.data for chunk in chunks) == b"".join(data for to, data in script if to == name)
    assert len(fake.execs) == 1


async def test_a_program_that_is_running_is_taken_up_again(fake: FakeServer) -> None:
    fake.cuts = [(2, "drop"), (1, "interrupted"), (1, "end")]
    events, sandbox_id = await events_of(
        make_api(fake), command="echo $$ >> runs; for n in 1 2 3 4; do echo $n; sleep 0.05; done; exit 3"
    )
    assert "".join(one["delta"] for one in events[1:-1]) == "1\n2\n3\n4\n"
    assert events[-1]["exec"]["exit_code"] == 3
    assert len(fake.file(sandbox_id, "runs").read_text().split()) == 1
    assert fake.count("POST", "/exec") == 1
    afters = [one.query for one in fake.seen if one.path.endswith("/events")]
    assert afters == ["after=10", "after=20", "after=30"]


async def test_a_start_whose_answer_was_lost_is_asked_for_again(fake: FakeServer) -> None:
    fake.cuts = [(0, "drop"), (0, "end")]
    events, _ = await events_of(make_api(fake), command="echo on")
    assert events[-1]["exec"]["stdout"] == "on\n"
    assert fake.count("POST", "/exec") == 3
    assert len({one.headers["idempotency-key"] for one in fake.seen if one.path.endswith("/exec")}) == 1
    assert fake.started == 1


async def test_a_plain_run_is_taken_up_again_too(fake: FakeServer) -> None:
    api = make_api(fake)
    fake.cuts = [(1, "drop"), (1, "interrupted")]
    result = await api.execs.run((await api.create({})).id, {"command": "echo 1; sleep 0.1; echo 2"})
    assert result == "1\n2\n"
    assert fake.started == 1


async def test_another_exec_under_the_same_key_is_an_error(fake: FakeServer) -> None:
    fake.cuts = [(1, "drop")]
    fake.faults.append(Fault("GET", "/events", 200, SSE, raw=_started("exec_other")))
    with pytest.raises(UnexpectedResponseError, match="may have run twice"):
        await events_of(make_api(fake))


@pytest.mark.parametrize("event", [{"type": "exec.started"}, {"sequence_number": 1}, {"type": 1}])
async def test_events_that_cannot_be_read(fake: FakeServer, event: dict[str, Any]) -> None:
    raw = f"data: {json.dumps(event)}\n\n".encode()
    fake.faults.append(Fault("POST", "/exec", 200, SSE, raw=raw))
    with pytest.raises(UnexpectedResponseError):
        await events_of(make_api(fake))


@pytest.mark.parametrize(
    ("code", "kind"), [("sandbox_paused", SandboxPausedError), ("exec_result_gone", ExecResultGoneError)]
)
async def test_an_end_that_will_not_pass_is_told_at_once(
    fake: FakeServer, code: str, kind: type[Exception]
) -> None:
    fake.cuts = [(1, code)]
    with pytest.raises(kind):
        await events_of(make_api(fake))
    assert fake.count("POST", "/exec") == 1


async def test_streams_that_bring_nothing_new_are_given_up(fake: FakeServer) -> None:
    fake.cuts = [(1, "end")] + [(0, "end")] * 50
    with pytest.raises(ConnectionLostError, match=r"ended before its result.*gave up after 4 attempts"):
        await events_of(make_api(fake, patience=Patience(max_retries=3)), command="echo 1; sleep 0.1; echo 2")
    fake.cuts = [(1, "interrupted")] + [(0, "interrupted")] * 50
    with pytest.raises(UnavailableError, match="cut by the test"):
        await events_of(make_api(fake, patience=Patience(max_retries=3)), command="echo 1; sleep 0.1; echo 2")


async def test_both_faces_follow_over_breaks(login: FakeServer) -> None:
    login.cuts = [(2, "drop"), (1, "end")]
    async with Eighty80() as client, client.sandbox() as sandbox:
        pending = sandbox.run("echo 1; sleep 0.05; echo 2", stream=True)
        assert "".join([chunk async for chunk in pending]) == "1\n2\n"

    def blocking() -> str:
        login.cuts = [(2, "drop"), (1, "end")]
        with Eighty80() as client, client.sandbox() as sandbox:
            heard: list[str] = []
            result = sandbox.run("echo 1; sleep 0.05; echo 2", on_stdout=heard.append)
            assert "".join(heard) == result.stdout
            return result.stdout

    assert await asyncio.to_thread(blocking) == "1\n2\n"


async def test_an_error_in_a_stream_is_what_its_status_says(fake: FakeServer) -> None:
    """The answer itself has the status 200: who is busy is asked again, what is not there is an error."""
    fake.faults.append(Fault("POST", "/exec", 200, SSE, raw=_error(429, "context_busy"), times=2))
    events, _ = await events_of(make_api(fake), command="echo on")
    assert events[-1]["exec"]["stdout"] == "on\n"
    assert fake.count("POST", "/exec") == 3
    fake.faults.append(Fault("POST", "/exec", 200, SSE, raw=_error(404, "context_not_found")))
    with pytest.raises(NotFoundError) as caught:
        await events_of(make_api(fake))
    assert (caught.value.status, caught.value.code) == (404, "context_not_found")


async def test_who_stops_listening_ends_the_program_at_once(fake: FakeServer) -> None:
    """Cancel is missing in SDKs (kubernetes-sigs/agent-sandbox#1603): closing the stream ends the program."""
    fake.retry_grace_s = 60
    api = make_api(fake)
    info = await api.create({})
    events: AsyncGenerator[dict[str, Any]] = api.execs.events(info.id, {"command": "echo on; sleep 30"})
    await anext(events)
    await events.aclose()
    await until(lambda: not fake.programs)
    assert [run.signals for run in fake.execs.values()] == [["SIGKILL"]]


async def test_who_is_cancelled_ends_the_program_at_once(fake: FakeServer) -> None:
    fake.retry_grace_s = 60
    api = make_api(fake)
    info = await api.create({})
    running = asyncio.create_task(api.execs.run(info.id, {"command": "sleep 30"}))
    await until(lambda: fake.programs)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not fake.programs)


async def test_who_leaves_a_stream_before_it_tells_anything_ends_the_program_at_once(
    fake: FakeServer,
) -> None:
    """The request is on its way, and the id of what it starts is not known yet."""
    fake.retry_grace_s = 60
    api = make_api(fake)
    info = await api.create({})
    fake.faults.append(Fault("POST", "/exec", 0, after=True))
    asked = asyncio.create_task(anext(api.execs.events(info.id, {"command": "sleep 30"})))
    await until(lambda: fake.programs)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await until(lambda: not fake.programs)
    assert [run.signals for run in fake.execs.values()] == [["SIGKILL"]]


async def test_leaving_code_in_a_context_interrupts_it_and_keeps_the_context(fake: FakeServer) -> None:
    api = make_api(fake)
    info = await api.create({})
    events = api.execs.events(info.id, {"command": "echo on; sleep 30", "context": "ctx_1"})
    await anext(events)
    await events.aclose()
    assert [run.signals for run in fake.execs.values()] == [["SIGINT"]]


async def test_leaving_a_program_that_has_ended_sends_nothing(fake: FakeServer) -> None:
    api = make_api(fake)
    info = await api.create({})
    async with aclosing(api.execs.events(info.id, {"command": "true"})) as events:
        async for event in events:
            if event["type"] == "exec.completed":
                break
    assert fake.count("POST", "/signal") == 0


async def test_leaving_takes_no_longer_than_it_may(
    fake: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is gone, or that refuses, does not hold up who leaves."""
    caplog.set_level("INFO", "e80_sdk")
    fake.faults.append(Fault("POST", "/signal", 500, body={"error": {"message": "broken", "code": "broken"}}))
    fake.faults.append(Fault("POST", "/signal", 0, times=100))
    api = make_api(fake, patience=Patience(max_retries=3))
    info = await api.create({})
    for _ in range(2):
        events = api.execs.events(info.id, {"command": "echo on; sleep 30"})
        await anext(events)
        await events.aclose()
    assert caplog.text.count("could not be told to end") == 2


def _started(exec_id: str) -> bytes:
    event = {"type": "exec.started", "sequence_number": 99, "exec": {"id": exec_id}}
    return f"data: {json.dumps(event)}\n\n".encode()


def _error(status: int, code: str) -> bytes:
    error = {"message": "an error", "type": "x", "param": None, "code": code, "status": status}
    return f"data: {json.dumps({'type': 'error', 'sequence_number': 0, 'error': error})}\n\n".encode()
