"""Stateful interpreters over the wire. Code runs in one as an exec; see `e80_sdk.execs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e80_sdk.errors import NotFoundError
from e80_sdk.paths import checked_id, sandbox_path
from e80_sdk.records import ContextInfo
from e80_sdk.transport import Request, Transport


class ContextApi:
    """Contexts of a sandbox by its id."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(
        self, sandbox_id: str, body: Mapping[str, Any], *, key: str | None = None
    ) -> ContextInfo:
        """Start one; `body` may have `language`, `cwd` and `env`."""
        request = Request("POST", _path(sandbox_id), body=body, idempotency_key=key or True)
        return ContextInfo.from_body(await self._transport.send(request))

    async def list(self, sandbox_id: str) -> list[ContextInfo]:
        """All that the sandbox has."""
        answer = await self._transport.send(Request("GET", _path(sandbox_id), idempotent=True))
        return [ContextInfo.from_body(body) for body in answer.get("data", []) if isinstance(body, dict)]

    async def get(self, sandbox_id: str, context_id: str) -> ContextInfo:
        """One of them."""
        return await self._ask("GET", _path(sandbox_id, context_id))

    async def interrupt(self, sandbox_id: str, context_id: str) -> ContextInfo:
        """Interrupt what runs in it; its state stays."""
        return await self._ask("POST", f"{_path(sandbox_id, context_id)}/interrupt")

    async def restart(self, sandbox_id: str, context_id: str) -> ContextInfo:
        """Give it a new process, without the state of the old one."""
        return await self._ask("POST", f"{_path(sandbox_id, context_id)}/restart")

    async def delete(self, sandbox_id: str, context_id: str) -> None:
        """End it; one that is gone already is no error."""
        try:
            await self._transport.send(Request("DELETE", _path(sandbox_id, context_id), idempotent=True))
        except NotFoundError as exc:
            if exc.code != "context_not_found":
                raise

    async def _ask(self, method: str, path: str) -> ContextInfo:
        # Before anything else runs in it, doing it twice does what doing it once does.
        body: dict[str, Any] | None = {} if method == "POST" else None
        return ContextInfo.from_body(
            await self._transport.send(Request(method, path, body=body, idempotent=True))
        )


def _path(sandbox_id: str, context_id: str | None = None) -> str:
    path = f"{sandbox_path(sandbox_id)}/contexts"
    return path if context_id is None else f"{path}/{checked_id(context_id, 'context')}"
