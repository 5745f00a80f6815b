"""What an agent answers to requests for files is as hostile as all else it says."""

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from e80_agent import protocol
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.agentlink.files import CHANGES, MAX_NAME, MAX_PATH, TYPES, Change, Entry, Files
from tests.sandboxd.agentlink.fake_agent import FakeAgent, says

FILE = {"ok": True, "size": 9, "start": 0, "length": 9, "tag": "1-9-2"}
ENTRY = {
    "name": "a",
    "type": "file",
    "size": 1,
    "mode": 0o644,
    "owner": "user",
    "modified_ns": 1,
    "link": None,
}
CHANGE = {"type": "created", "path": "a"}


def pack(fact: Any) -> bytes:
    data = json.dumps(fact).encode()
    return struct.pack(">I", len(data)) + data


def data(payload: Any) -> bytes:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return protocol.pack_record(protocol.RECORD_DATA, raw)


END = protocol.pack_record(protocol.RECORD_END, b"")


async def upload():
    for _ in range(100):
        yield b"x" * 10_000


async def read(files: Files) -> None:
    content = await files.read(b"x")
    async with aclosing(content.chunks) as chunks:
        async for chunk in chunks:
            assert len(chunk) <= protocol.MAX_RECORD
    assert content.size >= 0
    assert content.length >= 0


async def listing(files: Files) -> None:
    entries, _ = await files.list(b"x", 3, None)
    assert len(entries) <= 3
    for entry in entries:
        check(entry)


async def stat(files: Files) -> None:
    check(await files.stat(b"x", False))


async def watch(files: Files) -> None:
    async with aclosing(await files.watch(b"x", False)) as changes:
        async for change in changes:
            assert isinstance(change, Change)
            assert change.type in CHANGES
            assert len(change.path) <= MAX_PATH


async def write(files: Files) -> None:
    size, _ = await files.write(b"x", upload())
    assert size >= 0


async def unpack(files: Files) -> None:
    entries, size = await files.unpack(b"x", upload())
    assert entries >= 0
    assert size >= 0


async def pack_folder(files: Files) -> None:
    chunks, close = await files.pack(b"x", False)
    try:
        async for chunk in chunks:
            assert len(chunk) <= protocol.MAX_RECORD
    finally:
        close()


CALLS: dict[str, Callable[[Files], Awaitable[None]]] = {
    "read": read,
    "list": listing,
    "stat": stat,
    "watch": watch,
    "write": write,
    "unpack": unpack,
    "pack": pack_folder,
}


def check(entry: Entry) -> None:
    assert entry.type in TYPES
    assert len(entry.name) <= MAX_NAME
    assert 0 <= entry.mode <= 0o7777
    assert len(entry.owner) <= 32
    entry.owner.encode()


