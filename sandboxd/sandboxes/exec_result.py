"""What comes of an exec, for its client and for the history: the sum of its events, and refusals."""

import signal
import time
from typing import Any

from sandboxd.agentlink.errors import AgentRefusedError
from sandboxd.agentlink.exec_log import Event, Failure, Gap, Outcome, Output, Result, Started
from sandboxd.kit.errors import BadRequestError, ConflictError, NotFoundError, SandboxdError
from sandboxd.sandboxes.errors import BusyError, ContextBusyError
from sandboxd.sandboxes.models import Exec
from sandboxd.sandboxes.states import ExecStatus

# What a shell answers for a program that is not there, or may not be run.
_NOT_STARTED = {"command_not_found": 127, "command_not_executable": 126}
_ENDED = {"timeout": ExecStatus.TIMED_OUT, "killed": ExecStatus.KILLED, "oom": ExecStatus.OOM}
_MAX_ERROR_NAME = 100
# An agent of ours tells of some 20,000 in one call at most.
MAX_RESULTS = 65536
# How a context tells that a display may be updated, is updated, or that the output is to be cleared.
DISPLAY_TYPE = "application/vnd.e80.display+json"
CLEAR_TYPE = "application/vnd.e80.clear+json"


class Shown:
    """Rich results as a notebook would show them: an update in place of what it updates, nothing of what was
    cleared, and no more than MAX_RESULTS. What each costs does not grow with what is there already: tenant
    code says how many there are, and everybody waits meanwhile."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []
        self._places: dict[str, int] = {}

    def add(self, bundle: dict[str, Any]) -> None:
        if CLEAR_TYPE in bundle:
            self.results.clear()
            self._places.clear()
            return
        display = bundle.get(DISPLAY_TYPE)
        name = display.get("id") if isinstance(display, dict) else None
        if isinstance(name, str) and isinstance(display, dict) and display.get("update") is True:
            place = self._places.get(name)
            if place is not None:
                self.results[place] = bundle
                return
        if len(self.results) >= MAX_RESULTS:
            return
        if isinstance(name, str):
            self._places.setdefault(name, len(self.results))
        self.results.append(bundle)


class Run:
    """An exec as it goes on: what it wrote so far and how it ended. `status` is set by who knows better than
    its events. One that nobody will read does without the output."""

    def __init__(
        self,
        exec_id: str,
        sandbox_id: str,
        kind: str,
        started_at: float,
        *,
        title: str = "",
        context_id: str | None = None,
        background: bool = False,
        keep_output: bool = True,
    ) -> None:
        self.id = exec_id
        self.sandbox_id = sandbox_id
        self.kind = kind
        self.started_at = started_at
        self.title = title
        self.context_id = context_id
        self.background = background
        self.status: ExecStatus | None = None
        self.output_bytes = 0
        self._keep_output = keep_output
        self._started = time.perf_counter()
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._shown = Shown()
        self._missed = False
        self._failure: Failure | None = None
        self._outcome: Outcome | None = None

    @property
    def ended(self) -> bool:
        return self._outcome is not None or self.status is not None

    def add(self, event: Event) -> None:
        if isinstance(event, Output):
            self.output_bytes += len(event.data)
            if self._keep_output:
                (self._stderr if event.is_stderr else self._stdout).extend(event.data)
        elif isinstance(event, Failure):
            self._failure = event
        elif isinstance(event, Outcome):
            self._outcome = event
        elif isinstance(event, Result):
            if self._keep_output:
                self._shown.add(event.bundle)
        elif isinstance(event, Gap):
            self._missed = True
            self.output_bytes += event.missed_bytes
        elif isinstance(event, Started) and event.resumed:
            self.started_at -= event.age_s

    def collect(self, event: Event) -> None:
        """For a run that was followed without its output: adds that afterwards, and nothing else."""
        if isinstance(event, Output):
            (self._stderr if event.is_stderr else self._stdout).extend(event.data)
        elif isinstance(event, Result):
            self._shown.add(event.bundle)
        elif isinstance(event, Gap):
            self._missed = True

    def result(self) -> dict[str, Any]:
        outcome, failure = self._outcome, self._failure
        return {
            "id": self.id,
            "object": "sandbox.exec",
            "sandbox_id": self.sandbox_id,
            "status": self.status or status_of(outcome),
            "exit_code": outcome.exit_code if outcome else None,
            "signal": signal_name(outcome.signal) if outcome else None,
            "stdout": self._stdout.decode("utf-8", "replace"),
            "stderr": self._stderr.decode("utf-8", "replace"),
            "truncated": self._missed or (outcome.truncated if outcome else False),
            "output_path": outcome.spool if outcome else None,
            "results": self._shown.results,
            "error": None
            if failure is None
            else {"name": failure.name, "value": failure.value, "traceback": failure.traceback},
            "context": self.context_id,
            "background": self.background,
            "started_at": round(self.started_at, 3),
            "duration_ms": None if self.status is ExecStatus.RUNNING else self.duration_ms,
            "usage": self._usage(),
        }

    def row(self, project_id: str | None) -> dict[str, Any]:
        """All columns of the history's table."""
        outcome, failure, usage = self._outcome, self._failure, self._usage()
        status = self.status or status_of(outcome)
        return {
            "id": self.id,
            "project_id": project_id or "",
            "sandbox_id": self.sandbox_id,
            "kind": self.kind,
            "title": self.title,
            "context_id": self.context_id,
            "background": self.background,
            "status": str(status),
            "exit_code": _storable(outcome.exit_code) if outcome else None,
            "signal": signal_name(outcome.signal) if outcome else None,
            "error_name": failure.name[:_MAX_ERROR_NAME].replace("\0", "?") if failure else None,
            "truncated": outcome.truncated if outcome else False,
            "started_at": self.started_at,
            "duration_ms": None if status is ExecStatus.RUNNING else self.duration_ms,
            "cpu_ms": usage["cpu_ms"],
            "max_rss_mb": usage["max_rss_mb"],
        }

    @property
    def duration_ms(self) -> float:
        if self._outcome is not None:
            return self._outcome.duration_ms
        return round((time.perf_counter() - self._started) * 1000, 3)

    def _usage(self) -> dict[str, float]:
        outcome = self._outcome
        return {
            "cpu_ms": outcome.cpu_ms if outcome else 0.0,
            "max_rss_mb": round(outcome.max_rss_kb / 1024, 1) if outcome else 0.0,
        }


