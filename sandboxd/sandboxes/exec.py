"""Runs code and commands in a sandbox and tells what came of it, at the end or as it happens."""

import asyncio
import base64
import codecs
import signal
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import structlog

from sandboxd.agentlink.client import Event, ExecRequest, Failure, Outcome, Output
from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.kit.clock import Clock
from sandboxd.kit.errors import BadRequestError, SandboxdError
from sandboxd.kit.ids import new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Runtime
from sandboxd.sandboxes.errors import BusyError, LimitError
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.states import ExecStatus

log = structlog.get_logger(__name__)

HOME = "/home/user"
# How late the agent may be before it gets help, and how long that lasts; agentlink gives up after both.
OVERDUE_S = 0.25
RELIEF_S = 25.0
# What a shell answers for a program that is not there, or may not be run.
_NOT_STARTED = {"command_not_found": 127, "command_not_executable": 126}
_ENDED = {"timeout": ExecStatus.TIMED_OUT, "killed": ExecStatus.KILLED, "oom": ExecStatus.OOM}


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


class ExecService:
    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        tasks: TaskOwner,
        live: LiveSandboxes,
        runtime: Runtime,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._tasks = tasks
        self._live = live
        self._runtime = runtime

    async def run(self, sandbox: LiveSandbox, wanted: NewExec) -> dict[str, Any]:
        """The result of the exec, as the API shows it."""
        run = _Run(sandbox.id, self._clock.now())
        async with aclosing(self._events(sandbox, self._request(sandbox, wanted, run.id), run)) as events:
            async for event in events:
                run.add(event)
        return self._result(run)

    def stream(self, sandbox: LiveSandbox, wanted: NewExec) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
        """Stream events: the start, each piece of output, the full result. What is wrong with the request
        is raised here, while the answer can still have a status."""
        run = _Run(sandbox.id, self._clock.now())
        return self._stream(sandbox, self._request(sandbox, wanted, run.id), run)

    async def _stream(
        self, sandbox: LiveSandbox, request: ExecRequest, run: "_Run"
    ) -> AsyncGenerator[tuple[str, Mapping[str, Any]]]:
        decoders = {False: _Decoder("exec.stdout.delta"), True: _Decoder("exec.stderr.delta")}
        started = {"id": run.id, "sandbox_id": sandbox.id, "started_at": run.started_at}
        try:
            yield "exec.started", {"exec": started}
            async with aclosing(self._events(sandbox, request, run)) as events:
                async for event in events:
                    run.add(event)
                    if isinstance(event, Output):
                        for delta in decoders[event.is_stderr].feed(event.data):
                            yield delta
            for decoder in decoders.values():
                for delta in decoder.end():
                    yield delta
            yield "exec.completed", {"exec": self._result(run)}
        finally:
            if not run.ended:
                # Nobody listens any more, and nobody could ever see the result.
                self._tasks.start(f"cancel {run.id}", self._cancel(sandbox, run.id))

    async def _events(self, sandbox: LiveSandbox, request: ExecRequest, run: "_Run") -> AsyncGenerator[Event]:
        sandbox.execs += 1
        ended = asyncio.Event()
        overdue = self._watch(sandbox, request, ended)
        try:
            async with aclosing(sandbox.agent.run(request)) as events:
                async for event in events:
                    yield event
        except AgentRefusedError as error:
            for event in _refused(error):
                yield event
        except LinkBrokenError as error:
            # With its sandbox gone the exec was ended; otherwise nobody can tell.
            gone = self._live.get(sandbox.id) is None
            log.warning("exec.link_lost", sandbox_id=sandbox.id, exec_id=run.id, reason=error.message)
            run.status = ExecStatus.KILLED if gone else ExecStatus.LOST
        finally:
            ended.set()
            overdue.cancel()
            sandbox.execs -= 1
            sandbox.touch(self._clock.now())

    def _watch(self, sandbox: LiveSandbox, request: ExecRequest, ended: asyncio.Event) -> asyncio.TimerHandle:
        """Arms the help for an agent that does not end an exec at its deadline."""

        def help_agent() -> None:
            self._tasks.start(f"relieve {request.id}", self._relieve(sandbox, request.id, ended))

        assert request.timeout_s is not None
        return asyncio.get_running_loop().call_later(request.timeout_s + OVERDUE_S, help_agent)

    async def _relieve(self, sandbox: LiveSandbox, exec_id: str, ended: asyncio.Event) -> None:
        """Lets the agent out of the sandbox's CPU limit until the exec has ended. Hundreds of processes that
        fork can use up the quota in the kernel alone, period after period, and leave the agent none of it."""
        log.warning("exec.overdue", sandbox_id=sandbox.id, exec_id=exec_id)
        try:
            await self._runtime.limit_cpus(sandbox.id, None)
            async with asyncio.timeout(RELIEF_S):
                await ended.wait()
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

    def _request(self, sandbox: LiveSandbox, wanted: NewExec, exec_id: str) -> ExecRequest:
        if sandbox.execs >= self._settings.max_execs:
            raise BusyError(f"Sandbox {sandbox.id} runs {sandbox.execs} execs, the limit")
        timeout_s = wanted.timeout_s if wanted.timeout_s is not None else self._settings.exec_timeout_s
        if timeout_s > self._settings.max_exec_timeout_s:
            raise LimitError(
                f"timeout_s {timeout_s:g}: the limit here is {self._settings.max_exec_timeout_s:g}",
                param="timeout_s",
            )
        command = wanted.command
        argv = ("bash", "-lc", command) if isinstance(command, str) else tuple(command or ())
        return ExecRequest(
            id=exec_id,
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
        )

    def _result(self, run: "_Run") -> dict[str, Any]:
        result = run.result()
        self._metrics.execs.labels(result["status"]).inc()
        self._metrics.exec_duration.observe(result["duration_ms"] / 1000)
        return result

    async def _cancel(self, sandbox: LiveSandbox, exec_id: str) -> None:
        try:
            await sandbox.agent.signal(exec_id, signal.SIGKILL)
        except SandboxdError as error:
            log.info("exec.cancel_failed", sandbox_id=sandbox.id, exec_id=exec_id, reason=error.message)


