"""The two faces of a sandbox: `AsyncSandbox` (calls give `Pending`) and `Sandbox` (calls block). No HTTP in
here."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, Unpack, overload

from e80_sdk.api import SandboxApi
from e80_sdk.errors import ConflictError, E80Error, NotFoundError, UnexpectedResponseError
from e80_sdk.options import (
    ExecOptions,
    OnChunk,
    PythonOptions,
    SandboxOptions,
    command_body,
    python_body,
    sandbox_body,
)
from e80_sdk.pending import Calls, Emit, Pending, undisturbed
from e80_sdk.portal import Portal
from e80_sdk.results import ExecChunk, ExecResult, SandboxInfo

STOP_TIMEOUT_S = 20.0
_OUTPUT = ("exec.stdout.delta", "exec.stderr.delta")
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
                `on_stdout` and `on_stderr` (called with each `ExecChunk`; may be coroutine functions).

        Returns:
            A `Pending[ExecResult]`. A program that fails is a result, not an error.

        Raises:
            E80Error: When awaited: the platform failed.
            TypeError: The code is not text or an option does not exist.
        """
        body, callbacks = python_body(code, options)
        return self._exec("run_python", body, callbacks if callbacks else None, stream)

    def run(
        self, command: str | Sequence[str], *, stream: bool = False, **options: Unpack[ExecOptions]
    ) -> Pending[ExecResult]:
        """Run a command: text goes to `bash -lc`, a list is the argument vector. Otherwise as
        `run_python`."""
        body, callbacks = command_body(command, options)
        return self._exec("run", body, callbacks if callbacks else None, stream)

    def read_file(self, path: str) -> Pending[bytes]:
        """Read a file of the sandbox."""
        return self._calls.start("read_file", lambda: self._api.read_file(self.id, path))

    def write_file(self, path: str, data: bytes | str) -> Pending[int]:
        """Write a file of the sandbox (text as UTF-8); gives its size. Calls made after it wait for it."""
        content = _as_bytes(data)
        return self._calls.start(
            "write_file", lambda: self._api.write_file(self.id, path, content), write=True
        )

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

    def _exec(
        self, label: str, body: dict[str, Any], callback: OnChunk | None, stream: bool
    ) -> Pending[ExecResult]:
        if stream:
            return self._calls.start_stream(label, lambda emit: self._follow(body, callback, emit))
        if callback is not None:
            return self._calls.start(label, lambda: self._follow(body, callback, None))
        return self._calls.start(label, lambda: self._api.exec(self.id, body))

    async def _follow(self, body: dict[str, Any], callback: OnChunk | None, emit: Emit | None) -> ExecResult:
        result = None
        async with aclosing(self._api.exec_events(self.id, body)) as events:
            async for event in events:
                kind = event.get("type")
                if kind in _OUTPUT:
                    chunk = ExecChunk.from_event(event)
                    if callback is not None and isinstance(called := callback(chunk), Awaitable):
                        await called
                    if emit is not None:
                        await emit(chunk)
                elif kind == "exec.completed":
                    result = _result_of(event)
        assert result is not None  # exec_events raises when the stream ends without it
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
                `on_stdout` and `on_stderr` (called with each `ExecChunk`, in the calling thread).

        Returns:
            An `ExecResult`. A program that fails is a result, not an error.

        Raises:
            E80Error: The platform failed.
            TypeError: The code is not text or an option does not exist.
        """
        body, callbacks = python_body(code, options)
        return self._exec(body, callbacks if callbacks else None, stream)

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
        body, callbacks = command_body(command, options)
        return self._exec(body, callbacks if callbacks else None, stream)

    def read_file(self, path: str) -> bytes:
        """Read a file of the sandbox."""
        return self._portal.call(self._api.read_file, self.id, path)

    def write_file(self, path: str, data: bytes | str) -> int:
        """Write a file of the sandbox (text as UTF-8); returns its size."""
        return self._portal.call(self._api.write_file, self.id, path, _as_bytes(data))

    def stop(self) -> None:
        """End the sandbox. What still runs in it is killed. Stopping it again is no error."""
        self.info = self._portal.call(self._api.stop, self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(stop_quietly, self._api, self)

    def _exec(self, body: dict[str, Any], callback: OnChunk | None, stream: bool) -> ExecResult | ExecStream:
        if not stream and callback is None:
            return self._portal.call(self._api.exec, self.id, body)
        following = ExecStream(self._portal, self._api.exec_events(self.id, body), callback)
        return following if stream else following.result()


class ExecStream:
    """A program's output as it arrives, for blocking callers: iterate it for `ExecChunk`s, then ask
    `result()`."""

    def __init__(
        self, portal: Portal, events: AsyncGenerator[dict[str, Any]], callback: OnChunk | None = None
    ) -> None:
        self._portal = portal
        self._events = events
        self._callback = callback
        self._result: ExecResult | None = None
        self._ahead = self._next_event()  # starts the program, and raises here what keeps it from starting

    def __iter__(self) -> Iterator[ExecChunk]:
        while (event := self._take()) is not None:
            if event.get("type") in _OUTPUT:
                chunk = ExecChunk.from_event(event)
                self._call_back(chunk)
                yield chunk
            elif event.get("type") == "exec.completed":
                self._result = _result_of(event)

    def result(self) -> ExecResult:
        """The result; waits for the end of the program and drops output that was not iterated."""
        try:
            for _ in self:
                pass
        except BaseException:
            self.close()
            raise
        if self._result is None:
            raise E80Error("this stream was closed before its program ended", code="stream_closed")
        return self._result

    def close(self) -> None:
        """Stop following the program."""
        self._portal.call(self._events.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> dict[str, Any] | None:
        event, self._ahead = self._ahead, None
        return event if event is not None else self._next_event()

    def _next_event(self) -> dict[str, Any] | None:
        return self._portal.call(_next, self._events)

    def _call_back(self, chunk: ExecChunk) -> None:
        called = None if self._callback is None else self._callback(chunk)
        if inspect.iscoroutine(called):
            called.close()
            raise TypeError(
                "on_stdout and on_stderr must be plain functions here; use `async with` for coroutines"
            )


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


async def _next(events: AsyncGenerator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(events, None)


def _result_of(event: dict[str, Any]) -> ExecResult:
    body = event.get("exec")
    if not isinstance(body, dict):
        raise UnexpectedResponseError("the event exec.completed holds no exec")
    return ExecResult.from_body(body)


def _as_bytes(data: bytes | str) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    raise TypeError(f"data must be bytes or text, not {type(data).__name__}")
