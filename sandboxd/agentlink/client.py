"""Calls to one sandbox's agent. Whatever comes back is hostile: bounded first, then parsed.

A stream of records survives the loss of its connection: it is taken up again, by exec id and offset.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from e80_agent import protocol

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError, UnknownExecError
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.streams import Stream

CALL_TIMEOUT_S = 10.0
REATTACH_TIMEOUT_S = 10.0
MAX_LOSSES = 5
# The agent ends an exec at its deadline; one that is this late has an agent that does not work any more.
OVERTIME_S = 30.0
WRITE_CHUNK = 256 * 1024
# What a log may hold beyond its output: the records' heads, the tenant's exception, the outcome.
LOG_EXTRA = 1024 * 1024
MAX_LOG = 32 * 1024 * 1024
# So many records in a row are taken from the buffer before anybody else has a turn.
_TURN = 64

_NUMBER = (int, float)

Dial = Callable[[float], Awaitable[Stream]]


@dataclass(frozen=True, slots=True)
class Known:
    """An exec that the agent has the log of. `left_s` is what is left of its time."""

    id: str
    kind: Literal["code", "command"]
    keyed: bool
    finished: bool
    age_s: float
    left_s: float | None


@dataclass(frozen=True, slots=True)
class Hello:
    """`held` tells that deadlines stand still, see `Agent.timers`."""

    protocol: int
    python: str
    ready: bool
    warm: bool
    held: bool
    faults: int
    uptime_s: float
    execs: tuple[Known, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The agent has taken a request with a key: it runs now, or is the repetition of one that came before."""

    resumed: bool
    finished: bool
    age_s: float


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes the tenant wrote."""

    is_stderr: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """The exception that ended tenant Python code, as the tenant's process told it."""

    name: str
    value: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an exec ended. `reason` is exit, timeout, killed or oom."""

    reason: str
    exit_code: int | None
    signal: int | None
    truncated: bool
    spool: str | None
    duration_ms: float
    cpu_ms: float
    max_rss_kb: int


Event = Started | Output | Failure | Outcome


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """One run. Either `code` (Python) or `argv`. Times in seconds, limits in bytes. With a `fingerprint` the
    request may be repeated: the agent follows what runs or ran under this id, if the fingerprint is the same,
    and refuses with exec_differs or exec_gone otherwise."""

    id: str
    env: dict[str, str]
    cwd: str
    timeout_s: float | None
    output_limit: int
    spool_limit: int
    stream: bool
    stdin: bytes = b""
    code: bytes | None = None
    argv: tuple[str, ...] = ()
    fresh: bool = False
    fingerprint: str | None = None


class Agent:
    """The agent of one sandbox. Raises AgentRefusedError, LinkBrokenError, and what `dial` raises."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial

    async def hello(self, timeout_s: float = CALL_TIMEOUT_S) -> Hello:
        reply = await self._call({"op": "hello"}, timeout_s)
        execs = reply.get("execs")
        return Hello(
            protocol=_integer(reply, "protocol"),
            python=str(reply.get("python"))[:20],
            ready=reply.get("ready") is True,
            warm=reply.get("warm") is True,
            held=reply.get("held") is True,
            faults=_integer(reply, "faults"),
            uptime_s=_number(reply, "uptime_s"),
            execs=tuple(
                _known(item)
                for item in (execs if isinstance(execs, list) else [])[:256]
                if isinstance(item, dict)
            ),
        )

    async def warm(self) -> bool:
        """Asks for the interpreter with the heavy libraries; True when it is there already."""
        return (await self._call({"op": "warm"}, CALL_TIMEOUT_S)).get("warm") is True

    async def signal(self, exec_id: str, number: int) -> None:
        await self._call({"op": "signal", "id": exec_id, "signal": number}, CALL_TIMEOUT_S)

    async def timers(self, run: bool) -> None:
        """Stops the deadlines of execs (False), or lets them go on with what was left (True). Idempotent."""
        await self._call({"op": "timers", "run": run}, CALL_TIMEOUT_S)

    async def run(self, request: ExecRequest) -> AsyncGenerator[Event]:
        """Starts the exec and yields what it writes, then its Outcome; with a fingerprint, Started before
        all. A lost connection is taken up again;
        LinkBrokenError means that the agent did not come back, and the exec's fate is unknown."""
        header: dict[str, Any] = {
            "op": "command" if request.code is None else "python",
            "id": request.id,
            "env": request.env,
            "cwd": request.cwd,
            "timeout_s": request.timeout_s,
            "output_limit": request.output_limit,
            "spool_limit": request.spool_limit,
            "stream": request.stream,
        }
        body = request.stdin
        if request.code is not None:
            header.update(code_size=len(request.code), fresh=request.fresh)
            body = request.code + request.stdin
        else:
            header["argv"] = list(request.argv)
        if request.fingerprint is not None:
            header.update(fingerprint=request.fingerprint, resume=True)
        header["body"] = len(body)
        limit_s = None if request.timeout_s is None else request.timeout_s + OVERTIME_S
        max_log = request.output_limit + LOG_EXTRA
        async with aclosing(self._follow(request.id, 0, header, body, limit_s, max_log)) as events:
            async for event in events:
                yield event

    async def attach(self, exec_id: str, offset: int = 0) -> AsyncGenerator[Event]:
        """The exec's events from an offset of its log on, to its Outcome. Raises UnknownExecError."""
        header = _attach_header(exec_id, offset)
        async with aclosing(self._follow(exec_id, offset, header, b"", None, MAX_LOG)) as events:
            async for event in events:
                yield event

    async def read_log(self, exec_id: str) -> list[Event] | None:
        """What the exec has written so far, with its Outcome if it has ended; None when the agent has no log
        of it."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                _send(stream, _attach_header(exec_id, 0), b"")
                size = _count(_check(await _read_header(stream)), "size")
                events: list[Event] = []
                while 0 < size <= MAX_LOG:
                    kind, payload = await _read_record(stream)
                    size -= protocol.RECORD.size + len(payload)
                    events.append(_event(kind, payload))
                return events
        except AgentRefusedError as error:
            if error.agent_code != "unknown_exec":
                raise
            return None
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            raise LinkBrokenError(f"the agent hung up in the middle of the log of {exec_id}") from error
        finally:
            # The agent would go on with what the exec writes from here on.
            stream.close()

    async def _follow(
        self,
        exec_id: str,
        offset: int,
        header: dict[str, Any],
        body: bytes,
        limit_s: float | None,
        max_log: int,
    ) -> AsyncGenerator[Event]:
        deadline = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
        stream = await self._dial(CALL_TIMEOUT_S)
        losses = 0
        while True:
            try:
                async with aclosing(_read_log(stream, header, body, deadline, max_log - offset)) as log:
                    async for event, size in log:
                        offset += size
                        if size:
                            losses = 0
                        yield event
                return
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                losses += 1
                if losses > MAX_LOSSES:
                    raise LinkBrokenError(f"lost the agent while following exec {exec_id}") from error
            except AgentRefusedError as error:
                if error.agent_code != "unknown_exec":
                    raise
                raise UnknownExecError(f"the agent no longer knows exec {exec_id}") from error
            except TimeoutError as error:
                raise LinkBrokenError(f"exec {exec_id} is long past its deadline") from error
            # Only a request that never arrived may be sent again; else the exec is taken up, not run twice.
            if offset > 0 or await self._knows(exec_id):
                header, body = _attach_header(exec_id, offset), b""
            stream = await self._redial(exec_id)

    async def _redial(self, exec_id: str) -> Stream:
        try:
            return await self._dial(REATTACH_TIMEOUT_S)
        except SandboxdError as error:
            raise LinkBrokenError(
                f"the agent did not come back to exec {exec_id}: {error.message}"
            ) from error

    async def _knows(self, exec_id: str) -> bool:
        try:
            return any(item.id == exec_id for item in (await self.hello(REATTACH_TIMEOUT_S)).execs)
        except SandboxdError as error:
            raise LinkBrokenError(
                f"the agent did not come back to exec {exec_id}: {error.message}"
            ) from error

    async def read_file(self, path: str) -> tuple[int, AsyncGenerator[bytes]]:
        """The file's size when it was opened, and its bytes. The iterator must be used up or closed."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            _send(stream, {"op": "read_file", "path": path}, b"")
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = _check(await _read_header(stream))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            stream.close()
            raise LinkBrokenError("the agent hung up before the file") from error
        except BaseException:
            stream.close()
            raise
        try:
            return _count(reply, "size"), _file_chunks(stream)
        except LinkBrokenError:
            stream.close()
            raise

    async def write_file(self, path: str, chunks: AsyncIterable[bytes]) -> tuple[int, bool]:
        """Writes the file in one step at the end; returns its size and whether it is new."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            _send(stream, {"op": "write_file", "path": path}, b"")
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(_read_answer(stream))
                await _send_chunks(stream, chunks, answer)
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    reply = await answer
        except BaseExceptionGroup as faults:
            # Of the two only the sender can fail, and then the answer was cancelled: one fault, its own.
            fault = faults.exceptions[0]
            if isinstance(fault, TimeoutError):
                raise LinkBrokenError("the agent did not say that the file was written") from fault
            raise fault from None
        finally:
            stream.close()
        if reply is None:
            raise LinkBrokenError("the agent hung up before the file was written")
        reply = _check(reply)
        return _count(reply, "size"), reply.get("created") is True

    async def _call(self, header: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        stream = await self._dial(timeout_s)
        done = False
        try:
            async with asyncio.timeout(timeout_s):
                _send(stream, header, b"")
                reply = await _read_header(stream)
            done = True
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            raise LinkBrokenError(f"the agent did not answer {header['op']!r}") from error
        finally:
            if done:
                stream.release()
            else:
                stream.close()
        return _check(reply)


def _attach_header(exec_id: str, offset: int) -> dict[str, Any]:
    return {"op": "attach", "id": exec_id, "offset": offset}


def _send(stream: Stream, header: dict[str, Any], body: bytes) -> None:
    try:
        head = protocol.pack_header(header)
    except protocol.ProtocolError as error:
        raise AgentRefusedError("bad_request", f"arguments and variables are too large: {error}") from error
    stream.writer.write(head + body)


async def _read_answer(stream: Stream) -> dict[str, Any] | None:
    """The agent's answer, whenever it comes; None when it hangs up or breaks the protocol instead."""
    try:
        return await _read_header(stream)
    except (asyncio.IncompleteReadError, ConnectionError, LinkBrokenError):
        return None


