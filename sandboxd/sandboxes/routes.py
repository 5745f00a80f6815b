"""HTTP for sandboxes themselves."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.idempotency import request_digest
from sandboxd.identity.service import Principal, check_project
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.http import IdempotencyKey, PageQuery, known_query_only
from sandboxd.kit.paging import Page
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.schemas import (
    LABEL_NAME,
    CreateSandboxBody,
    EmptyBody,
    PatchSandboxBody,
    SandboxOut,
)
from sandboxd.sandboxes.service import Repeatable, SandboxService
from sandboxd.sandboxes.states import ALIVE

StatusFilter = Literal["alive", "all", "creating", "running", "paused", "stopping", "stopped", "failed"]
LabelFilter = Annotated[
    list[str],
    Query(
        alias="label",
        max_length=16,
        description="`name=value`; may be repeated, and then all of them must be there.",
    ),
]


def make_router(sandboxes: SandboxService) -> APIRouter:
    router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"], dependencies=[Depends(known_query_only)])

    def out(row: Sandbox, principal: Principal) -> SandboxOut:
        live = sandboxes.live.get(row.id)
        return SandboxOut.of(row, principal.project_slug, live.last_active_at if live else None)

    @router.post("", status_code=201)
    async def create_sandbox(
        body: CreateSandboxBody, principal: CurrentPrincipal, idempotency_key: IdempotencyKey = None
    ) -> SandboxOut:
        check_project(principal, body.project)
        repeatable = None
        if idempotency_key is not None:
            repeatable = Repeatable(idempotency_key, request_digest(body))
        return out(await sandboxes.create(principal, body.wanted(), repeatable), principal)

    @router.get("")
    async def list_sandboxes(
        page: PageQuery,
        principal: CurrentPrincipal,
        label: LabelFilter = [],  # noqa: B006 - FastAPI copies it
        status: StatusFilter = "alive",
    ) -> Page[SandboxOut]:
        wanted = {"alive": list(ALIVE), "all": None}.get(status, [status])
        rows, has_more = await sandboxes.list(principal.project_id, wanted, page, _labels(label))
        return Page[SandboxOut].of([out(row, principal) for row in rows], has_more=has_more)

    @router.get("/{sandbox_id}")
    async def get_sandbox(sandbox_id: str, principal: CurrentPrincipal) -> SandboxOut:
        return out(await sandboxes.get(principal.project_id, sandbox_id), principal)

    @router.patch("/{sandbox_id}")
    async def update_sandbox(
        sandbox_id: str, body: PatchSandboxBody, principal: CurrentPrincipal
    ) -> SandboxOut:
        """Changes what the body names, all of it or nothing. `timeout_s` counts from now."""
        check_project(principal, body.project)
        return out(await sandboxes.update(principal, sandbox_id, body.changes()), principal)

    @router.post("/{sandbox_id}/pause")
    async def pause_sandbox(
        sandbox_id: str, principal: CurrentPrincipal, body: EmptyBody | None = None
    ) -> SandboxOut:
        """Freezes all of its processes, memory kept; neither its time nor its idleness runs on."""
        check_project(principal, body.project if body else None)
        return out(await sandboxes.pause(principal, sandbox_id), principal)

    @router.post("/{sandbox_id}/resume")
    async def resume_sandbox(
        sandbox_id: str, principal: CurrentPrincipal, body: EmptyBody | None = None
    ) -> SandboxOut:
        check_project(principal, body.project if body else None)
        return out(await sandboxes.resume(principal, sandbox_id), principal)

    @router.post("/{sandbox_id}/stop")
    async def stop_sandbox(
        sandbox_id: str, principal: CurrentPrincipal, body: EmptyBody | None = None
    ) -> SandboxOut:
        check_project(principal, body.project if body else None)
        return out(await sandboxes.stop(principal, sandbox_id), principal)

    @router.delete("/{sandbox_id}")
    async def delete_sandbox(sandbox_id: str, principal: CurrentPrincipal) -> SandboxOut:
        return out(await sandboxes.stop(principal, sandbox_id), principal)

    return router


def _labels(pairs: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not LABEL_NAME.fullmatch(name):
            raise BadRequestError(
                f"'label' in the query: {pair[:100]!r} is not of the form name=value.", param="label"
            )
        if labels.setdefault(name, value) != value:
            raise BadRequestError(
                f"'label' in the query asks for two values of {name!r}; no sandbox has both.", param="label"
            )
    return labels
