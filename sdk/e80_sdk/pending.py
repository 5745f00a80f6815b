"""`Pending[T]`: a call on a sandbox that has started; and `Calls`, which owns the calls of one sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, NoReturn, TypeVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from e80_sdk.errors import NotAwaitedError
from e80_sdk.results import ExecChunk

T = TypeVar("T")
P = TypeVar("P", bound="Pending[Any]")
Emit = Callable[[ExecChunk], Awaitable[None]]
STREAM_CHUNKS = 64


class Pending(Generic[T]):
    """A call that has started. `await` it for its value; with `stream=True` also iterate it with `async for`.

    A tool or an endpoint of `eighty80_app()` may return it as it is. Everything else that would treat it as
    the value raises `NotAwaitedError`.
    """

    __slots__ = ("__weakref__", "_chunks", "_label", "_observed", "_task")

    def __init__(
        self, task: asyncio.Task[T], label: str, chunks: MemoryObjectReceiveStream[ExecChunk] | None = None
    ) -> None:
        self._task = task
        self._label = label
        self._chunks = chunks
        self._observed = False

    def __await__(self) -> Generator[Any, None, T]:
        self._observed = True
        self._discard_chunks()
        return self._task.__await__()

    async def __aiter__(self) -> AsyncIterator[ExecChunk]:
        """Output as it arrives; raises at the end what the call raised."""
        if self._chunks is None:
            raise NotAwaitedError(f"{self._label}() gives no stream; call it with stream=True to iterate it")
        async for chunk in self._chunks:
            yield chunk
        await self

    def __repr__(self) -> str:
        return f"<Pending {self._label}(); await it>"

    def cancel(self) -> None:
        """Break the call off: a program that it runs is ended; awaiting it raises `CancelledError`."""
        self._observed = True
        self._task.cancel()

    def _discard_chunks(self) -> None:
        # Nobody will iterate any more: without this a full buffer would hold the call up for ever.
        if self._chunks is not None:
            self._chunks.close()

    def _refuse(self, use: str) -> NoReturn:
        raise NotAwaitedError(
            f"{self._label}() has started but its value is not here yet: await it before {use}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(f"reading .{name}")

    def __bool__(self) -> NoReturn:
        self._refuse("testing it")

    def __len__(self) -> NoReturn:
        self._refuse("asking its length")

    def __str__(self) -> NoReturn:
        self._refuse("using it as text")

    def __format__(self, spec: str) -> NoReturn:
        self._refuse("formatting it")

    def __iter__(self) -> NoReturn:
        self._refuse("iterating it")

    def __contains__(self, item: object) -> NoReturn:
        self._refuse("looking into it")

    def __getitem__(self, key: object) -> NoReturn:
        self._refuse("indexing it")

    def __add__(self, other: object) -> NoReturn:
        self._refuse("adding to it")

    def __radd__(self, other: object) -> NoReturn:
        self._refuse("adding it")

    def __eq__(self, other: object) -> bool:
        return self is other or self._refuse("comparing it")

    __hash__ = object.__hash__


class Calls:
    """Starts the calls of one sandbox and is the owner of their tasks.

    Calls run at the same time, but for one rule: a call waits for the writes that were started before it, so
    that an un-awaited `write_file` followed by `run_python` finds its file.
    """

    def __init__(self) -> None:
        self._open: list[Pending[Any]] = []
        self._write: asyncio.Task[Any] | None = None

    def start(
        self, label: str, call: Callable[[], Coroutine[Any, Any, T]], *, write: bool = False
    ) -> Pending[T]:
        """Start a call. `write` makes later calls wait for it."""
        return self.start_as(Pending[T], label, call, write=write)

    def start_as(
        self, kind: type[P], label: str, call: Callable[[], Coroutine[Any, Any, T]], *, write: bool = False
    ) -> P:
        """Start a call whose `Pending` can do more."""
        task = asyncio.get_running_loop().create_task(_after(self._write, call))
        if write:
            self._write = task
        pending = kind(task, label)
        self._own(pending)
        return pending

    def start_stream(self, label: str, call: Callable[[Emit], Coroutine[Any, Any, T]]) -> Pending[T]:
        """Start a call that emits chunks for whoever iterates the `Pending`."""
        sender, receiver = anyio.create_memory_object_stream[ExecChunk](STREAM_CHUNKS)
        task = asyncio.get_running_loop().create_task(_after(self._write, lambda: call(_emitter(sender))))
        task.add_done_callback(lambda _: sender.close())
        return self._own(Pending(task, label, receiver))

    async def finish(self) -> None:
        """Wait for every call.

        Raises:
            Exception: The first error of a call that nobody awaited; further ones are in its notes.
        """
        while waiting := [call for call in self._open if not call._task.done()]:
            for call in waiting:
                call._discard_chunks()
            await asyncio.wait([call._task for call in waiting])
        errors = self.take_errors()
        if errors:
            for label, error in errors[1:]:
                errors[0][1].add_note(f"{label}() failed too: {error}")
            raise errors[0][1]

    async def cancel(self) -> None:
        """Cancel what runs and wait until it is gone."""
        running = [call for call in self._open if not call._task.done()]
        for call in running:
            call._task.cancel()
        if running:
            await asyncio.wait([call._task for call in running])

    def take_errors(self) -> list[tuple[str, BaseException]]:
        """The errors of calls that nobody awaited, each once; forgets all calls that are done."""
        done = [call for call in self._open if call._task.done()]
        self._open = [call for call in self._open if not call._task.done()]
        errors: list[tuple[str, BaseException]] = []
        for call in done:
            call._discard_chunks()
            # Asking for the exception also tells asyncio that somebody knows of it.
            error = None if call._task.cancelled() else call._task.exception()
            if error is not None and not call._observed and all(error is not known for _, known in errors):
                errors.append((call._label, error))
        return errors

    def _own(self, call: Pending[T]) -> Pending[T]:
        self._open = [known for known in self._open if not (known._task.done() and known._observed)]
        self._open.append(call)
        return call


async def settle(value: object) -> Any:
    """The value itself, or what it comes to when it is a `Pending` (or any other awaitable)."""
    while isinstance(value, Awaitable):
        value = await value
    return value


async def undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Run cleaning up to its end even when the caller is cancelled meanwhile; the cancellation follows
    afterwards."""
    task = asyncio.get_running_loop().create_task(work)
    interrupted: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # a cancelled anyio scope would cancel each await anew
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                interrupted = exc
    task.result()
    if interrupted is not None:
        raise interrupted


async def _after(write: asyncio.Task[Any] | None, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    if write is not None and not write.done():
        await asyncio.wait([write])
        write.result()
    return await call()


def _emitter(sender: MemoryObjectSendStream[ExecChunk]) -> Emit:
    async def emit(chunk: ExecChunk) -> None:
        try:
            await sender.send(chunk)
        except anyio.BrokenResourceError:
            pass  # nobody iterates; the result holds the output

    return emit
