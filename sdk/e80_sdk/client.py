"""The clients: `AsyncEighty80` is the core, `Eighty80` its blocking face."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from e80_sdk.api import SandboxApi
from e80_sdk.blocks import AsyncSandboxBlock, SandboxBlock
from e80_sdk.config import Connection, load_connection
from e80_sdk.history import Bucket, Moment, Order
from e80_sdk.options import SandboxOptions
from e80_sdk.portal import Portal
from e80_sdk.records import AuditEntry, SandboxEvent, Usage
from e80_sdk.results import SandboxInfo
from e80_sdk.retries import PATIENCE_S, OnWait, Patience
from e80_sdk.sandbox import AsyncSandbox, Sandbox
from e80_sdk.streams import iterate
from e80_sdk.transport import Request, Transport

HEALTH_TIMEOUT_S = 10.0
HEALTH_PATIENCE_S = 1.0
"""Whoever asks whether the server lives wants to hear that it does not."""
_IDEMPOTENT = ("GET", "HEAD", "PUT", "PATCH", "DELETE")


class AsyncSandboxes:
    """The sandboxes of the project, for asynchronous callers."""

    def __init__(self, api: SandboxApi) -> None:
        self._api = api

    async def create(self, **options: Unpack[SandboxOptions]) -> AsyncSandbox:
        """Create a sandbox that you stop yourself; see `Eighty80.sandbox` for the options."""
        return AsyncSandbox(self._api, await self._api.create(options))

    async def list(
        self,
        *,
        status: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> list[AsyncSandbox]:
        """Sandboxes, newest first; see `Sandboxes.list`."""
        found = await self._api.list(status=status, labels=labels, limit=limit)
        return [AsyncSandbox(self._api, info) for info in found]

    async def get(self, sandbox_id: str) -> AsyncSandbox:
        """One sandbox, alive or not."""
        return AsyncSandbox(self._api, await self._api.get(sandbox_id))

    async def stop(self, sandbox_id: str) -> SandboxInfo:
        """End a sandbox; one that has ended already is no error."""
        return await self._api.stop(sandbox_id)


class AsyncEighty80:
    """A client for asynchronous callers: what `async with Eighty80() as client` gives.

    Attributes:
        connection: The server and where its address and key came from.
        sandboxes: `create`, `list`, `get`, `stop` as coroutines.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        first_patience_s: float | None = None,
        max_retries: int | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        """See `Eighty80`.

        Args:
            first_patience_s: The patience as long as the server has never answered: its address may be
                wrong. None for the same as later.
            on_wait: Called before each pause, with the error and the seconds of patience that are left.
        """
        self.connection: Connection = load_connection(api_key=api_key, base_url=base_url)
        patience = Patience(patience_s, first_patience_s, max_retries)
        self._transport = Transport(self.connection, patience=patience, on_wait=on_wait)
        self._api = SandboxApi(self._transport)
        self.sandboxes = AsyncSandboxes(self._api)

    @property
    def api(self) -> SandboxApi:
        """The operations by sandbox id that everything else is made of."""
        return self._api

    def sandbox(self, **options: Unpack[SandboxOptions]) -> AsyncSandboxBlock:
        """A sandbox for the length of an `async with` block; see `Eighty80.sandbox`."""
        return AsyncSandboxBlock(self._api, options)

    def events(
        self,
        *,
        follow: bool = False,
        sandbox_id: str | None = None,
        type: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        order: Order = "asc",
    ) -> AsyncIterator[SandboxEvent]:
        """What happened to sandboxes, for `async for`; see `Eighty80.events`."""
        return self._api.history.events(
            follow=follow, sandbox_id=sandbox_id, type=type, after=after, limit=limit, order=order
        )

    async def usage(
        self, from_: Moment | None = None, to: Moment | None = None, bucket: Bucket | None = None
    ) -> Usage:
        """What the project used; see `Eighty80.usage`."""
        return await self._api.history.usage(from_, to, bucket)

    async def audit(
        self, *, action: str | None = None, resource_id: str | None = None, limit: int | None = None
    ) -> list[AuditEntry]:
        """Who changed what, newest first; see `Eighty80.audit`."""
        return await self._api.history.audit(action=action, resource_id=resource_id, limit=limit)

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | bool = False,
    ) -> dict[str, Any]:
        """Send any request of the REST API and return its JSON object.

        Args:
            method: HTTP method.
            path: Path from the server root, such as `/v1/doctor`.
            body: JSON body.
            idempotency_key: For a POST to a route that knows such keys: one of your own, or True for a new
                one. It may then be sent again after it may have arrived, as every other method may.

        Raises:
            E80Error: The class says what happened.
        """
        return await self._transport.send(
            Request(
                method,
                path,
                body=body,
                idempotent=method in _IDEMPOTENT,
                idempotency_key=idempotency_key,
            )
        )

    async def health(self) -> dict[str, Any]:
        """Whether the server lives, and its version; needs no key."""
        return await self._transport.send(
            Request(
                "GET",
                "/healthz",
                idempotent=True,
                anonymous=True,
                timeout_s=HEALTH_TIMEOUT_S,
                patience_s=HEALTH_PATIENCE_S,
            )
        )

    async def __aenter__(self) -> Self:
        await self._transport.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.release()


