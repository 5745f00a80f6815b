"""What happened in the project over the wire: events of sandboxes, usage, the audit log."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import datetime
from typing import Literal

from e80_sdk.errors import ConnectionLostError, UnexpectedResponseError
from e80_sdk.paging import pages
from e80_sdk.paths import checked_id
from e80_sdk.records import AuditEntry, SandboxEvent, Usage
from e80_sdk.retries import STREAM_SILENCE_S, Failure, silence_is_broken
from e80_sdk.transport import Params, Request, Transport

Moment = float | datetime
"""Unix seconds, or a datetime (one without a zone is local time)."""
Bucket = Literal["hour", "day"]
Order = Literal["asc", "desc"]
_EVENTS = "/v1/events"


class HistoryApi:
    """Events, usage and audit entries of the project."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def events(
        self,
        *,
        follow: bool = False,
        sandbox_id: str | None = None,
        type: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        order: Order = "asc",
    ) -> AsyncGenerator[SandboxEvent]:
        """Events of sandboxes: those that are there, or, with `follow`, those that come, without end.

        Args:
            follow: Wait for events. A connection that breaks is made again, and none is lost or doubled; but
                while a project has had no event at all, those of the gap are not seen.
            sandbox_id: Of this sandbox only.
            type: Of this type only.
            after: Only what came after the event with this id; with `follow` it defaults to now.
            limit: At most so many.
            order: Oldest or newest first; with `follow` always as they come.
        """
        params: dict[str, str | int] = {}
        if sandbox_id is not None:
            params["sandbox_id"] = checked_id(sandbox_id, "sandbox")
        if type is not None:
            params["type"] = type
        if not follow:
            listed = {**params, "order": order} | ({} if after is None else {"after": after})
            async for body in pages(self._transport, _EVENTS, listed, limit=limit):
                yield SandboxEvent.from_body(body)
            return
        left = limit
        if left is not None and left <= 0:
            return
        async for event in self._follow(params, after):
            yield event
            left = None if left is None else left - 1
            if left == 0:
                return

    async def _follow(self, params: Params, after: str | None) -> AsyncGenerator[SandboxEvent]:
        last = await self._newest() if after is None else after
        request = Request(
            "GET",
            _EVENTS,
            params={**params, "follow": "true"},
            idempotent=True,
            lasting=True,
            timeout_s=STREAM_SILENCE_S,
        )
        call = self._transport.call(request)
        while True:
            if last is not None:
                call.turn(replace(request, params={**params, "follow": "true", "after": last}))
            failure = None
            async with call.events() as events:
                try:
                    async for body in events:
                        call.progress()
                        if body.get("type") != "sandbox.event":
                            continue
                        event = _event_in(body)
                        last = event.id
                        yield event
                except Failure as caught:
                    failure = silence_is_broken(caught)
            await call.again(failure or _ended())

    async def _newest(self) -> str | None:
        """The newest event of all: what comes after it is new, also when the stream opens a little late."""
        query: Params = {"limit": 1, "order": "desc"}
        page = await self._transport.send(Request("GET", _EVENTS, params=query, idempotent=True))
        for body in page.get("data", []):
            return SandboxEvent.from_body(body).id
        return None

    async def usage(
        self, start: Moment | None = None, end: Moment | None = None, bucket: Bucket | None = None
    ) -> Usage:
        """What the project used from `start` to `end`, by the hour or the day."""
        params: dict[str, str | int] = {}
        for name, moment in (("from", start), ("to", end)):
            if moment is not None:
                params[name] = _seconds(moment)
        if bucket is not None:
            params["bucket"] = bucket
        return Usage.from_body(
            await self._transport.send(Request("GET", "/v1/usage", params=params, idempotent=True))
        )

    async def audit(
        self, *, action: str | None = None, resource_id: str | None = None, limit: int | None = None
    ) -> list[AuditEntry]:
        """Who changed what, newest first."""
        given = {"action": action, "resource_id": resource_id}
        params = {name: value for name, value in given.items() if value is not None}
        return [
            AuditEntry.from_body(body)
            async for body in pages(self._transport, "/v1/audit", params, limit=limit)
        ]


def _event_in(body: dict[str, object]) -> SandboxEvent:
    event = body.get("event")
    if not isinstance(event, dict):
        raise UnexpectedResponseError("the stream of events holds something that is no event")
    return SandboxEvent.from_body(event)


def _ended() -> Failure:
    return Failure(ConnectionLostError("the stream of events ended"), resend=True, broken=True)


def _seconds(moment: Moment) -> int:
    return int(moment.timestamp() if isinstance(moment, datetime) else moment)
