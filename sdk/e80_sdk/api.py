"""The asynchronous core: one coroutine per operation of the REST API. Every face of the SDK and the CLI
stands on it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from e80_sdk.errors import BadRequestError, ConnectionLostError, E80Error
from e80_sdk.options import SandboxOptions, sandbox_body
from e80_sdk.pending import undisturbed
from e80_sdk.results import ExecResult, SandboxInfo
from e80_sdk.transport import Content, Params, Request, Transport

CREATE_TIMEOUT_S = 300.0
"""A cold create may have to fetch an image."""
FILE_TIMEOUT_S = 120.0
"""The longest silence in a file transfer."""
EXEC_SILENCE_S = 3600.0
"""The longest exec that is waited for when the caller gave no `timeout_s`; the server's own limit ends it
long before."""
EXEC_GRACE_S = 30.0
"""What the server may need beyond the exec's own timeout to end it and answer."""
ABANDON_S = 15.0
"""How long a create that was cancelled is waited for, to stop its sandbox."""
PAGE_SIZE = 100
_log = logging.getLogger("e80_sdk")
_ID = re.compile(r"[A-Za-z0-9_-]+")


class SandboxApi:
    """Operations on sandboxes by id."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    async def create(self, options: SandboxOptions) -> SandboxInfo:
        """Create a sandbox; returns when it runs.

        Cancelled while the server is at it, it waits for the answer and stops what was made, because nobody
        would know its id.
        """
        request = Request(
            "POST",
            "/v1/sandboxes",
            body=sandbox_body(options),
            idempotency_key=True,
            timeout_s=CREATE_TIMEOUT_S,
        )
        creating = asyncio.get_running_loop().create_task(self.transport.send(request))
        try:
            answer = await asyncio.shield(creating)
        except asyncio.CancelledError:
            await undisturbed(self._abandon(creating))
            raise
        return SandboxInfo.from_body(answer)

    async def _abandon(self, creating: asyncio.Task[dict[str, Any]]) -> None:
        await asyncio.wait([creating], timeout=ABANDON_S)
        if not creating.done():
            creating.cancel()
            await asyncio.wait([creating])
            return
        try:
            await self.stop(SandboxInfo.from_body(creating.result()).id)
        except E80Error as exc:
            _log.warning("a sandbox whose create was cancelled may run on until its timeout: %s", exc)

    async def list(self, *, status: str | None = None, limit: int | None = None) -> list[SandboxInfo]:
        """Sandboxes of the project, newest first, over all pages; alive ones unless `status` says
        otherwise."""
        bodies = self.pages("/v1/sandboxes", {} if status is None else {"status": status}, limit=limit)
        return [SandboxInfo.from_body(body) async for body in bodies]

    async def pages(
        self, path: str, params: Params, *, limit: int | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Every item of a list of the API, page after page, at most `limit`."""
        left, after = limit, ""
        while left is None or left > 0:
            size = PAGE_SIZE if left is None else min(left, PAGE_SIZE)
            query = {**params, "limit": size} | ({"after": after} if after else {})
            page = await self.transport.send(Request("GET", path, params=query, idempotent=True))
            items = [item for item in page.get("data", []) if isinstance(item, dict)]
            for item in items:
                yield item
            after = str(page.get("last_id") or "")
            left = None if left is None else left - len(items)
            if not page.get("has_more") or not after or not items:
                return

    async def get(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox, alive or not."""
        return SandboxInfo.from_body(
            await self.transport.send(Request("GET", _path(sandbox_id), idempotent=True))
        )

    async def stop(self, sandbox_id: str) -> SandboxInfo:
        """End a sandbox; one that has ended already is no error."""
        path = f"{_path(sandbox_id)}/stop"
        return SandboxInfo.from_body(
            await self.transport.send(Request("POST", path, body={}, idempotent=True))
        )

    async def exec(self, sandbox_id: str, body: Mapping[str, Any]) -> ExecResult:
        """Run code or a command to its end."""
        return ExecResult.from_body(await self.transport.send(_exec_request(sandbox_id, body)))

    async def exec_events(self, sandbox_id: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Run code or a command and yield its events; the last one is `exec.completed`.

        Raises:
            ConnectionLostError: The stream ended before the result.
        """
        exec_id = None
        async with self.transport.events(_exec_request(sandbox_id, {**body, "stream": True})) as events:
            async for event in events:
                if event.get("type") == "exec.started":
                    exec_id = (event.get("exec") or {}).get("id")
                yield event
                if event.get("type") == "exec.completed":
                    return
        raise ConnectionLostError(
            f"the output of exec {exec_id or '(not started)'} in {sandbox_id} ended before its result; "
            "whether it finished is unknown"
        )

    async def read_file(self, sandbox_id: str, path: str) -> bytes:
        """The bytes of a file."""
        async with self.open_file(sandbox_id, path) as (_, chunks):
            return b"".join([chunk async for chunk in chunks])

    @asynccontextmanager
    async def open_file(
        self, sandbox_id: str, path: str
    ) -> AsyncGenerator[tuple[int | None, AsyncGenerator[bytes]]]:
        """A file to be read in pieces: its size, where the server says it, and the pieces."""
        request = Request(
            "GET",
            f"{_path(sandbox_id)}/files",
            params={"path": path},
            idempotent=True,
            timeout_s=FILE_TIMEOUT_S,
        )
        async with self.transport.open(request) as response:
            size = response.headers.get("content-length")
            chunks = response.aiter_bytes()
            async with aclosing(chunks):
                yield (int(size) if size is not None and size.isdigit() else None), chunks

    async def write_file(self, sandbox_id: str, path: str, content: Content) -> int:
        """Write a file; returns its size. `content` may be a function that makes an async iterator of
        bytes."""
        answer = await self.transport.send(
            Request(
                "PUT",
                f"{_path(sandbox_id)}/files",
                params={"path": path},
                content=content,
                timeout_s=FILE_TIMEOUT_S,
            )
        )
        size = answer.get("size")
        return size if isinstance(size, int) else 0


def _exec_request(sandbox_id: str, body: Mapping[str, Any]) -> Request:
    timeout_s = body.get("timeout_s")
    wait_s = timeout_s + EXEC_GRACE_S if isinstance(timeout_s, int | float) else EXEC_SILENCE_S
    return Request("POST", f"{_path(sandbox_id)}/exec", body=body, idempotency_key=True, timeout_s=wait_s)


def _path(sandbox_id: str) -> str:
    # An empty id or one with a slash would name another resource.
    if not _ID.fullmatch(sandbox_id):
        raise BadRequestError(
            f"{sandbox_id!r:.100} is not a sandbox id; `8080 sandbox list` shows them", param="sandbox_id"
        )
    return f"/v1/sandboxes/{sandbox_id}"
