"""HTTP for API keys and the audit trail."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.idempotency import request_digest
from sandboxd.identity.schemas import ApiKeyOut, AuditEntryOut, CreatedKeyOut, CreateKeyBody
from sandboxd.identity.service import IdentityService, check_project
from sandboxd.kit.http import IdempotencyKey, PageQuery, known_query_only
from sandboxd.kit.paging import Page

Action = Annotated[str, Query(max_length=64, pattern=r"^[a-z_.]+$", description="Like `sandbox.stop`.")]
ResourceId = Annotated[str, Query(max_length=64, pattern=r"^[!-~]+$")]


def make_router(identity: IdentityService) -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(known_query_only)])
    _add_keys(router, identity)
    _add_audit(router, identity)
    return router


def _add_keys(router: APIRouter, identity: IdentityService) -> None:
    @router.post("/apikeys", status_code=201, tags=["apikeys"])
    async def create_key(
        body: CreateKeyBody, principal: CurrentPrincipal, idempotency_key: IdempotencyKey = None
    ) -> CreatedKeyOut:
        """The answer shows the secret, this once."""
        check_project(principal, body.project)
        created = await identity.create_key(
            principal.project_id,
            body.name,
            actor=principal.key_id,
            idempotency_key=idempotency_key,
            request_digest=request_digest(body),
        )
        return CreatedKeyOut.of(created.row, key=created.key)

    @router.get("/apikeys", tags=["apikeys"])
    async def list_keys(page: PageQuery, principal: CurrentPrincipal) -> Page[ApiKeyOut]:
        """The project's keys, revoked ones too."""
        rows, has_more = await identity.list_keys(principal.project_id, page)
        return Page[ApiKeyOut].of([ApiKeyOut.of(row) for row in rows], has_more=has_more)

    @router.get("/apikeys/current", tags=["apikeys"])
    async def get_current_key(principal: CurrentPrincipal) -> ApiKeyOut:
        """The key that this request is sent with."""
        return ApiKeyOut.of(await identity.get_key(principal.project_id, principal.key_id))

    @router.post("/apikeys/{key_id}/revoke", tags=["apikeys"])
    async def revoke_key(key_id: str, principal: CurrentPrincipal) -> ApiKeyOut:
        """Makes the key useless at once. It stays listed."""
        return ApiKeyOut.of(await identity.revoke_key(principal.project_id, key_id, actor=principal.key_id))

    @router.delete("/apikeys/{key_id}", tags=["apikeys"])
    async def delete_key(key_id: str, principal: CurrentPrincipal) -> ApiKeyOut:
        """The same as revoking it."""
        return ApiKeyOut.of(await identity.revoke_key(principal.project_id, key_id, actor=principal.key_id))


def _add_audit(router: APIRouter, identity: IdentityService) -> None:
    @router.get("/audit", tags=["audit"])
    async def list_audit(
        page: PageQuery,
        principal: CurrentPrincipal,
        action: Action | None = None,
        resource_id: ResourceId | None = None,
    ) -> Page[AuditEntryOut]:
        """Who did what in the project."""
        rows, has_more = await identity.list_audit(
            principal.project_id, page, action=action, resource_id=resource_id
        )
        return Page[AuditEntryOut].of([AuditEntryOut.of(row) for row in rows], has_more=has_more)
