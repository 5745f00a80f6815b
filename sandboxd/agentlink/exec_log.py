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


Event = Started | Output | Failure | Outcome


async def read_log(
    stream: Stream, header: dict[str, Any], body: bytes, deadline: float | None, room: int
) -> AsyncGenerator[tuple[Event, int]]:
    """Sends the request and yields the exec's events with their sizes in the log, up to its Outcome; no
    more than `room` bytes of them, whatever the agent sends."""
    between_requests = False
    turn = _TURN
    try:
        async with asyncio.timeout_at(deadline):
            send(stream, header, body)
            reply = await read_header(stream)
        between_requests = reply.get("ok") is not True
        check(reply)
        if header.get("resume"):
            yield _started(reply), 0
        while True:
            async with asyncio.timeout_at(deadline):
                kind, payload = await read_record(stream)
            room -= protocol.RECORD.size + len(payload)
            if room < 0:
                raise LinkBrokenError("the agent sent more output than it was asked for")
            turn -= 1
            if not turn:
                # Records that have arrived already are read without a pause, and tiny ones are many.
                turn = _TURN
                await asyncio.sleep(0)
            between_requests = kind == protocol.RECORD_END
            event = parse_event(kind, payload)
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


def parse_event(kind: int, payload: bytes) -> Event:
    if kind in (protocol.RECORD_STDOUT, protocol.RECORD_STDERR):
        return Output(kind == protocol.RECORD_STDERR, payload)
    if kind == protocol.RECORD_ERROR:
        return _failure(payload)
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
