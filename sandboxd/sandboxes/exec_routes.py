"""HTTP for execs: run one, look at those that ran."""

import json

from fastapi import APIRouter, Depends, Response
from starlette.requests import Request

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.service import check_project
from sandboxd.kit.http import IdempotencyKey, PageQuery, known_query_only
from sandboxd.kit.ids import is_id
from sandboxd.kit.paging import Page
from sandboxd.kit.sse import EVENT_STREAM, sse_response
from sandboxd.sandboxes.errors import ExecNotFoundError
from sandboxd.sandboxes.exec import ExecService
from sandboxd.sandboxes.exec_schemas import ExecBody, ExecEntryOut, ExecOut, PastExecOut
from sandboxd.sandboxes.service import SandboxService


def make_exec_router(sandboxes: SandboxService, execs: ExecService) -> APIRouter:
    router = APIRouter(prefix="/v1/sandboxes", tags=["execs"], dependencies=[Depends(known_query_only)])

    @router.post("/{sandbox_id}/exec", responses={200: {"model": ExecOut, "content": EVENT_STREAM}})
    async def exec_in_sandbox(
        sandbox_id: str,
        body: ExecBody,
        principal: CurrentPrincipal,
        request: Request,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """A failing program is a normal result. With `stream` the answer is server-sent events. With an
        `Idempotency-Key` a repeated request follows the first one's exec from its start."""
        check_project(principal, body.project)
        sandbox = await sandboxes.running(principal.project_id, sandbox_id)
        # What a drain interrupts goes on in the sandbox, and the same request finds it again.
        request.scope["repeatable"] = idempotency_key is not None
        if body.stream:
            return sse_response(execs.stream(sandbox, body.wanted(), idempotency_key))
        result = await execs.run(sandbox, body.wanted(), idempotency_key)
        # Built by hand: validating our own output again would be a quarter of the whole call.
        return Response(json.dumps(result), media_type="application/json")

    @router.get("/{sandbox_id}/execs")
    async def list_execs(sandbox_id: str, page: PageQuery, principal: CurrentPrincipal) -> Page[ExecEntryOut]:
        """Those of an ended sandbox, too; ordered by the time of their start."""
        sandbox = await sandboxes.get(principal.project_id, sandbox_id)
        rows, has_more = await execs.page(sandbox.id, page)
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

    return router