async def _send_chunks(stream: Stream, chunks: AsyncIterable[bytes], answer: asyncio.Future[Any]) -> None:
    """Sends the data unless the agent answers before its end: then there is an error to be read."""
    try:
        async for chunk in chunks:
            for start in range(0, len(chunk), WRITE_CHUNK):
                _write_record(stream, protocol.RECORD_DATA, chunk[start : start + WRITE_CHUNK])
                # Waits for the agent only, not for the client: that one may be as slow as it likes.
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await stream.writer.drain()
            if answer.done():
                return
        _write_record(stream, protocol.RECORD_END, b"")
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await stream.writer.drain()
    except ConnectionError:
        # The agent hung up: its last word, if there is one, says why.
        return


def _write_record(stream: Stream, kind: int, payload: bytes) -> None:
    if stream.writer.is_closing():
        # The sandbox was paused or stopped meanwhile. uvloop takes a write now for a fault of the program.
        raise ConnectionResetError
    stream.writer.write(protocol.pack_record(kind, payload))


async def _read_header(stream: Stream) -> dict[str, Any]:
    try:
        size = protocol.header_length(await stream.reader.readexactly(4))
        return protocol.parse_header(await stream.reader.readexactly(size))
    except protocol.ProtocolError as error:
        raise LinkBrokenError(f"the agent broke the protocol: {error}") from error