BAD: list[tuple[str, str, bytes]] = [
    ("read", "no size", pack({**FILE, "size": None})),
    ("read", "a size below zero", pack({**FILE, "size": -1})),
    ("read", "a size beyond all", pack({**FILE, "size": 2**60})),
    ("read", "no length", pack({**FILE, "length": "9"})),
    ("read", "a tag with a line break", pack({**FILE, "tag": "a\r\nSet-Cookie: b"})),
    ("read", "no tag", pack({**FILE, "tag": None})),
    ("read", "cut in a record", pack(FILE) + b"\5\0\0"),
    ("read", "a record over the cap", pack(FILE) + struct.pack(">BI", 5, 2**31)),
    ("read", "a record of execs", pack(FILE) + protocol.pack_record(1, b"x")),
    ("read", "no end", pack(FILE) + data(b"x")),
    ("stat", "no entry", pack({"ok": True})),
    ("stat", "an unknown type", pack({"ok": True, "entry": {**ENTRY, "type": "door"}})),
    ("stat", "a type that is a list", pack({"ok": True, "entry": {**ENTRY, "type": []}})),
    ("stat", "a mode too large", pack({"ok": True, "entry": {**ENTRY, "mode": 2**20}})),
    ("stat", "a time that is a truth", pack({"ok": True, "entry": {**ENTRY, "modified_ns": True}})),
    ("stat", "a time too far", pack({"ok": True, "entry": {**ENTRY, "modified_ns": 2**63}})),
    ("stat", "a name too long", pack({"ok": True, "entry": {**ENTRY, "name": "x" * 256}})),
    ("stat", "a name that is too long in bytes", pack({"ok": True, "entry": {**ENTRY, "name": "ä" * 200}})),
    ("stat", "a name that has no bytes", pack({"ok": True, "entry": {**ENTRY, "name": "\ud800"}})),
    ("stat", "a name with a NUL", pack({"ok": True, "entry": {**ENTRY, "name": "a\0"}})),
    ("stat", "a link that is a number", pack({"ok": True, "entry": {**ENTRY, "link": 5}})),
    ("list", "more than asked for", pack({"ok": True}) + data([ENTRY] * 4) + END),
    ("list", "no list", pack({"ok": True}) + data({"a": 1}) + END),
    ("list", "no JSON", pack({"ok": True}) + data(b"]") + END),
    ("list", "deep JSON", pack({"ok": True}) + data(b"[" * 100_000) + END),
    ("list", "no end", pack({"ok": True}) + data([ENTRY])),
    ("watch", "no JSON", pack({"ok": True}) + data(b"}")),
    ("watch", "an unknown change", pack({"ok": True}) + data({**CHANGE, "type": "eaten"})),
    ("watch", "a change that is a list", pack({"ok": True}) + data({**CHANGE, "type": []})),
    ("watch", "no path", pack({"ok": True}) + data({"type": "created"})),
    ("watch", "a path too long", pack({"ok": True}) + data({**CHANGE, "path": "x" * 5000})),
    ("watch", "an end without a last word", pack({"ok": True})),
    ("write", "nothing", b""),
    ("write", "half a length", b"\0\0"),
    ("write", "no object", pack([])),
    ("write", "a size below zero", pack({"ok": True, "size": -3, "created": True})),
    ("unpack", "no count", pack({"ok": True, "size": 3})),
    ("unpack", "a count below zero", pack({"ok": True, "size": 3, "entries": -1})),
    ("pack", "no end", pack({"ok": True}) + data(b"x")),
]


@pytest.mark.parametrize(
    ("call", "answer"), [(item[0], item[2]) for item in BAD], ids=[f"{item[0]}: {item[1]}" for item in BAD]
)
async def test_answers_that_are_none(call, answer):
    async with FakeAgent(says(answer)) as fake:
        with pytest.raises(LinkBrokenError):
            await CALLS[call](Files(fake.dial))
        assert fake.streams[0].closed >= 1


async def test_a_connection_is_never_given_back():
    """It was handed to a child of the agent, and ends with it."""
    for call, answer in (
        ("stat", pack({"ok": True, "entry": ENTRY})),
        ("list", pack({"ok": True, "has_more": False}) + data([ENTRY]) + END),
        ("read", pack(FILE) + data(b"x" * 9) + END),
        ("write", pack({"ok": True, "size": 3, "created": True})),
    ):
        async with FakeAgent(says(answer, hang_up=False)) as fake:
            await CALLS[call](Files(fake.dial))
            assert (fake.streams[0].closed >= 1, fake.streams[0].released) == (True, 0)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(CALLS)),
    st.sampled_from([b"", pack({"ok": True}), pack(FILE)]),
    st.binary(max_size=300),
)
@example("list", pack({"ok": True}), data([{**ENTRY, "link": "\udcff"}]) + END)
def test_any_bytes_at_all(call, head, rest):
    async def play() -> None:
        async with FakeAgent(says(head + rest)) as fake:
            try:
                await CALLS[call](Files(fake.dial))
            except (LinkBrokenError, AgentRefusedError):
                pass

    asyncio.run(play())


async def test_an_upload_refused_in_the_middle_says_why():
    refusal = pack({"ok": False, "code": "disk_full", "message": "full"})
    async with FakeAgent(says(refusal, hang_up=False)) as fake:
        with pytest.raises(AgentRefusedError) as caught:
            await Files(fake.dial).write(b"x", upload())
    assert caught.value.agent_code == "disk_full"


async def test_an_upload_whose_connection_is_closed_on_our_side_breaks_as_such(monkeypatch):
    # A pause or a stop closes it. uvloop raises RuntimeError for a write after that.
    original = asyncio.StreamWriter.write

    def strict(writer: asyncio.StreamWriter, data: bytes) -> None:
        if writer.is_closing():
            raise RuntimeError("the handler is closed")
        original(writer, data)

    monkeypatch.setattr(asyncio.StreamWriter, "write", strict)
    async with FakeAgent(says(b"", hang_up=False)) as fake:

        async def chunks():
            yield b"x"
            fake.streams[0].writer.transport.abort()
            yield b"y"

        with pytest.raises(LinkBrokenError):
            await Files(fake.dial).write(b"x", chunks())
