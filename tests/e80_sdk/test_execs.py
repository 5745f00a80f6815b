"""An exec whose stream breaks anywhere: nothing of its output is lost, nothing comes twice, and it runs
once."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from e80_sdk import (
    ConnectionLostError,
    Eighty80,
    ExecChunk,
    ExecResultGoneError,
    SandboxPausedError,
    UnavailableError,
    UnexpectedResponseError,
)
from e80_sdk.api import SandboxApi
from e80_sdk.config import Connection
from e80_sdk.execs import Replay
from e80_sdk.retries import Patience
from e80_sdk.transport import Transport
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e80_sdk.fake_server import FakeServer, Fault, Switch, fresh_fake
from tests.e80_sdk.gaps import until

WAYS = st.sampled_from(["drop", "end", "interrupted", "unavailable"])
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
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for name in ("stdout", "stderr"):
        chunks = [ExecChunk.from_event(one) for one in events if one["type"] == f"exec.{name}.delta"]
        assert all(chunks), "no empty pieces"
        assert b"".join(chunk.data for chunk in chunks) == b"".join(data for to, data in script if to == name)
    assert len(fake.execs) == 1


def test_a_cut_inside_a_character_keeps_its_bytes() -> None:
    replay = Replay()
    first = {"type": "exec.stdout.delta", "delta": "w6Q=", "encoding": "base64"}  # "ä" whole
    half = {"type": "exec.stdout.delta", "delta": "ww==", "encoding": "base64"}  # its first byte
    told = [replay.fresh({"type": "exec.started", "exec": {"id": "e"}}), replay.fresh(half)]
    replay.restart()
    told += [replay.fresh({"type": "exec.started", "exec": {"id": "e"}}), replay.fresh(first)]
    assert told[2] is None
    assert [ExecChunk.from_event(one).data for one in (told[1], told[3]) if one] == [b"\xc3", b"\xa4"]
    rest = replay.fresh({"type": "exec.stdout.delta", "delta": "more", "encoding": None})
    assert rest is not None
    assert rest["delta"] == "more"


def test_rich_results_come_once() -> None:
    replay = Replay()
    told = [replay.fresh({"type": "exec.result", "result": n}) for n in (1, 2)]
    replay.restart()
    told += [replay.fresh({"type": "exec.result", "result": n}) for n in (1, 2, 3)]
    assert [one["result"] for one in told if one] == [1, 2, 3]


def test_another_exec_under_the_same_key_is_an_error() -> None:
    replay = Replay()
    replay.fresh({"type": "exec.started", "exec": {"id": "a"}})
    replay.restart()
    with pytest.raises(UnexpectedResponseError, match="may have run twice"):
        replay.fresh({"type": "exec.started", "exec": {"id": "b"}})


async def test_a_program_that_is_running_is_taken_up_again(fake: FakeServer) -> None:
    fake.cuts = [(2, "drop"), (3, "interrupted"), (1, "end")]
    events, sandbox_id = await events_of(
        make_api(fake), command="echo $$ >> runs; for n in 1 2 3 4; do echo $n; sleep 0.05; done; exit 3"
    )
    assert "".join(one["delta"] for one in events[1:-1]) == "1\n2\n3\n4\n"
    assert events[-1]["exec"]["exit_code"] == 3
    assert len(fake.file(sandbox_id, "runs").read_text().split()) == 1
    assert fake.count("POST", "/exec") == 4


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
    fake.cuts = [(2, "end")] * 50
    with pytest.raises(ConnectionLostError, match=r"ended before its result.*gave up after 4 attempts"):
        await events_of(make_api(fake, patience=Patience(max_retries=3)), command="echo 1; sleep 0.1; echo 2")
    fake.cuts = [(2, "interrupted")] * 50
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


async def test_who_stops_listening_ends_the_program(fake: FakeServer) -> None:
    api = make_api(fake)
    info = await api.create({})
    events: AsyncGenerator[dict[str, Any]] = api.execs.events(info.id, {"command": "echo on; sleep 30"})
    await anext(events)
    await events.aclose()
    await until(lambda: not fake.programs)
    assert fake.count("POST", "/exec") == 1