def _check(reply: dict[str, Any]) -> dict[str, Any]:
    if reply.get("ok") is True:
        return reply
    code = reply.get("code")
    if not isinstance(code, str) or code not in protocol.ERROR_CODES:
        raise LinkBrokenError("the agent answered with an unknown error code")
    raise AgentRefusedError(code, _text(reply.get("message"), 1000))


async def _read_record(stream: Stream) -> tuple[int, bytes]:
    kind, size = protocol.RECORD.unpack(await stream.reader.readexactly(protocol.RECORD.size))
    if size > protocol.MAX_RECORD:
        raise LinkBrokenError(f"the agent sent a record of {size} bytes, over the cap")
    return kind, await stream.reader.readexactly(size)


def _event(kind: int, payload: bytes) -> Event:
    if kind in (protocol.RECORD_STDOUT, protocol.RECORD_STDERR):
        return Output(kind == protocol.RECORD_STDERR, payload)
    if kind == protocol.RECORD_ERROR:
        return _failure(payload)
    if kind == protocol.RECORD_END:
        return _outcome(payload)
    raise LinkBrokenError(f"the agent sent a record of unknown kind {kind}")


async def _read_log(
    stream: Stream, header: dict[str, Any], body: bytes, deadline: float | None, room: int
) -> AsyncGenerator[tuple[Event, int]]:
    """Sends the request and yields the exec's events with their sizes in the log, up to its Outcome; no
    more than `room` bytes of them, whatever the agent sends."""
    between_requests = False
    turn = _TURN
    try:
        async with asyncio.timeout_at(deadline):
            _send(stream, header, body)
            reply = await _read_header(stream)
        between_requests = reply.get("ok") is not True
        _check(reply)
        if header.get("resume"):
            yield _started(reply), 0
        while True:
            async with asyncio.timeout_at(deadline):
                kind, payload = await _read_record(stream)
            room -= protocol.RECORD.size + len(payload)
            if room < 0:
                raise LinkBrokenError("the agent sent more output than it was asked for")
            turn -= 1
            if not turn:
                # Records that have arrived already are read without a pause, and tiny ones are many.
                turn = _TURN
                await asyncio.sleep(0)
            between_requests = kind == protocol.RECORD_END
            event = _event(kind, payload)
            if between_requests:
                # Before the consumer gets to see it: it may not come back for more.
                stream.release()
            yield event, protocol.RECORD.size + len(payload)
            if between_requests:
                return
    finally:
        if between_requests:
            stream.release()
        else:
            stream.close()


