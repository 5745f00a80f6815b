"""Runs code and commands in a sandbox and tells what came of it, at the end or as it happens.

Each exec in progress has one entry here, however many requests follow it. An exec that no request follows any
more is kept: followed to its end by a task, so that the history gets its row.
"""

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import structlog

from sandboxd.agentlink.client import Event, ExecRequest, Known, Output, Started
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError, UnknownExecError
from sandboxd.identity.errors import IdempotencyConflictError
from sandboxd.kit.clock import Clock
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.ids import derived_id, new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Runtime
from sandboxd.runtimes.errors import AgentUnreachableError
from sandboxd.sandboxes.errors import (
    BusyError,
    ExecNotFoundError,
    ExecResultGoneError,
    LimitError,
    SandboxPausedError,
)
from sandboxd.sandboxes.exec_result import Decoder, Run, refused, result_of
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.states import ExecStatus

log = structlog.get_logger(__name__)

HOME = "/home/user"
# How late the agent may be before it gets help, and how long that lasts; agentlink gives up after both.
OVERDUE_S = 0.25
RELIEF_S = 25.0
# A repeated request may come so long after its exec lost the last one that followed it.
RETRY_GRACE_S = 30.0
# Requests that may follow one exec at once: each holds a connection to the agent.
MAX_FOLLOWERS = 8
# An exec that runs longer than this is in the history while it runs.
NOTE_S = 1.0
_RECOVER_DELAYS_S = (0.0, 1.0, 5.0, 30.0)

Events = AsyncGenerator[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class NewExec:
    """What a client wants to run: Python `code`, or a `command` as argv or as text for `bash -lc`."""

    code: str | None = None
    command: str | list[str] | None = None
    cwd: str = HOME
    env: dict[str, str] = field(default_factory=dict)
    stdin: str = ""
    timeout_s: float | None = None
    stream: bool = False
    fresh: bool = False

    def fingerprint(self) -> str:
        """Equal for requests that would run the same thing, however they want to be told of it."""
        said = [self.code, self.command, self.cwd, self.env, self.stdin, self.timeout_s, self.fresh]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode("ascii")).hexdigest()


@dataclass(slots=True)
class _Entry:
    """An exec in progress. `running` is false only before the agent can have heard of it."""

    id: str
    sandbox: LiveSandbox
    kind: str
    started_at: float
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    followers: int = 0
    running: bool = False
    noted: bool = False
    ended: bool = False
    keeper: asyncio.Task[None] | None = None
    # On the loop's clock: when an exec that nobody follows is ended; None for never.
    end_at: float | None = None