class Sandboxes:
    """The sandboxes of the project."""

    def __init__(self, api: SandboxApi, portal: Portal) -> None:
        self._api = api
        self._portal = portal

    def create(self, **options: Unpack[SandboxOptions]) -> Sandbox:
        """Create a sandbox that you stop yourself; see `Eighty80.sandbox` for the options."""
        return self._face(self._portal.call(self._api.create, options))

    def list(
        self,
        *,
        status: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> list[Sandbox]:
        """Sandboxes, newest first.

        Args:
            status: Those with that status (`all` for every one); else the alive ones.
            labels: Only those that have all of these.
            limit: At most so many.
        """
        found = self._portal.call(self._api.list, status=status, labels=labels, limit=limit)
        return [self._face(info) for info in found]

    def get(self, sandbox_id: str) -> Sandbox:
        """One sandbox, alive or not."""
        return self._face(self._portal.call(self._api.get, sandbox_id))

    def stop(self, sandbox_id: str) -> SandboxInfo:
        """End a sandbox; one that has ended already is no error."""
        return self._portal.call(self._api.stop, sandbox_id)

    def _face(self, info: SandboxInfo) -> Sandbox:
        return Sandbox(self._api, info, self._portal)


class Eighty80:
    """A client of one server.

    `with` and plain calls block. `async with Eighty80() as client` gives an `AsyncEighty80`, and
    `async with client.sandbox() as sandbox` works from either.

    Attributes:
        sandboxes: `create`, `list`, `get`, `stop`.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        max_retries: int | None = None,
    ) -> None:
        """Find the server; nothing is sent yet.

        Args:
            api_key: Key; else `_8080_API_KEY`, else the one stored by `8080 apikey set`.
            base_url: Server root; else `_8080_BASE_URL`, else the stored one, else http://127.0.0.1:8080.
            patience_s: How long a server that does not answer, because it restarts for example, is waited
                for; 0 for not at all.
            max_retries: At most so many retries of one call; else as many as fit into that time.

        Raises:
            ConfigError: The base URL or a stored file cannot be used.
        """
        self._core = AsyncEighty80(api_key, base_url, patience_s=patience_s, max_retries=max_retries)
        self._portal = Portal(self._core._transport.hold)
        self.sandboxes = Sandboxes(self._core.api, self._portal)

    @property
    def connection(self) -> Connection:
        """The server and where its address and key came from."""
        return self._core.connection

    def sandbox(self, **options: Unpack[SandboxOptions]) -> SandboxBlock:
        """A sandbox for the length of a block: `with` blocks, `async with` gives `Pending`s.

        Args:
            options: `image`, `cpu_mhz`, `memory_size_mb`, `disk_size_mb`, `gpu_count`, `timeout_s`,
                `idle_timeout_s`, `labels`, `env`, `network`, `project`, `idempotency_key` (your own: the
                same key never makes a second sandbox); the server decides what is left out.

        Raises:
            TypeError: An option does not exist.
            E80Error: On entering the block: the sandbox could not be made.
        """
        return SandboxBlock(self._core.api, options, self._portal)

    def events(
        self,
        *,
        follow: bool = False,
        sandbox_id: str | None = None,
        type: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        order: Order = "asc",
    ) -> Iterator[SandboxEvent]:
        """What happened to sandboxes: what is known, or, with `follow`, what happens from now on.

        Args:
            follow: Wait for events, without end. A connection that breaks is made again; no event is lost
                or doubled.
            sandbox_id: Of this sandbox only.
            type: Of this type only, such as `sandbox.stopped`.
            after: Only what came after the event with this id.
            limit: At most so many.
            order: `asc` or `desc`; with `follow` always as they come.
        """
        found = self._core.api.history.events(
            follow=follow, sandbox_id=sandbox_id, type=type, after=after, limit=limit, order=order
        )
        return iterate(self._portal, found)

    def usage(
        self, from_: Moment | None = None, to: Moment | None = None, bucket: Bucket | None = None
    ) -> Usage:
        """What the project used.

        Args:
            from_: Unix seconds or a datetime; the server decides when it is left out, as with the others.
            to: Likewise.
            bucket: `hour` or `day`: what a row of the answer covers.
        """
        return self._portal.call(self._core.usage, from_, to, bucket)

    def audit(
        self, *, action: str | None = None, resource_id: str | None = None, limit: int | None = None
    ) -> list[AuditEntry]:
        """Who changed what, newest first.

        Args:
            action: Only entries of this action.
            resource_id: Only entries on the thing with this id.
            limit: At most so many.
        """
        return self._portal.call(self._core.audit, action=action, resource_id=resource_id, limit=limit)

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | bool = False,
    ) -> dict[str, Any]:
        """Send any request of the REST API and return its JSON object; see `AsyncEighty80.request`."""
        return self._portal.call(self._core.request, method, path, body, idempotency_key=idempotency_key)

    def close(self) -> None:
        """Close connections and the client's thread. The client can be used again."""
        self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEighty80:
        return await self._core.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._core.__aexit__(kind, error, trace)
