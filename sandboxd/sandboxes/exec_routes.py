"""HTTP for execs: run one, follow it, write to it, look at those that ran."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response
from starlette.requests import Request

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.service import IdentityService, Principal, check_project
from sandboxd.kit.http import IdempotencyKey, PageQuery, known_query_only
from sandboxd.kit.ids import is_id
from sandboxd.kit.leaving import unless_left
from sandboxd.kit.paging import Page
from sandboxd.kit.sse import EVENT_STREAM, resumable_response
from sandboxd.sandboxes.errors import ExecNotFoundError
from sandboxd.sandboxes.exec import ExecService
from sandboxd.sandboxes.exec_schemas import (
    AnyStatus,
    ExecBody,
    ExecEntryOut,
    ExecOut,
    PastExecOut,
    ResizeBody,
    ResizeOut,
    SignalBody,
    SignalOut,
    StdinBody,
    StdinOut,
)
from sandboxd.sandboxes.live import LiveSandbox
from sandboxd.sandboxes.service import SandboxService

_MAX_NUMBER = 2**53 - 1
After = Annotated[
    int | None,
    Query(
        ge=0,
        le=_MAX_NUMBER,
        description="Only what comes after this `sequence_number`.",
    ),
]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", pattern=r"^[0-9]{0,15}$", description="The same as `after`.")
]


def make_exec_router(sandboxes: SandboxService, execs: ExecService, identity: IdentityService) -> APIRouter:
    router = APIRouter(prefix="/v1/sandboxes", tags=["execs"], dependencies=[Depends(known_query_only)])

    @router.post("/{sandbox_id}/exec", responses={200: {"model": ExecOut, "content": EVENT_STREAM}})
    async def exec_in_sandbox(
        sandbox_id: str,
        body: ExecBody,
        principal: CurrentPrincipal,
        request: Request,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """A failing program is a normal result. With `stream` the answer is server-sent events; with
        `background` it comes at once. With an `Idempotency-Key` a repeated request follows the first one's
        exec from its start. Whoever hangs up ends the exec, unless it runs in the background."""
        check_project(principal, body.project)
        sandbox = await sandboxes.running(principal.project_id, sandbox_id)
        # What a drain interrupts goes on in the sandbox, and the same request finds it again.
        request.scope["repeatable"] = idempotency_key is not None
        wanted = body.wanted()
        if wanted.stream:
            return resumable_response(execs.stream(sandbox, wanted, idempotency_key))
        if wanted.background:
            result = await execs.start(sandbox, wanted, idempotency_key)
        else:
            result = await unless_left(request, execs.run(sandbox, wanted, idempotency_key))
        # Built by hand: validating our own output again would be a quarter of the whole call.
        return Response(json.dumps(result), media_type="application/json")

    @router.get("/{sandbox_id}/execs")
    async def list_execs(
        sandbox_id: str, page: PageQuery, principal: CurrentPrincipal, status: AnyStatus | None = None
    ) -> Page[ExecEntryOut]:
        """Those of an ended sandbox, too; ordered by the time of their start."""
        sandbox = await sandboxes.get(principal.project_id, sandbox_id)
        rows, has_more = await execs.page(sandbox.id, page, status, alive=sandbox.is_alive)
        items = [ExecEntryOut.of(row, alive=sandbox.is_alive) for row in rows]
        return Page[ExecEntryOut].of(items, has_more=has_more)

    @router.get("/{sandbox_id}/execs/{exec_id}", responses={200: {"model": PastExecOut}})
    async def get_exec(sandbox_id: str, exec_id: str, principal: CurrentPrincipal) -> Response:
        """The result, with the output as long as the sandbox keeps it; of one that runs, what there is."""
        sandbox = await sandboxes.get(principal.project_id, sandbox_id)
        if not is_id(exec_id):
            raise ExecNotFoundError(exec_id)
        result = await execs.get(principal.project_id, sandbox.id, exec_id, alive=sandbox.is_alive)
        return Response(json.dumps(result), media_type="application/json")

    @router.get(
        "/{sandbox_id}/execs/{exec_id}/events",
        responses={200: {"content": EVENT_STREAM}},
        response_class=Response,
    )
    async def follow_exec(
        sandbox_id: str,
        exec_id: str,
        principal: CurrentPrincipal,
        after: After = None,
        last_event_id: LastEventId = None,
    ) -> Response:
        """What the exec wrote and writes, from its start or after a number, to its end: server-sent events.
        The exec goes on whoever leaves."""
        # A client that comes back by itself sends the first `after` again, and what it has come to.
        number = max(-1 if after is None else after, int(last_event_id or -1))

        async def allowed() -> Any:
            await identity.check_active(principal.key_id)

        project_id, key_id = principal.project_id, principal.key_id
        chunks = await execs.follow_running(project_id, sandbox_id, exec_id, number, key_id, allowed)
        if chunks is None:
            sandbox = await sandboxes.get(project_id, sandbox_id)
            if not is_id(exec_id):
                raise ExecNotFoundError(exec_id)
            chunks = await execs.follow(
                project_id, sandbox.id, exec_id, number, key_id, allowed, alive=sandbox.is_alive
            )
        return resumable_response(chunks)

    _add_input(router, sandboxes, execs)
    return router


def _add_input(router: APIRouter, sandboxes: SandboxService, execs: ExecService) -> None:
    @asynccontextmanager
    async def linked(
        principal: Principal, sandbox_id: str, exec_id: str, project: str | None
    ) -> AsyncIterator[LiveSandbox]:
        check_project(principal, project)
        async with sandboxes.linked(principal.project_id, sandbox_id) as sandbox:
            if not is_id(exec_id):
                raise ExecNotFoundError(exec_id)
            yield sandbox

    @router.post("/{sandbox_id}/execs/{exec_id}/stdin")
    async def write_stdin(
        sandbox_id: str, exec_id: str, body: StdinBody, principal: CurrentPrincipal
    ) -> StdinOut:
        """Writes to the stdin of an exec that was started with `stdin_open` or `pty`."""
        async with linked(principal, sandbox_id, exec_id, body.project) as sandbox:
            size, is_open = await execs.input.write(
                sandbox, exec_id, body.decoded(), body.offset, close=body.close
            )
        return StdinOut(exec_id=exec_id, size=size, open=is_open)

    @router.post("/{sandbox_id}/execs/{exec_id}/signal")
    async def signal_exec(
        sandbox_id: str, exec_id: str, body: SignalBody, principal: CurrentPrincipal
    ) -> SignalOut:
        """To all processes of the exec's group. In a context, SIGINT interrupts the call."""
        async with linked(principal, sandbox_id, exec_id, body.project) as sandbox:
            delivered = await execs.input.signal(sandbox, exec_id, body.signal)
        return SignalOut(exec_id=exec_id, signal=signal.Signals(body.signal).name, delivered=delivered)

    @router.post("/{sandbox_id}/execs/{exec_id}/resize")
    async def resize_exec(
        sandbox_id: str, exec_id: str, body: ResizeBody, principal: CurrentPrincipal
    ) -> ResizeOut:
        """Sets the size of the terminal of an exec that was started with `pty`."""
        async with linked(principal, sandbox_id, exec_id, body.project) as sandbox:
            await execs.input.resize(sandbox, exec_id, body.rows, body.cols)
        return ResizeOut(exec_id=exec_id, rows=body.rows, cols=body.cols)
