"""Running programs over the wire: one exec per call, however often the connection breaks meanwhile."""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from e80_sdk.errors import ConnectionLostError, E80Error, UnexpectedResponseError
from e80_sdk.paging import pages
from e80_sdk.paths import checked_id, sandbox_path
from e80_sdk.pending import undisturbed
from e80_sdk.records import ExecInfo, StdinState
from e80_sdk.results import ExecResult
from e80_sdk.retries import STREAM_SILENCE_S, Failure, silence_is_broken
from e80_sdk.transport import Call, Params, Request, Transport

EXEC_SILENCE_S = 3600.0
"""The longest exec that is waited for when the caller gave no `timeout_s`; the server's own limit ends it
long before."""
EXEC_GRACE_S = 30.0
"""What the server may need beyond the exec's own timeout to end it and answer."""
END_S = 5.0
"""How long whoever leaves a program waits until it is told to end."""
END_PATIENCE_S = 2.0
_log = logging.getLogger("e80_sdk")


class ExecApi:
    """Execs of a sandbox by its id."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def run(self, sandbox_id: str, body: Mapping[str, Any], *, key: str | None = None) -> ExecResult:
        """Run code or a command to its end; as with `events`, leaving early ends the program."""
        key = key or uuid.uuid4().hex
        timeout_s = body.get("timeout_s")
        request = Request(
            "POST",
            f"{sandbox_path(sandbox_id)}/exec",
            body=body,
            idempotency_key=key,
            lasting=True,
            timeout_s=timeout_s + EXEC_GRACE_S if isinstance(timeout_s, int | float) else EXEC_SILENCE_S,
        )
        try:
            return ExecResult.from_body(await self._transport.send(request))
        except asyncio.CancelledError:
            await undisturbed(self._leave(sandbox_id, body, key))
            raise

    async def events(
        self, sandbox_id: str, body: Mapping[str, Any], *, key: str | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Run code or a command and yield its events; the last one is `exec.completed`.

        A stream that breaks is taken up after the last event that came. Whoever leaves early (closes the
        generator or is cancelled) ends the program; code in a context is interrupted, and the context stays.

        Raises:
            ConnectionLostError: The stream ended before the result, and could not be taken up again.
        """
        key = key or uuid.uuid4().hex
        telling = self._telling(sandbox_id, body, key)
        try:
            async with aclosing(telling.events()) as events:
                async for event in events:
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            if telling.exec_id is None:
                await undisturbed(self._leave(sandbox_id, body, key))
            elif not telling.ended:
                await undisturbed(self._end(sandbox_id, body, telling.exec_id))
            raise

    async def follow(
        self, sandbox_id: str, exec_id: str, *, after: int | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """The events of an exec, running or ended, to `exec.completed`: what comes after the event with the
        number `after`, or all that is kept. Leaving early ends nothing.

        Raises:
            ConnectionLostError: The stream ended before the result, and could not be taken up again.
        """
        call = self._transport.call(_events_request(sandbox_id, exec_id, after))
        async with aclosing(_Telling(call, sandbox_id, exec_id, after).events()) as events:
            async for event in events:
                yield event

    async def start(self, sandbox_id: str, body: Mapping[str, Any], *, key: str | None = None) -> ExecResult:
        """Run code or a command in the background; gives it as it is at once, with its id."""
        path = f"{sandbox_path(sandbox_id)}/exec"
        body = {**body, "background": True}
        answer = await self._transport.send(Request("POST", path, body=body, idempotency_key=key or True))
        return ExecResult.from_body(answer)

    async def list(
        self, sandbox_id: str, *, status: str | None = None, limit: int | None = None
    ) -> list[ExecInfo]:
        """What ran and runs in a sandbox, newest first; with that status only, such as `running`."""
        params: Params = {} if status is None else {"status": status}
        bodies = pages(self._transport, f"{sandbox_path(sandbox_id)}/execs", params, limit=limit)
        return [ExecInfo.from_body(body) async for body in bodies]

    async def get(self, sandbox_id: str, exec_id: str) -> ExecResult:
        """One exec, running or ended, with its output where the sandbox still has it."""
        path = _exec_path(sandbox_id, exec_id)
        return ExecResult.from_body(await self._transport.send(Request("GET", path, idempotent=True)))

    async def write(
        self, sandbox_id: str, exec_id: str, data: bytes, *, offset: int | None = None, close: bool = False
    ) -> StdinState:
        """Write to a program's input, and close it afterwards if that is wanted.

        Args:
            data: The bytes; none to ask how many were taken so far.
            offset: Where in all of the input they belong. What was taken before is left out, so that sending
                them again does no harm; without it they are sent once.
            close: Whether they are the last.

        Raises:
            StdinClosedError: It is not open.
            StdinFullError: The program does not read.
        """
        body = {"data": base64.b64encode(data).decode("ascii"), "encoding": "base64", "close": close}
        if offset is not None:
            body["offset"] = offset
        path = f"{_exec_path(sandbox_id, exec_id)}/stdin"
        request = Request("POST", path, body=body, idempotent=offset is not None or not data)
        return StdinState.from_body(await self._transport.send(request))

    async def signal(self, sandbox_id: str, exec_id: str, signal: str | int) -> bool:
        """Send a signal; whether it was delivered: not to a program that has ended."""
        # Sent again only where a second one changes nothing.
        request = _signal_request(sandbox_id, exec_id, signal, idempotent=signal in ("SIGKILL", "KILL", 9))
        return bool((await self._transport.send(request)).get("delivered"))

    async def resize(self, sandbox_id: str, exec_id: str, rows: int, cols: int) -> None:
        """Give a program's terminal another size."""
        path = f"{_exec_path(sandbox_id, exec_id)}/resize"
        await self._transport.send(Request("POST", path, body={"rows": rows, "cols": cols}, idempotent=True))

    def _telling(self, sandbox_id: str, body: Mapping[str, Any], key: str) -> _Telling:
        request = Request(
            "POST",
            f"{sandbox_path(sandbox_id)}/exec",
            body={**body, "stream": True},
            idempotency_key=key,
            lasting=True,
            timeout_s=STREAM_SILENCE_S,
        )
        return _Telling(self._transport.call(request), sandbox_id)

    async def _leave(self, sandbox_id: str, body: Mapping[str, Any], key: str) -> None:
        """End a program whose id nobody has told yet: asked again by its key, the server tells it at once."""
        telling = self._telling(sandbox_id, body, key)
        try:
            async with asyncio.timeout(END_S), aclosing(telling.events()) as events:
                await anext(events, None)
        except (E80Error, TimeoutError) as exc:
            _log.info("a program in %s was left and could not be told to end: %s", sandbox_id, exc)
        if telling.exec_id is not None and not telling.ended:
            await self._end(sandbox_id, body, telling.exec_id)

    async def _end(self, sandbox_id: str, body: Mapping[str, Any], exec_id: str) -> None:
        """End a program that nobody waits for any more. The server does it too when this fails, a little
        later."""
        signal = "SIGKILL" if body.get("context") is None else "SIGINT"
        request = _signal_request(sandbox_id, exec_id, signal, idempotent=True, patience_s=END_PATIENCE_S)
        try:
            async with asyncio.timeout(END_S):
                await self._transport.send(request)
        except (E80Error, TimeoutError) as exc:
            _log.info("exec %s was left and could not be told to end: %s", exec_id, exc)


class _Telling:
    """The events of one exec over all connections that it takes.

    The number of an event is its place in the exec's log, the same whenever it is told.
    """

    def __init__(
        self, call: Call, sandbox_id: str, exec_id: str | None = None, after: int | None = None
    ) -> None:
        self.exec_id = exec_id
        self.ended = False
        self._call = call
        self._sandbox_id = sandbox_id
        self._last = after
        self._started = False

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        while not self.ended:
            failure = None
            async with self._call.events() as events:
                try:
                    async for event in events:
                        if not self._is_new(event):
                            continue
                        self._call.progress()
                        yield event
                        if self.ended:
                            return
                except Failure as caught:
                    failure = silence_is_broken(caught)
            await self._call.again(failure or self._ended_early())
            if self.exec_id is not None:
                self._call.turn(_events_request(self._sandbox_id, self.exec_id, self._last))

    def _is_new(self, event: Mapping[str, Any]) -> bool:
        kind, number = event.get("type"), event.get("sequence_number")
        if not isinstance(kind, str) or not isinstance(number, int):
            raise UnexpectedResponseError("an event of an exec has no type or no number")
        if kind == "exec.started":
            self._check_same(event)
            known, self._started = self._started, True
        else:
            known = kind != "exec.completed" and self._last is not None and number <= self._last
        if not known:
            self._last = number if self._last is None else max(number, self._last)
        self.ended = kind == "exec.completed"
        return not known

    def _check_same(self, event: Mapping[str, Any]) -> None:
        started = event.get("exec")
        exec_id = started.get("id") if isinstance(started, dict) else None
        if not isinstance(exec_id, str):
            raise UnexpectedResponseError("the event exec.started names no exec")
        if self.exec_id is not None and exec_id != self.exec_id:
            raise UnexpectedResponseError(
                f"asked again for exec {self.exec_id}, the server told of exec {exec_id}: it does not know "
                "idempotency keys, and the program may have run twice"
            )
        self.exec_id = exec_id

    def _ended_early(self) -> Failure:
        message = (
            f"the output of exec {self.exec_id or '(not started)'} in {self._sandbox_id} ended before its "
            "result; whether it finished is unknown"
        )
        return Failure(ConnectionLostError(message), resend=True, broken=True)


def _exec_path(sandbox_id: str, exec_id: str) -> str:
    return f"{sandbox_path(sandbox_id)}/execs/{checked_id(exec_id, 'exec')}"


def _events_request(sandbox_id: str, exec_id: str, after: int | None) -> Request:
    return Request(
        "GET",
        f"{_exec_path(sandbox_id, exec_id)}/events",
        params={} if after is None else {"after": after},
        idempotent=True,
        lasting=True,
        timeout_s=STREAM_SILENCE_S,
    )


def _signal_request(
    sandbox_id: str, exec_id: str, signal: str | int, *, idempotent: bool, patience_s: float | None = None
) -> Request:
    path = f"{_exec_path(sandbox_id, exec_id)}/signal"
    return Request(
        "POST", path, body={"signal": signal}, idempotent=idempotent, patience_s=patience_s, timeout_s=END_S
    )
