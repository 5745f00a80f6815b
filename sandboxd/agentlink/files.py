"""Files of one sandbox, through its agent. Paths and names are bytes; over the wire they go as text in which
lone surrogates stand for what is no UTF-8."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from e80_agent import protocol

from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.agentlink.wire import (
    CALL_TIMEOUT_S,
    Dial,
    check,
    count,
    read_answer,
    read_header,
    read_record,
    send,
    send_chunks,
    text,
)
from sandboxd.kit.streams import Stream

# For what grows with the number of files: a walk, a copy between mounts, a folder of a million names.
WALK_TIMEOUT_S = 600.0
# An archive's next piece: it may hold nothing but names to pass over, or unpack to a thousand times its size.
ARCHIVE_TIMEOUT_S = 60.0
MAX_NAME = 255
MAX_PATH = 4096
TYPES = frozenset(["file", "directory", "symlink", "fifo", "socket", "device"])
CHANGES = frozenset(["created", "modified", "deleted", "moved", "overflow"])

# First and last byte; no last one: to the end; no first one: so many bytes of the end.
Range = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """What there is to know of one name in a folder."""

    name: bytes
    type: str
    size: int
    mode: int
    owner: str
    modified_ns: int
    link: bytes | None


@dataclass(frozen=True, slots=True)
class Content:
    """A file that was opened. `start` is None when the range begins behind its end. The iterator must be used
    up, or `close` called, which does no harm a second time."""

    size: int
    start: int | None
    length: int
    tag: str
    chunks: AsyncGenerator[bytes]
    close: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happened below a watched path. Paths are relative to that; `source` is of a move. Of
    an overflow nothing is known."""

    type: str
    path: bytes
    source: bytes | None


class Files:
    """Raises AgentRefusedError, LinkBrokenError, and what `dial` raises."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial

    async def read(self, path: bytes, part: Range | None = None, tag: str | None = None) -> Content:
        """The file, or a part of it; all of it when `tag` is given and not its own any more."""
        header: dict[str, Any] = {"op": "read_file", "path": _wire(path)}
        if part is not None:
            header.update(range=part, tag=tag)
        stream, reply = await self._open(header, CALL_TIMEOUT_S)
        with _closing_unless_parsed(stream):
            start = None if reply.get("start") is None else count(reply, "start")
            tag = text(reply.get("tag"), 64)
            if not tag.isascii() or not tag.replace("-", "").isalnum():
                raise LinkBrokenError("the agent sent no tag")
            length = count(reply, "length")
            chunks = _chunks(stream, CALL_TIMEOUT_S)
            return Content(count(reply, "size"), start, length, tag, chunks, stream.close)

    async def write(
        self, path: bytes, chunks: AsyncIterable[bytes], mode: int | None = None
    ) -> tuple[int, bool]:
        """Writes the file in one step at the end; returns its size and whether it is new."""
        header = {"op": "write_file", "path": _wire(path), "mode": mode}
        reply = await self._send(header, chunks, CALL_TIMEOUT_S)
        return count(reply, "size"), reply.get("created") is True

    async def stat(self, path: bytes, follow: bool) -> Entry:
        header = {"op": "stat_file", "path": _wire(path), "follow": follow}
        return _entry((await self._call(header, CALL_TIMEOUT_S)).get("entry"))

    async def list(self, path: bytes, limit: int, after: bytes | None) -> tuple[list[Entry], bool]:
        """The next entries behind the name `after`, in the order of their bytes, and whether there are
        more."""
        header = {"op": "list_folder", "path": _wire(path), "limit": limit}
        if after is not None:
            header["after"] = _wire(after)
        stream, reply = await self._open(header, WALK_TIMEOUT_S)
        found: list[Entry] = []
        async with aclosing(_chunks(stream, CALL_TIMEOUT_S)) as batches:
            async for data in batches:
                found += _entries(data)
                if len(found) > limit:
                    raise LinkBrokenError("the agent listed more than it was asked for")
        return found, reply.get("has_more") is True

    async def make_folder(self, path: bytes, parents: bool, mode: int | None) -> tuple[Entry, bool]:
        """The folder, and whether it is new."""
        header = {"op": "make_folder", "path": _wire(path), "parents": parents, "mode": mode}
        reply = await self._call(header, CALL_TIMEOUT_S)
        return _entry(reply.get("entry")), reply.get("created") is True

    async def move(self, path: bytes, to: bytes, overwrite: bool) -> Entry:
        header = {"op": "move", "path": _wire(path), "to": _wire(to), "overwrite": overwrite}
        return _entry((await self._call(header, WALK_TIMEOUT_S)).get("entry"))

    async def remove(self, path: bytes, recursive: bool) -> None:
        header = {"op": "remove", "path": _wire(path), "recursive": recursive}
        await self._call(header, WALK_TIMEOUT_S)

    async def chmod(self, path: bytes, mode: int, recursive: bool) -> Entry:
        header = {"op": "chmod", "path": _wire(path), "mode": mode, "recursive": recursive}
        return _entry((await self._call(header, WALK_TIMEOUT_S)).get("entry"))

    async def pack(self, path: bytes, gzip: bool) -> tuple[AsyncGenerator[bytes], Callable[[], None]]:
        """A tar archive of the folder's content. The iterator must be used up, or the second of the two be
        called, which does no harm twice."""
        stream, _ = await self._open({"op": "pack", "path": _wire(path), "gzip": gzip}, CALL_TIMEOUT_S)
        return _chunks(stream, ARCHIVE_TIMEOUT_S), stream.close

    async def unpack(self, path: bytes, chunks: AsyncIterable[bytes]) -> tuple[int, int]:
        """Unpacks an archive below the path; how many entries it had, and how many bytes of content."""
        reply = await self._send({"op": "unpack", "path": _wire(path)}, chunks, ARCHIVE_TIMEOUT_S)
        return count(reply, "entries"), count(reply, "size")

    async def watch(self, path: bytes, recursive: bool) -> AsyncGenerator[Change]:
        """What happens to and below the path from now on. The iterator must be closed; it ends when the path
        itself is gone."""
        header = {"op": "watch", "path": _wire(path), "recursive": recursive}
        stream, _ = await self._open(header, ARCHIVE_TIMEOUT_S)
        return _changes(stream)

    async def _call(self, header: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A request with one answer. Its connection ends with it: it was handed to a child of the agent."""
        stream, reply = await self._open(header, timeout_s)
        stream.close()
        return reply

    async def _open(self, header: dict[str, Any], timeout_s: float) -> tuple[Stream, dict[str, Any]]:
        """A request whose answer goes on behind its header."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            send(stream, header, b"")
            async with asyncio.timeout(timeout_s):
                return stream, check(await read_header(stream))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            stream.close()
            raise LinkBrokenError(f"the agent hung up before it answered {header['op']!r}") from error
        except BaseException:
            stream.close()
            raise

    async def _send(
        self, header: dict[str, Any], chunks: AsyncIterable[bytes], timeout_s: float
    ) -> dict[str, Any]:
        """A request with data of any size, and the answer to it."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            send(stream, header, b"")
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(read_answer(stream))
                await send_chunks(stream, chunks, answer, timeout_s)
                async with asyncio.timeout(timeout_s):
                    reply = await answer
        except BaseExceptionGroup as faults:
            # Of the two only the sender can fail, and then the answer was cancelled: one fault, its own.
            fault = faults.exceptions[0]
            if isinstance(fault, TimeoutError):
                raise LinkBrokenError("the agent did not say that the data was written") from fault
            raise fault from None
        finally:
            stream.close()
        if reply is None:
            raise LinkBrokenError("the agent hung up before the data was written")
        return check(reply)


