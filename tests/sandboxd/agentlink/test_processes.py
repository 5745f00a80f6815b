"""Gaps and results in a log, and what agents of an older release are not asked for."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest
from e80_agent import protocol
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.agentlink.client import Agent
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.agentlink.exec_log import Event, Gap, Outcome, Output, Result
from tests.sandboxd.agentlink.fake_agent import FakeAgent, read_request, says
from tests.sandboxd.agentlink.test_hostile_agent import HELLO, OK, end, header, record, request


def begins_at(**fields: Any) -> bytes:
    return header(json.dumps({"ok": True, "size": 0, "finished": False, **fields}).encode())


def gap(**fields: Any) -> bytes:
    return record(protocol.RECORD_GAP, json.dumps(fields).encode())


async def follow(fake: FakeAgent, offset: int = 0) -> list[tuple[Event, int]]:
    return [item async for item in Agent(fake.dial).follow("exec_1", offset)]


async def test_what_was_dropped_is_told_with_offsets_that_stay():
    log = record(1, b"new") + gap(base=2000, missed=900) + record(1, b"newest") + end()
    async with FakeAgent(says(begins_at(base=1000, dropped=800) + log)) as fake:
        found = await follow(fake)
    assert found[:4] == [
        (Gap(800), 1000),
        (Output(False, b"new"), 1008),
        (Gap(900), 2000),
        (Output(False, b"newest"), 2011),
    ]
    assert isinstance(found[4][0], Outcome)


@pytest.mark.parametrize(
    "answer",
    [
        begins_at(base=-1, dropped=0),
        begins_at(base="1000", dropped=0),
        begins_at(base=1000),
        begins_at(base=1000, dropped=-5),
        begins_at(base=2**60, dropped=1),
        OK + record(protocol.RECORD_GAP, b"["),
        OK + gap(base=0, missed=1),
        OK + gap(missed=1),
        OK + gap(base=10, missed=-1),
        OK + gap(base=10, missed=float("inf")),
        OK + record(1, b"x" * 100) + gap(base=50, missed=1),
    ],
)
async def test_gaps_that_are_none(answer):
    async with FakeAgent(says(answer + end())) as fake:
        with pytest.raises(LinkBrokenError):
            await follow(fake)
        assert fake.streams[-1].closed == 1


async def test_a_lost_connection_is_taken_up_behind_what_was_seen():
    asked: list[dict[str, Any]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await read_request(reader))
        if len(asked) == 1:
            writer.write(begins_at() + record(1, b"x" * 10) + gap(base=500, missed=400) + record(1, b"y"))
        else:
            writer.write(begins_at(base=700, dropped=600) + end())
        await writer.drain()

    async with FakeAgent(script) as fake:
        found = await follow(fake)
    assert [item["offset"] for item in asked] == [0, 506]
    # Ten bytes and one were seen, four hundred known to be missing: the rest of 600 is news.
    assert [event.missed_bytes for event, _ in found if isinstance(event, Gap)] == [400, 189]
    assert found[-2][1] == 700


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(
        lambda value: json.dumps({"a/b": value}).encode("utf-8", "surrogatepass")
    )
)
def test_what_a_tenant_gives_as_a_result_can_be_sent_on(payload):
    async def check() -> None:
        async with FakeAgent(says(OK + record(protocol.RECORD_RESULT, payload) + end())) as fake:
            (result, _), _ = await follow(fake)
        assert isinstance(result, Result)
        json.dumps(result.bundle, ensure_ascii=False, allow_nan=False).encode()

    asyncio.run(check())


@pytest.mark.parametrize(
    "field", [{"user": "nobody"}, {"pty": (24, 80)}, {"stdin_open": True}, {"ring": True}]
)
async def test_an_agent_of_an_older_release_is_not_asked_for_what_it_would_pass_over(field):
    """It would run the exec as the first user, without a terminal, and say nothing."""
    async with FakeAgent(says(protocol.pack_header({**HELLO, "protocol": 2}))) as fake:
        agent = Agent(fake.dial)
        with pytest.raises(AgentRefusedError, match="older release") as refused:
            await anext(agent.run(dataclasses.replace(request(), **field)))
        assert refused.value.agent_code == "unsupported"
        assert len(fake.streams) == 1


async def test_input_is_sent_in_pieces_the_agent_takes_and_closed_after_the_last():
    asked: list[dict[str, Any]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await read_request(reader))
        size = asked[-1]["offset"] + asked[-1]["body"]
        writer.write(protocol.pack_header({"ok": True, "size": size, "open": not asked[-1]["close"]}))
        await writer.drain()

    data = bytes(300_000)
    async with FakeAgent(script) as fake:
        agent = Agent(fake.dial)
        assert await agent.stdin("exec_1", data, 0, True) == (262_144, True)
        assert await agent.stdin("exec_1", data[262_144:], 262_144, True) == (300_000, False)


@pytest.mark.parametrize("size", [None, -1, "5", True, 2**60])
async def test_a_lie_about_the_size_of_input_is_none(size):
    async with FakeAgent(says(protocol.pack_header({"ok": True, "size": size, "open": True}))) as fake:
        with pytest.raises(LinkBrokenError):
            await Agent(fake.dial).stdin("exec_1", b"x", 0, False)
