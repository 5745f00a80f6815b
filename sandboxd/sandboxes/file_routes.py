"""HTTP for the files of a sandbox."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Response
from starlette.requests import Request
from starlette.responses import StreamingResponse

from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.http import known_query_only
from sandboxd.sandboxes import files
from sandboxd.sandboxes.schemas import FileOut
from sandboxd.sandboxes.service import SandboxService

FilePath = Annotated[
    str, Query(min_length=1, max_length=4096, description="Absolute, or relative to /home/user.")
]


def make_router(sandboxes: SandboxService) -> APIRouter:
    router = APIRouter(prefix="/v1/sandboxes", tags=["files"], dependencies=[Depends(known_query_only)])

    @router.get(
        "/{sandbox_id}/files",
        response_class=StreamingResponse,
        responses={200: {"content": {"application/octet-stream": {}}}},
    )
    async def read_file(sandbox_id: str, path: FilePath, principal: CurrentPrincipal) -> Response:
        """The file's raw bytes."""
        sandbox = await sandboxes.running(principal.project_id, sandbox_id)
        size, chunks = await files.read(sandbox, _checked(path))
        name = quote(path.rsplit("/", 1)[-1], safe="")
        headers = {
            "Content-Length": str(size),
            "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
            # It is a tenant's file on our own origin: no browser may take it for a page.
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox",
        }
        return StreamingResponse(_exactly(size, chunks), 200, headers, "application/octet-stream")

    @router.put(
        "/{sandbox_id}/files",
        responses={201: {"model": FileOut}},
        openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}, "required": True}},
    )
    async def write_file(
        sandbox_id: str, path: FilePath, principal: CurrentPrincipal, request: Request, response: Response
    ) -> FileOut:
        """Takes raw bytes of any size. The file appears, or changes, when all of it has arrived."""
        sandbox = await sandboxes.running(principal.project_id, sandbox_id)
        size, created = await files.write(sandbox, _checked(path), request.stream())
        response.status_code = 201 if created else 200
        return FileOut(path=path, size=size)

    return router


async def _exactly(size: int, chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The bytes announced: a file that grew is cut there; one that shrank breaks the connection, so that
    nobody takes a part for the whole."""
    left = size
    async with aclosing(chunks):
        async for chunk in chunks:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return


def _checked(path: str) -> str:
    if "\0" in path:
        raise BadRequestError("'path' in the query holds a NUL character, which no path can.", param="path")
    return path
