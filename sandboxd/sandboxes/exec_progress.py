"""The execs in progress: one entry each, however many requests follow it.

An exec that no request follows any more is kept: a task waits for its end, so that the history gets its row.
What an earlier process left running is taken up in the same way.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import structlog

from sandboxd.agentlink.client import ExecRequest, Known
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError, UnknownExecError
from sandboxd.kit.clock import Clock
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.ids import is_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Runtime
from sandboxd.runtimes.errors import AgentUnreachableError
from sandboxd.sandboxes.errors import BusyError
from sandboxd.sandboxes.exec_result import Run, add_refusal
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.states import ExecStatus

log = structlog.get_logger(__name__)

# How late the agent may be before it gets help, and how long that lasts; agentlink gives up after both.
OVERDUE_S = 0.25
RELIEF_S = 25.0
# A call in a context is interrupted at its deadline, and may take so long to end of it.
CONTEXT_GRACE_S = 1.0
HELLO_S = 2.0
# Requests that may follow one exec at once: each holds a connection to the agent.
MAX_FOLLOWERS = 8
# An exec that runs longer than this is in the history while it runs.
NOTE_S = 1.0
_RECOVER_DELAYS_S = (0.0, 1.0, 5.0, 30.0)


@dataclass(slots=True)
class Entry:
    """An exec in progress. `running` is false only before the agent can have heard of it."""

    id: str
    sandbox: LiveSandbox
    kind: str
    started_at: float
    title: str = ""
    context_id: str | None = None
    background: bool = False
    # Whether a request with its Idempotency-Key may come back for it.
    keyed: bool = False
    # Counted as a server: it has no deadline.
    endless: bool = False
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    followers: int = 0
    running: bool = False
    # It had ended, and was accounted for, before anything here followed it.
    replayed: bool = False
    noted: bool = False
    ended: bool = False
    keeper: asyncio.Task[None] | None = None
    # On the loop's clock: when an exec that nobody follows is ended; None for never.
    end_at: float | None = None

    def new_run(self, *, keep_output: bool = False) -> Run:
        return Run(
            self.id,
            self.sandbox.id,
            self.kind,
            self.started_at,
            title=self.title,
            context_id=self.context_id,
            background=self.background,
            keep_output=keep_output,
        )


class Progress:
    """`draining` tells that the daemon is about to end, and that nobody can come back to it."""

    def __init__(
        self,
        *,
        max_execs: int,
        clock: Clock,
        metrics: Metrics,
        tasks: TaskOwner,
        live: LiveSandboxes,
        runtime: Runtime,
        history: History,
        draining: Callable[[], bool],
    ) -> None:
        self._max_execs = max_execs
        self._clock = clock
        self._metrics = metrics
        self._tasks = tasks
        self._live = live
        self._runtime = runtime
        self._history = history
        self._draining = draining
        self._entries: dict[str, Entry] = {}

    def find(self, sandbox_id: str, exec_id: str) -> Entry | None:
        entry = self._entries.get(exec_id)
        return entry if entry is not None and entry.sandbox.id == sandbox_id else None

    def check_room(self, sandbox: LiveSandbox, exec_id: str) -> None:
        entry = self._entries.get(exec_id)
        if entry is None and sandbox.execs >= self._max_execs:
            raise BusyError(f"Sandbox {sandbox.id} runs {sandbox.execs} execs, the limit")
        if entry is not None and entry.followers >= MAX_FOLLOWERS:
            raise BusyError(f"Exec {exec_id} is followed by {entry.followers} requests, the limit")

    def join(self, sandbox: LiveSandbox, request: ExecRequest, run: Run) -> Entry:
        self.check_room(sandbox, request.id)
        entry = self._entries.get(request.id)
        if entry is None:
            entry = Entry(
                request.id,
                sandbox,
                run.kind,
                run.started_at,
                title=run.title,
                context_id=run.context_id,
                background=run.background,
                keyed=request.fingerprint is not None,
                endless=request.timeout_s is None,
            )
            self._open(entry, request.timeout_s)
        self._join(entry)
        return entry

    def follow(self, sandbox: LiveSandbox, exec_id: str) -> Entry | None:
        """Joins an exec in progress that goes on as long as somebody follows it; None for any other."""
        entry = self.find(sandbox.id, exec_id)
        if entry is None or not entry.running or not (entry.background or entry.keyed):
            return None
        self._join(entry)
        return entry

    def note(self, sandbox_id: str) -> None:
        """Sees to it that the history knows all that runs in a sandbox."""
        for entry in self._entries.values():
            if entry.sandbox.id == sandbox_id and entry.running and not entry.noted:
                self._note(entry)

    async def write_down(self, entry: Entry) -> None:
        """Makes an exec durable before it is started: whatever happens to this process, its id is known."""
        if await self._history.find(entry.sandbox.id, entry.id) is None:
            await self._history.write(self._row(entry, ExecStatus.RUNNING))
        entry.noted = True

    def leave(self, entry: Entry, run: Run, patience_s: float | None, taken: bool) -> None:
        entry.followers -= 1
        entry.sandbox.touch(self._clock.now())
        if run.ended:
            self._end(entry, run)
        if entry.followers:
            return
        if entry.ended or not entry.running or entry.sandbox.paused:
            self._drop(entry)
            return
        if self._tasks.closed:
            return  # the next process takes it up
        if taken or entry.end_at is None:
            now = asyncio.get_running_loop().time()
            entry.end_at = None if patience_s is None else now + patience_s
        self._keep(entry)

    async def recover(self, sandbox: LiveSandbox) -> None:
        """Takes up all that an earlier process, or a pause, left running in a sandbox or without its row."""
        if sandbox.project_id is None:
            return
        for delay_s in _RECOVER_DELAYS_S:
            await asyncio.sleep(delay_s)
            if sandbox.paused or self._live.get(sandbox.id) is not sandbox:
                return
            try:
                await self._recover(sandbox)
                return
            except SandboxdError as error:
                log.warning("exec.not_recovered", sandbox_id=sandbox.id, reason=error.message)

    def _join(self, entry: Entry) -> None:
        if entry.keeper is not None:
            entry.keeper.cancel()
            entry.keeper = None
        entry.followers += 1

    def _open(self, entry: Entry, left_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        entry.timers.append(loop.call_later(NOTE_S, self._note, entry))
        if left_s is not None:
            # Help for an agent that does not end an exec at its deadline.
            self._expect(entry, left_s)
        self._entries[entry.id] = entry
        entry.sandbox.execs += 1
        entry.sandbox.servers += entry.endless

    def _expect(self, entry: Entry, left_s: float) -> None:
        late_s = OVERDUE_S if entry.context_id is None else OVERDUE_S + CONTEXT_GRACE_S
        loop = asyncio.get_running_loop()
        entry.timers.append(loop.call_later(left_s + late_s, self._overdue, entry))

    def _drop(self, entry: Entry) -> None:
        for timer in entry.timers:
            timer.cancel()
        entry.over.set()
        self._entries.pop(entry.id, None)
        entry.sandbox.execs -= 1
        entry.sandbox.servers -= entry.endless
        if entry.noted and not entry.ended and not entry.running:
            # It was refused, but so late that it is in the history already.
            self._history.add(self._row(entry, ExecStatus.FAILED))

    def _end(self, entry: Entry, run: Run) -> None:
        """The exec is over: accounts for it, once. The result of one that was over before is only written
        again, which changes nothing unless it was never written."""
        if entry.ended:
            return
        entry.ended = True
        sandbox = entry.sandbox
        row = run.row(sandbox.project_id)
        self._history.add(row)
        if not entry.replayed:
            sandbox.execs_ended += 1
            sandbox.bytes_out += run.output_bytes
            self._metrics.execs.labels(row["status"]).inc()
            self._metrics.exec_duration.observe(row["duration_ms"] / 1000)

    def _note(self, entry: Entry) -> None:
        if not entry.ended:
            entry.noted = True
            self._history.add(self._row(entry, ExecStatus.RUNNING))

    def _row(self, entry: Entry, status: ExecStatus) -> dict[str, Any]:
        run = entry.new_run()
        run.status = status
        return run.row(entry.sandbox.project_id)

    def _keep(self, entry: Entry) -> asyncio.Task[None]:
        entry.keeper = self._tasks.start(f"keep {entry.id}", self._kept(entry))
        return entry.keeper

    async def _kept(self, entry: Entry) -> None:
        """Follows an exec that no request follows. A request that comes back cancels this and goes on."""
        run = entry.new_run()
        killer = None
        if entry.end_at is not None:
            killer = asyncio.get_running_loop().call_at(entry.end_at, self._give_up, entry)
        try:
            if entry.background:
                # What a server writes in all its life is nobody's to read here.
                for event in await entry.sandbox.agent.wait(entry.id):
                    run.add(event)
            else:
                async with aclosing(entry.sandbox.agent.attach(entry.id)) as events:
                    async for event in events:
                        run.add(event)
        except AgentRefusedError as error:
            entry.running = False
            add_refusal(run, error)
        except UnknownExecError:
            # It never came to the agent, unless we know better.
            run.status = ExecStatus.LOST if entry.noted else None
        except (LinkBrokenError, AgentUnreachableError) as error:
            run.status = self.fate(entry.sandbox, entry.id, error)
        finally:
            if killer is not None:
                killer.cancel()
        if run.ended:
            self._end(entry, run)
        if not entry.followers:
            self._drop(entry)

    def _give_up(self, entry: Entry) -> None:
        if not self._draining():
            self._tasks.start(f"cancel {entry.id}", self._cancel(entry))

    async def _cancel(self, entry: Entry) -> None:
        try:
            await entry.sandbox.agent.cancel(entry.id)
        except SandboxdError as error:
            log.info(
                "exec.cancel_failed", sandbox_id=entry.sandbox.id, exec_id=entry.id, reason=error.message
            )

    def fate(self, sandbox: LiveSandbox, exec_id: str, error: SandboxdError) -> ExecStatus | None:
        """What became of an exec whose link is lost; None when it stands still with its sandbox."""
        if self._live.get(sandbox.id) is None:
            # With its sandbox gone the exec was ended.
            return ExecStatus.KILLED
        if sandbox.paused:
            return None
        log.warning("exec.link_lost", sandbox_id=sandbox.id, exec_id=exec_id, reason=error.message)
        return ExecStatus.LOST

    async def _recover(self, sandbox: LiveSandbox) -> None:
        hello = await sandbox.agent.hello()
        if hello.held:
            # Whoever stopped the clock died before he could start it again.
            await sandbox.agent.timers(run=True)
        # Whatever the agent names: only what can be an id of ours comes near the store.
        known = {item.id: item for item in hello.execs if is_id(item.id)}
        rows = {row.id: row for row in await self._history.running(sandbox.id)}
        for row in rows.values():
            if row.id not in known and row.id not in self._entries:
                self._history.add({**row.model_dump(), "status": str(ExecStatus.LOST)})
        ended = await self._history.ended(known)
        for item in known.values():
            if item.id in ended or item.id in self._entries:
                continue
            task = self._keep(self._adopt(sandbox, item, rows.get(item.id)))
            if item.finished:
                # One after the other: these are only read, and there may be many.
                await asyncio.wait([task])

    def _adopt(self, sandbox: LiveSandbox, item: Known, row: Exec | None) -> Entry:
        entry = Entry(
            item.id,
            sandbox,
            item.kind,
            self._clock.now() - item.age_s if row is None else row.started_at,
            title="" if row is None else row.title,
            context_id=(item.context if is_id(item.context or "") else None)
            if row is None
            else row.context_id,
            background=item.ring if row is None else row.background,
            keyed=item.keyed,
            endless=item.left_s is None and not item.finished,
            running=True,
            noted=row is not None,
        )
        self._open(entry, None if item.finished else item.left_s)
        log.info("exec.recovered", sandbox_id=sandbox.id, exec_id=item.id, finished=item.finished)
        return entry

    def _overdue(self, entry: Entry) -> None:
        self._tasks.start(f"relieve {entry.id}", self._relieve(entry))

    async def _relieve(self, entry: Entry) -> None:
        """Lets the agent out of the sandbox's CPU limit until the exec has ended. Hundreds of processes that
        fork can use up the quota in the kernel alone, period after period, and leave the agent none of it."""
        sandbox, exec_id = entry.sandbox, entry.id
        left_s = None if entry.context_id is None else await self._left_s(entry)
        if left_s is not None:
            self._expect(entry, left_s)
            return
        log.warning("exec.overdue", sandbox_id=sandbox.id, exec_id=exec_id)
        try:
            await self._runtime.limit_cpus(sandbox.id, None)
            async with asyncio.timeout(RELIEF_S):
                await entry.over.wait()
        except TimeoutError:
            log.warning("exec.still_overdue", sandbox_id=sandbox.id, exec_id=exec_id)
        except SandboxdError as error:
            log.warning("exec.relief_failed", sandbox_id=sandbox.id, exec_id=exec_id, reason=error.message)
        finally:
            if self._live.get(sandbox.id) is not None:
                await self._restore(sandbox)

    async def _left_s(self, entry: Entry) -> float | None:
        """What is left of a call whose time began later than we thought, because it waited for its turn in
        its context; None when nothing is."""
        try:
            known = {item.id: item for item in (await entry.sandbox.agent.hello(HELLO_S)).execs}
        except SandboxdError:
            return None
        item = known.get(entry.id)
        if item is None or item.finished or not item.left_s:
            return None
        return item.left_s

    async def _restore(self, sandbox: LiveSandbox) -> None:
        try:
            await self._runtime.limit_cpus(sandbox.id, sandbox.cpus)
        except SandboxdError as error:
            log.warning("exec.limit_not_restored", sandbox_id=sandbox.id, reason=error.message)
