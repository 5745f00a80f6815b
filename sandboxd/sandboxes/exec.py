"""Runs code and commands in a sandbox and tells what came of it: at the end, as it happens, or later."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import structlog

from sandboxd.agentlink.client import ExecRequest
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.agentlink.exec_log import Event, Outcome, Output, Started
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
    ExecOutputGoneError,
    ExecResultGoneError,
    LimitError,
    SandboxPausedError,
)
from sandboxd.sandboxes.exec_feed import Allowed, Chunks, Feeds, started
from sandboxd.sandboxes.exec_input import ExecInput
from sandboxd.sandboxes.exec_progress import Entry, Progress
from sandboxd.sandboxes.exec_request import HOMES, NewExec
from sandboxd.sandboxes.exec_result import Run, add_refusal, refused, result_of
from sandboxd.sandboxes.exec_stream import STARTED, Teller, Told
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.states import ExecStatus

log = structlog.get_logger(__name__)

# A repeated request may come so long after its exec lost the last one that followed it.
RETRY_GRACE_S = 30.0


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
        self._feeds = Feeds(
            metrics=metrics,
            tasks=tasks,
            live=live,
            progress=self._progress,
            draining=draining,
            patience_s=retry_grace_s,
        )
        self.input = ExecInput(clock, self._progress, history)

    async def run(self, sandbox: LiveSandbox, wanted: NewExec, key: str | None = None) -> dict[str, Any]:
        """The result of the exec, as the API shows it; with a key, of the one exec that it stands for."""
        request = self._request(sandbox, wanted, key)
        run = self._new_run(sandbox, request, wanted)
        async with aclosing(self._events(sandbox, request, run, key)) as events:
            async for _event in events:
                continue
        return run.result()

    def stream(self, sandbox: LiveSandbox, wanted: NewExec, key: str | None = None) -> Chunks:
        """Stream events: the start, each piece of output, the full result; with a key from the start of the
        exec, whenever that was. What is wrong with the request is raised here, while the answer can still
        have a status."""
        request = self._request(sandbox, wanted, key)
        self._progress.check_room(sandbox, request.id)
        return self._stream(sandbox, request, self._new_run(sandbox, request, wanted), key)

    async def start(self, sandbox: LiveSandbox, wanted: NewExec, key: str | None = None) -> dict[str, Any]:
        """Starts an exec that goes on by itself, and returns what there is of its result. Its id is in the
        history before it runs. Raises StoreUnavailableError before anything has happened."""
        request = self._request(sandbox, wanted, key)
        run = self._new_run(sandbox, request, wanted)
        entry = self._progress.join(sandbox, request, run)
        taken = False
        try:
            if not entry.running:
                await self._progress.write_down(entry)
            was_running, entry.running = entry.running, True
            sandbox.bytes_in += len(request.code or b"") + len(request.stdin)
            async with aclosing(self._ask(entry, request, run, key, was_running)) as events:
                async for event, _ in events:
                    taken = True
                    if isinstance(event, Started) and not event.finished:
                        break
        finally:
            self._progress.leave(entry, run, None, taken)
        if not run.ended:
            run.status = ExecStatus.RUNNING
        return run.result()

    async def follow_running(
        self, project_id: str, sandbox_id: str, exec_id: str, after: int, key_id: str, allowed: Allowed
    ) -> Chunks | None:
        """Like `follow`, for an exec in progress here: asks the store nothing. None for any other."""
        live = self._live.find(project_id, sandbox_id)
        entry = self._progress.find(sandbox_id, exec_id)
        if live is None or entry is None:
            return None
        feed = await self._feeds.open(live, entry.new_run())
        return None if feed is None else self._feeds.follow(feed, after, key_id, allowed)

    async def follow(
        self,
        project_id: str,
        sandbox_id: str,
        exec_id: str,
        after: int,
        key_id: str,
        allowed: Allowed,
        *,
        alive: bool,
    ) -> Chunks:
        """The events of an exec after a number (-1: from its start) to its end, for as long as the sandbox
        has them; see `Feeds.follow`. `alive` is whether its sandbox is. Raises ExecNotFoundError,
        ExecOutputGoneError, FollowersError."""
        run, row = await self._find(sandbox_id, exec_id, keep_output=False)
        live = self._live.find(project_id, sandbox_id)
        feed = None if live is None else await self._feeds.open(live, run)
        if feed is None:
            ended = row is not None and row.status != ExecStatus.RUNNING
            unwritten = ExecStatus.LOST if alive else ExecStatus.KILLED
            raise ExecOutputGoneError(exec_id, row.status if row is not None and ended else unwritten)
        return self._feeds.follow(feed, after, key_id, allowed)

    async def get(self, project_id: str, sandbox_id: str, exec_id: str, *, alive: bool) -> dict[str, Any]:
        """The result of an exec, with its output as long as the agent keeps it, or what there is so far.
        `alive` is whether its sandbox is."""
        run, row = await self._find(sandbox_id, exec_id, keep_output=True)
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
            result.update(stdout=None, stderr=None, results=None)
        return {**result, "kind": run.kind, "output_kept": kept}

    async def page(
        self, sandbox_id: str, params: PageParams, status: str | None, *, alive: bool
    ) -> tuple[list[Exec], bool]:
        """What ran in a sandbox and what runs in it; with a status, only those that have it. `alive` is
        whether the sandbox is."""
        self._progress.note(sandbox_id)
        statuses = None if status is None else {status}
        if statuses is not None and not alive:
            # As they are shown: see ExecEntryOut.
            statuses -= {ExecStatus.RUNNING}
            statuses |= {ExecStatus.RUNNING} if status == ExecStatus.KILLED else set()
        return await self.history.page(sandbox_id, params, statuses)

    def take_up(self, sandbox: LiveSandbox) -> None:
        """Recovers the sandbox's execs, in a task; for a sandbox that was adopted or resumed."""
        self._tasks.start(f"recover {sandbox.id}", self.recover(sandbox))

    async def recover(self, sandbox: LiveSandbox) -> None:
        """Takes up all that an earlier process, or a pause, left running in a sandbox or without its row."""
        await self._progress.recover(sandbox)

    async def tick(self) -> None:
        """A job, once a second."""
        await self._feeds.tick()

    async def close(self) -> None:
        """Writes the rows that wait. The execs go on, for the next process to take up."""
        await self.history.close()

    async def _find(self, sandbox_id: str, exec_id: str, *, keep_output: bool) -> tuple[Run, Exec | None]:
        """What is known of an exec, as a run that has nothing of its log yet, and its row."""
        entry = self._progress.find(sandbox_id, exec_id)
        row = await self.history.find(sandbox_id, exec_id)
        if row is not None:
            run = Run(
                exec_id,
                sandbox_id,
                row.kind,
                row.started_at,
                title=row.title,
                context_id=row.context_id,
                background=row.background,
                keep_output=keep_output,
            )
            return run, row
        if entry is None:
            raise ExecNotFoundError(exec_id)
        return entry.new_run(keep_output=keep_output), None

    async def _stream(self, sandbox: LiveSandbox, request: ExecRequest, run: Run, key: str | None) -> Chunks:
        teller = Teller()
        begun = key is None
        has_end = False
        if begun:
            yield 0, Told(0, STARTED, started(run)).encoded()
        async with aclosing(self._events(sandbox, request, run, key)) as events:
            async for event, end in events:
                if not begun:
                    # Only now its start is known: it may have been long ago.
                    begun = True
                    yield 0, Told(0, STARTED, started(run)).encoded()
                has_end = has_end or (end is not None and isinstance(event, Outcome))
                if end is not None:
                    told = list(teller.tell(event, end))
                else:
                    told = list(teller.refuse(event)) if isinstance(event, Output) else []
                if told:
                    yield told[-1].number, b"".join(item.encoded() for item in told)
        if not begun:
            yield 0, Told(0, STARTED, started(run)).encoded()
        for item in teller.complete(run.result(), has_end=has_end):
            yield item.number, item.encoded()

    async def _events(
        self, sandbox: LiveSandbox, request: ExecRequest, run: Run, key: str | None
    ) -> AsyncGenerator[tuple[Event, int | None]]:
        """Adds each event to `run` and yields it."""
        entry = self._progress.join(sandbox, request, run)
        was_running, entry.running = entry.running, True
        sandbox.bytes_in += len(request.code or b"") + len(request.stdin)
        taken = False
        try:
            async with aclosing(self._ask(entry, request, run, key, was_running)) as events:
                async for item in events:
                    taken = True
                    yield item
        finally:
            self._progress.leave(entry, run, self._patience_s(key), taken)

    async def _ask(
        self, entry: Entry, request: ExecRequest, run: Run, key: str | None, was_running: bool
    ) -> AsyncGenerator[tuple[Event, int | None]]:
        """Sends the request to the agent; adds each event to `run` and yields it with its end in the log,
        which a refusal is not in."""
        sandbox = entry.sandbox
        try:
            async with aclosing(sandbox.agent.start(request)) as events:
                async for item in events:
                    event = item[0]
                    run.add(event)
                    if isinstance(event, Started):
                        entry.started_at = run.started_at
                        entry.replayed = entry.replayed or (event.finished and not was_running)
                    yield item
        except AgentRefusedError as error:
            entry.running = was_running
            for event in await self._refused(error, sandbox, request.id, key):
                run.add(event)
                yield event, None
        except AgentUnreachableError as error:
            # It was never asked: a connection that is lost later is another error.
            entry.running = was_running
            if sandbox.paused:
                raise SandboxPausedError(sandbox.id) from error
            raise
        except LinkBrokenError as error:
            run.status = self._progress.fate(sandbox, entry.id, error)
            if run.status is None:
                raise SandboxPausedError(sandbox.id) from error

    def _patience_s(self, key: str | None) -> float:
        """How long an exec that its request has left may go on; nothing ends when it is the daemon's own end
        that made the request leave."""
        return 0.0 if key is None else self._retry_grace_s

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

    def _new_run(self, sandbox: LiveSandbox, request: ExecRequest, wanted: NewExec) -> Run:
        return Run(
            request.id,
            sandbox.id,
            "command" if wanted.code is None else "code",
            self._clock.now(),
            title=wanted.title(),
            context_id=wanted.context,
            background=wanted.background,
        )

    def _request(self, sandbox: LiveSandbox, wanted: NewExec, key: str | None) -> ExecRequest:
        env = {**sandbox.env, **wanted.env} if wanted.env else sandbox.env
        if wanted.pty is not None:
            env = {"TERM": wanted.pty.term, **env}
        home = HOMES[wanted.user]
        cwd = home if wanted.cwd is None else wanted.cwd
        exec_id = new_id("exec") if key is None else derived_id("exec", sandbox.project_id, sandbox.id, key)
        fingerprint = None if key is None else wanted.fingerprint()
        if wanted.background and fingerprint is None:
            # Nobody can repeat it; but the agent tells of the start of those only that have one.
            fingerprint = exec_id
        return ExecRequest(
            id=exec_id,
            env=env,
            cwd=cwd if cwd.startswith("/") else f"{home}/{cwd}",
            timeout_s=self._timeout_s(wanted),
            output_limit=self._settings.exec_output_mb * 1024 * 1024,
            spool_limit=0 if wanted.background else self._settings.exec_spool_mb * 1024 * 1024,
            stream=wanted.stream or wanted.background,
            stdin=wanted.stdin.encode(),
            code=None if wanted.code is None or wanted.runs_bash else wanted.code.encode(),
            argv=wanted.argv(),
            fresh=wanted.fresh,
            fingerprint=fingerprint,
            user=wanted.user,
            stdin_open=wanted.stdin_open,
            pty=None if wanted.pty is None else (wanted.pty.rows, wanted.pty.cols),
            ring=wanted.background,
            context=wanted.context,
        )

    def _timeout_s(self, wanted: NewExec) -> float | None:
        if wanted.timeout_s is None:
            return None if wanted.background else self._settings.exec_timeout_s
        limit = float(self._settings.max_exec_timeout_s)
        if wanted.background:
            limit = max(limit, self._settings.max_timeout_s)
        if wanted.timeout_s > limit:
            raise LimitError(
                f"timeout_s {wanted.timeout_s:g}: the limit here is {limit:g}", param="timeout_s"
            )
        return wanted.timeout_s
