"""What an exec tells its client: names of signals, refusals as results; and what may be asked for."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from sandboxd.agentlink.client import Known
from sandboxd.agentlink.errors import AgentRefusedError
from sandboxd.agentlink.exec_log import Event, Failure, Outcome, Output, Result
from sandboxd.kit.clock import SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.sandboxes.errors import BusyError
from sandboxd.sandboxes.exec import ExecService
from sandboxd.sandboxes.exec_request import NewExec
from sandboxd.sandboxes.exec_result import CLEAR_TYPE, DISPLAY_TYPE, Run, refused
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.live import Idleness, LiveSandbox, LiveSandboxes, Metered


def outcome(reason: str = "exit", exit_code: int | None = 0, number: int | None = None) -> Outcome:
    return Outcome(reason, exit_code, number, False, None, 1.5, 0.5, 2048)


@pytest.mark.parametrize(
    ("end", "status", "signal"),
    [
        (outcome(), "completed", None),
        (outcome(exit_code=3), "failed", None),
        (outcome(exit_code=None, number=11), "failed", "SIGSEGV"),
        (outcome(exit_code=None, number=64), "failed", "SIGRTMAX"),
        (outcome(exit_code=None, number=63), "failed", "SIG63"),
        (outcome("timeout", None, 9), "timed_out", "SIGKILL"),
        (outcome("killed", None, 9), "killed", "SIGKILL"),
        (outcome("oom", None, 9), "oom", "SIGKILL"),
    ],
)
def test_statuses_and_signals(end: Outcome, status: str, signal: str | None) -> None:
    run = Run("exec_1", "sbx_1", "code", 1000.0)
    run.add(Output(False, b"a\xff"))
    run.add(Failure("E", "v", "t"))
    run.add(end)
    result = run.result()
    assert (result["status"], result["signal"]) == (status, signal)
    assert result["stdout"] == "a\ufffd"
    assert result["error"] == {"name": "E", "value": "v", "traceback": "t"}
    assert result["usage"] == {"cpu_ms": 0.5, "max_rss_mb": 2.0}


def live_sandbox(agent: object) -> LiveSandbox:
    return LiveSandbox(
        id="sbx_1",
        project_id="proj_1",
        agent=agent,  # type: ignore[arg-type]  # a fake
        env={},
        cpus=0.5,
        disk_size_mb=64,
        last_active_at=0.0,
        deadline=None,
        idle=Idleness(0.0),
        metered=Metered(0.0),
    )


class StarvedAgent:
    """Ends an exec only once somebody has lifted the sandbox's CPU limit."""

    def __init__(self, lifted: asyncio.Event) -> None:
        self.lifted = lifted

    async def start(self, _request: object) -> AsyncGenerator[tuple[Event, int]]:
        await self.lifted.wait()
        yield outcome("timeout", None, 9), 100


class Quotas:
    """A runtime that writes down the limits it is asked for."""

    def __init__(self) -> None:
        self.asked: list[float | None] = []
        self.lifted = asyncio.Event()
        self.restored = asyncio.Event()

    async def limit_cpus(self, _sandbox_id: str, cpus: float | None) -> None:
        self.asked.append(cpus)
        (self.lifted if cpus is None else self.restored).set()


async def test_an_agent_that_is_late_is_let_out_of_the_cpu_limit(settings: Settings, db: Database) -> None:
    runtime, live = Quotas(), LiveSandboxes()
    agent = StarvedAgent(runtime.lifted)
    sandbox = live_sandbox(agent)
    live.add(sandbox)
    async with TaskOwner() as tasks:
        service = ExecService(
            settings=settings,
            clock=SystemClock(),
            metrics=Metrics(),
            tasks=tasks,
            live=live,
            runtime=runtime,  # type: ignore[arg-type]  # a fake
            history=History(db, Metrics()),
        )
        result = await service.run(sandbox, NewExec(code="bomb", timeout_s=0.01))
        await asyncio.wait_for(runtime.restored.wait(), 10)
    assert result["status"] == "timed_out"
    assert runtime.asked == [None, 0.5]


