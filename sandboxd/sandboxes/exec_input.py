"""What is sent to an exec that runs: input, signals, the size of its terminal."""

import asyncio
import signal
from weakref import WeakValueDictionary

from sandboxd.agentlink.errors import AgentRefusedError
from sandboxd.kit.clock import Clock
from sandboxd.sandboxes.errors import (
    BusyError,
    ExecNotFoundError,
    NoTerminalError,
    StdinClosedError,
    StdinFullError,
    StdinOffsetError,
)
from sandboxd.sandboxes.exec_progress import Progress
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.live import LiveSandbox

# Names without SIG, as `kill -l` has them.
SIGNALS = {name.removeprefix("SIG"): int(number) for name, number in signal.Signals.__members__.items()}
# A program that takes no input for so long does not read.
STDIN_TIMEOUT_S = 10.0
_PIECE = 256 * 1024
# What requests that write to programs of one sandbox may hold in memory, and what each costs beside its data:
# they wait for each other, and for programs that do not read.
MAX_WAITING_BYTES = 32 * 1024 * 1024
_WRITER_BYTES = 64 * 1024


class ExecInput:
    def __init__(
        self,
        clock: Clock,
        progress: Progress,
        history: History,
        stdin_timeout_s: float = STDIN_TIMEOUT_S,
    ) -> None:
        self._stdin_timeout_s = stdin_timeout_s
        self._clock = clock
        self._progress = progress
        self._history = history
        # One writer at a time: what has no offset of its own follows on what came before it.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def write(
        self, sandbox: LiveSandbox, exec_id: str, data: bytes, offset: int | None, *, close: bool
    ) -> tuple[int, bool]:
        """Hands `data` on to stdin, all of it or StdinFullError; how many bytes it was given by now, and
        whether it is still open. `offset` is where `data` begins in all of stdin: what came before is
        skipped. Raises BusyError."""
        turn = self._turns.get(exec_id)
        if turn is None:
            turn = self._turns[exec_id] = asyncio.Lock()
        cost = len(data) + _WRITER_BYTES
        if sandbox.input_bytes + cost > MAX_WAITING_BYTES:
            raise BusyError(
                f"Requests with {sandbox.input_bytes} bytes of input for sandbox {sandbox.id} wait"
            )
        sandbox.input_bytes += cost
        try:
            async with turn:
                return await self._write(sandbox, exec_id, data, offset, close)
        except AgentRefusedError as error:
            if error.agent_code == "stdin_closed":
                raise StdinClosedError(exec_id, "it was closed, or never open") from error
            await self._check_known(sandbox, exec_id, error)
            raise StdinClosedError(exec_id, "the exec has ended") from error
        finally:
            sandbox.input_bytes -= cost

    async def signal(self, sandbox: LiveSandbox, exec_id: str, number: int) -> bool:
        """Sends a signal; False for an exec that has ended."""
        try:
            delivered = await sandbox.agent.signal(exec_id, number)
        except AgentRefusedError as error:
            await self._check_known(sandbox, exec_id, error)
            return False
        sandbox.touch(self._clock.now())
        return delivered

    async def resize(self, sandbox: LiveSandbox, exec_id: str, rows: int, cols: int) -> None:
        try:
            await sandbox.agent.resize(exec_id, rows, cols)
        except AgentRefusedError as error:
            if error.agent_code != "no_terminal":
                await self._check_known(sandbox, exec_id, error)
            raise NoTerminalError(exec_id) from error
        sandbox.touch(self._clock.now())

    async def _write(
        self, sandbox: LiveSandbox, exec_id: str, data: bytes, offset: int | None, close: bool
    ) -> tuple[int, bool]:
        agent = sandbox.agent
        size, is_open = await agent.stdin(exec_id, b"", 0, False)
        if offset is None:
            offset = size
        if offset > size:
            raise StdinOffsetError(offset, size)
        first, end = size, max(size, offset + len(data))
        if not is_open and end == size:
            return size, False  # all of it was done before
        deadline = asyncio.get_running_loop().time() + self._stdin_timeout_s
        while size < end:
            start = size - offset
            taken, is_open = await agent.stdin(exec_id, data[start : start + _PIECE], size, False)
            if taken > size:
                deadline = asyncio.get_running_loop().time() + self._stdin_timeout_s
            elif asyncio.get_running_loop().time() >= deadline:
                raise StdinFullError(exec_id, size - first, size, self._stdin_timeout_s)
            sandbox.bytes_in += max(0, taken - size)
            sandbox.touch(self._clock.now())
            size = max(size, taken)
        if close:
            size, is_open = await agent.stdin(exec_id, b"", size, True)
        return size, is_open

    async def _check_known(self, sandbox: LiveSandbox, exec_id: str, error: AgentRefusedError) -> None:
        """An exec that the agent has forgotten has ended; one that nobody knows is an error."""
        if error.agent_code != "unknown_exec":
            raise error
        in_progress = self._progress.find(sandbox.id, exec_id) is not None
        if not in_progress and await self._history.find(sandbox.id, exec_id) is None:
            raise ExecNotFoundError(exec_id) from error