class _closing_unless_parsed:
    """Closes the stream of an answer that is nonsense."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stream.close()


async def _chunks(stream: Stream, timeout_s: float) -> AsyncGenerator[bytes]:
    try:
        while True:
            async with asyncio.timeout(timeout_s):
                kind, payload = await read_record(stream)
            if kind == protocol.RECORD_END:
                return
            if kind != protocol.RECORD_DATA:
                raise LinkBrokenError("the agent could not read the file to its end")
            yield payload
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
        raise LinkBrokenError("the agent hung up in the middle of the file") from error
    finally:
        stream.close()


async def _changes(stream: Stream) -> AsyncGenerator[Change]:
    try:
        while True:
            kind, payload = await read_record(stream)
            if kind == protocol.RECORD_END:
                return
            if kind != protocol.RECORD_DATA:
                raise LinkBrokenError("the agent stopped watching")
            yield _change(payload)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise LinkBrokenError("the agent hung up while it watched") from error
    finally:
        stream.close()


def _change(payload: bytes) -> Change:
    try:
        fact = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise LinkBrokenError("the agent sent a change that is no JSON") from error
    kind = fact.get("type") if isinstance(fact, dict) else None
    if not isinstance(kind, str) or kind not in CHANGES:
        raise LinkBrokenError("the agent sent an unknown change")
    source = fact.get("source")
    return Change(
        kind, _bytes(fact.get("path"), MAX_PATH), None if source is None else _bytes(source, MAX_PATH)
    )


def _entries(payload: bytes) -> list[Entry]:
    try:
        facts = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise LinkBrokenError("the agent sent a list that is no JSON") from error
    if not isinstance(facts, list):
        raise LinkBrokenError("the agent sent no list")
    return [_entry(fact) for fact in facts]


def _entry(fact: object) -> Entry:
    if not isinstance(fact, dict):
        raise LinkBrokenError("the agent sent no entry")
    kind, mode, link = fact.get("type"), count(fact, "mode"), fact.get("link")
    if not isinstance(kind, str) or kind not in TYPES or mode > 0o7777:
        raise LinkBrokenError("the agent sent an unknown type or mode")
    modified_ns = fact.get("modified_ns")
    if type(modified_ns) is not int or abs(modified_ns) >= 2**63:
        raise LinkBrokenError("the agent sent no time")
    return Entry(
        name=_bytes(fact.get("name"), MAX_NAME),
        type=kind,
        size=count(fact, "size"),
        mode=mode,
        owner=text(fact.get("owner"), 32),
        modified_ns=modified_ns,
        link=None if link is None else _bytes(link, MAX_PATH),
    )


def _wire(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _bytes(value: object, limit: int) -> bytes:
    """A name or path that came from the agent."""
    if not isinstance(value, str) or len(value) > limit or "\0" in value:
        raise LinkBrokenError("the agent sent no name")
    try:
        data = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise LinkBrokenError("the agent sent a name that has no bytes") from error
    if len(data) > limit:
        raise LinkBrokenError("the agent sent a name that is too long")
    return data
