"""Signed URLs for files: they need no key, and do one thing for a while."""

import re
from typing import Literal

from fastapi import APIRouter, Depends
from starlette.requests import Request

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.service import check_project
from sandboxd.identity.urls import SignedUrls
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.http import known_query_only
from sandboxd.sandboxes.errors import SandboxNotRunningError
from sandboxd.sandboxes.file_schemas import FileUrlOut, UrlBody
from sandboxd.sandboxes.files import shown
from sandboxd.sandboxes.service import SandboxService

_METHODS: dict[Literal["download", "upload"], str] = {"download": "GET", "upload": "PUT"}
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


def make_router(sandboxes: SandboxService, urls: SignedUrls, public_url: str) -> APIRouter:
    router = APIRouter(prefix="/v1/sandboxes", tags=["files"], dependencies=[Depends(known_query_only)])

    @router.post("/{sandbox_id}/files/urls", status_code=201)
    async def create_file_url(
        sandbox_id: str, body: UrlBody, principal: CurrentPrincipal, request: Request
    ) -> FileUrlOut:
        """A URL that downloads or uploads one file without a key, until it expires, the key that made it is
        revoked, or the sandbox ends."""
        check_project(principal, body.project)
        row = await sandboxes.get(principal.project_id, sandbox_id)
        if not row.is_alive:
            raise SandboxNotRunningError(row.id, row.status, row.termination_reason)
        path = f"/v1/sandboxes/{row.id}/files"
        query, expires_at = await urls.create(
            principal,
            _METHODS[body.method],
            path,
            [(b"path", body.path_bytes)],
            expires_in_s=body.expires_in_s,
            action="file_url.create",
            resource_id=row.id,
            details={"method": body.method, "path": shown(body.path_bytes)[:200]},
        )
        return FileUrlOut(
            url=f"{public_url or _base(request)}{path}?{query}",
            method=body.method,
            path=shown(body.path_bytes),
            expires_at=expires_at,
        )

    return router


def _base(request: Request) -> str:
    host = request.headers.get("host", "")
    if _HOST.fullmatch(host) is None:
        raise BadRequestError(
            "The header 'Host' names no host, and SANDBOXD_PUBLIC_URL is not set.", param="Host"
        )
    return f"{request.url.scheme}://{host}"