class ExecService:
    """`draining` tells that the daemon is about to end, and that nobody can come back to it."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        tasks: TaskOwner,
        live: LiveSandboxes,
        runtime: Runtime,
        history: History,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._tasks = tasks
        self._live = live
        self._runtime = runtime
        self.history = history
        self._draining = draining
        self._entries: dict[str, _Entry] = {}

    async def run(self, sandbox: LiveSandbox, wanted: NewExec, key: str | None = None) -> dict[str, Any]:
        """The result of the exec, as the API shows it; with a key, of the one exec that it stands for."""
        request = self._request(sandbox, wanted, key)
        run = self._new_run(sandbox, request)
        async with aclosing(self._events(sandbox, request, run, key)) as events:
            async for _event in events:
                continue
        return run.result()

    def stream(self, sandbox: LiveSandbox, wanted: NewExec, key: str | None = None) -> Events:
        """Stream events: the start, each piece of output, the full result; with a key from the start of the
        exec, whenever that was. What is wrong with the request is raised here, while the answer can still
        have a status."""
        request = self._request(sandbox, wanted, key)
        self._check_room(sandbox, request.id)
        return self._stream(sandbox, request, self._new_run(sandbox, request), key)

    async def get(self, project_id: str, sandbox_id: str, exec_id: str, *, alive: bool) -> dict[str, Any]:
        """The result of an exec, with its output as long as the agent keeps it, or what there is so far.
        `alive` is whether its sandbox is."""
        entry = self._entries.get(exec_id)
        if entry is not None and entry.sandbox.id != sandbox_id:
            entry = None
        row = await self.history.find(sandbox_id, exec_id)
        if row is None and entry is None:
            raise ExecNotFoundError(exec_id)
        kind = row.kind if row is not None else entry.kind if entry is not None else ""
        started_at = row.started_at if row is not None else entry.started_at if entry is not None else 0.0
        run = Run(exec_id, sandbox_id, kind, started_at)
        live = self._live.find(project_id, sandbox_id)
        kept = live is not None and await self._read_log(live, run)
        if kept and not run.ended:
            run.status = ExecStatus.RUNNING
        elif not kept and (row is None or row.status == ExecStatus.RUNNING):
            # Nobody writes the end of an exec whose sandbox ended while no daemon was there.
            run.status = ExecStatus.RUNNING if alive else ExecStatus.KILLED
        result = run.result() if kept or row is None else result_of(row, run.status or row.status)
        if result["status"] == ExecStatus.RUNNING:
            result["duration_ms"] = None
        if not kept:
            result.update(stdout=None, stderr=None)
        return {**result, "kind": kind, "output_kept": kept}

    async def page(self, sandbox_id: str, params: PageParams) -> tuple[list[Exec], bool]:
        """What ran in a sandbox and, of what has run for a moment, what runs in it."""
        return await self.history.page(sandbox_id, params)

    def take_up(self, sandbox: LiveSandbox) -> None:
        """Recovers the sandbox's execs, in a task; for a sandbox that was adopted or resumed."""
        self._tasks.start(f"recover {sandbox.id}", self.recover(sandbox))

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

    async def close(self) -> None:
        """Writes the rows that wait. The execs go on, for the next process to take up."""
        await self.history.close()

    async def _stream(self, sandbox: LiveSandbox, request: ExecRequest, run: Run, key: str | None) -> Events:
        decoders = {False: Decoder("exec.stdout.delta"), True: Decoder("exec.stderr.delta")}
        told = key is None
        if told:
            yield "exec.started", _started(run)
        async with aclosing(self._events(sandbox, request, run, key)) as events:
            async for event in events:
                if not told:
                    # Only now its start is known: it may have been long ago.
                    told = True
                    yield "exec.started", _started(run)
                if isinstance(event, Output):
                    for delta in decoders[event.is_stderr].feed(event.data):
                        yield delta
        if not told:
            yield "exec.started", _started(run)
        for decoder in decoders.values():
            for delta in decoder.end():
                yield delta
        yield "exec.completed", {"exec": run.result()}

    async def _events(
        self, sandbox: LiveSandbox, request: ExecRequest, run: Run, key: str | None
    ) -> AsyncGenerator[Event]:
        """Adds each event to `run` and yields it."""
        entry = self._join(sandbox, request, run)
        was_running, entry.running = entry.running, True
        sandbox.bytes_in += len(request.code or b"") + len(request.stdin)
        taken = False
        try:
            async with aclosing(sandbox.agent.run(request)) as events:
                async for event in events:
                    run.add(event)
                    taken = True
                    if isinstance(event, Started):
                        entry.started_at = run.started_at
                    yield event
        except AgentRefusedError as error:
            entry.running = was_running
            for event in await self._refused(error, sandbox, request.id, key):
                run.add(event)
                yield event
        except AgentUnreachableError as error:
            # It was never asked: a connection that is lost later is another error.
            entry.running = was_running
            if sandbox.paused:
                raise SandboxPausedError(sandbox.id) from error
            raise
        except LinkBrokenError as error:
            run.status = self._fate(entry, error)
            if run.status is None:
                raise SandboxPausedError(sandbox.id) from error
        finally:
            self._leave(entry, run, self._patience_s(request, key), taken)

    def _check_room(self, sandbox: LiveSandbox, exec_id: str) -> None:
        entry = self._entries.get(exec_id)
        if entry is None and sandbox.execs >= self._settings.max_execs:
            raise BusyError(f"Sandbox {sandbox.id} runs {sandbox.execs} execs, the limit")
        if entry is not None and entry.followers >= MAX_FOLLOWERS:
            raise BusyError(f"Exec {exec_id} is followed by {entry.followers} requests, the limit")

    def _join(self, sandbox: LiveSandbox, request: ExecRequest, run: Run) -> _Entry:
        self._check_room(sandbox, request.id)
        entry = self._entries.get(request.id)
        if entry is None:
            entry = self._open(sandbox, request.id, run.kind, run.started_at, request.timeout_s)
        if entry.keeper is not None:
            entry.keeper.cancel()
            entry.keeper = None
        entry.followers += 1
        return entry

    def _leave(self, entry: _Entry, run: Run, patience_s: float | None, taken: bool) -> None:
        entry.followers -= 1
        entry.sandbox.touch(self._clock.now())
        if run.ended:
            self._end(entry, run)
        if entry.followers:
            return
        if entry.ended or not entry.running or entry.sandbox.paused:
            self._drop(entry)
            return
        if taken or entry.end_at is None:
            now = asyncio.get_running_loop().time()
            entry.end_at = None if patience_s is None else now + patience_s
        self._keep(entry)

    def _patience_s(self, request: ExecRequest, key: str | None) -> float | None:
        """How long an exec that its request has left may go on; None for to its end."""
        if key is not None:
            return RETRY_GRACE_S
        # Without a key nobody could ever see the rest of a stream. A plain request is only left by a drain.
        return 0.0 if request.stream else None

    def _open(
        self, sandbox: LiveSandbox, exec_id: str, kind: str, started_at: float, left_s: float | None
    ) -> _Entry:
        entry = _Entry(exec_id, sandbox, kind, started_at)
        loop = asyncio.get_running_loop()
        entry.timers.append(loop.call_later(NOTE_S, self._note, entry))
        if left_s is not None:
            # Help for an agent that does not end an exec at its deadline.
            entry.timers.append(loop.call_later(left_s + OVERDUE_S, self._overdue, entry))
        self._entries[exec_id] = entry
        sandbox.execs += 1
        return entry

    def _drop(self, entry: _Entry) -> None:
        for timer in entry.timers:
            timer.cancel()
        entry.over.set()
        self._entries.pop(entry.id, None)
        entry.sandbox.execs -= 1
        if entry.noted and not entry.ended and not entry.running:
            # It was refused, but so late that it is in the history already.
            self.history.add(self._row(entry, ExecStatus.FAILED))

    def _end(self, entry: _Entry, run: Run) -> None:
        """The exec is over: accounts for it, once. The result of one that was over before is only written
        again, which changes nothing unless it was never written."""
        if entry.ended:
            return
        entry.ended = True
        sandbox = entry.sandbox
        row = run.row(sandbox.project_id)
        self.history.add(row)
        if not run.replayed:
            sandbox.execs_ended += 1
            sandbox.bytes_out += run.output_bytes
            self._metrics.execs.labels(row["status"]).inc()
            self._metrics.exec_duration.observe(row["duration_ms"] / 1000)

    def _note(self, entry: _Entry) -> None:
        if not entry.ended:
            entry.noted = True
            self.history.add(self._row(entry, ExecStatus.RUNNING))

    def _row(self, entry: _Entry, status: ExecStatus) -> dict[str, Any]:
        run = Run(entry.id, entry.sandbox.id, entry.kind, entry.started_at)
        run.status = status
        return run.row(entry.sandbox.project_id)

    def _keep(self, entry: _Entry) -> asyncio.Task[None]:
        entry.keeper = self._tasks.start(f"keep {entry.id}", self._kept(entry))
        return entry.keeper

    async def _kept(self, entry: _Entry) -> None:
        """Follows an exec that no request follows. A request that comes back cancels this and goes on."""
        run = Run(entry.id, entry.sandbox.id, entry.kind, entry.started_at, keep_output=False)
        killer = None
        if entry.end_at is not None:
            killer = asyncio.get_running_loop().call_at(entry.end_at, self._give_up, entry)
        try:
            async with aclosing(entry.sandbox.agent.attach(entry.id)) as events:
                async for event in events:
                    run.add(event)
        except AgentRefusedError as error:
            entry.running = False
            self._add_refusal(run, error)
        except UnknownExecError:
            # It never came to the agent, unless we know better.
            run.status = ExecStatus.LOST if entry.noted else None
        except (LinkBrokenError, AgentUnreachableError) as error:
            run.status = self._fate(entry, error)
        finally:
            if killer is not None:
                killer.cancel()
        if run.ended:
            self._end(entry, run)
        if not entry.followers:
            self._drop(entry)

    def _give_up(self, entry: _Entry) -> None:
        if not self._draining():
            self._tasks.start(f"cancel {entry.id}", self._cancel(entry))

    async def _cancel(self, entry: _Entry) -> None:
        try:
            await entry.sandbox.agent.signal(entry.id, signal.SIGKILL)
        except SandboxdError as error:
            log.info(
                "exec.cancel_failed", sandbox_id=entry.sandbox.id, exec_id=entry.id, reason=error.message
            )

    def _fate(self, entry: _Entry, error: SandboxdError) -> ExecStatus | None:
        """What became of an exec whose link is lost; None when it stands still with its sandbox."""
        if self._live.get(entry.sandbox.id) is None:
            # With its sandbox gone the exec was ended.
            return ExecStatus.KILLED
        if entry.sandbox.paused:
            return None
        log.warning("exec.link_lost", sandbox_id=entry.sandbox.id, exec_id=entry.id, reason=error.message)
        return ExecStatus.LOST

    async def _recover(self, sandbox: LiveSandbox) -> None:
        hello = await sandbox.agent.hello()
        if hello.held:
            # Whoever stopped the clock died before he could start it again.
            await sandbox.agent.timers(run=True)
        known = {item.id: item for item in hello.execs}
        for row in await self.history.running(sandbox.id):
            if row.id not in known and row.id not in self._entries:
                self.history.add({**row.model_dump(), "status": str(ExecStatus.LOST)})
        ended = await self.history.ended(known)
        for item in known.values():
            if item.id in ended or item.id in self._entries:
                continue
            task = self._keep(self._adopt(sandbox, item))
            if item.finished:
                # One after the other: these are only read, and there may be many.
                await asyncio.wait([task])

    def _adopt(self, sandbox: LiveSandbox, item: Known) -> _Entry:
        started_at = self._clock.now() - item.age_s
        entry = self._open(sandbox, item.id, item.kind, started_at, None if item.finished else item.left_s)
        entry.running = True
        log.info("exec.recovered", sandbox_id=sandbox.id, exec_id=item.id, finished=item.finished)
        return entry

    async def _read_log(self, sandbox: LiveSandbox, run: Run) -> bool:
        """Adds what the agent has of the exec to `run`; False if that is nothing."""
        if sandbox.paused:
            return False
        try:
            events = await sandbox.agent.read_log(run.id)
        except AgentRefusedError as error:
            return self._add_refusal(run, error)
        except SandboxdError as error:
            log.info("exec.log_not_read", sandbox_id=sandbox.id, exec_id=run.id, reason=error.message)
            return False
        for event in events or ():
            run.add(event)
        return events is not None

    def _add_refusal(self, run: Run, error: AgentRefusedError) -> bool:
        try:
            events = refused(error)
        except SandboxdError:
            return False
        for event in events:
            run.add(event)
        return True

    async def _refused(
        self, error: AgentRefusedError, sandbox: LiveSandbox, exec_id: str, key: str | None
    ) -> list[Event]:
        if key is not None and error.agent_code == "exec_differs":
            raise IdempotencyConflictError(key) from error
        if key is not None and error.agent_code == "exec_gone":
            row = await self.history.find(sandbox.id, exec_id)
            raise ExecResultGoneError(exec_id, None if row is None else row.status) from error
        return refused(error)

    def _overdue(self, entry: _Entry) -> None:
        self._tasks.start(f"relieve {entry.id}", self._relieve(entry))

    async def _relieve(self, entry: _Entry) -> None:
        """Lets the agent out of the sandbox's CPU limit until the exec has ended. Hundreds of processes that
        fork can use up the quota in the kernel alone, period after period, and leave the agent none of it."""
        sandbox, exec_id = entry.sandbox, entry.id
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

    async def _restore(self, sandbox: LiveSandbox) -> None:
        try:
            await self._runtime.limit_cpus(sandbox.id, sandbox.cpus)
        except SandboxdError as error:
            log.warning("exec.limit_not_restored", sandbox_id=sandbox.id, reason=error.message)

    def _new_run(self, sandbox: LiveSandbox, request: ExecRequest) -> Run:
        kind = "command" if request.code is None else "code"
        return Run(request.id, sandbox.id, kind, self._clock.now())

    def _request(self, sandbox: LiveSandbox, wanted: NewExec, key: str | None) -> ExecRequest:
        timeout_s = wanted.timeout_s if wanted.timeout_s is not None else self._settings.exec_timeout_s
        if timeout_s > self._settings.max_exec_timeout_s:
            raise LimitError(
                f"timeout_s {timeout_s:g}: the limit here is {self._settings.max_exec_timeout_s:g}",
                param="timeout_s",
            )
        command = wanted.command
        argv = ("bash", "-lc", command) if isinstance(command, str) else tuple(command or ())
        return ExecRequest(
            id=new_id("exec") if key is None else derived_id("exec", sandbox.project_id, sandbox.id, key),
            env={**sandbox.env, **wanted.env} if wanted.env else sandbox.env,
            cwd=wanted.cwd if wanted.cwd.startswith("/") else f"{HOME}/{wanted.cwd}",
            timeout_s=timeout_s,
            output_limit=self._settings.exec_output_mb * 1024 * 1024,
            spool_limit=self._settings.exec_spool_mb * 1024 * 1024,
            stream=wanted.stream,
            stdin=wanted.stdin.encode(),
            code=None if wanted.code is None else wanted.code.encode(),
            argv=argv,
            fresh=wanted.fresh,
            fingerprint=None if key is None else wanted.fingerprint(),
        )


def _started(run: Run) -> dict[str, Any]:
    return {"exec": {"id": run.id, "sandbox_id": run.sandbox_id, "started_at": run.started_at}}
