"""What the fake server remembers: events, usage, the audit log."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

if TYPE_CHECKING:
    from tests.e80_sdk.fake_server import FakeServer

USED = {"sandbox_seconds": 7200.0, "cpu_seconds": 12.5, "bytes_in": 2048, "bytes_out": 3_000_000}
USED |= {"execs": 42, "sandboxes": 3}


def note(fake: FakeServer, kind: str, sandbox_id: str, **data: Any) -> None:
    """An event of a sandbox."""
    event = {"id": f"evt_{len(fake.events):04d}", "object": "sandbox.event", "type": f"sandbox.{kind}"}
    fake.events.append(event | {"sandbox_id": sandbox_id, "created_at": time.time(), "data": data})


def add_history(app: FastAPI, fake: FakeServer) -> None:
    @app.get("/v1/events")
    async def events(
        sandbox_id: str | None = None,
        type: str | None = None,
        follow: bool = False,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
    ) -> Any:
        if follow:
            return StreamingResponse(_follow(fake, sandbox_id, type, after), media_type="text/event-stream")
        found = _matching(fake, sandbox_id, type)[:: 1 if order == "asc" else -1]
        return page(found, limit, after)

    @app.get("/v1/usage")
    async def usage(bucket: str = "hour") -> Any:
        row = {"start": 1_700_000_000.0, **USED}
        return {"object": "usage", "from": 1_700_000_000, "to": 1_700_003_600, "total": USED, "data": [row]}

    @app.get("/v1/audit")
    async def audit(action: str | None = None, limit: int = 20, after: str | None = None) -> Any:
        found = [one for one in fake.audit if action in (None, one["action"])]
        return page(found, limit, after)


def page(found: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """A page of a list."""
    ids = [one["id"] for one in found]
    start = ids.index(after) + 1 if after else 0
    data = found[start : start + limit]
    last_id = data[-1]["id"] if data else None
    return {"object": "list", "data": data, "last_id": last_id, "has_more": start + limit < len(found)}


def _matching(fake: FakeServer, sandbox_id: str | None, kind: str | None) -> list[dict[str, Any]]:
    found = [one for one in fake.events if sandbox_id in (None, one["sandbox_id"])]
    return [one for one in found if kind in (None, one["type"])]


async def _follow(
    fake: FakeServer, sandbox_id: str | None, kind: str | None, after: str | None
) -> AsyncGenerator[bytes]:
    last = after or ""
    number = 0
    while True:
        for event in _matching(fake, sandbox_id, kind):
            if event["id"] <= last:
                continue
            if fake.event_cuts and number >= fake.event_cuts[0]:
                fake.event_cuts.pop(0)
                raise ConnectionError("cut by the test")
            body = {"type": "sandbox.event", "sequence_number": number, "event": event}
            yield f"data: {json.dumps(body)}\n\n".encode()
            last, number = event["id"], number + 1
        yield b": alive\n\n"
        await asyncio.sleep(0.01)
