"""The clients: `AsyncEighty80` is the core, `Eighty80` its blocking face."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from e80_sdk.api import SandboxApi
from e80_sdk.config import Connection, load_connection
from e80_sdk.options import SandboxOptions
from e80_sdk.portal import Portal
from e80_sdk.results import SandboxInfo
from e80_sdk.sandbox import AsyncSandbox, AsyncSandboxBlock, Sandbox, SandboxBlock
from e80_sdk.transport import Request, Transport

DEFAULT_MAX_RETRIES = 7
HEALTH_TIMEOUT_S = 10.0


class AsyncSandboxes:
    """The sandboxes of the project, for asynchronous callers."""

    def __init__(self, api: SandboxApi) -> None:
        self._api = api

    async def create(self, **options: Unpack[SandboxOptions]) -> AsyncSandbox:
        """Create a sandbox that you stop yourself; see `Eighty80.sandbox` for the options."""
        return AsyncSandbox(self._api, await self._api.create(options))

    async def list(self, *, status: str | None = None, limit: int | None = None) -> list[AsyncSandbox]:
        """Sandboxes, newest first: the alive ones, or those with that `status` (`all` for every one)."""
        found = await self._api.list(status=status, limit=limit)
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
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        """See `Eighty80`."""
        self.connection: Connection = load_connection(api_key=api_key, base_url=base_url)
        self._transport = Transport(self.connection, max_retries=max_retries)
        self._api = SandboxApi(self._transport)
        self.sandboxes = AsyncSandboxes(self._api)

    @property
    def api(self) -> SandboxApi:
        """The operations by sandbox id that everything else is made of."""
        return self._api

    def sandbox(self, **options: Unpack[SandboxOptions]) -> AsyncSandboxBlock:
        """A sandbox for the length of an `async with` block; see `Eighty80.sandbox`."""
        return AsyncSandboxBlock(self._api, options)

    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send any request of the REST API and return its JSON object.

        Args:
            method: HTTP method.
            path: Path from the server root, such as `/v1/doctor`.
            body: JSON body.

        Raises:
            E80Error: The class says what happened.
        """
        idempotent = method in ("GET", "DELETE")
        return await self._transport.send(Request(method, path, body=body, idempotent=idempotent))

    async def health(self) -> dict[str, Any]:
        """Whether the server lives, and its version; needs no key."""
        return await self._transport.send(
            Request("GET", "/healthz", idempotent=True, anonymous=True, timeout_s=HEALTH_TIMEOUT_S)
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

    def list(self, *, status: str | None = None, limit: int | None = None) -> list[Sandbox]:
        """Sandboxes, newest first: the alive ones, or those with that `status` (`all` for every one)."""
        found = self._portal.call(self._api.list, status=status, limit=limit)
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
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        """Find the server; nothing is sent yet.

        Args:
            api_key: Key; else `_8080_API_KEY`, else the one stored by `8080 apikey set`.
            base_url: Server root; else `_8080_BASE_URL`, else the stored one, else http://127.0.0.1:8080.
            max_retries: How often a request that may be sent again is sent again.

        Raises:
            ConfigError: The base URL or a stored file cannot be used.
        """
        self._core = AsyncEighty80(api_key, base_url, max_retries=max_retries)
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
                `labels`, `env`, `network`, `project`; the server decides what is left out.

        Raises:
            TypeError: An option does not exist.
            E80Error: On entering the block: the sandbox could not be made.
        """
        return SandboxBlock(self._core.api, options, self._portal)

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send any request of the REST API and return its JSON object; see `AsyncEighty80.request`."""
        return self._portal.call(self._core.request, method, path, body)

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
