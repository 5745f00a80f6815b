"""The two faces of a sandbox: `AsyncSandbox` (calls give `Pending`) and `Sandbox` (calls block). No HTTP in
here."""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from e80_sdk.api import SandboxApi
from e80_sdk.contexts import AsyncContext, Context, PendingContext
from e80_sdk.errors import ConflictError, E80Error, NotFoundError
from e80_sdk.files import AsyncFiles, Files
from e80_sdk.options import (
    CommandOptions,
    CommandStartOptions,
    Program,
    PythonOptions,
    PythonStartOptions,
    SandboxChanges,
    changes_body,
    command_program,
    python_program,
)
from e80_sdk.pending import Calls, Pending, undisturbed
from e80_sdk.portal import Portal
from e80_sdk.processes import AsyncProcess, Process, ProcessCore
from e80_sdk.records import ContextInfo, ExecInfo, SandboxEvent
from e80_sdk.results import ExecResult, SandboxInfo
from e80_sdk.streams import ExecStream, iterate, run_blocking, run_pending

STOP_TIMEOUT_S = 20.0
TITLE_LENGTH = 200
"""What the server, too, keeps of a program for lists."""
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

    Attributes:
        files: Its files, as `AsyncFiles`.
    """

    def __init__(self, api: SandboxApi, info: SandboxInfo) -> None:
        self.info = info
        self._api = api
        self._calls = Calls()
        self.files = AsyncFiles(api.files, info.id, self._calls)

    def run_python(
        self, code: str, *, stream: bool = False, **options: Unpack[PythonOptions]
    ) -> Pending[ExecResult]:
        """Run Python code.

        Args:
            code: The program.
            stream: Makes the `Pending` iterable with `async for`, chunk by chunk.
            options: `cwd`, `env`, `stdin`, `timeout_s`, `user` (`user` or `nobody`), `fresh` (a new
                interpreter instead of a fork),
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
        self, command: str | Sequence[str], *, stream: bool = False, **options: Unpack[CommandOptions]
    ) -> Pending[ExecResult]:
        """Run a command: text goes to `bash -lc`, a list is the argument vector. Otherwise as
        `run_python`, with `pty` (a terminal, see `start`) and without `fresh`. Whoever leaves early, by
        Ctrl-C for example, ends it."""
        return self._exec("run", command_program(command, options), stream)

    def start(
        self, command: str | Sequence[str], **options: Unpack[CommandStartOptions]
    ) -> Pending[AsyncProcess]:
        """Start a command in the background; see `Sandbox.start`."""
        return self._start("start", command_program(command, options, start=True))

    def start_python(self, code: str, **options: Unpack[PythonStartOptions]) -> Pending[AsyncProcess]:
        """Start Python code in the background; see `Sandbox.start`."""
        return self._start("start_python", python_program(code, options, start=True))

    def process(self, exec_id: str) -> AsyncProcess:
        """The handle of a program by its id; nothing is sent yet."""
        return AsyncProcess(ProcessCore(self._api.execs, self.id, exec_id), self._calls)

    def processes(self) -> Pending[list[AsyncProcess]]:
        """What runs in it, newest first."""
        return self._calls.start("processes", self._processes)

    def context(
        self, language: str = "python", *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> PendingContext:
        """Start an interpreter that keeps its state; see `Sandbox.context`. `await` it, or enter it with
        `async with`."""
        body = context_body(language, cwd, env)
        return self._calls.start_as(PendingContext, "context", lambda: self._context(body))

    def get_context(self, context_id: str) -> Pending[AsyncContext]:
        """One of its contexts by its id."""
        return self._calls.start("get_context", lambda: self._get_context(context_id))

    def contexts(self) -> Pending[list[AsyncContext]]:
        """The contexts that it has."""
        return self._calls.start("contexts", self._contexts)

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
        return run_pending(self._api.execs, self._calls, self.id, label, program, stream=stream)

    def _start(self, label: str, program: Program) -> Pending[AsyncProcess]:
        return self._calls.start(label, lambda: self._started(program))

    async def _started(self, program: Program) -> AsyncProcess:
        return AsyncProcess(await started(self._api, self.id, program), self._calls)

    async def _processes(self) -> list[AsyncProcess]:
        return [AsyncProcess(core, self._calls) for core in await running(self._api, self.id)]

    async def _context(self, body: Mapping[str, Any]) -> AsyncContext:
        return self._context_face(await self._api.contexts.create(self.id, body))

    async def _get_context(self, context_id: str) -> AsyncContext:
        return self._context_face(await self._api.contexts.get(self.id, context_id))

    async def _contexts(self) -> list[AsyncContext]:
        return [self._context_face(info) for info in await self._api.contexts.list(self.id)]

    def _context_face(self, info: ContextInfo) -> AsyncContext:
        return AsyncContext(self._api, self.id, info, self._calls)


class Sandbox(_Facts):
    """A sandbox inside `with`, or one from `Eighty80().sandboxes`: every call blocks until it has its value.

    Attributes:
        files: Its files, as `Files`.
    """

    def __init__(self, api: SandboxApi, info: SandboxInfo, portal: Portal) -> None:
        self.info = info
        self._api = api
        self._portal = portal
        self.files = Files(api.files, info.id, portal)

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
            options: `cwd`, `env`, `stdin`, `timeout_s`, `user` (`user` or `nobody`), `fresh` (a new
                interpreter instead of a fork),
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
        self,
        command: str | Sequence[str],
        *,
        stream: Literal[False] = False,
        **options: Unpack[CommandOptions],
    ) -> ExecResult: ...
    @overload
    def run(
        self, command: str | Sequence[str], *, stream: Literal[True], **options: Unpack[CommandOptions]
    ) -> ExecStream: ...

    def run(
        self, command: str | Sequence[str], *, stream: bool = False, **options: Unpack[CommandOptions]
    ) -> ExecResult | ExecStream:
        """Run a command: text goes to `bash -lc`, a list is the argument vector. Otherwise as
        `run_python`, with `pty` (a terminal, see `start`) and without `fresh`. Whoever leaves early, by
        Ctrl-C for example, ends it."""
        return self._exec(command_program(command, options), stream)

    def start(self, command: str | Sequence[str], **options: Unpack[CommandStartOptions]) -> Process:
        """Start a command in the background: it goes on when this program ends, until it ends itself, its
        `timeout_s` is over or the sandbox ends.

        Args:
            command: As for `run`.
            options: `cwd`, `env`, `stdin`, `timeout_s` (none unless given), `user`, `idempotency_key` as for
                `run`; `stdin_open` (its input stays open, for `Process.write`); `pty` (a terminal: True, or
                its size as `{"rows": 40, "cols": 120}`).

        Returns:
            A `Process`.

        Raises:
            E80Error: It was not started.
            TypeError: The command is none or an option does not exist.
        """
        return self._start(command_program(command, options, start=True))

    def start_python(self, code: str, **options: Unpack[PythonStartOptions]) -> Process:
        """Start Python code in the background; options as for `start`, with `fresh` and without `pty`."""
        return self._start(python_program(code, options, start=True))

    def process(self, exec_id: str) -> Process:
        """The handle of a program by its id, which another program may have started; nothing is sent yet."""
        return Process(ProcessCore(self._api.execs, self.id, exec_id), self._portal)

    def processes(self) -> list[Process]:
        """What runs in it, newest first; `info.title` of each is how its command or code begins."""
        return [Process(core, self._portal) for core in self._portal.call(running, self._api, self.id)]

    def context(
        self, language: str = "python", *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Context:
        """Start an interpreter that keeps its state between calls.

        Args:
            language: `python` or `bash`.
            cwd: Where it starts; else /home/user.
            env: More variables.

        Returns:
            A `Context`; as a context manager it is deleted at the end of the block.
        """
        info = self._portal.call(self._api.contexts.create, self.id, context_body(language, cwd, env))
        return self._context_face(info)

    def get_context(self, context_id: str) -> Context:
        """One of its contexts by its id."""
        return self._context_face(self._portal.call(self._api.contexts.get, self.id, context_id))

    def contexts(self) -> list[Context]:
        """The contexts that it has."""
        return [self._context_face(one) for one in self._portal.call(self._api.contexts.list, self.id)]

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
        return run_blocking(self._api.execs, self._portal, self.id, program, stream=stream)

    def _start(self, program: Program) -> Process:
        return Process(self._portal.call(started, self._api, self.id, program), self._portal)

    def _context_face(self, info: ContextInfo) -> Context:
        return Context(self._api, self.id, info, self._portal)


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


async def started(api: SandboxApi, sandbox_id: str, program: Program) -> ProcessCore:
    """A program in the background."""
    result = await api.execs.start(sandbox_id, program.body, key=program.key)
    # The answer does not repeat what was sent.
    kind = "code" if "code" in program.body else "command"
    text = program.body[kind]
    title = text if isinstance(text, str) else shlex.join(text)
    info = ExecInfo.from_body({**result.raw, "kind": kind, "title": title[:TITLE_LENGTH]})
    return ProcessCore(api.execs, sandbox_id, result.id, info)


async def running(api: SandboxApi, sandbox_id: str) -> list[ProcessCore]:
    """What runs in a sandbox."""
    found = await api.execs.list(sandbox_id, status="running")
    return [ProcessCore(api.execs, sandbox_id, info.id, info) for info in found]


def context_body(language: str, cwd: str | None, env: Mapping[str, str] | None) -> dict[str, Any]:
    """The body of a request for a context."""
    return (
        {"language": language}
        | ({} if cwd is None else {"cwd": cwd})
        | ({} if env is None else {"env": dict(env)})
    )
