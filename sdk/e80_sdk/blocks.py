"""`sandbox(...)`: a sandbox from entering a block to leaving it. No HTTP in here."""

from __future__ import annotations

from types import TracebackType
from typing import NoReturn

from e80_sdk.api import SandboxApi
from e80_sdk.options import SandboxOptions, sandbox_body
from e80_sdk.portal import Portal
from e80_sdk.sandbox import AsyncSandbox, Sandbox


class AsyncSandboxBlock:
    """What `sandbox(...)` gives: a sandbox that exists from entering the block to leaving it."""

    def __init__(self, api: SandboxApi, options: SandboxOptions) -> None:
        sandbox_body(options)  # a misspelt option fails here, where it was written
        self._api = api
        self._options = options
        self._entered: AsyncSandbox | Sandbox | None = None

    async def __aenter__(self) -> AsyncSandbox:
        self._refuse_twice()
        # Held here already, so that the connection of the create serves the calls as well.
        async with self._api.transport.hold():
            made = AsyncSandbox(self._api, await self._api.create(self._options))
            self._entered = await made.__aenter__()
        return made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        assert isinstance(entered, AsyncSandbox)
        await entered.__aexit__(kind, error, trace)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"no sandbox yet to take .{name} from: enter it with `async with ...sandbox() as sandbox` or "
            "`with ...sandbox() as sandbox`, or make one to stop yourself: `Eighty80().sandboxes.create()`"
        )

    def _refuse_twice(self) -> None:
        if self._entered is not None:
            raise RuntimeError(
                "this sandbox() block is entered already; call sandbox() again for another sandbox"
            )


class SandboxBlock(AsyncSandboxBlock):
    """A block that also works with plain `with`, where every call blocks."""

    def __init__(self, api: SandboxApi, options: SandboxOptions, portal: Portal) -> None:
        super().__init__(api, options)
        self._portal = portal

    def __enter__(self) -> Sandbox:
        self._refuse_twice()
        made = Sandbox(self._api, self._portal.call(self._api.create, self._options), self._portal)
        self._entered = made
        return made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        assert isinstance(entered, Sandbox)
        entered.__exit__(kind, error, trace)
