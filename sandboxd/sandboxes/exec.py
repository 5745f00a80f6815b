"""Runs code and commands in a sandbox and tells what came of it: at the end, as it happens, or later."""

import hashlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import structlog

from sandboxd.agentlink.client import ExecRequest
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.agentlink.exec_log import Event, Output, Started
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
    ExecNotFoundError,
    ExecResultGoneError,
    LimitError,
    SandboxPausedError,
)
from sandboxd.sandboxes.exec_progress import Progress
from sandboxd.sandboxes.exec_result import Decoder, Run, add_refusal, refused, result_of
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.states import ExecStatus

log = structlog.get_logger(__name__)

HOME = "/home/user"
# A repeated request may come so long after its exec lost the last one that followed it.
RETRY_GRACE_S = 30.0

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
        retry_grace_s: float = RETRY_GRACE_S,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._tasks = tasks
        self._live = live
        self._retry_grace_s = retry_grace_s
        self.history = history
        self._progress = Progress(
            max_execs=settings.max_execs,
            clock=clock,
            metrics=metrics,
            tasks=tasks,
            live=live,
            runtime=runtime,
            history=history,
            draining=draining,
        )

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
        self._progress.check_room(sandbox, request.id)
        return self._stream(sandbox, request, self._new_run(sandbox, request), key)

    async def get(self, project_id: str, sandbox_id: str, exec_id: str, *, alive: bool) -> dict[str, Any]:
        """The result of an exec, with its output as long as the agent keeps it, or what there is so far.
        `alive` is whether its sandbox is."""
        entry = self._progress.find(sandbox_id, exec_id)
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
        await self._progress.recover(sandbox)

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
        entry = self._progress.join(sandbox, request, run)
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
                        entry.replayed = entry.replayed or (event.finished and not was_running)
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
            run.status = self._progress.fate(entry, error)
            if run.status is None:
                raise SandboxPausedError(sandbox.id) from error
        finally:
            self._progress.leave(entry, run, self._patience_s(request, key), taken)

    def _patience_s(self, request: ExecRequest, key: str | None) -> float | None:
        """How long an exec that its request has left may go on; None for to its end."""
        if key is not None:
            return self._retry_grace_s
        # Without a key nobody could ever see the rest of a stream. A plain request is only left by a drain.
        return 0.0 if request.stream else None

    async def _read_log(self, sandbox: LiveSandbox, run: Run) -> bool:
        """Adds what the agent has of the exec to `run`; False if that is nothing."""
        if sandbox.paused:
            return False
        try:
            events = await sandbox.agent.read_log(run.id)
        except AgentRefusedError as error:
            return add_refusal(run, error)
        except SandboxdError as error:
            log.info("exec.log_not_read", sandbox_id=sandbox.id, exec_id=run.id, reason=error.message)
            return False
        for event in events or ():
            run.add(event)
        return events is not None

    async def _refused(
        self, error: AgentRefusedError, sandbox: LiveSandbox, exec_id: str, key: str | None
    ) -> list[Event]:
        if key is not None and error.agent_code == "exec_differs":
            raise IdempotencyConflictError(key) from error
        if key is not None and error.agent_code == "exec_gone":
            row = await self.history.find(sandbox.id, exec_id)
            raise ExecResultGoneError(exec_id, None if row is None else row.status) from error
        return refused(error)

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
