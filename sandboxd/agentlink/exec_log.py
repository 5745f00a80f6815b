"""The log of an exec as the agent sends it: records, parsed into events."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from e80_agent import protocol

from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.agentlink.wire import check, count, integer, number, read_header, read_record, send, text
from sandboxd.kit.streams import Stream

# So many records in a row are taken from the buffer before anybody else has a turn.
_TURN = 64


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


@dataclass(frozen=True, slots=True)
class Result:
    """One rich result of a call in a context: MIME types with their data, as the tenant's process told it."""

    bundle: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Gap:
    """Output that was dropped before this follower came to it, from a log that keeps the newest. Who began
    in the middle of the log may be told of some more: the 5 bytes that head each record count."""

    missed_bytes: int


Event = Started | Output | Failure | Result | Gap | Outcome


async def read_log(
    stream: Stream,
    header: dict[str, Any],
    body: bytes,
    deadline: float | None,
    room: int | None,
    offset: int,
    output: int | None = None,
) -> AsyncGenerator[tuple[Event, int]]:
    """Sends the request, which is answered with the log from `offset` on, and yields the exec's events up to
    its Outcome, each with the offset in the log where it ends; no more than `room` bytes of them, whatever
    the agent sends. `output` is how much output there was before the offset, where that is known."""
    between_requests = False
    turn = _TURN
    try:
        async with asyncio.timeout_at(deadline):
            send(stream, header, body)
            reply = await read_header(stream)
        between_requests = reply.get("ok") is not True
        check(reply)
        if header.get("resume"):
            yield _started(reply), offset
        gap, offset = base_of(reply, offset, output)
        if gap is not None:
            yield gap, offset
        while True:
            async with asyncio.timeout_at(deadline):
                kind, payload = await read_record(stream)
            if room is not None:
                room -= protocol.RECORD.size + len(payload)
                if room < 0:
                    raise LinkBrokenError("the agent sent more output than it was asked for")
            turn -= 1
            if not turn:
                # Records that have arrived already are read without a pause, and tiny ones are many.
                turn = _TURN
                await asyncio.sleep(0)
            between_requests = kind == protocol.RECORD_END
            if kind == protocol.RECORD_GAP:
                gap, offset = _gap(payload, offset)
                yield gap, offset
                continue
            event = parse_event(kind, payload)
            offset += protocol.RECORD.size + len(payload)
            if between_requests:
                # Before the consumer gets to see it: it may not come back for more.
                stream.release()
            yield event, offset
            if between_requests:
                return
    finally:
        if between_requests:
            stream.release()
        else:
            stream.close()


def base_of(reply: dict[str, Any], offset: int, output: int | None) -> tuple[Gap | None, int]:
    """Where the log begins that a reply announces, asked for from `offset` on, and what is missing before:
    what was dropped in all, without the `output` that came before the offset."""
    base = count(reply, "base") if "base" in reply else 0
    if base <= offset:
        return None, offset
    return Gap(base - offset if output is None else max(0, count(reply, "dropped") - output)), base


def size_of(event: Event) -> int:
    """How much output an event stands for."""
    if isinstance(event, Output):
        return len(event.data)
    return event.missed_bytes if isinstance(event, Gap) else 0


def _gap(payload: bytes, offset: int) -> tuple[Gap, int]:
    try:
        fact = protocol.parse_header(payload)
    except protocol.ProtocolError as error:
        raise LinkBrokenError("the agent sent a gap that is not JSON") from error
    base, missed = count(fact, "base"), count(fact, "missed")
    if base <= offset:
        raise LinkBrokenError("the agent sent a gap that leads back")
    return Gap(missed), base


def parse_event(kind: int, payload: bytes) -> Event:
    if kind in (protocol.RECORD_STDOUT, protocol.RECORD_STDERR):
        return Output(kind == protocol.RECORD_STDERR, payload)
    if kind == protocol.RECORD_ERROR:
        return _failure(payload)
    if kind == protocol.RECORD_RESULT:
        return _result(payload)
    if kind == protocol.RECORD_END:
        return _outcome(payload)
    raise LinkBrokenError(f"the agent sent a record of unknown kind {kind}")


def _failure(payload: bytes) -> Failure:
    """What the tenant's process says of itself; garbage is shown as such, never trusted."""
    try:
        fact = json.loads(payload)
    except (ValueError, RecursionError):
        fact = None
    if not isinstance(fact, dict):
        return Failure("Error", "", "")
    return Failure(
        name=text(fact.get("name"), 200),
        value=text(fact.get("value"), 8192),
        traceback=text(fact.get("traceback"), 64 * 1024),
    )


def _result(payload: bytes) -> Result:
    """Garbage is shown as an empty bundle. What is kept can be written as JSON again: no lone surrogates, no
    numbers that JSON does not have, no more depth than a parser takes."""
    try:
        bundle = json.loads(payload, parse_constant=_no_constant)
        if not isinstance(bundle, dict):
            return Result({})
        # Encodes only what UTF-8 can, and goes as deep as whoever writes it on will have to.
        json.dumps(bundle, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return Result({})
    return Result(bundle)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _outcome(payload: bytes) -> Outcome:
    try:
        end = protocol.parse_header(payload)
    except protocol.ProtocolError as error:
        raise LinkBrokenError("the agent sent an outcome that is not JSON") from error
    fault = end.get("fault")
    if isinstance(fault, dict):
        # It was admitted, but could not be started: the same as a refusal, only later.
        check(fault)
    reason = end.get("reason")
    if reason not in ("exit", "timeout", "killed", "oom"):
        raise LinkBrokenError("the agent sent an unknown reason")
    return Outcome(
        reason=reason,
        exit_code=None if end.get("exit_code") is None else integer(end, "exit_code"),
        signal=None if end.get("signal") is None else integer(end, "signal"),
        truncated=end.get("truncated") is True,
        spool=None if end.get("spool") is None else text(end["spool"], 500),
        duration_ms=number(end, "duration_ms"),
        cpu_ms=number(end, "cpu_ms"),
        max_rss_kb=count(end, "max_rss_kb"),
    )


def _started(reply: dict[str, Any]) -> Started:
    resumed = reply.get("resumed") is True
    age_s = number(reply, "age_s") if resumed else 0.0
    return Started(resumed, reply.get("finished") is True, age_s)
