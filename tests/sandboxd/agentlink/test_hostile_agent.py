"""An agent is part of a sandbox and may be anybody's by now: whatever it answers, the daemon gets a result
or one of its own errors, in bounded time and memory."""

import asyncio
import json
import struct

import pytest
from e80_agent import protocol
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandboxd.agentlink.client import LOG_EXTRA, Agent, ExecRequest, Hello
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.agentlink.exec_log import Event, Failure, Outcome, Output, Started
from tests.sandboxd.agentlink.fake_agent import FakeAgent, read_request, says

OK = protocol.pack_header({"ok": True, "size": 0, "finished": False})
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
OUTPUT_LIMIT = 100_000


def record(kind: int, payload: bytes) -> bytes:
    return protocol.pack_record(kind, payload)


def header(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def end(**changes: object) -> bytes:
    return record(protocol.RECORD_END, json.dumps({**END, **changes}).encode())


def request(timeout_s: float | None = 10.0, fingerprint: str | None = None) -> ExecRequest:
    return ExecRequest(
        id="exec_1",
        env={},
        cwd="/",
        timeout_s=timeout_s,
        output_limit=OUTPUT_LIMIT,
        spool_limit=0,
        stream=False,
        code=b"x",
        fingerprint=fingerprint,
    )


async def events(agent: FakeAgent, wanted: ExecRequest | None = None) -> list[Event]:
    return [event async for event in Agent(agent.dial).run(wanted or request())]


HELLO = {"ok": True, "protocol": 1, "python": "3.11.2", "faults": 0, "uptime_s": 1.0, "execs": []}
BAD_HELLOS = {
    "nothing": b"",
    "half a length": b"\0\0",
    "a length without end": b"\xff\xff\xff\xff" + b"x" * 1000,
    "a length over the cap": struct.pack(">I", protocol.MAX_HEADER + 1),
    "less than announced": struct.pack(">I", 100) + b"{}",
    "no JSON": header(b"hello"),
    "no text": header(b"\xff\xfe\x00"),
    "no object": header(b"[1, 2]"),
    "a number": header(b"7"),
    "deep nesting": header(b"[" * 200_000),
    "deep objects": header(b'{"a":' * 90_000),
    "a number of 5000 digits": header(b'{"ok": true, "protocol": ' + b"9" * 5000 + b"}"),
    "not a number": header(json.dumps({**HELLO, "uptime_s": float("nan")}).encode()),
    "an infinite number": header(json.dumps({**HELLO, "uptime_s": float("inf")}).encode()),
    "a number below zero": header(json.dumps({**HELLO, "uptime_s": -1}).encode()),
    "a truth for a number": header(json.dumps({**HELLO, "protocol": True}).encode()),
    "a text for a number": header(json.dumps({**HELLO, "faults": "0"}).encode()),
    "a number too large": header(json.dumps({**HELLO, "faults": 2**60}).encode()),
    "an exec of no age": header(json.dumps({**HELLO, "execs": [{"id": "exec_1", "age_s": -1}]}).encode()),
    "an exec with odd time": header(
        json.dumps({**HELLO, "execs": [{"id": "exec_1", "left_s": []}]}).encode()
    ),
    "nothing in it": header(b"{}"),
    "almost ok": header(json.dumps({**HELLO, "ok": "true"}).encode()),
    "an unknown error": header(b'{"ok": false, "code": "rm_rf"}'),
    "an error that is a list": header(b'{"ok": false, "code": ["busy"]}'),
    "an error that is an object": header(b'{"ok": false, "code": {"busy": 1}}'),
}


@pytest.mark.parametrize("answer", BAD_HELLOS.values(), ids=BAD_HELLOS)
async def test_answers_that_are_none(answer):
    async with FakeAgent(says(answer)) as fake:
        with pytest.raises(LinkBrokenError):
            await Agent(fake.dial).hello()
        assert fake.streams[0].closed + fake.streams[0].released >= 1


async def test_an_answer_with_odd_details_is_bounded():
    odd = {
        **HELLO,
        "python": "\ud800" * 100,
        "execs": [None, 5, [], {"id": "\udfff" * 1000, "kind": []}, *({"id": n} for n in range(1000))],
    }
    async with FakeAgent(says(header(json.dumps(odd).encode()))) as fake:
        hello = await Agent(fake.dial).hello()
    assert len(hello.python) <= 20
    assert len(hello.execs) <= 256
    assert all(len(item.id.encode()) <= 64 for item in hello.execs)
    assert {item.kind for item in hello.execs} == {"code"}


async def test_a_refusal_carries_clean_text_of_bounded_length():
    said = {"ok": False, "code": "busy", "message": "\ud800" + "x" * 100_000}
    async with FakeAgent(says(header(json.dumps(said).encode()))) as fake:
        with pytest.raises(AgentRefusedError) as caught:
            await Agent(fake.dial).signal("exec_1", 9)
    assert len(caught.value.message.encode()) <= 1000


async def test_silence_has_a_deadline():
    async with FakeAgent(says(b"", hang_up=False)) as fake:
        with pytest.raises(LinkBrokenError):
            await Agent(fake.dial).hello(timeout_s=0.05)
        assert fake.streams[0].closed == 1


@pytest.mark.parametrize("said", [b"", OK, OK + record(1, b"x"), OK + b"\1\0"])
async def test_an_exec_that_never_ends_has_a_deadline(said):
    # The daemon waits for 30 s longer than the exec may take: here a tenth of a second in all.
    async with FakeAgent(says(said, hang_up=False)) as fake:
        with pytest.raises(LinkBrokenError):
            await events(fake, request(timeout_s=-29.9))
        assert fake.streams[0].closed == 1


BAD_LOGS = {
    "a record over the cap": struct.pack(">BI", 1, protocol.MAX_RECORD + 1),
    "an unknown kind": record(99, b"x"),
    "a record of files": record(protocol.RECORD_DATA, b"x"),
    "an end that is no JSON": record(protocol.RECORD_END, b"}"),
    "an end that is no object": record(protocol.RECORD_END, b"[]"),
    "an end that is deep": record(protocol.RECORD_END, b"[" * 200_000),
    "an unknown reason": end(reason="boredom"),
    "a reason that is a list": end(reason=["exit"]),
    "a text as exit code": end(exit_code="0"),
    "a truth as exit code": end(exit_code=True),
    "no duration": end(duration_ms=None),
    "a duration below zero": end(duration_ms=-1.0),
    "a duration that is not a number": end(duration_ms=float("nan")),
    "a duration without end": end(cpu_ms=float("inf")),
    "a duration too long to add up": end(cpu_ms=1e300),
    "memory below zero": end(max_rss_kb=-5),
    "an unknown fault": end(fault={"code": "rm_rf", "message": 5}),
    "a fault that is a list": end(fault={"code": []}),
}


@pytest.mark.parametrize("log", BAD_LOGS.values(), ids=BAD_LOGS)
async def test_logs_that_are_none(log):
    async with FakeAgent(says(OK + log)) as fake:
        with pytest.raises(LinkBrokenError):
            await events(fake)
        assert fake.streams[0].closed + fake.streams[0].released >= 1


async def test_an_end_with_odd_details_is_bounded():
    odd = end(spool="/" + "\ud800" * 10_000, exit_code=2**40, signal=999, truncated="yes")
    async with FakeAgent(says(OK + odd)) as fake:
        [outcome] = await events(fake)
    assert isinstance(outcome, Outcome)
    assert outcome.spool is not None
    assert len(outcome.spool.encode()) <= 500
    assert outcome.truncated is False


@pytest.mark.parametrize("payload", [b"x" * 65536, b"x", b""])
async def test_output_without_end_is_cut_off(payload):
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        piece = record(1, payload) * max(1, 65536 // (5 + len(payload)))
        while True:
            writer.write(piece)
            await writer.drain()

    got = 0

    async def consume() -> None:
        nonlocal got
        async for event in Agent(fake.dial).run(request()):
            assert isinstance(event, Output)
            got += len(event.data)

    async with FakeAgent(flood) as fake:
        with pytest.raises(LinkBrokenError):
            await consume()
        assert got <= OUTPUT_LIMIT + LOG_EXTRA
        assert fake.streams[0].closed == 1


async def test_a_crowd_of_tiny_records_lets_others_have_their_turn():
    log = OK + record(1, b"x") * 20_000 + end()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with FakeAgent(says(log)) as fake:
        task = asyncio.ensure_future(other())
        assert len(await events(fake)) == 20_001
        task.cancel()
    assert turns > 200


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
@example(b"\0\0\0\2{}")
@example(OK)
@example(OK + end())
def test_any_bytes_at_all(data):
    async def check() -> None:
        async with FakeAgent(says(data)) as fake:
            try:
                assert isinstance(await Agent(fake.dial).hello(), Hello)
            except (LinkBrokenError, AgentRefusedError):
                pass
        async with FakeAgent(says(OK + data)) as fake:
            try:
                for event in await events(fake):
                    assert isinstance(event, Output | Failure | Outcome)
            except (LinkBrokenError, AgentRefusedError):
                pass

    asyncio.run(check())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=50)
    | st.dictionaries(st.sampled_from(["name", "value", "traceback"]), JSON).map(
        lambda fact: json.dumps(fact).encode()
    )
)
@example(b"[" * 100_000)
@example(b'{"name": "\\ud800", "value": "\\udfff", "traceback": "' + b"x" * 200_000 + b'"}')
@example(b"9" * 10_000)
def test_what_a_tenant_says_of_its_error_becomes_clean_text(payload):
    async def check() -> None:
        async with FakeAgent(says(OK + record(protocol.RECORD_ERROR, payload) + end())) as fake:
            failure, outcome = await events(fake)
        assert isinstance(failure, Failure)
        assert isinstance(outcome, Outcome)
        for text, limit in ((failure.name, 200), (failure.value, 8192), (failure.traceback, 64 * 1024)):
            assert len(text) <= limit
            text.encode()

    asyncio.run(check())


