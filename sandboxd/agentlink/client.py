"""Calls to one sandbox's agent. Whatever comes back is hostile: bounded first, then parsed.

A stream of records survives the loss of its connection: it is taken up again, by exec id and offset.
"""

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from e80_agent import protocol

from sandboxd.agentlink.contexts import Contexts
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError, UnknownExecError
from sandboxd.agentlink.exec_log import Event, base_of, parse_event, read_log, size_of
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
STDIN_TIMEOUT_S = 15.0
# What an agent takes at once.
MAX_STDIN = 256 * 1024
MAX_LOSSES = 5
# The agent ends an exec at its deadline; one that is this late has an agent that does not work any more.
OVERTIME_S = 30.0
# What a log may hold beyond its output: the records' heads, the tenant's exception, the outcome.
LOG_EXTRA = 1024 * 1024
# And the rich results of a call in a context.
RESULTS_EXTRA = 9 * 1024 * 1024
MAX_LOG = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Known:
    """An exec that the agent has the log of. `left_s` is what is left of its time; `ring` tells that the log
    keeps the newest output."""

    id: str
    kind: Literal["code", "command"]
    keyed: bool
    finished: bool
    age_s: float
    left_s: float | None
    ring: bool = False
    # For its turn in its context: its time has not begun.
    waiting: bool = False
    context: str | None = None


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
    and refuses with exec_differs or exec_gone otherwise.

    `user` is "user" or "nobody". `stdin_open` keeps stdin open after `stdin`, see `Agent.stdin`. `pty` is the
    size, rows and columns, of a terminal for a command; its stdin is open. `ring` keeps the newest output,
    not the oldest. `context` names the context to run `code` in."""

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
    user: str = "user"
    stdin_open: bool = False
    pty: tuple[int, int] | None = None
    ring: bool = False
    context: str | None = None


class Agent:
    """The agent of one sandbox. Raises AgentRefusedError, LinkBrokenError, and what `dial` raises."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._protocol: int | None = None
        self.files = Files(dial)
        self.contexts = Contexts(dial)

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

    async def signal(self, exec_id: str, number: int) -> bool:
        """Sends a signal to the exec's process group; SIGKILL ends all that it started. False when it came
        too late."""
        header = {"op": "signal", "id": exec_id, "signal": number}
        return (await self._call(header, CALL_TIMEOUT_S)).get("delivered") is True

    async def cancel(self, exec_id: str) -> None:
        """Ends the exec as its deadline would: with all it started; a call in a context by an interrupt, and
        with its context if it goes on all the same."""
        # Agents that know nothing of `cancel` know what to do with the signal.
        header = {"op": "signal", "id": exec_id, "signal": int(signal.SIGKILL), "cancel": True}
        await self._call(header, CALL_TIMEOUT_S)

    async def stdin(self, exec_id: str, data: bytes, offset: int | None, close: bool) -> tuple[int, bool]:
        """Hands on input to an exec whose stdin is open, as much as there is room for, 256 KiB at most: waits
        up to 5 s for some. Of `data`, which begins at `offset` of all input, what came before is left out;
        None means that it follows on what came. Returns how much input the exec has been given in all, and
        whether its stdin is still open: `close` closes it once all of `data` was taken."""
        piece = data[:MAX_STDIN]
        close = close and len(piece) == len(data)
        header = {"op": "stdin", "id": exec_id, "offset": offset, "close": close, "body": len(piece)}
        reply = await call(self._dial, header, STDIN_TIMEOUT_S, piece)
        return count(reply, "size"), reply.get("open") is True

    async def resize(self, exec_id: str, rows: int, cols: int) -> None:
        """Sets the size of the exec's terminal and tells what runs in it."""
        await self._call({"op": "resize", "id": exec_id, "rows": rows, "cols": cols}, CALL_TIMEOUT_S)

    async def timers(self, run: bool) -> None:
        """Stops the deadlines of execs (False), or lets them go on with what was left (True). Idempotent."""
        await self._call({"op": "timers", "run": run}, CALL_TIMEOUT_S)

    async def run(self, request: ExecRequest) -> AsyncGenerator[Event]:
        """Starts the exec and yields what it writes, then its Outcome; with a fingerprint, Started before
        all. A lost connection is taken up again;
        LinkBrokenError means that the agent did not come back, and the exec's fate is unknown."""
        async with aclosing(self.start(request)) as events:
            async for event, _ in events:
                yield event

    async def start(self, request: ExecRequest) -> AsyncGenerator[tuple[Event, int]]:
        """Like `run`; with each event comes the offset in the exec's log where it ends."""
        header: dict[str, Any] = {
            "op": _operation(request),
            "id": request.id,
            "env": request.env,
            "cwd": request.cwd,
            "timeout_s": request.timeout_s,
            "output_limit": request.output_limit,
            "spool_limit": request.spool_limit,
            "stream": request.stream,
        }
        body = request.stdin
        if request.context is not None and request.code is not None:
            header["context"] = request.context
            body = request.code
        elif request.code is not None:
            header.update(code_size=len(request.code), fresh=request.fresh)
            body = request.code + request.stdin
        else:
            header["argv"] = list(request.argv)
        header.update(await self._additions(request))
        if request.fingerprint is not None:
            header.update(fingerprint=request.fingerprint, resume=True)
        header["body"] = len(body)
        # Behind other calls its time begins at some time that only the agent knows.
        endless = request.timeout_s is None or request.context is not None
        limit_s = None if endless else (request.timeout_s or 0) + OVERTIME_S
        room = LOG_EXTRA if request.context is None else LOG_EXTRA + RESULTS_EXTRA
        max_log = None if request.ring else request.output_limit + room
        async with aclosing(self._follow(request.id, 0, header, body, limit_s, max_log)) as events:
            async for event in events:
                yield event

    async def attach(self, exec_id: str, offset: int = 0) -> AsyncGenerator[Event]:
        """The exec's events from an offset of its log on, to its Outcome. Raises UnknownExecError."""
        header = _attach_header(exec_id, offset)
        async with aclosing(self._follow(exec_id, offset, header, b"", None, MAX_LOG)) as events:
            async for event, _ in events:
                yield event

    async def follow(self, exec_id: str, offset: int = 0) -> AsyncGenerator[tuple[Event, int]]:
        """Like `attach`; with each event comes the offset in the log where it ends, to go on from. There may
        be any amount of events: a log that keeps the newest output has no end while its exec runs."""
        header = _attach_header(exec_id, offset)
        async with aclosing(self._follow(exec_id, offset, header, b"", None, None)) as events:
            async for item in events:
                yield item

    async def wait(self, exec_id: str) -> list[Event]:
        """What the exec's log ends with, once it has ended: its exception, if there was one, and its Outcome.
        Costs nothing while it runs, however much it writes. Raises UnknownExecError."""
        loop = asyncio.get_running_loop()
        losses = 0
        while True:
            began_at = loop.time()
            try:
                reply = await call(self._dial, {"op": "wait", "id": exec_id}, None)
                break
            except AgentRefusedError as error:
                if error.agent_code != "unknown_exec":
                    raise
                raise UnknownExecError(f"the agent no longer knows exec {exec_id}") from error
            except LinkBrokenError:
                losses = 1 if loop.time() - began_at > OVERTIME_S else losses + 1
                if losses > MAX_LOSSES:
                    raise
        events = [parse_event(protocol.RECORD_END, text(reply.get("end"), protocol.MAX_RECORD).encode())]
        if reply.get("error") is not None:
            error_record = text(reply["error"], protocol.MAX_RECORD).encode()
            events.insert(0, parse_event(protocol.RECORD_ERROR, error_record))
        return events

    async def read_log(self, exec_id: str) -> list[Event] | None:
        """What the exec has written so far, with its Outcome if it has ended; None when the agent has no log
        of it."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                send(stream, _attach_header(exec_id, 0), b"")
                reply = check(await read_header(stream))
                gap, base = base_of(reply, 0, 0)
                size = count(reply, "size") - base
                events: list[Event] = [] if gap is None else [gap]
                while 0 < size <= MAX_LOG:
                    kind, payload = await read_record(stream)
                    if kind == protocol.RECORD_GAP:
                        break  # it writes faster than it is read: what there was is gone already
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
        max_log: int | None,
    ) -> AsyncGenerator[tuple[Event, int]]:
        deadline = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
        stream = await self._dial(CALL_TIMEOUT_S)
        losses = 0
        output = 0 if offset == 0 else None
        while True:
            try:
                room = None if max_log is None else max_log - offset
                async with aclosing(read_log(stream, header, body, deadline, room, offset, output)) as log:
                    async for event, end in log:
                        if end > offset:
                            losses = 0
                        offset = end
                        if output is not None:
                            output += size_of(event)
                        yield event, end
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

    async def _additions(self, request: ExecRequest) -> dict[str, Any]:
        """The fields of a header that agents know since protocol 3. Those before would run the exec without a
        word, as another user and without a terminal."""
        fields: dict[str, Any] = {}
        if request.user != "user":
            fields["user"] = request.user
        if request.stdin_open:
            fields["stdin_open"] = True
        if request.pty is not None:
            fields["pty"] = {"rows": request.pty[0], "cols": request.pty[1]}
        if request.ring:
            fields["ring"] = True
        if fields and self._protocol is None:
            self._protocol = (await self.hello()).protocol
        if fields and self._protocol is not None and self._protocol < 3:
            names = ", ".join(fields)
            raise AgentRefusedError(
                "unsupported", f"this sandbox is of an older release and knows no {names}"
            )
        return fields

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


def _operation(request: ExecRequest) -> str:
    if request.code is None:
        return "command"
    return "python" if request.context is None else "context_exec"


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
        ring=fact.get("ring") is True,
        waiting=fact.get("waiting") is True,
        context=None if fact.get("context") is None else text(fact["context"], 64),
    )
