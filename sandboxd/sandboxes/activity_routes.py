"""HTTP for what happened to sandboxes and what they used."""

import math
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.service import IdentityService, Principal
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.http import PageQuery, known_query_only
from sandboxd.kit.ids import ID_PATTERN
from sandboxd.kit.paging import Page, PageParams
from sandboxd.kit.sse import EVENT_STREAM, KEEP_ALIVE, sse_response
from sandboxd.sandboxes.activity_schemas import EventOut, UsageReportOut
from sandboxd.sandboxes.events import Events
from sandboxd.sandboxes.models import Event
from sandboxd.sandboxes.service import SandboxService
from sandboxd.sandboxes.usage import HOUR_S, Meter

MAX_USAGE_HOURS = 24 * 400
_DEFAULT_USAGE_HOURS = 24 * 30

EventType = Literal[
    "sandbox.created",
    "sandbox.running",
    "sandbox.updated",
    "sandbox.paused",
    "sandbox.resumed",
    "sandbox.stopped",
    "sandbox.failed",
]
Follow = Annotated[
    bool,
    Query(
        description="Stay and send each event when it happens, as server-sent events.",
        json_schema_extra={"x-test-by-hand": "the answer has no end"},
    ),
]
UnixTime = Annotated[int, Query(ge=0, le=2**40)]
SandboxId = Annotated[str, Query(pattern=ID_PATTERN)]
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"model": Page[EventOut], "content": EVENT_STREAM}}


def make_router(
    sandboxes: SandboxService, events: Events, meter: Meter, identity: IdentityService
) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["activity"], dependencies=[Depends(known_query_only)])

    async def answer(
        principal: Principal, page: PageParams, follow: bool, sandbox_id: str | None, type: str | None
    ) -> Response:
        if follow:
            found = await events.follow(principal.project_id, page.after, sandbox_id, type)
            return sse_response(_stream(found, identity, principal))
        rows, has_more = await events.list(principal.project_id, page, sandbox_id, type)
        body = Page[EventOut].of([EventOut.of(row) for row in rows], has_more=has_more)
        return Response(body.model_dump_json(), media_type="application/json")

    @router.get("/events", responses=_EVENTS, response_model=None)
    async def list_events(
        page: PageQuery,
        principal: CurrentPrincipal,
        sandbox_id: SandboxId | None = None,
        type: EventType | None = None,
        follow: Follow = False,
    ) -> Response:
        """What happened to the project's sandboxes; with `follow`, what comes after `after`, or from now."""
        return await answer(principal, page, follow, sandbox_id, type)

    @router.get("/sandboxes/{sandbox_id}/events", responses=_EVENTS, response_model=None)
    async def list_sandbox_events(
        sandbox_id: str,
        page: PageQuery,
        principal: CurrentPrincipal,
        type: EventType | None = None,
        follow: Follow = False,
    ) -> Response:
        """The same for one sandbox, those before its end included when it has ended."""
        row = await sandboxes.get(principal.project_id, sandbox_id)
        return await answer(principal, page, follow, row.id, type)

    @router.get("/usage")
    async def get_usage(
        principal: CurrentPrincipal,
        start: Annotated[UnixTime | None, Query(alias="from")] = None,
        end: Annotated[UnixTime | None, Query(alias="to")] = None,
        bucket: Literal["hour", "day"] = "day",
    ) -> UsageReportOut:
        """What the project's sandboxes used, by the hour or the day (UTC); the last 30 days by default."""
        last = math.ceil((time.time() if end is None else end) / HOUR_S)
        first = last - _DEFAULT_USAGE_HOURS if start is None else start // HOUR_S
        if not 0 <= last - first <= MAX_USAGE_HOURS:
            raise BadRequestError(
                f"'from' {start} to 'to' {end} is not a time between 0 and {MAX_USAGE_HOURS // 24} days.",
                param="from",
            )
        rows = await meter.hours(principal.project_id, first, last)
        return UsageReportOut.of(list(rows), first, last, 1 if bucket == "hour" else 24)

    return router


async def _stream(
    found: AsyncGenerator[Event | None], identity: IdentityService, principal: Principal
) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
    try:
        async for row in found:
            # The stream may be older than the key's life: nothing is told to one that has been revoked.
            await identity.check_active(principal.key_id)
            if row is None:
                yield KEEP_ALIVE, {}
            else:
                yield "sandbox.event", {"event": EventOut.of(row).model_dump()}
    finally:
        await found.aclose()
