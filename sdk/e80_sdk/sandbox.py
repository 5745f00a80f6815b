"""The two faces of a sandbox: `AsyncSandbox` (calls give `Pending`) and `Sandbox` (calls block). No HTTP in
here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from e80_sdk.api import SandboxApi
from e80_sdk.errors import ConflictError, E80Error, NotFoundError
from e80_sdk.execs import OUTPUT_EVENTS
from e80_sdk.options import (
    ExecOptions,
    Program,
    PythonOptions,
    SandboxChanges,
    changes_body,
    command_program,
    python_program,
)
from e80_sdk.pending import Calls, Emit, Pending, undisturbed
from e80_sdk.portal import Portal
from e80_sdk.records import ExecInfo, SandboxEvent
from e80_sdk.results import ExecChunk, ExecResult, SandboxInfo
from e80_sdk.streams import ExecStream, iterate, result_of

STOP_TIMEOUT_S = 20.0
_log = logging.getLogger("e80_sdk")


class _Facts:
    """What both faces know about their sandbox."""

    info: SandboxInfo
    """The sandbox as the server last described it."""

    @property
    def id(self) -> str:
        """Id of the sandbox."""
        return self.info.id

    @property
    def status(self) -> str:
        """Status when it was last asked for; `sandboxes.get(id)` asks again."""
        return self.info.status

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.id} {self.info.status}>"


class AsyncSandbox(_Facts):
    """A sandbox inside `async with`: every call starts at once and gives a `Pending`.

    Leaving the block waits for what is pending, then stops the sandbox. An exception in the block cancels
    what is pending; an error that nobody awaited is raised at the end of the block.
    """

    def __init__(self, api: SandboxApi, info: SandboxInfo) -> None:
        self.info = info
        self._api = api
        self._calls = Calls()

    def run_python(
        self, code: str, *, stream: bool = False, **options: Unpack[PythonOptions]
    ) -> Pending[ExecResult]:
        """Run Python code.

        Args:
            code: The program.
            stream: Makes the `Pending` iterable with `async for`, chunk by chunk.
            options: `cwd`, `env`, `stdin`, `timeout_s`, `fresh` (a new interpreter instead of a fork),
                `on_stdout` and `on_stderr` (called with each `ExecChunk`; may be coroutine functions),
                `idempotency_key` (your own: the same key never runs it twice).

        Returns:
            A `Pending[ExecResult]`. A program that fails is a result, not an error.

        Raises:
            E80Error: When awaited: the platform failed.
            TypeError: The code is not text or an option does not exist.
        """
        return self._exec("run_python", python_program(code, options), stream)

    def run(
        self, command: str | Sequence[str], *, stream: bool = False, **options: Unpack[ExecOptions]
    ) -> Pending[ExecResult]:
        """Run a command: text goes to `bash -lc`, a list is the argument vector. Otherwise as
        `run_python`."""
        return self._exec("run", command_program(command, options), stream)

    def read_file(self, path: str) -> Pending[bytes]:
        """Read a file of the sandbox."""
        return self._calls.start("read_file", lambda: self._api.read_file(self.id, path))

    def write_file(self, path: str, data: bytes | str) -> Pending[int]:
        """Write a file of the sandbox (text as UTF-8); gives its size. Calls made after it wait for it."""
        content = _as_bytes(data)
        return self._calls.start(
            "write_file", lambda: self._api.write_file(self.id, path, content), write=True
        )

    def pause(self) -> Pending[SandboxInfo]:
        """Halt what runs in it and keep its memory. Calls made after it wait for it."""
        return self._calls.start("pause", lambda: self._told(self._api.pause(self.id)), write=True)

    def resume(self) -> Pending[SandboxInfo]:
        """Let what was halted go on. Calls made after it wait for it."""
        return self._calls.start("resume", lambda: self._told(self._api.resume(self.id)), write=True)

    def update(self, **changes: Unpack[SandboxChanges]) -> Pending[SandboxInfo]:
        """Change it while it is alive. Calls made after it wait for it.

        Args:
            changes: `timeout_s` (from now on; None for no end), `idle_timeout_s` (None for none), `labels`
                (in place of those it has), `network`, `cpu_mhz`, `memory_size_mb`.

        Raises:
            TypeError: Such a change does not exist.
            E80Error: When awaited: the server refused.
        """
        changes_body(changes)  # a misspelt one fails here, where it was written
        return self._calls.start("update", lambda: self._told(self._api.update(self.id, changes)), write=True)

    def execs(self, *, limit: int | None = None) -> Pending[list[ExecInfo]]:
        """What ran and runs in it, newest first."""
        return self._calls.start("execs", lambda: self._api.execs.list(self.id, limit=limit))

    def get_exec(self, exec_id: str) -> Pending[ExecResult]:
        """One exec of it, with its output where the sandbox still has it."""
        return self._calls.start("get_exec", lambda: self._api.execs.get(self.id, exec_id))

    def events(
        self, *, follow: bool = False, after: str | None = None, limit: int | None = None
    ) -> AsyncIterator[SandboxEvent]:
        """Its events, to be iterated with `async for`; see `Eighty80.events`."""
        return self._api.history.events(follow=follow, sandbox_id=self.id, after=after, limit=limit)

    def stop(self) -> Pending[None]:
        """End the sandbox. What still runs in it is killed."""
        return self._calls.start("stop", self._stop)

    async def __aenter__(self) -> Self:
        await self._api.transport.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self._calls.finish()
        finally:
            await undisturbed(self._end(error))

    async def _end(self, error: BaseException | None) -> None:
        try:
            await self._calls.cancel()
            for label, other in self._calls.take_errors():
                if error is not None:
                    error.add_note(f"{label}() failed too: {other}")
            await stop_quietly(self._api, self)
        finally:
            await self._api.transport.release()

    async def _stop(self) -> None:
        self.info = await self._api.stop(self.id)

    async def _told(self, answer: Awaitable[SandboxInfo]) -> SandboxInfo:
        self.info = await answer
        return self.info

    def _exec(self, label: str, program: Program, stream: bool) -> Pending[ExecResult]:
        if stream:
            return self._calls.start_stream(label, lambda emit: self._follow(program, emit))
        if program.on_chunk is not None:
            return self._calls.start(label, lambda: self._follow(program, None))
        execs = self._api.execs
        return self._calls.start(label, lambda: execs.run(self.id, program.body, key=program.key))

    async def _follow(self, program: Program, emit: Emit | None) -> ExecResult:
        result = None
        async with aclosing(self._api.execs.events(self.id, program.body, key=program.key)) as events:
            async for event in events:
                kind = event.get("type")
                if kind in OUTPUT_EVENTS:
                    chunk = ExecChunk.from_event(event)
                    if program.on_chunk and isinstance(called := program.on_chunk(chunk), Awaitable):
                        await called
                    if emit is not None:
                        await emit(chunk)
                elif kind == "exec.completed":
                    result = result_of(event)
        assert result is not None  # events() raises when the stream ends without it
        return result


class Sandbox(_Facts):
    """A sandbox inside `with`, or one from `Eighty80().sandboxes`: every call blocks until it has its
    value."""

    def __init__(self, api: SandboxApi, info: SandboxInfo, portal: Portal) -> None:
        self.info = info
        self._api = api
        self._portal = portal

    @overload
    def run_python(
        self, code: str, *, stream: Literal[False] = False, **options: Unpack[PythonOptions]
    ) -> ExecResult: ...
    @overload
    def run_python(
        self, code: str, *, stream: Literal[True], **options: Unpack[PythonOptions]
    ) -> ExecStream: ...

    def run_python(
        self, code: str, *, stream: bool = False, **options: Unpack[PythonOptions]
    ) -> ExecResult | ExecStream:
        """Run Python code.

        Args:
            code: The program.
            stream: Return an `ExecStream` to iterate, chunk by chunk, instead of the result.
            options: `cwd`, `env`, `stdin`, `timeout_s`, `fresh` (a new interpreter instead of a fork),
                `on_stdout` and `on_stderr` (called with each `ExecChunk`, in the calling thread),
                `idempotency_key` (your own: the same key never runs it twice).

        Returns:
            An `ExecResult`. A program that fails is a result, not an error.

        Raises:
            E80Error: The platform failed.
            TypeError: The code is not text or an option does not exist.
        """
        return self._exec(python_program(code, options), stream)

    @overload
    def run(
        self, command: str | Sequence[str], *, stream: Literal[False] = False, **options: Unpack[ExecOptions]
    ) -> ExecResult: ...
    @overload
    def run(
        self, command: str | Sequence[str], *, stream: Literal[True], **options: Unpack[ExecOptions]
    ) -> ExecStream: ...

    def run(
        self, command: str | Sequence[str], *, stream: bool = False, **options: Unpack[ExecOptions]
    ) -> ExecResult | ExecStream:
        """Run a command: text goes to `bash -lc`, a list is the argument vector. Otherwise as
        `run_python`."""
        return self._exec(command_program(command, options), stream)

    def read_file(self, path: str) -> bytes:
        """Read a file of the sandbox."""
        return self._portal.call(self._api.read_file, self.id, path)

    def write_file(self, path: str, data: bytes | str) -> int:
        """Write a file of the sandbox (text as UTF-8); returns its size."""
        return self._portal.call(self._api.write_file, self.id, path, _as_bytes(data))

    def pause(self) -> SandboxInfo:
        """Halt what runs in it and keep its memory. Pausing it again is no error.

        Raises:
            SandboxNotRunningError: It has ended.
        """
        self.info = self._portal.call(self._api.pause, self.id)
        return self.info

    def resume(self) -> SandboxInfo:
        """Let what was halted go on. Resuming one that runs is no error.

        Raises:
            SandboxNotRunningError: It has ended.
        """
        self.info = self._portal.call(self._api.resume, self.id)
        return self.info

    def update(self, **changes: Unpack[SandboxChanges]) -> SandboxInfo:
        """Change it while it is alive.

        Args:
            changes: `timeout_s` (from now on; None for no end), `idle_timeout_s` (None for none), `labels`
                (in place of those it has), `network`, `cpu_mhz`, `memory_size_mb`.

        Raises:
            TypeError: Such a change does not exist.
            E80Error: The server refused.
        """
        self.info = self._portal.call(self._api.update, self.id, changes)
        return self.info

    def execs(self, *, limit: int | None = None) -> list[ExecInfo]:
        """What ran and runs in it, newest first."""
        return self._portal.call(self._api.execs.list, self.id, limit=limit)

    def get_exec(self, exec_id: str) -> ExecResult:
        """One exec of it, with its output where the sandbox still has it."""
        return self._portal.call(self._api.execs.get, self.id, exec_id)

    def events(
        self, *, follow: bool = False, after: str | None = None, limit: int | None = None
    ) -> Iterator[SandboxEvent]:
        """Its events; see `Eighty80.events`."""
        found = self._api.history.events(follow=follow, sandbox_id=self.id, after=after, limit=limit)
        return iterate(self._portal, found)

    def stop(self) -> None:
        """End the sandbox. What still runs in it is killed. Stopping it again is no error."""
        self.info = self._portal.call(self._api.stop, self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(stop_quietly, self._api, self)

    def _exec(self, program: Program, stream: bool) -> ExecResult | ExecStream:
        execs = self._api.execs
        if not stream and program.on_chunk is None:
            return self._portal.call(execs.run, self.id, program.body, key=program.key)
        events = execs.events(self.id, program.body, key=program.key)
        following = ExecStream(self._portal, events, program.on_chunk)
        return following if stream else following.result()


async def stop_quietly(api: SandboxApi, sandbox: AsyncSandbox | Sandbox) -> None:
    """Stop at the end of a block: a failure is logged, not raised, because it must not replace the block's
    outcome."""
    if not sandbox.info.alive:
        return
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            sandbox.info = await api.stop(sandbox.id)
    except (NotFoundError, ConflictError):
        pass  # it has ended by itself
    except (E80Error, TimeoutError) as exc:
        _log.warning("sandbox %s could not be stopped and ends by its own timeout: %s", sandbox.id, exc)


def _as_bytes(data: bytes | str) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    raise TypeError(f"data must be bytes or text, not {type(data).__name__}")
