"""Calls to one sandbox's agent. Whatever comes back is hostile: bounded first, then parsed.

A stream of records survives the loss of its connection: it is taken up again, by exec id and offset.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from e80_agent import protocol

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError, UnknownExecError
from sandboxd.agentlink.exec_log import Event, parse_event, read_log
from sandboxd.agentlink.files import Files
from sandboxd.agentlink.wire import (
    CALL_TIMEOUT_S,
    Dial,
    call,
    check,
    count,
    integer,
    number,
    read_header,
    read_record,
    send,
    text,
)
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.streams import Stream

REATTACH_TIMEOUT_S = 10.0
MAX_LOSSES = 5
# The agent ends an exec at its deadline; one that is this late has an agent that does not work any more.
OVERTIME_S = 30.0
# What a log may hold beyond its output: the records' heads, the tenant's exception, the outcome.
LOG_EXTRA = 1024 * 1024
MAX_LOG = 32 * 1024 * 1024


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
        self.files = Files(dial)

    async def hello(self, timeout_s: float = CALL_TIMEOUT_S) -> Hello:
        reply = await self._call({"op": "hello"}, timeout_s)
        execs = reply.get("execs")
        return Hello(
            protocol=integer(reply, "protocol"),
            python=str(reply.get("python"))[:20],
            ready=reply.get("ready") is True,
            warm=reply.get("warm") is True,
            held=reply.get("held") is True,
            faults=integer(reply, "faults"),
            uptime_s=number(reply, "uptime_s"),
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
                send(stream, _attach_header(exec_id, 0), b"")
                size = count(check(await read_header(stream)), "size")
                events: list[Event] = []
                while 0 < size <= MAX_LOG:
                    kind, payload = await read_record(stream)
                    size -= protocol.RECORD.size + len(payload)
                    events.append(parse_event(kind, payload))
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
                async with aclosing(read_log(stream, header, body, deadline, max_log - offset)) as log:
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

    async def _call(self, header: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return await call(self._dial, header, timeout_s)


def _attach_header(exec_id: str, offset: int) -> dict[str, Any]:
    return {"op": "attach", "id": exec_id, "offset": offset}


def _known(fact: dict[str, Any]) -> Known:
    return Known(
        id=text(fact.get("id"), 64),
        kind="command" if fact.get("kind") == "command" else "code",
        keyed=fact.get("keyed") is True,
        finished=fact.get("finished") is True,
        age_s=number(fact, "age_s") if "age_s" in fact else 0.0,
        left_s=None if fact.get("left_s") is None else number(fact, "left_s"),
    )
