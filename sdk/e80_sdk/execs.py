"""Running programs over the wire: one exec per call, however often the connection breaks meanwhile."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from e80_sdk.errors import ConnectionLostError, UnexpectedResponseError
from e80_sdk.paging import pages
from e80_sdk.paths import checked_id, sandbox_path
from e80_sdk.records import ExecInfo
from e80_sdk.results import ExecChunk, ExecResult
from e80_sdk.retries import Failure
from e80_sdk.transport import Request, Transport

EXEC_SILENCE_S = 3600.0
"""The longest exec that is waited for when the caller gave no `timeout_s`; the server's own limit ends it
long before."""
EXEC_GRACE_S = 30.0
"""What the server may need beyond the exec's own timeout to end it and answer."""
OUTPUT_EVENTS = ("exec.stdout.delta", "exec.stderr.delta")


class ExecApi:
    """Execs of a sandbox by its id."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def run(self, sandbox_id: str, body: Mapping[str, Any], *, key: str | None = None) -> ExecResult:
        """Run code or a command to its end."""
        return ExecResult.from_body(await self._transport.send(_request(sandbox_id, body, key)))

    async def events(
        self, sandbox_id: str, body: Mapping[str, Any], *, key: str | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Run code or a command and yield its events; the last one is `exec.completed`.

        A stream that breaks is taken up where it broke: the server knows the exec by its key and tells it
        again from the start, and what was told before is left out.

        Raises:
            ConnectionLostError: The stream ended before the result, and could not be taken up again.
        """
        call = self._transport.call(_request(sandbox_id, {**body, "stream": True}, key))
        replay = Replay()
        while True:
            failure = None
            async with call.events() as events:
                replay.restart()
                try:
                    async for event in events:
                        fresh = replay.fresh(event)
                        if fresh is None:
                            continue
                        call.progress()
                        yield fresh
                        if fresh["type"] == "exec.completed":
                            return
                except Failure as caught:
                    failure = caught
            await call.again(failure or _ended_early(sandbox_id, replay.exec_id))

    async def list(self, sandbox_id: str, *, limit: int | None = None) -> list[ExecInfo]:
        """What ran and runs in a sandbox, newest first."""
        bodies = pages(self._transport, f"{sandbox_path(sandbox_id)}/execs", {}, limit=limit)
        return [ExecInfo.from_body(body) async for body in bodies]

    async def get(self, sandbox_id: str, exec_id: str) -> ExecResult:
        """One exec, running or ended, with its output where the sandbox still has it."""
        path = f"{sandbox_path(sandbox_id)}/execs/{checked_id(exec_id, 'exec')}"
        return ExecResult.from_body(await self._transport.send(Request("GET", path, idempotent=True)))


class Replay:
    """Tells what is new in a stream that starts over: output by its bytes, other events by their number.

    A replay holds the same bytes in each of the two outputs, but may cut them elsewhere.
    """

    def __init__(self) -> None:
        self.exec_id: str | None = None
        self._told: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._sent = 0

    def restart(self) -> None:
        """The stream starts over: as much as was told is to be left out."""
        self._left = Counter(self._told)

    def fresh(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """The event, or the part of it that was not told yet, numbered as if nothing had happened.

        Raises:
            UnexpectedResponseError: The stream is of another exec, or cannot be read.
        """
        kind = str(event.get("type"))
        if kind == "exec.started":
            self._check_same(event)
        made = self._fresh_output(kind, event) if kind in OUTPUT_EVENTS else self._fresh_other(kind, event)
        if made is None:
            return None
        made |= {"type": kind, "sequence_number": self._sent}
        self._sent += 1
        return made

    def _fresh_output(self, kind: str, event: Mapping[str, Any]) -> dict[str, Any] | None:
        data = ExecChunk.from_event(event).data
        old = min(self._left[kind], len(data))
        self._left[kind] -= old
        self._told[kind] += len(data) - old
        if not old:
            return dict(event)
        if len(data) == old:
            return None
        return {name: value for name, value in event.items() if name != "encoding"} | _delta(data[old:])

    def _fresh_other(self, kind: str, event: Mapping[str, Any]) -> dict[str, Any] | None:
        if self._left[kind]:
            self._left[kind] -= 1
            return None
        self._told[kind] += 1
        return dict(event)

    def _check_same(self, event: Mapping[str, Any]) -> None:
        started = event.get("exec")
        exec_id = started.get("id") if isinstance(started, dict) else None
        if self.exec_id is not None and exec_id != self.exec_id:
            raise UnexpectedResponseError(
                f"asked again for exec {self.exec_id}, the server told of exec {exec_id}: it does not know "
                "idempotency keys, and the program may have run twice"
            )
        self.exec_id = None if exec_id is None else str(exec_id)


def _delta(data: bytes) -> dict[str, str]:
    try:
        return {"delta": data.decode()}
    except UnicodeDecodeError:
        return {"delta": base64.b64encode(data).decode("ascii"), "encoding": "base64"}


def _ended_early(sandbox_id: str, exec_id: str | None) -> Failure:
    message = (
        f"the output of exec {exec_id or '(not started)'} in {sandbox_id} ended before its result; "
        "whether it finished is unknown"
    )
    return Failure(ConnectionLostError(message), resend=True, broken=True)


def _request(sandbox_id: str, body: Mapping[str, Any], key: str | None) -> Request:
    timeout_s = body.get("timeout_s")
    wait_s = timeout_s + EXEC_GRACE_S if isinstance(timeout_s, int | float) else EXEC_SILENCE_S
    return Request(
        "POST",
        f"{sandbox_path(sandbox_id)}/exec",
        body=body,
        idempotency_key=key or True,
        lasting=True,
        timeout_s=wait_s,
    )
