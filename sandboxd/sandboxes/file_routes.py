"""HTTP for the files of a sandbox."""

import posixpath
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Query, Response
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sandboxd.agentlink.files import Change
from sandboxd.identity.auth import CurrentPrincipal
from sandboxd.identity.service import IdentityService, Principal, check_project
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.http import BrokenAnswerError, known_query_only
from sandboxd.kit.sse import EVENT_STREAM, sse_response
from sandboxd.kit.stalled import sending
from sandboxd.sandboxes.file_schemas import (
    DEFAULT_LIST,
    MAX_LIST,
    AfterBytes,
    ArchiveOut,
    ChmodBody,
    DeletedFileOut,
    EntryListOut,
    EntryOut,
    FileOut,
    MkdirBody,
    ModeQuery,
    MoveBody,
    PathBytes,
    SignedQuery,
    absolute,
    exact,
    parse_mode,
    parse_range,
)
from sandboxd.sandboxes.files import FileService, Target, shown

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BYTES = {"content": {"application/octet-stream": _BINARY}}
# It is a tenant's file on our own origin: no browser may take it for a page.
_SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
_UPLOAD = {"requestBody": {"content": {"application/octet-stream": {}}, "required": True}}
# How often a watch looks whether its key is still good.
_KEY_CHECK_S = 5.0

Recursive = Annotated[bool, Query(description="A folder with all that is in it.")]


def make_router(files: FileService, identity: IdentityService) -> APIRouter:
    router = APIRouter(prefix="/v1/sandboxes", tags=["files"], dependencies=[Depends(known_query_only)])
    _add_content(router, files)
    _add_names(router, files)
    _add_archives(router, files)
    _add_watch(router, files, identity)
    return router


def _add_content(router: APIRouter, files: FileService) -> None:
    @router.get(
        "/{sandbox_id}/files",
        response_class=StreamingResponse,
        responses={200: _BYTES, 206: {"description": "The range that was asked for", **_BYTES}},
    )
    async def read_file(
        sandbox_id: str,
        path: PathBytes,
        principal: CurrentPrincipal,
        range: Annotated[str | None, Header(description="One range: `bytes=first-last`.")] = None,
        if_range: Annotated[str | None, Header(description="The ETag of an earlier answer.")] = None,
        _signed: SignedQuery = None,
    ) -> Response:
        """The file's raw bytes, or a part of them."""
        part = parse_range(range)
        tag = None if if_range is None else if_range.strip('"')
        target = Target(principal.project_id, sandbox_id, path)
        async with AsyncExitStack() as stack:
            content = await stack.enter_async_context(files.read(target, part, tag))
            headers = {
                "Content-Length": str(content.length),
                "Content-Disposition": _attachment(path),
                "Accept-Ranges": "bytes",
                "ETag": f'"{content.tag}"',
                **_SAFE,
            }
            # A tag that is not the file's any more gets all of it.
            partial = part is not None and (tag is None or tag == content.tag)
            if partial:
                first = content.start or 0
                last = first + content.length - 1
                headers["Content-Range"] = f"bytes {first}-{last}/{content.size}"
            body = _exactly(content.length, content.chunks)
            close = stack.pop_all().aclose
        return _Download(body, close, 206 if partial else 200, headers, "application/octet-stream")

    @router.put("/{sandbox_id}/files", responses={201: {"model": FileOut}}, openapi_extra=_UPLOAD)
    async def write_file(
        sandbox_id: str,
        path: PathBytes,
        principal: CurrentPrincipal,
        request: Request,
        response: Response,
        mode: ModeQuery = None,
        _signed: SignedQuery = None,
    ) -> FileOut:
        """Takes raw bytes of any size. The file appears, or changes, when all of it has arrived."""
        target = Target(principal.project_id, sandbox_id, path)
        size, created = await files.write(target, request.stream(), parse_mode(mode))
        response.status_code = 201 if created else 200
        return FileOut(path=shown(path), size=size)


def _add_names(router: APIRouter, files: FileService) -> None:
    @router.delete("/{sandbox_id}/files")
    async def delete_file(
        sandbox_id: str, path: PathBytes, principal: CurrentPrincipal, recursive: Recursive = False
    ) -> DeletedFileOut:
        """A link goes, not what it leads to. A folder has to be empty, or `recursive` set."""
        await files.remove(Target(principal.project_id, sandbox_id, path), recursive=recursive)
        return DeletedFileOut(path=shown(path))

    @router.get("/{sandbox_id}/files/list")
    async def list_files(
        sandbox_id: str,
        path: PathBytes,
        principal: CurrentPrincipal,
        after: AfterBytes,
        limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = DEFAULT_LIST,
    ) -> EntryListOut:
        """What is in a folder, by the bytes of the names."""
        target = Target(principal.project_id, sandbox_id, path)
        entries, has_more = await files.list(target, limit, after)
        return EntryListOut.of(entries, absolute(path), has_more=has_more)

    @router.get("/{sandbox_id}/files/stat")
    async def stat_file(
        sandbox_id: str,
        path: PathBytes,
        principal: CurrentPrincipal,
        follow: Annotated[bool, Query(description="Where a link leads, not the link.")] = False,
    ) -> EntryOut:
        """What is known of a file, folder or link."""
        target = Target(principal.project_id, sandbox_id, path)
        return EntryOut.of(await files.stat(target, follow=follow), absolute(path))

    @router.post("/{sandbox_id}/files/mkdir", status_code=201, responses={200: {"model": EntryOut}})
    async def make_folder(
        sandbox_id: str, body: MkdirBody, principal: CurrentPrincipal, response: Response
    ) -> EntryOut:
        """201 for a new folder, 200 for one that was there."""
        check_project(principal, body.project)
        target = Target(principal.project_id, sandbox_id, body.path_bytes)
        entry, created = await files.make_folder(target, parents=body.parents, mode=parse_mode(body.mode))
        response.status_code = 201 if created else 200
        return EntryOut.of(entry, absolute(body.path_bytes))

    @router.post("/{sandbox_id}/files/move")
    async def move_file(sandbox_id: str, body: MoveBody, principal: CurrentPrincipal) -> EntryOut:
        """Gives a file, folder or link another name."""
        check_project(principal, body.project)
        target = Target(principal.project_id, sandbox_id, body.source_bytes, "from")
        entry = await files.move(target, body.to_bytes, overwrite=body.overwrite)
        return EntryOut.of(entry, absolute(body.to_bytes))

    @router.post("/{sandbox_id}/files/chmod")
    async def chmod_file(sandbox_id: str, body: ChmodBody, principal: CurrentPrincipal) -> EntryOut:
        """Sets the permission bits of a file or folder."""
        check_project(principal, body.project)
        target = Target(principal.project_id, sandbox_id, body.path_bytes)
        entry = await files.chmod(target, parse_mode(body.mode) or 0, recursive=body.recursive)
        return EntryOut.of(entry, absolute(body.path_bytes))