class QueuedAgent(StarvedAgent):
    """Says of its call that its turn has not come, `waiting_rounds` times, and then that its time is over."""

    def __init__(self, lifted: asyncio.Event, waiting_rounds: int) -> None:
        super().__init__(lifted)
        self.rounds = waiting_rounds
        self.asked = 0
        self.exec_id = ""

    async def start(self, request: Any) -> AsyncGenerator[tuple[Event, int]]:
        self.exec_id = request.id
        async for item in super().start(request):
            yield item

    async def hello(self, _timeout_s: float) -> Any:
        self.asked += 1
        left_s = 0.01 if self.asked <= self.rounds else 0.0
        known = Known(self.exec_id, "code", False, False, 1.0, left_s, waiting=left_s > 0, context="ctx_1")
        return SimpleNamespace(execs=(known,))


async def test_a_call_that_waits_for_its_turn_does_not_lift_the_cpu_limit(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.sandboxes.exec_progress.CONTEXT_GRACE_S", 0.0)
    runtime, live = Quotas(), LiveSandboxes()
    agent = QueuedAgent(runtime.lifted, 2)
    sandbox = live_sandbox(agent)
    live.add(sandbox)
    async with TaskOwner() as tasks:
        service = ExecService(
            settings=settings,
            clock=SystemClock(),
            metrics=Metrics(),
            tasks=tasks,
            live=live,
            runtime=runtime,  # type: ignore[arg-type]  # a fake
            history=History(db, Metrics()),
        )
        result = await service.run(sandbox, NewExec(code="1", context="ctx_1", timeout_s=0.01))
        await asyncio.wait_for(runtime.restored.wait(), 10)
    # Only when its own time was over, and asked for each time.
    assert (result["status"], agent.asked) == ("timed_out", 3)
    assert runtime.asked == [None, 0.5]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ([{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 2}]),
        ([{"a": 1}, {CLEAR_TYPE: {"wait": False}}, {"a": 2}], [{"a": 2}]),
        (
            [
                {DISPLAY_TYPE: {"id": "x"}, "a": 1},
                {"b": 1},
                {DISPLAY_TYPE: {"id": "x", "update": True}, "a": 2},
            ],
            [{DISPLAY_TYPE: {"id": "x", "update": True}, "a": 2}, {"b": 1}],
        ),
        ([{DISPLAY_TYPE: {"id": "y", "update": True}}], [{DISPLAY_TYPE: {"id": "y", "update": True}}]),
        ([{DISPLAY_TYPE: "garbage"}, {DISPLAY_TYPE: {"id": [1], "update": True}}], None),
    ],
)
def test_results_are_shown_as_a_notebook_would(told: list[Any], shown: list[Any] | None) -> None:
    run = Run("exec_1", "sbx_1", "code", 1000.0)
    for bundle in told:
        run.add(Result(bundle))
    assert run.result()["results"] == (told if shown is None else shown)


def test_a_run_without_an_end_is_lost() -> None:
    assert Run("exec_1", "sbx_1", "code", 1000.0).result()["status"] == "lost"


def test_refusals_are_results_or_errors() -> None:
    said, end = refused(AgentRefusedError("command_not_found", "'x': No such file or directory"))
    assert isinstance(said, Output)
    assert isinstance(end, Outcome)
    assert (said.is_stderr, end.exit_code) == (True, 127)
    with pytest.raises(BusyError) as busy:
        refused(AgentRefusedError("busy", "64 execs are running"))
    assert busy.value.headers["Retry-After"] == "1"
    with pytest.raises(BadRequestError) as cwd:
        refused(AgentRefusedError("cwd_not_found", "cwd '/x': No such file or directory"))
    assert cwd.value.param == "cwd"
