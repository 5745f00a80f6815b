"""HTTP for contexts. Code is run in one by the exec route."""

from fastapi import APIRouter, Depends

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.idempotency import request_digest
from sandboxd.identity.service import check_project
from sandboxd.kit.http import IdempotencyKey, known_query_only
from sandboxd.kit.paging import Page
from sandboxd.sandboxes.context_schemas import ContextOut, CreateContextBody, DeletedContextOut
from sandboxd.sandboxes.contexts import ContextService
from sandboxd.sandboxes.schemas import EmptyBody
from sandboxd.sandboxes.service import SandboxService


def make_router(sandboxes: SandboxService, contexts: ContextService) -> APIRouter:
    router = APIRouter(
        prefix="/v1/sandboxes/{sandbox_id}/contexts",
        tags=["contexts"],
        dependencies=[Depends(known_query_only)],
    )

    @router.post("", status_code=201)
    async def create_context(
        sandbox_id: str,
        body: CreateContextBody,
        principal: CurrentPrincipal,
        idempotency_key: IdempotencyKey = None,
    ) -> ContextOut:
        """Starts an interpreter that keeps its state. It takes calls when this answers."""
        check_project(principal, body.project)
        async with sandboxes.linked(principal.project_id, sandbox_id) as sandbox:
            made = await contexts.create(
                sandbox,
                body.language,
                body.cwd,
                body.env,
                fingerprint=request_digest(body),
                key=idempotency_key,
            )
            return ContextOut.of(sandbox_id, made)

    @router.get("")
    async def list_contexts(sandbox_id: str, principal: CurrentPrincipal) -> Page[ContextOut]:
        """All contexts of the sandbox, lost ones included; there are few."""
        async with sandboxes.linked(principal.project_id, sandbox_id) as sandbox:
            found = await contexts.list(sandbox)
            return Page[ContextOut].of([ContextOut.of(sandbox_id, item) for item in found], has_more=False)

    @router.get("/{context_id}")
    async def get_context(sandbox_id: str, context_id: str, principal: CurrentPrincipal) -> ContextOut:
        async with sandboxes.linked(principal.project_id, sandbox_id) as sandbox:
            return ContextOut.of(sandbox_id, await contexts.get(sandbox, context_id))

    @router.post("/{context_id}/restart")
    async def restart_context(
        sandbox_id: str, context_id: str, principal: CurrentPrincipal, body: EmptyBody | None = None
    ) -> ContextOut:
        """A new process under the same id; the state is gone, and calls that run or wait are ended."""
        check_project(principal, body.project if body else None)
        async with sandboxes.linked(principal.project_id, sandbox_id) as sandbox:
            return ContextOut.of(sandbox_id, await contexts.restart(sandbox, context_id))

    @router.post("/{context_id}/interrupt")
    async def interrupt_context(
        sandbox_id: str, context_id: str, principal: CurrentPrincipal, body: EmptyBody | None = None
    ) -> ContextOut:
        """What Ctrl-C does: the call that runs is interrupted, the state stays."""
        check_project(principal, body.project if body else None)
        async with sandboxes.linked(principal.project_id, sandbox_id) as sandbox:
            return ContextOut.of(sandbox_id, await contexts.interrupt(sandbox, context_id))

    @router.delete("/{context_id}")
    async def delete_context(
        sandbox_id: str, context_id: str, principal: CurrentPrincipal
    ) -> DeletedContextOut:
        """Ends it and all it started."""
        async with sandboxes.linked(principal.project_id, sandbox_id) as sandbox:
            await contexts.delete(sandbox, context_id)
            return DeletedContextOut(id=context_id)

    return router
