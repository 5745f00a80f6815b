"""Stateful interpreters: `Context` (calls block) and `AsyncContext` (calls give `Pending`). No HTTP in
here."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

from e80_sdk.errors import ConflictError, E80Error, NotFoundError
from e80_sdk.options import CellOptions, cell_program
from e80_sdk.pending import Calls, Pending, undisturbed
from e80_sdk.portal import Portal
from e80_sdk.records import ContextInfo
from e80_sdk.results import ExecResult
from e80_sdk.streams import ExecStream, run_blocking, run_pending

if TYPE_CHECKING:
    from e80_sdk.api import SandboxApi

DELETE_TIMEOUT_S = 20.0
_log = logging.getLogger("e80_sdk")


class _Facts:
    info: ContextInfo
    """The context as the server last described it."""

    @property
    def id(self) -> str:
        """Id of the context; `sandbox.get_context(id)` finds it again."""
        return self.info.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.id} {self.info.language} {self.info.status}>"


class AsyncContext(_Facts):
    """An interpreter that keeps its state, in an `AsyncSandbox`: calls start at once and give a `Pending`.

    What runs in it runs one after the other, in the order of the calls. Leaving its block waits for them and
    ends the context.
    """

    def __init__(self, api: SandboxApi, sandbox_id: str, info: ContextInfo, calls: Calls) -> None:
        self.info = info
        self._api = api
        self._sandbox_id = sandbox_id
        self._calls = calls
        # First come, first served.
        self._turn = asyncio.Lock()

    def run(self, code: str, *, stream: bool = False, **options: Unpack[CellOptions]) -> Pending[ExecResult]:
        """Run code in it; see `Context.run`. With `stream=True` the `Pending` can be iterated."""
        program = cell_program(code, self.id, options)
        return run_pending(
            self._api.execs, self._calls, self._sandbox_id, "run", program, stream=stream, turn=self._turn
        )

    def interrupt(self) -> Pending[ContextInfo]:
        """Interrupt what runs in it; its state stays."""
        return self._calls.start("interrupt", self._interrupt)

    def restart(self) -> Pending[ContextInfo]:
        """Give it a new process, without the state of the old one."""
        return self._calls.start("restart", self._restart, write=True)

    def delete(self) -> Pending[None]:
        """End it. Doing so again is no error."""
        return self._calls.start("delete", lambda: self._api.contexts.delete(self._sandbox_id, self.id))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self._calls.start("run", self._settled)
        finally:
            await undisturbed(_delete_quietly(self._api, self._sandbox_id, self.id))

    async def _settled(self) -> None:
        """Returns when everything that was started before is through."""
        async with self._turn:
            return

    async def _interrupt(self) -> ContextInfo:
        self.info = await self._api.contexts.interrupt(self._sandbox_id, self.id)
        return self.info

    async def _restart(self) -> ContextInfo:
        self.info = await self._api.contexts.restart(self._sandbox_id, self.id)
        return self.info


class PendingContext(Pending[AsyncContext]):
    """A context that is being made: `await` it, or enter it with `async with` to have it deleted at the end
    of the block."""

    __slots__ = ("_entered",)

    async def __aenter__(self) -> AsyncContext:
        self._entered = await self
        return await self._entered.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._entered.__aexit__(kind, error, trace)


class Context(_Facts):
    """An interpreter that keeps its state between calls, in a `Sandbox`: calls block. As a context manager it
    is deleted at the end of the block."""

    def __init__(self, api: SandboxApi, sandbox_id: str, info: ContextInfo, portal: Portal) -> None:
        self.info = info
        self._api = api
        self._sandbox_id = sandbox_id
        self._portal = portal

    @overload
    def run(
        self, code: str, *, stream: Literal[False] = False, **options: Unpack[CellOptions]
    ) -> ExecResult: ...
    @overload
    def run(self, code: str, *, stream: Literal[True], **options: Unpack[CellOptions]) -> ExecStream: ...

    def run(
        self, code: str, *, stream: bool = False, **options: Unpack[CellOptions]
    ) -> ExecResult | ExecStream:
        """Run code in it, with what earlier calls left: variables, imports, the working directory.

        Args:
            code: In the language of the context.
            stream: Return an `ExecStream` to iterate, chunk by chunk, instead of the result.
            options: `timeout_s`, `on_stdout`, `on_stderr`, `on_result` (called with each `Result`),
                `idempotency_key`.

        Returns:
            An `ExecResult`, with what was shown in `results`. Code that fails is a result, not an error.

        Raises:
            ContextLostError: Its process has ended; `restart()` it.
            E80Error: The platform failed.
            TypeError: The code is not text or an option does not exist.
        """
        program = cell_program(code, self.id, options)
        return run_blocking(self._api.execs, self._portal, self._sandbox_id, program, stream=stream)

    def interrupt(self) -> ContextInfo:
        """Interrupt what runs in it (from another thread); its state stays."""
        self.info = self._portal.call(self._api.contexts.interrupt, self._sandbox_id, self.id)
        return self.info

    def restart(self) -> ContextInfo:
        """Give it a new process, without the state of the old one. Its id stays."""
        self.info = self._portal.call(self._api.contexts.restart, self._sandbox_id, self.id)
        return self.info

    def delete(self) -> None:
        """End it. Doing so again is no error."""
        self._portal.call(self._api.contexts.delete, self._sandbox_id, self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(_delete_quietly, self._api, self._sandbox_id, self.id)


async def _delete_quietly(api: SandboxApi, sandbox_id: str, context_id: str) -> None:
    """At the end of a block: a failure must not replace the block's outcome, and the context ends with its
    sandbox."""
    try:
        async with asyncio.timeout(DELETE_TIMEOUT_S):
            await api.contexts.delete(sandbox_id, context_id)
    except (NotFoundError, ConflictError) as exc:
        _log.debug("context %s has ended with its sandbox: %s", context_id, exc)
    except (E80Error, TimeoutError) as exc:
        _log.warning("context %s could not be deleted and ends with its sandbox: %s", context_id, exc)
