"""The asynchronous core: one coroutine per operation on sandboxes. Every face of the SDK and
the CLI stands on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from e80_sdk.context_api import ContextApi
from e80_sdk.errors import E80Error, ServerError
from e80_sdk.execs import ExecApi
from e80_sdk.file_api import FileApi
from e80_sdk.history import HistoryApi
from e80_sdk.options import SandboxChanges, SandboxOptions, changes_body, sandbox_body
from e80_sdk.paging import pages
from e80_sdk.paths import sandbox_path
from e80_sdk.pending import undisturbed
from e80_sdk.results import SandboxInfo
from e80_sdk.transport import Params, Request, Transport

CREATE_TIMEOUT_S = 300.0
"""A cold create may have to fetch an image."""
POLL_S = 0.2
MOST_STILLBORN = 4
ABANDON_S = 15.0
"""How long a create that was cancelled is waited for, to stop its sandbox."""
_log = logging.getLogger("e80_sdk")


class SandboxApi:
    """Operations on sandboxes by id.

    Attributes:
        execs: Running programs, and what ran.
        contexts: Stateful interpreters.
        files: Files and folders.
        history: Events, usage, audit log.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.execs = ExecApi(transport)
        self.contexts = ContextApi(transport)
        self.files = FileApi(transport)
        self.history = HistoryApi(transport)

    async def create(self, options: SandboxOptions) -> SandboxInfo:
        """Create a sandbox; returns when it runs.

        Cancelled while the server is at it, it waits for the answer and stops what was made, because nobody
        would know its id.
        """
        request = Request(
            "POST",
            "/v1/sandboxes",
            body=sandbox_body(options),
            idempotency_key=options.get("idempotency_key") or True,
            timeout_s=CREATE_TIMEOUT_S,
        )
        creating = asyncio.get_running_loop().create_task(self._create(request))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            await undisturbed(self._abandon(creating))
            raise

    async def _create(self, request: Request) -> SandboxInfo:
        """A daemon that dies while it makes a sandbox gives it up when it is back; nobody has worked in it,
        so another takes its place."""
        for _ in range(MOST_STILLBORN):
            info = SandboxInfo.from_body(await self.transport.send(request))
            polls = 0
            while info.status == "creating" and polls < CREATE_TIMEOUT_S / POLL_S:
                await self.transport.sleep(POLL_S)
                info = await self.get(info.id)
                polls += 1
            if info.alive or info.started_at is not None:
                return info
        raise ServerError(f"sandbox {info.id} ended before it ran ({info.termination_reason})")

    async def _abandon(self, creating: asyncio.Task[SandboxInfo]) -> None:
        await asyncio.wait([creating], timeout=ABANDON_S)
        if not creating.done():
            creating.cancel()
            await asyncio.wait([creating])
            return
        try:
            await self.stop(creating.result().id)
        except E80Error as exc:
            _log.warning("a sandbox whose create was cancelled may run on until its timeout: %s", exc)

    async def list(
        self,
        *,
        status: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> list[SandboxInfo]:
        """Sandboxes of the project that have all of these labels, newest first, over all pages; alive ones
        unless `status` says otherwise."""
        params: dict[str, str | int | list[str]] = {} if status is None else {"status": status}
        if labels:
            params["label"] = [f"{name}={value}" for name, value in labels.items()]
        return [
            SandboxInfo.from_body(body) async for body in self.pages("/v1/sandboxes", params, limit=limit)
        ]

    def pages(self, path: str, params: Params, *, limit: int | None = None) -> AsyncGenerator[dict[str, Any]]:
        """Every item of a list of the API, page after page, at most `limit`."""
        return pages(self.transport, path, params, limit=limit)

    async def get(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox, alive or not."""
        return await self._ask("GET", sandbox_path(sandbox_id))

    async def stop(self, sandbox_id: str) -> SandboxInfo:
        """End a sandbox; one that has ended already is no error."""
        return await self._ask("POST", f"{sandbox_path(sandbox_id)}/stop", {})

    async def pause(self, sandbox_id: str) -> SandboxInfo:
        """Halt what runs in a sandbox and keep its memory; one that is paused already is no error."""
        return await self._ask("POST", f"{sandbox_path(sandbox_id)}/pause", {})

    async def resume(self, sandbox_id: str) -> SandboxInfo:
        """Let a paused sandbox go on; one that runs is no error."""
        return await self._ask("POST", f"{sandbox_path(sandbox_id)}/resume", {})

    async def update(self, sandbox_id: str, changes: SandboxChanges) -> SandboxInfo:
        """Change a sandbox that is alive."""
        return await self._ask("PATCH", sandbox_path(sandbox_id), changes_body(changes))

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> SandboxInfo:
        # Twice does what once does: every one of these names the state that is wanted.
        return SandboxInfo.from_body(
            await self.transport.send(Request(method, path, body=body, idempotent=True))
        )
