"""Whatever an agent answers about contexts, the daemon gets facts within bounds or one of its own errors."""

import json

import pytest
from e80_agent import protocol

from sandboxd.agentlink.client import Agent, ExecRequest
from sandboxd.agentlink.contexts import MAX_LISTED, Context
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.agentlink.exec_log import Failure, Outcome, Result
from tests.sandboxd.agentlink.fake_agent import FakeAgent, says

CONTEXT = {
    "id": "ctx_1",
    "language": "python",
    "cwd": "/home/user",
    "status": "idle",
    "executions": 3,
    "created_at": 1.5,
    "last_used_at": 2.5,
}
END = {
    "exit_code": 0,
    "signal": None,
    "reason": "exit",
    "truncated": False,
    "spool": None,
    "duration_ms": 1.5,
    "cpu_ms": 1.0,
    "max_rss_kb": 100,
}


def one(**changes: object) -> bytes:
    return protocol.pack_header({"ok": True, "context": {**CONTEXT, **changes}})


async def test_what_is_well_formed_comes_through():
    async with FakeAgent(says(one())) as agent:
        made = await Agent(agent.dial).contexts.create("ctx_1", "python", "/home/user", {}, "")
    assert made == Context(**CONTEXT)  # type: ignore[arg-type]  # its values are these


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        protocol.pack_header({"ok": True}),
        protocol.pack_header({"ok": True, "context": [1]}),
        protocol.pack_header({"ok": False, "code": "made_up", "message": ""}),
        one(id="ctx_2"),
        one(status="dead"),
        one(status=None),
        one(executions=-1),
        one(executions="3"),
        one(executions=True),
        one(created_at=float("nan")),
        one(last_used_at=float("inf")),
        one(last_used_at=-1),
    ],
)
async def test_what_is_not_is_a_broken_link(answer):
    async with FakeAgent(says(answer)) as agent:
        with pytest.raises(LinkBrokenError):
            await Agent(agent.dial).contexts.interrupt("ctx_1")


async def test_texts_and_lists_are_cut():
    item = {**CONTEXT, "language": "x" * 100, "cwd": "\ud800" * 5000}
    answer = protocol.pack_header({"ok": True, "contexts": [CONTEXT] * (MAX_LISTED + 100)})
    async with FakeAgent(says(answer)) as agent:
        assert len(await Agent(agent.dial).contexts.list()) == MAX_LISTED
    async with FakeAgent(says(protocol.pack_header({"ok": True, "contexts": [item]}))) as agent:
        (found,) = await Agent(agent.dial).contexts.list()
    assert (found.language, found.cwd) == ("x" * 32, "?" * 4096)
    async with FakeAgent(says(protocol.pack_header({"ok": True, "contexts": {"a": 1}}))) as agent:
        assert await Agent(agent.dial).contexts.list() == []


async def test_an_older_agent_says_that_it_knows_none():
    refusal = protocol.pack_header(
        {"ok": False, "code": "unknown_operation", "message": "this agent knows ..."}
    )
    async with FakeAgent(says(refusal)) as agent:
        with pytest.raises(AgentRefusedError) as refused:
            await Agent(agent.dial).contexts.delete("ctx_1")
    assert refused.value.agent_code == "unknown_operation"


def request() -> ExecRequest:
    return ExecRequest("exec_1", {}, "/", 10.0, 1000, 0, False, code=b"x", context="ctx_1")


def log(*records: tuple[int, bytes]) -> bytes:
    answer = protocol.pack_header({"ok": True, "size": 0, "finished": False})
    for kind, payload in (*records, (protocol.RECORD_END, json.dumps(END).encode())):
        answer += protocol.pack_record(kind, payload)
    return answer


@pytest.mark.parametrize(
    ("payload", "bundle"),
    [
        (b'{"text/plain": "1"}', {"text/plain": "1"}),
        (b"garbage", {}),
        (b"[1]", {}),
        (b'{"a": NaN}', {}),
        (b'{"a": 1e999}', {}),
        (b'{"a": "\\ud800"}', {}),
        (b'{"a": ' * 50_000, {}),
        (b"\xff\xfe", {}),
        (b'{"image/png": "' + b"x" * (protocol.MAX_RESULT - 20) + b'"}', None),
    ],
)
async def test_results_are_parsed_or_empty(payload, bundle):
    async with FakeAgent(says(log((protocol.RECORD_RESULT, payload)))) as agent:
        events = [event async for event in Agent(agent.dial).run(request())]
    assert isinstance(events[0], Result)
    assert bundle is None or events[0].bundle == bundle
    assert isinstance(events[-1], Outcome)


async def test_more_than_a_result_may_have_is_not_even_read():
    head = protocol.pack_header({"ok": True, "size": 0, "finished": False})
    for kind, size in ((protocol.RECORD_RESULT, protocol.MAX_RESULT + 1), (protocol.RECORD_ERROR, 1 << 21)):
        async with FakeAgent(says(head + protocol.RECORD.pack(kind, size), hang_up=False)) as agent:
            with pytest.raises(LinkBrokenError, match="over the cap"):
                [event async for event in Agent(agent.dial).run(request())]


async def test_results_without_end_are_cut_off():
    result = (protocol.RECORD_RESULT, b'"' + b"x" * 3_000_000 + b'"')
    async with FakeAgent(says(log(*[result] * 8))) as agent:
        with pytest.raises(LinkBrokenError, match="more output"):
            [event async for event in Agent(agent.dial).run(request())]


async def test_an_error_of_a_call_is_as_hostile_as_any():
    async with FakeAgent(says(log((protocol.RECORD_ERROR, b'{"name": {"a": 1}, "value": 3}')))) as agent:
        events = [event async for event in Agent(agent.dial).run(request())]
    assert events[0] == Failure("", "", "")
