"""Files of the fake server: in a folder of this machine. Downloads break where a test says so."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

if TYPE_CHECKING:
    from tests.e80_sdk.fake_server import FakeServer


def add_files(app: FastAPI, fake: FakeServer) -> None:
    _add_content(app, fake)
    _add_names(app, fake)
    _add_folders(app, fake)


def _add_content(app: FastAPI, fake: FakeServer) -> None:
    @app.put("/v1/sandboxes/{sandbox_id}/files", status_code=201)
    async def put(sandbox_id: str, path: str, request: Request) -> Any:
        if sandbox_id not in fake.sandboxes:
            return refusal(404, "not_found", f"no sandbox {sandbox_id!r}")
        target = fake.file(sandbox_id, path)
        if target.is_dir():
            return refusal(400, "is_a_directory", f"{path!r} is a directory")
        size = 0
        with target.open("wb") as file:
            async for chunk in request.stream():
                size += file.write(chunk)
        return {"object": "sandbox.file", "path": path, "size": size}

    @app.get("/v1/sandboxes/{sandbox_id}/files")
    async def read(sandbox_id: str, path: str, request: Request) -> Any:
        target = fake.file(sandbox_id, path)
        if not target.is_file():
            return refusal(404, "not_found", f"no file {path!r}")
        content = target.read_bytes()
        if fake.cut_file:
            return StreamingResponse(
                _cut(fake, content, len(content) // 2), headers={"content-length": str(len(content))}
            )
        tag = f'"{target.stat().st_mtime_ns}-{len(content)}"'
        headers, status = {"etag": tag}, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        if wanted and request.headers.get("if-range") == tag:
            content, status = content[int(wanted[1]) :], 206
        headers["content-length"] = str(len(content))
        cut = fake.file_cuts.pop(0) if fake.file_cuts else None
        return StreamingResponse(_cut(fake, content, cut), status, headers)


def _add_names(app: FastAPI, fake: FakeServer) -> None:
    @app.get("/v1/sandboxes/{sandbox_id}/files/stat")
    async def stat(sandbox_id: str, path: str) -> Any:
        if sandbox_id not in fake.sandboxes:
            return refusal(404, "sandbox_not_found", f"no sandbox {sandbox_id!r}")
        target = fake.file(sandbox_id, path)
        if not target.exists():
            return refusal(404, "file_not_found", f"no file {path!r}")
        kind = "directory" if target.is_dir() else "file"
        facts = {"size": target.stat().st_size, "mode": "0644", "owner": "user", "modified_at": 0.0}
        return {"object": "sandbox.file", "name": target.name, "path": path, "type": kind, **facts}

    @app.delete("/v1/sandboxes/{sandbox_id}/files")
    async def remove(sandbox_id: str, path: str) -> Any:
        target = fake.file(sandbox_id, path)
        if not target.exists():
            return refusal(404, "file_not_found", f"no file {path!r}")
        target.unlink()
        return {"path": path, "object": "sandbox.file", "deleted": True}


def _add_folders(app: FastAPI, fake: FakeServer) -> None:
    @app.get("/v1/sandboxes/{sandbox_id}/files/archive")
    async def read_archive(sandbox_id: str, path: str) -> Any:
        cut = fake.file_cuts.pop(0) if fake.file_cuts else None
        return StreamingResponse(_cut(fake, fake.archive, cut), media_type="application/x-tar")

    @app.put("/v1/sandboxes/{sandbox_id}/files/archive")
    async def write_archive(sandbox_id: str, path: str, request: Request) -> Any:
        fake.archive = b"".join([chunk async for chunk in request.stream()])
        return {"object": "sandbox.archive", "path": path, "entries": 7, "size": len(fake.archive)}

    @app.get("/v1/sandboxes/{sandbox_id}/files/watch")
    async def watch(sandbox_id: str, path: str) -> Any:
        return StreamingResponse(_changes(fake.changes.pop(0)), media_type="text/event-stream")


def refusal(status: int, code: str, message: str, **more: Any) -> JSONResponse:
    """An error of the API."""
    body = {"error": {"message": message, "type": "fake", "param": None, "code": code, **more}}
    return JSONResponse(body, status, headers={"X-Request-Id": "req_fake"})


async def _changes(events: list[dict[str, Any]]) -> AsyncGenerator[bytes]:
    for number, event in enumerate(events):
        yield f"data: {json.dumps({**event, 'sequence_number': number})}\n\n".encode()
    await asyncio.sleep(0.02)
    raise ConnectionError("cut by the test")


async def _cut(fake: FakeServer, content: bytes, cut: int | None) -> AsyncGenerator[bytes]:
    if cut is None:
        yield content
        return
    yield content[:cut]
    await asyncio.sleep(0.05)  # lets the first part leave before the connection drops
    fake.on_cut()
    raise ConnectionError("cut by the test")
