"""Programs in the background: `Process` (calls block) and `AsyncProcess` (calls give `Pending`). No HTTP in
here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

from e80_sdk.errors import NotFoundError, StdinFullError
from e80_sdk.execs import ExecApi
from e80_sdk.pending import Calls, Pending
from e80_sdk.portal import Portal
from e80_sdk.records import ExecInfo
from e80_sdk.results import ExecChunk, ExecReader, ExecResult
from e80_sdk.streams import iterate

WRITE_PIECE = 128 * 1024


class ProcessCore:
    """One exec that goes on by itself: what both faces do with it. It knows how far its output was read, and
    how much input it was given."""

    def __init__(self, execs: ExecApi, sandbox_id: str, exec_id: str, info: ExecInfo | None = None) -> None:
        self.id = exec_id
        self.info = info
        self._execs = execs
        self._sandbox_id = sandbox_id
        self._last: int | None = None
        self._ended: ExecResult | None = None
        self._written: int | None = None
        # First come, first served: what is written without awaiting arrives in its order.
        self._writing = asyncio.Lock()

    async def chunks(self) -> AsyncGenerator[ExecChunk]:
        """Output from where this handle has read to, as it comes, to the end of the program."""
        async with aclosing(self._read()) as items:
            async for reader, chunk in items:
                self._last = reader.last
                if chunk is not None:
                    yield chunk

    async def wait(self, timeout_s: float | None = None) -> ExecResult:
        """The result, once there is one. What was not read yet can be read later."""
        if self._ended is not None:
            return self._ended
        try:
            async with asyncio.timeout(timeout_s), aclosing(self._read()) as items:
                async for _ in items:
                    pass  # what comes is for who iterates
        except TimeoutError as exc:
            raise TimeoutError(f"process {self.id} still runs after {timeout_s:g} s") from exc
        except NotFoundError as exc:
            # How it ended is known for longer than what it wrote.
            if exc.code != "exec_output_gone":
                raise
            return await self.result()
        assert self._ended is not None  # follow() raises when the stream ends without it
        return self._ended

    async def result(self) -> ExecResult:
        """How it is now, with its output so far."""
        if self._ended is None:
            found = await self._execs.get(self._sandbox_id, self.id)
            if found.status == "running":
                return found
            self._ended = found
        return self._ended

    async def poll(self) -> ExecResult | None:
        """The result, or None while it runs."""
        found = await self.result()
        return None if found.status == "running" else found

    async def write(self, data: bytes | str) -> int:
        """Write to its input; waits, as a pipe does, while the program does not read. Gives how many bytes
        were written. Each byte arrives once, however often the connection breaks."""
        raw = data.encode() if isinstance(data, str) else bytes(data)
        async with self._writing:
            begin = self._written if self._written is not None else await self._taken()
            # Unknown until all of it is in: somebody may lose patience half-way.
            self._written = None
            done = 0
            while done < len(raw):
                piece = raw[done : done + WRITE_PIECE]
                done = await self._push(piece, begin + done) - begin
            self._written = begin + done
        return len(raw)

    async def close_stdin(self) -> None:
        """End its input; once is as good as twice."""
        async with self._writing:
            await self._execs.write(self._sandbox_id, self.id, b"", close=True)

    async def send_signal(self, signal: str | int) -> bool:
        """Send it a signal; whether it was delivered."""
        return await self._execs.signal(self._sandbox_id, self.id, signal)

    async def resize(self, rows: int, cols: int) -> None:
        """Give its terminal another size."""
        await self._execs.resize(self._sandbox_id, self.id, rows, cols)

    async def _taken(self) -> int:
        return (await self._execs.write(self._sandbox_id, self.id, b"")).size

    async def _push(self, piece: bytes, offset: int) -> int:
        while True:
            try:
                return (await self._execs.write(self._sandbox_id, self.id, piece, offset=offset)).size
            except StdinFullError:
                continue  # the server has waited already, and knows what it has taken

    async def _read(self) -> AsyncGenerator[tuple[ExecReader, ExecChunk | None]]:
        reader = ExecReader()
        async with aclosing(self._execs.follow(self._sandbox_id, self.id, after=self._last)) as events:
            async for event in events:
                chunk = reader.chunk(event)
                if reader.result is not None:
                    self._ended = reader.result
                yield reader, chunk


class _Facts:
    _core: ProcessCore

    @property
    def id(self) -> str:
        """Id of the exec; `sandbox.process(id)` finds it again, from anywhere."""
        return self._core.id

    @property
    def info(self) -> ExecInfo | None:
        """The exec as the server described it when this handle was made; None for one from
        `sandbox.process(id)`."""
        return self._core.info

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"


class AsyncProcess(_Facts):
    """A program in the background of an `AsyncSandbox`: calls start at once and give a `Pending`.

    `async for chunk in process` gives its output as it comes, from where this handle has read to.
    """

    def __init__(self, core: ProcessCore, calls: Calls) -> None:
        self._core = core
        self._calls = calls

    def __aiter__(self) -> AsyncIterator[ExecChunk]:
        return self._core.chunks()

    def wait(self, timeout_s: float | None = None) -> Pending[ExecResult]:
        """Wait for its end; see `Process.wait`."""
        return self._calls.start("wait", lambda: self._core.wait(timeout_s))

    def poll(self) -> Pending[ExecResult | None]:
        """The result, or None while it runs."""
        return self._calls.start("poll", self._core.poll)

    def result(self) -> Pending[ExecResult]:
        """How it is now, running or ended, with the output that is kept."""
        return self._calls.start("result", self._core.result)

    def write(self, data: bytes | str) -> Pending[int]:
        """Write to its input; see `Process.write`. Several writes arrive in their order."""
        return self._calls.start("write", lambda: self._core.write(data))

    def close_stdin(self) -> Pending[None]:
        """End its input, after what was written before."""
        return self._calls.start("close_stdin", self._core.close_stdin)

    def send_signal(self, signal: str | int) -> Pending[bool]:
        """Send it a signal; see `Process.send_signal`."""
        return self._calls.start("send_signal", lambda: self._core.send_signal(signal))

    def kill(self) -> Pending[bool]:
        """End it and all that it started, at once."""
        return self._calls.start("kill", lambda: self._core.send_signal("SIGKILL"))

    def resize(self, rows: int, cols: int) -> Pending[None]:
        """Give its terminal another size."""
        return self._calls.start("resize", lambda: self._core.resize(rows, cols))


class Process(_Facts):
    """A program in the background of a `Sandbox`: calls block.

    `for chunk in process` gives its output as it comes, from where this handle has read to, until the program
    ends; break off and go on later as you like. A background program keeps its newest output; a chunk tells
    in `missed_bytes` what was lost before it.
    """

    def __init__(self, core: ProcessCore, portal: Portal) -> None:
        self._core = core
        self._portal = portal

    def __iter__(self) -> Iterator[ExecChunk]:
        return iterate(self._portal, self._core.chunks())

    def wait(self, timeout_s: float | None = None) -> ExecResult:
        """Wait for its end and return the result. Output that was not iterated can still be iterated.

        Raises:
            TimeoutError: It still runs after `timeout_s`; it goes on.
        """
        return self._portal.call(self._core.wait, timeout_s)

    def poll(self) -> ExecResult | None:
        """The result, or None while it runs."""
        return self._portal.call(self._core.poll)

    def result(self) -> ExecResult:
        """How it is now, running (`status`) or ended, with the output that is kept."""
        return self._portal.call(self._core.result)

    def write(self, data: bytes | str) -> int:
        """Write to its input (text as UTF-8); returns how many bytes were written.

        It blocks, as a pipe does, while the program does not read. Each byte arrives once, however often the
        connection breaks. One handle writes at a time.

        Raises:
            StdinClosedError: Its input is not open: it was started without `stdin_open` or `pty`, it was
                closed, or the program has ended.
        """
        return self._portal.call(self._core.write, data)

    def close_stdin(self) -> None:
        """End its input."""
        self._portal.call(self._core.close_stdin)

    def send_signal(self, signal: str | int) -> bool:
        """Send it a signal, such as `SIGINT`; whether it was delivered: not to a program that has ended."""
        return self._portal.call(self._core.send_signal, signal)

    def kill(self) -> bool:
        """End it and all that it started, at once; whether there was something to end."""
        return self._portal.call(self._core.send_signal, "SIGKILL")

    def resize(self, rows: int, cols: int) -> None:
        """Give its terminal another size.

        Raises:
            ConflictError: It has no terminal.
        """
        self._portal.call(self._core.resize, rows, cols)