def result_of(row: Exec, status: str) -> dict[str, Any]:
    """The result of an exec as far as the history has it: without what it wrote."""
    error = None if row.error_name is None else {"name": row.error_name, "value": None, "traceback": None}
    return {
        "id": row.id,
        "object": "sandbox.exec",
        "sandbox_id": row.sandbox_id,
        "status": status,
        "exit_code": row.exit_code,
        "signal": row.signal,
        "stdout": None,
        "stderr": None,
        "truncated": row.truncated,
        "output_path": None,
        "results": None,
        "error": error,
        "context": row.context_id,
        "background": row.background,
        "started_at": round(row.started_at, 3),
        "duration_ms": row.duration_ms,
        "usage": {"cpu_ms": row.cpu_ms, "max_rss_mb": row.max_rss_mb},
    }


def _storable(exit_code: int | None) -> int | None:
    """The agent's word, as far as the column can hold it."""
    return None if exit_code is None else max(-1, min(exit_code, 2**31 - 1))


def status_of(outcome: Outcome | None) -> ExecStatus:
    if outcome is None:
        return ExecStatus.LOST
    if outcome.reason in _ENDED:
        return _ENDED[outcome.reason]
    return ExecStatus.COMPLETED if outcome.exit_code == 0 else ExecStatus.FAILED


def signal_name(number: int | None) -> str | None:
    if number is None:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:
        # The agent's word: no number that would not fit the history's column.
        return f"SIG{number % 1000}"


def refused(error: AgentRefusedError) -> list[Event]:
    """A program that cannot be started is a result, as in a shell; all else is an error of the request."""
    code = _NOT_STARTED.get(error.agent_code)
    if code is not None:
        said = Output(is_stderr=True, data=f"{error.message}\n".encode())
        return [said, Outcome("exit", code, None, False, None, 0.0, 0.0, 0)]
    if error.agent_code == "context_lost":
        raise ConflictError(error.message, param="context", code="context_lost") from error
    if error.agent_code == "unknown_context":
        raise NotFoundError(error.message, param="context", code="context_not_found") from error
    if error.agent_code == "context_busy":
        raise ContextBusyError(error.message) from error
    if error.agent_code in ("busy", "start_failed"):
        # At its limit of execs, or of processes: what it runs already is in the way.
        raise BusyError(error.message) from error
    if error.agent_code == "cwd_not_found":
        raise BadRequestError(error.message, param="cwd", code="cwd_not_found") from error
    raise BadRequestError(f"the command cannot be started: {error.message}", code=error.agent_code) from error


def add_refusal(run: Run, error: AgentRefusedError) -> bool:
    """Adds what a refusal comes to, if that is a result; False otherwise."""
    try:
        events = refused(error)
    except SandboxdError:
        return False
    for event in events:
        run.add(event)
    return True