async def _file_chunks(stream: Stream) -> AsyncGenerator[bytes]:
    try:
        while True:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                kind, payload = await _read_record(stream)
            if kind == protocol.RECORD_END:
                return
            if kind != protocol.RECORD_DATA:
                raise LinkBrokenError("the agent could not read the file to its end")
            yield payload
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
        raise LinkBrokenError("the agent hung up in the middle of the file") from error
    finally:
        stream.close()


def _failure(payload: bytes) -> Failure:
    """What the tenant's process says of itself; garbage is shown as such, never trusted."""
    try:
        fact = json.loads(payload)
    except (ValueError, RecursionError):
        fact = None
    if not isinstance(fact, dict):
        return Failure("Error", "", "")
    return Failure(
        name=_text(fact.get("name"), 200),
        value=_text(fact.get("value"), 8192),
        traceback=_text(fact.get("traceback"), 64 * 1024),
    )


def _outcome(payload: bytes) -> Outcome:
    try:
        end = protocol.parse_header(payload)
    except protocol.ProtocolError as error:
        raise LinkBrokenError("the agent sent an outcome that is not JSON") from error
    fault = end.get("fault")
    if isinstance(fault, dict):
        # It was admitted, but could not be started: the same as a refusal, only later.
        _check(fault)
    reason = end.get("reason")
    if reason not in ("exit", "timeout", "killed", "oom"):
        raise LinkBrokenError("the agent sent an unknown reason")
    return Outcome(
        reason=reason,
        exit_code=None if end.get("exit_code") is None else _integer(end, "exit_code"),
        signal=None if end.get("signal") is None else _integer(end, "signal"),
        truncated=end.get("truncated") is True,
        spool=None if end.get("spool") is None else _text(end["spool"], 500),
        duration_ms=_number(end, "duration_ms"),
        cpu_ms=_number(end, "cpu_ms"),
        max_rss_kb=_count(end, "max_rss_kb"),
    )


def _started(reply: dict[str, Any]) -> Started:
    resumed = reply.get("resumed") is True
    age_s = _number(reply, "age_s") if resumed else 0.0
    return Started(resumed, reply.get("finished") is True, age_s)


def _known(fact: dict[str, Any]) -> Known:
    return Known(
        id=_text(fact.get("id"), 64),
        kind="command" if fact.get("kind") == "command" else "code",
        keyed=fact.get("keyed") is True,
        finished=fact.get("finished") is True,
        age_s=_number(fact, "age_s") if "age_s" in fact else 0.0,
        left_s=None if fact.get("left_s") is None else _number(fact, "left_s"),
    )


def _integer(fact: dict[str, Any], name: str) -> int:
    value = fact.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**53) < value < 2**53:
        raise LinkBrokenError(f"the agent sent no number as {name}")
    return value


def _count(fact: dict[str, Any], name: str) -> int:
    value = _integer(fact, name)
    if value < 0:
        raise LinkBrokenError(f"the agent sent a negative number as {name}")
    return value


def _number(fact: dict[str, Any], name: str) -> float:
    """A duration or an amount: finite, and of a size that can be added up."""
    value = fact.get(name)
    if not isinstance(value, _NUMBER) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise LinkBrokenError(f"the agent sent no number as {name}")
    return float(value)


def _text(value: object, limit: int) -> str:
    """Text that can be encoded again: lone surrogates, which JSON allows, are replaced."""
    text = value if isinstance(value, str) else ""
    return text[:limit].encode("utf-8", "replace").decode()
