"""HTTP for API keys."""

from fastapi import APIRouter, Depends

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.schemas import ApiKeyOut, CreatedKeyOut, CreateKeyBody
from sandboxd.identity.service import IdentityService, check_project
from sandboxd.kit.http import PageQuery, known_query_only
from sandboxd.kit.paging import Page


def make_router(identity: IdentityService) -> APIRouter:
    router = APIRouter(prefix="/v1/apikeys", tags=["apikeys"], dependencies=[Depends(known_query_only)])

    @router.post("", status_code=201)
    async def create_key(body: CreateKeyBody, principal: CurrentPrincipal) -> CreatedKeyOut:
        check_project(principal, body.project)
        created = await identity.create_key(principal.project_id, body.name)
        return CreatedKeyOut.of(created.row, key=created.key)

    @router.get("")
    async def list_keys(page: PageQuery, principal: CurrentPrincipal) -> Page[ApiKeyOut]:
        rows, has_more = await identity.list_keys(principal.project_id, page)
        return Page[ApiKeyOut].of([ApiKeyOut.of(row) for row in rows], has_more=has_more)

    @router.get("/current")
    async def get_current_key(principal: CurrentPrincipal) -> ApiKeyOut:
        return ApiKeyOut.of(await identity.get_key(principal.project_id, principal.key_id))

    @router.post("/{key_id}/revoke")
    async def revoke_key(key_id: str, principal: CurrentPrincipal) -> ApiKeyOut:
        return ApiKeyOut.of(await identity.revoke_key(principal.project_id, key_id))

    @router.delete("/{key_id}")
    async def delete_key(key_id: str, principal: CurrentPrincipal) -> ApiKeyOut:
        return ApiKeyOut.of(await identity.revoke_key(principal.project_id, key_id))

    return router