class Forgetful:
    """An agent that is honest, but whose first connection breaks after so many bytes of its answer."""

    def __init__(self, breaks_after: int) -> None:
        self.breaks_after = breaks_after
        self.starts = 0
        self.log = record(1, b"first") + record(2, b"second") + record(3, b'{"name": "E"}') + end()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await read_request(reader)
        if asked["op"] == "hello":
            known = [{"id": "exec_1"}] if self.starts else []
            writer.write(protocol.pack_header({**HELLO, "execs": known}))
        elif asked["op"] == "attach":
            writer.write(OK + self.log[asked["offset"] :])
        else:
            self.starts += 1
            writer.write((OK + self.log)[: self.breaks_after])
        await writer.drain()


@pytest.mark.parametrize("breaks_after", range(len(OK + Forgetful(0).log)))
async def test_a_connection_cut_at_any_byte_loses_and_doubles_nothing(breaks_after):
    agent = Forgetful(breaks_after)
    async with FakeAgent(agent) as fake:
        got = await events(fake)
    assert [type(event) for event in got] == [Output, Output, Failure, Outcome]
    assert [event.data for event in got if isinstance(event, Output)] == [b"first", b"second"]
    assert agent.starts == 1


async def test_an_agent_that_always_hangs_up_is_given_up():
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await read_request(reader))["op"] == "hello":
            writer.write(protocol.pack_header({**HELLO, "execs": [{"id": "exec_1"}]}))
            await writer.drain()

    async with FakeAgent(script) as fake:
        with pytest.raises(LinkBrokenError):
            await events(fake)
        assert len(fake.streams) < 20