class _Run:
    """An exec as it goes on: what it wrote so far and how it ended."""

    def __init__(self, sandbox_id: str, started_at: float) -> None:
        self.id = new_id("exec")
        self.sandbox_id = sandbox_id
        self.started_at = started_at
        self.status: ExecStatus | None = None
        self.ended = False
        self._started = time.perf_counter()
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._failure: Failure | None = None
        self._outcome: Outcome | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Output):
            (self._stderr if event.is_stderr else self._stdout).extend(event.data)
        elif isinstance(event, Failure):
            self._failure = event
        else:
            self._outcome = event
            self.ended = True

    def result(self) -> dict[str, Any]:
        self.ended = True
        outcome, failure = self._outcome, self._failure
        elapsed_ms = (time.perf_counter() - self._started) * 1000
        return {
            "id": self.id,
            "object": "sandbox.exec",
            "sandbox_id": self.sandbox_id,
            "status": self.status or _status(outcome),
            "exit_code": outcome.exit_code if outcome else None,
            "signal": _signal_name(outcome.signal) if outcome else None,
            "stdout": self._stdout.decode("utf-8", "replace"),
            "stderr": self._stderr.decode("utf-8", "replace"),
            "truncated": outcome.truncated if outcome else False,
            "output_path": outcome.spool if outcome else None,
            "error": None
            if failure is None
            else {"name": failure.name, "value": failure.value, "traceback": failure.traceback},
            "started_at": round(self.started_at, 3),
            "duration_ms": outcome.duration_ms if outcome else round(elapsed_ms, 3),
            "usage": {
                "cpu_ms": outcome.cpu_ms if outcome else 0.0,
                "max_rss_mb": round(outcome.max_rss_kb / 1024, 1) if outcome else 0.0,
            },
        }


class _Decoder:
    """Bytes as they come to text events; what is not UTF-8 goes as base64, byte for byte."""

    def __init__(self, event: str) -> None:
        self._event = event
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, data: bytes) -> list[tuple[str, dict[str, Any]]]:
        held = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data)
        except UnicodeDecodeError:
            self._decoder.reset()
            return [self._binary(held + data)]
        return [(self._event, {"delta": text})] if text else []

    def end(self) -> list[tuple[str, dict[str, Any]]]:
        held = self._decoder.getstate()[0]
        return [self._binary(held)] if held else []

    def _binary(self, data: bytes) -> tuple[str, dict[str, Any]]:
        return self._event, {"delta": base64.b64encode(data).decode(), "encoding": "base64"}


def _status(outcome: Outcome | None) -> ExecStatus:
    if outcome is None:
        return ExecStatus.LOST
    if outcome.reason in _ENDED:
        return _ENDED[outcome.reason]
    return ExecStatus.COMPLETED if outcome.exit_code == 0 else ExecStatus.FAILED


def _signal_name(number: int | None) -> str | None:
    if number is None:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def _refused(error: AgentRefusedError) -> list[Event]:
    """A program that cannot be started is a result, as in a shell; all else is an error of the request."""
    code = _NOT_STARTED.get(error.agent_code)
    if code is not None:
        said = Output(is_stderr=True, data=f"{error.message}\n".encode())
        return [said, Outcome("exit", code, None, False, None, 0.0, 0.0, 0)]
    if error.agent_code in ("busy", "start_failed"):
        # At its limit of execs, or of processes: what it runs already is in the way.
        raise BusyError(error.message) from error
    if error.agent_code == "cwd_not_found":
        raise BadRequestError(error.message, param="cwd", code="cwd_not_found") from error
    raise BadRequestError(f"the command cannot be started: {error.message}", code=error.agent_code) from error
