"""Streams of execs: whatever is cut wherever, a client that comes back with the last number it saw has every
byte once, or is told how many it has not."""

import asyncio
import base64
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
from e80_agent import protocol
from e80_agent.log import Log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.agentlink.client import Agent
from sandboxd.agentlink.exec_log import Gap, Outcome, Output, parse_event
from sandboxd.kit.ids import new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.tasks import TaskOwner
from sandboxd.sandboxes.exec_feed import Feeds
from sandboxd.sandboxes.exec_result import Run
from sandboxd.sandboxes.exec_stream import PIECE, Decoder, Teller
from sandboxd.sandboxes.live import Idleness, LiveSandbox, LiveSandboxes, Metered
from tests.sandboxd.agentlink.fake_agent import FakeAgent

END = json.dumps(
    {"exit_code": 0, "signal": None, "reason": "exit", "fault": None, "truncated": False, "spool": None}
    | {"duration_ms": 1.0, "cpu_ms": 1.0, "max_rss_kb": 1}
).encode()


def bytes_of(fields: dict[str, Any]) -> bytes:
    text: str = fields["delta"]
    return base64.b64decode(text) if "encoding" in fields else text.encode()


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def fed(decoder: Decoder, parts: list[bytes]) -> Iterator[tuple[dict[str, Any], int]]:
    for part in parts:
        told = decoder.feed(part)
        if told is not None:
            yield told


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_the_stream_is_the_same_bytes_however_it_was_cut(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder()
    told = list(fed(decoder, pieces(data, cuts)))
    rest = decoder.end()
    told += [rest] if rest is not None else []
    assert b"".join(bytes_of(fields) for fields, _ in told) == data
    assert [len(bytes_of(fields)) for fields, _ in told] == [size for _, size in told]


@given(st.text(max_size=40), st.lists(st.integers(0, 160), max_size=8))
def test_text_stays_text_however_it_was_cut(text: str, cuts: list[int]) -> None:
    decoder = Decoder()
    told = list(fed(decoder, pieces(text.encode(), cuts)))
    assert decoder.end() is None
    assert "".join(fields["delta"] for fields, _ in told) == text


def test_a_big_record_is_told_in_pieces_that_have_numbers_of_their_own() -> None:
    data = ("€" * 3000).encode()
    told = list(Teller().tell(Output(False, data), 5 + len(data)))
    assert b"".join(bytes_of(dict(item.data)) for item in told) == data
    assert all("encoding" not in item.data for item in told)
    assert [item.number for item in told] == [5 + PIECE, 5 + 2 * PIECE, 5 + len(data)]
    # However little it is, and however much of it has to be escaped.
    hostile = list(Teller().tell(Output(False, b"\0" * 65536), 65541))
    assert max(len(item.encoded()) for item in hostile) < 25_000


def test_what_begins_in_the_middle_of_a_character_is_text_from_the_next_one_on() -> None:
    data = "€uro €".encode()
    teller = Teller()
    told = [*teller.tell(Gap(7), 100), *teller.tell(Output(False, data[1:]), 200)]
    assert [item.data for item in told[1:]] == [
        {"delta": base64.b64encode(data[1:3]).decode(), "encoding": "base64"},
        {"delta": "uro €"},
    ]
    assert [item.number for item in told] == [100, 200 - len(data) + 3, 200]


class RingAgent:
    """A real log behind a link that is cut after so many bytes; what leaves the ring is kept, to compare."""

    def __init__(self, exec_id: str, limit: int, ring: bool, cuts: list[int]) -> None:
        self.exec_id = exec_id
        self.history = bytearray()
        self.log = Log(limit, ring, self._dropped)
        self.cuts = cuts
        self.finished = False
        self.grew = asyncio.Event()
        self._behind: dict[object, list[int]] = {}

    def _dropped(self, start: int, end: int) -> None:
        self.history += self.log.read(start, end - start)
        for place in self._behind.values():
            if place[0] <= start:
                place[1] += end - start - protocol.RECORD.size

    def write(self, is_stderr: bool, data: bytes) -> None:
        self.log.output(protocol.RECORD_STDERR if is_stderr else protocol.RECORD_STDOUT, data)
        self._wake()

    def finish(self) -> None:
        self.log.append(protocol.RECORD_END, END)
        self.finished = True
        self._wake()

    def _wake(self) -> None:
        self.grew.set()
        self.grew = asyncio.Event()

    def written(self) -> list[tuple[bool, bytes]]:
        """All output there ever was, in its order."""
        data = bytes(self.history) + self.log.read(self.log.base, len(self.log))
        found, at = [], 0
        while at < len(data):
            kind, size = protocol.RECORD.unpack_from(data, at)
            event = parse_event(kind, data[at + 5 : at + 5 + size])
            if isinstance(event, Output):
                found.append((event.is_stderr, event.data))
            at += 5 + size
        return found

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = protocol.header_length(await reader.readexactly(4))
        header = protocol.parse_header(await reader.readexactly(size))
        if header["op"] == "hello":
            known = {"id": self.exec_id, "kind": "code", "finished": self.finished, "age_s": 1.0}
            reply = {"ok": True, "protocol": 3, "faults": 0, "uptime_s": 1.0, "execs": [known]}
            writer.write(protocol.pack_header(reply))
            await writer.drain()
            return
        left = self.cuts.pop(0) if self.cuts else 1 << 40
        place = [max(int(header["offset"]), self.log.base), 0]
        self._behind[writer] = place
        try:
            head = {"ok": True, "size": self.log.end, "base": self.log.base, "dropped": self.log.dropped}
            data = protocol.pack_header(head)
            while True:
                left = await self._send(writer, data, left)
                if place[0] < self.log.base:
                    gap = json.dumps({"base": self.log.base, "missed": place[1]}).encode()
                    data = protocol.pack_record(protocol.RECORD_GAP, gap)
                    place[:] = [self.log.base, 0]
                    continue
                if place[0] < self.log.end:
                    # Whole records, so that a drop never finds one half sent.
                    size = protocol.RECORD.unpack(self.log.read(place[0], 5))[1]
                    data = self.log.read(place[0], 5 + size)
                    place[0] += len(data)
                    self.log.sent = max(self.log.sent, place[0])
                    continue
                if self.finished:
                    return
                data = b""
                await self.grew.wait()
        finally:
            del self._behind[writer]

    async def _send(self, writer: asyncio.StreamWriter, data: bytes, left: int) -> int:
        writer.write(data[:left])
        await writer.drain()
        if len(data) > left:
            raise ConnectionResetError
        return left - len(data)


class Client:
    """Reads a stream of events; cut off after so many bytes, it comes back with the last id it saw whole."""

    def __init__(self, cuts: list[int], naps: list[int]) -> None:
        self.cuts = cuts
        self.naps = naps
        self.after = -1
        self.visits = 0
        self.events: list[dict[str, Any]] = []

    async def read(self, feeds: Feeds, sandbox: LiveSandbox, exec_id: str) -> None:
        while not self.events or self.events[-1]["type"] != "exec.completed":
            self.visits += 1
            feed = await feeds.open(sandbox, Run(exec_id, sandbox.id, "code", 1.0, keep_output=False))
            assert feed is not None
            async with aclosing(feeds.follow(feed, self.after, "key_1", allowed)) as chunks:
                await self._take(chunks)
            for _ in range(self.naps.pop(0) if self.naps else 0):
                await asyncio.sleep(0)

    async def _take(self, chunks: Any) -> None:
        left = self.cuts.pop(0) if self.cuts else None
        buffer = b""
        async for number, chunk in chunks:
            assert number >= self.after
            buffer += chunk if left is None else chunk[:left]
            *whole, buffer = buffer.split(b"\n\n")
            for text in whole:
                self._take_event(text)
            if left is not None:
                left -= len(chunk)
                if left <= 0:
                    return
            for _ in range(self.naps.pop(0) if self.naps else 0):
                await asyncio.sleep(0)

    def _take_event(self, text: bytes) -> None:
        head, data = text.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert head == b"id: %d" % event["sequence_number"]
        assert event["sequence_number"] > self.after or event["type"] == "exec.gap"
        self.after = event["sequence_number"]
        self.events.append(event)

    def segments(self) -> Iterator[dict[bool, bytes]]:
        """The bytes of both outputs between one gap and the next."""
        found = {False: b"", True: b""}
        for event in self.events:
            if event["type"] == "exec.gap":
                yield found
                found = {False: b"", True: b""}
            elif "delta" in event:
                found["stderr" in event["type"]] += bytes_of(event)
        yield found

    @property
    def missed(self) -> int:
        return sum(event.get("missed_bytes", 0) for event in self.events)


async def allowed() -> None:
    return None


class Nothing:
    """The execs in progress of a daemon that has just been started."""

    def find(self, *_: object) -> None:
        return None

    follow = find


def new_feeds(tasks: TaskOwner, live: LiveSandboxes, feed_bytes: int, linger_s: float) -> Feeds:
    return Feeds(
        metrics=Metrics(),
        tasks=tasks,
        live=live,
        progress=Nothing(),  # type: ignore[arg-type]  # it knows of no exec
        draining=lambda: False,
        patience_s=1.0,
        linger_s=linger_s,
        feed_bytes=feed_bytes,
    )


# Numbers make every place in it unlike all others, and no character has one byte only for long.
TEXT = "".join(f"{number}é€😀" for number in range(1500)).encode()
CUTS = st.lists(st.integers(0, 3000), max_size=4)
WRITE = st.tuples(st.booleans(), st.integers(1, 600), st.integers(0, 6))
PLANS = st.fixed_dictionaries(
    {
        "writes": st.lists(WRITE, min_size=1, max_size=60),
        "ring": st.booleans(),
        "limit": st.integers(200, 4000),
        "feed_bytes": st.sampled_from([1500, 1 << 24]),
        "agent_cuts": CUTS,
        "client_cuts": st.lists(CUTS, min_size=1, max_size=3),
        "naps": st.lists(st.integers(0, 20), max_size=20),
        "binary": st.booleans(),
        # Without any a client that comes back may find that all has to be read anew.
        "linger_s": st.sampled_from([0.0, 60.0]),
    }
)


def test_no_byte_is_lost_or_doubled_whatever_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    tally: Counter[str] = Counter()

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(PLANS)
    def one(plan: dict[str, Any]) -> None:
        asyncio.run(asyncio.wait_for(play(plan, tally), 60))

    one()
    with capsys.disabled():
        sys.stdout.write(f"\nstreams of execs: {dict(tally)}, bytes lost 0, doubled 0\n")
    assert tally["cut by the agent"] > 50
    assert tally["cut by clients"] > 50
    assert tally["bytes announced as missed"] > 0


async def play(plan: dict[str, Any], tally: Counter[str]) -> None:
    exec_id = new_id("exec")
    # An endless log keeps the beginning: nothing may be missing from one that is not a ring.
    limit = plan["limit"] if plan["ring"] else 1 << 20
    server = RingAgent(exec_id, limit, plan["ring"], list(plan["agent_cuts"]))
    clients = [Client(list(cuts), list(plan["naps"])) for cuts in plan["client_cuts"]]
    async with FakeAgent(server.serve) as fake, TaskOwner() as tasks:
        sandbox = live_sandbox(Agent(fake.dial))
        live = LiveSandboxes()
        live.add(sandbox)
        feeds = new_feeds(tasks, live, plan["feed_bytes"], plan["linger_s"])
        reading = [tasks.start("client", client.read(feeds, sandbox, exec_id)) for client in clients]
        text = random.Random(0).randbytes(len(TEXT)) if plan["binary"] else TEXT
        at = {False: 0, True: 0}
        for is_stderr, size, naps in plan["writes"]:
            server.write(is_stderr, text[at[is_stderr] : at[is_stderr] + size])
            at[is_stderr] += size
            for _ in range(naps):
                await asyncio.sleep(0)
        server.finish()
        await asyncio.gather(*reading)
        connections = len(fake.streams)
    kept_all = not plan["ring"] and plan["feed_bytes"] == 1 << 24
    for client in clients:
        check(client, server, kept_all, read_once=plan["linger_s"] > 0)
    tally["streams"] += len(clients)
    tally["cut by the agent"] += len(plan["agent_cuts"]) - len(server.cuts)
    tally["cut by clients"] += sum(len(cuts) for cuts in plan["client_cuts"]) - sum(
        len(client.cuts) for client in clients
    )
    tally["agent connections"] += connections
    tally["bytes written"] += sum(len(data) for _, data in server.written())
    tally["bytes announced as missed"] += sum(client.missed for client in clients)


def check(client: Client, server: RingAgent, kept_all: bool, read_once: bool) -> None:
    """Between gaps all bytes are there and in their order, and gaps and bytes make up the whole."""
    written = {False: b"", True: b""}
    for is_stderr, data in server.written():
        written[is_stderr] += data
    place = {False: 0, True: 0}
    got = 0
    for number, segment in enumerate(client.segments()):
        for is_stderr, data in segment.items():
            found = written[is_stderr].find(data, place[is_stderr])
            assert found >= 0, (data, place)
            assert number or found == 0 or not data
            place[is_stderr] = found + len(data)
            got += len(data)
    assert client.events[0]["type"] == "exec.started"
    total = sum(len(data) for data in written.values())
    if read_once or kept_all:
        assert got + client.missed == total, (got, client.missed, total)
    else:
        # Of what was dropped before it was read anew, the heads of records count as well; what does not are
        # characters that waited for their ends.
        more, less = protocol.RECORD.size * len(server.written()), 6 * client.visits
        assert total - less <= got + client.missed <= total + more, (got, client.missed, total)
    assert not (kept_all and client.missed)


def live_sandbox(agent: Agent) -> LiveSandbox:
    return LiveSandbox(
        id="sbx_1",
        project_id="proj_1",
        agent=agent,
        env={},
        cpus=0.5,
        disk_size_mb=64,
        last_active_at=0.0,
        deadline=None,
        idle=Idleness(0.0),
        metered=Metered(0.0),
    )


def test_every_event_has_the_same_number_at_every_replay() -> None:
    records = [
        Output(False, b"a\xe2\x82"),
        Output(True, b"\xff"),
        Output(False, b"\xacb"),
        Output(True, b"c"),
    ]

    def tell() -> list[tuple[int, str, Any]]:
        teller, end, told = Teller(), 0, []
        for event in records:
            end += 5 + len(event.data)
            told += list(teller.tell(event, end))
        end += 5 + len(END)
        outcome = parse_event(protocol.RECORD_END, END)
        assert isinstance(outcome, Outcome)
        told += list(teller.tell(outcome, end))
        told += list(teller.complete({}, has_end=True))
        return [(item.number, item.type, dict(item.data)) for item in told]

    numbers = [number for number, _, _ in tell()]
    assert tell() == tell()
    assert numbers == sorted(set(numbers))
    # The last is where the log ends.
    assert numbers[-1] == sum(5 + len(event.data) for event in records) + 5 + len(END)