def _add_archives(router: APIRouter, files: FileService) -> None:
    @router.get(
        "/{sandbox_id}/files/archive",
        response_class=StreamingResponse,
        responses={200: {"content": {"application/x-tar": _BINARY, "application/gzip": _BINARY}}},
    )
    async def read_archive(
        sandbox_id: str,
        path: PathBytes,
        principal: CurrentPrincipal,
        compression: Annotated[Literal["none", "gzip"], Query()] = "none",
    ) -> Response:
        """A folder's content as a tar archive. Links stay links; sockets, pipes and devices are left out."""
        gzip = compression == "gzip"
        target = Target(principal.project_id, sandbox_id, path)
        async with AsyncExitStack() as stack:
            body = await stack.enter_async_context(files.pack(target, gzip=gzip))
            close = stack.pop_all().aclose
        name = (path.rstrip(b"/") or b"root") + (b".tar.gz" if gzip else b".tar")
        headers = {"Content-Disposition": _attachment(name), **_SAFE}
        return _Download(body, close, 200, headers, "application/gzip" if gzip else "application/x-tar")

    @router.put(
        "/{sandbox_id}/files/archive",
        openapi_extra=_UPLOAD,
    )
    async def write_archive(
        sandbox_id: str, path: PathBytes, principal: CurrentPrincipal, request: Request
    ) -> ArchiveOut:
        """Unpacks a tar archive, with gzip or without, below a folder, which is made when it is missing."""
        target = Target(principal.project_id, sandbox_id, path)
        entries, size = await files.unpack(target, request.stream())
        return ArchiveOut(path=shown(path), entries=entries, size=size)


def _add_watch(router: APIRouter, files: FileService, identity: IdentityService) -> None:
    @router.get(
        "/{sandbox_id}/files/watch",
        response_class=StreamingResponse,
        responses={200: {"content": EVENT_STREAM}},
        openapi_extra={"x-test-by-hand": "the answer has no end"},
    )
    async def watch_files(
        sandbox_id: str,
        path: PathBytes,
        principal: CurrentPrincipal,
        recursive: Annotated[bool, Query(description="All folders below, too.")] = False,
    ) -> Response:
        """What happens to and in a folder, or to a file, from now on, as server-sent events."""
        changes = files.watch(Target(principal.project_id, sandbox_id, path), recursive=recursive)
        # It has begun, or there is no stream.
        await anext(changes)
        return sse_response(_events(changes, absolute(path), identity, principal))


async def _events(
    changes: AsyncGenerator[Change | None], top: bytes, identity: IdentityService, principal: Principal
) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
    async with aclosing(changes):
        yield "watch.started", _named(top)
        checked_at = time.monotonic()
        async for change in changes:
            # The stream may be older than the key's life: nothing is told to one that has been revoked.
            if time.monotonic() > checked_at + _KEY_CHECK_S:
                await identity.check_active(principal.key_id)
                checked_at = time.monotonic()
            if change is None:
                continue
            if change.type == "overflow":
                yield "watch.overflow", {}
                continue
            event = _named(_below(top, change.path))
            if change.source is not None:
                event |= {
                    name.replace("path", "from"): value
                    for name, value in _named(_below(top, change.source)).items()
                }
            yield f"file.{change.type}", event


def _named(path: bytes) -> dict[str, Any]:
    return {"path": shown(path), "path_base64": exact(path)}


def _below(top: bytes, path: bytes) -> bytes:
    return posixpath.join(top, path) if path else top


class _Download(StreamingResponse):
    """Sends what is open, and closes it whatever becomes of the answer: one that was never begun, too."""

    def __init__(
        self,
        body: AsyncGenerator[bytes],
        close: Callable[[], Coroutine[Any, Any, None]],
        status: int,
        headers: Mapping[str, str],
        media_type: str,
    ) -> None:
        super().__init__(_breaking(body), status, headers, media_type)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, sending(scope, send))
        finally:
            await self._close()


async def _breaking(body: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The status is out: what fails now can only break the connection."""
    try:
        async with aclosing(body):
            async for chunk in body:
                yield chunk
    except SandboxdError as error:
        raise BrokenAnswerError(error.message) from error


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


def _attachment(path: bytes) -> str:
    name = quote(path.rstrip(b"/").rsplit(b"/", 1)[-1], safe="")
    return f"attachment; filename*=UTF-8''{name}"