async def test_an_agent_that_hangs_up_after_each_record_is_cut_off():
    async with FakeAgent(says(OK + record(1, b"x" * 50_000))) as fake:
        with pytest.raises(LinkBrokenError):
            await events(fake)
        assert len(fake.streams) < 50


async def test_a_request_larger_than_a_header_is_refused_before_it_is_sent():
    wanted = ExecRequest(
        id="exec_1",
        env={},
        cwd="/",
        timeout_s=1,
        output_limit=1,
        spool_limit=0,
        stream=False,
        argv=("x" * protocol.MAX_HEADER,),
    )
    async with FakeAgent(says(b"")) as fake:
        with pytest.raises(AgentRefusedError) as caught:
            await events(fake, wanted)
        assert fake.streams[0].closed == 1
    assert caught.value.agent_code == "bad_request"


async def test_a_request_with_a_key_is_told_whether_it_came_before():
    first = OK + record(1, b"x") + end()
    again = protocol.pack_header({"ok": True, "size": 9, "finished": True, "resumed": True, "age_s": 3.5})
    async with FakeAgent(says(first), says(again + record(1, b"x") + end())) as fake:
        assert (await events(fake, request(fingerprint="f")))[0] == Started(False, False, 0.0)
        assert (await events(fake, request(fingerprint="f")))[0] == Started(True, True, 3.5)


async def test_a_request_with_a_key_whose_agent_always_hangs_up_is_given_up():
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await read_request(reader)
        writer.write(protocol.pack_header({**HELLO, "execs": []}) if asked["op"] == "hello" else OK)
        await writer.drain()

    async with FakeAgent(script) as fake:
        with pytest.raises(LinkBrokenError):
            await events(fake, request(fingerprint="f"))


async def test_the_log_of_an_exec_that_runs_is_read_up_to_now():
    now = record(1, b"so far")
    reply = protocol.pack_header({"ok": True, "size": len(now), "finished": False})
    async with FakeAgent(says(reply + now, hang_up=False)) as fake:
        assert await Agent(fake.dial).read_log("exec_1") == [Output(False, b"so far")]
        assert fake.streams[0].closed == 1


@pytest.mark.parametrize(
    "said", [{"ok": True}, {"ok": True, "size": -1}, {"ok": True, "size": 50}, {"ok": 1}]
)
async def test_a_log_that_is_none(said):
    async with FakeAgent(says(protocol.pack_header(said) + record(1, b"x"))) as fake:
        with pytest.raises(LinkBrokenError):
            await Agent(fake.dial).read_log("exec_1")


async def test_a_log_that_is_gone_is_no_error():
    said = protocol.pack_header({"ok": False, "code": "unknown_exec", "message": ""})
    async with FakeAgent(says(said)) as fake:
        assert await Agent(fake.dial).read_log("exec_1") is None
