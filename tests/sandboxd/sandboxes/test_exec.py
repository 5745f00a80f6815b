"""What an exec tells its client: names of signals, refusals as results; and what may be asked for."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from sandboxd.agentlink.client import Known
from sandboxd.agentlink.errors import AgentRefusedError
from sandboxd.agentlink.exec_log import Event, Failure, Outcome, Output, Result
from sandboxd.kit.clock import SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.ids import new_id
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.sandboxes.errors import BusyError, StdinClosedError, StdinFullError, StdinOffsetError
from sandboxd.sandboxes.exec import ExecService
from sandboxd.sandboxes.exec_input import ExecInput
from sandboxd.sandboxes.exec_request import NewExec, Pty
from sandboxd.sandboxes.exec_result import CLEAR_TYPE, DISPLAY_TYPE, Run, refused
from sandboxd.sandboxes.exec_schemas import ExecBody, PtyBody, SignalBody
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


def test_what_earlier_releases_knew_has_the_same_fingerprint() -> None:
    """Or an exec that runs over an upgrade could not be found again by its key."""
    plain = NewExec(code="x", cwd="/home/user", timeout_s=1.0)
    said: list[Any] = ["x", None, "/home/user", {}, "", 1.0, False]
    expected = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    assert plain.fingerprint() == expected
    assert NewExec(code="x", timeout_s=1.0).fingerprint() == expected
    others = [
        NewExec(code="x", timeout_s=1.0, language="bash"),
        NewExec(code="x", timeout_s=1.0, context="ctx_1"),
        NewExec(code="x", timeout_s=1.0, user="nobody"),
        NewExec(code="x", timeout_s=1.0, stdin_open=True),
        NewExec(code="x", timeout_s=1.0, background=True),
        NewExec(command="x", timeout_s=1.0, pty=Pty(24, 80, "xterm")),
        NewExec(command="x", timeout_s=1.0, pty=Pty(25, 80, "xterm")),
    ]
    assert len({expected, *(other.fingerprint() for other in others)}) == len(others) + 1


def test_titles_are_short_and_can_be_stored() -> None:
    assert NewExec(code="print(1)\n" * 100).title() == ("print(1)\n" * 100)[:200]
    assert NewExec(code="a\0b").title() == "a?b"
    assert NewExec(command=["ls", "a b"]).title() == "ls 'a b'"
    assert len(NewExec(command=["x" * 1000] * 1000).title()) == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"code": "x", "command": "x"}, "either 'code' or 'command'"),
        ({"code": "x", "user": "root"}, "must be 'user' or 'nobody'"),
        ({"code": "x", "pty": {}}, "'pty' is for 'command'"),
        ({"command": "x", "pty": {"rows": 0}}, "greater than or equal to 1"),
        ({"command": "x", "pty": {"term": "a b"}}, "match pattern"),
        ({"command": "x", "language": "bash"}, "'language' is for 'code'"),
        ({"command": "x", "context": new_id("ctx")}, "'context' is for 'code'"),
        ({"code": "x", "context": new_id("ctx"), "env": {}}, "'env' is not for code in a context"),
        ({"code": "x", "context": "nonsense"}, "match pattern"),
        ({"code": "x", "background": True, "stream": True}, "answers at once"),
        ({"code": "x", "timeout_s": None}, "for 'background' only"),
        ({"code": "x" * 131_072, "language": "bash"}, "write it to a file"),
        ({"code": "x\0", "language": "bash"}, "NUL"),
        ({"code": "x", "language": "bash", "fresh": True}, "'fresh' is for Python"),
    ],
)
def test_what_cannot_be_run_is_said_with_the_field(body: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        ExecBody(**body)


def test_what_can_be_run() -> None:
    assert ExecBody(code="x", background=True, timeout_s=None).wanted().timeout_s is None
    assert ExecBody(code="ls", language="bash").wanted().argv() == ("bash", "-c", "ls")
    assert ExecBody(code="x", context=new_id("ctx"), timeout_s=5).wanted().argv() == ()
    pty = ExecBody(command="x", pty=PtyBody(rows=10)).wanted().pty
    assert pty == Pty(10, 80, "xterm-256color")


@pytest.mark.parametrize("value", ["SIGTERM", "TERM", "sigterm", 15])
def test_a_signal_has_many_names(value: object) -> None:
    assert SignalBody(signal=value).signal == 15  # type: ignore[arg-type]  # as it comes


@pytest.mark.parametrize("value", ["FOO", "", 0, 65, -1, True, None, 1.5, 15.0])
def test_what_is_no_signal(value: object) -> None:
    with pytest.raises(ValidationError, match="must be a signal's name or number"):
        SignalBody(signal=value)  # type: ignore[arg-type]  # as it comes


class Reader:
    """An agent whose program reads so much of its input at a time, and no more than so much."""

    def __init__(self, step: int, most: int) -> None:
        self.step = step
        self.most = most
        self.taken = bytearray()
        self.open = True

    async def stdin(self, _id: str, data: bytes, offset: int | None, close: bool) -> tuple[int, bool]:
        await asyncio.sleep(0)
        start = len(self.taken) if offset is None else offset
        rest = data[len(self.taken) - start :][: min(self.step, self.most - len(self.taken))]
        if data and not self.open:
            raise AgentRefusedError("stdin_closed", "")
        self.taken += rest
        self.open = self.open and not close
        return len(self.taken), self.open


def input_of(db: Database) -> ExecInput:
    history = History(db, Metrics())
    return ExecInput(SystemClock(), Nobody(), history, stdin_timeout_s=0.05)  # type: ignore[arg-type]


class Nobody:
    def find(self, *_: object) -> None:
        return None


async def test_input_is_taken_in_its_order_and_once(db: Database) -> None:
    """Open stdin does not hang an exec, and neither does one that reads slowly (daytona#4230, E2B#339)."""
    reader = Reader(step=3, most=1000)
    sandbox, writer = live_sandbox(reader), input_of(db)
    both = await asyncio.gather(
        writer.write(sandbox, "exec_1", b"0123456789", None, close=False),
        writer.write(sandbox, "exec_1", b"abcdefghij", None, close=False),
    )
    assert bytes(reader.taken) in (b"0123456789abcdefghij", b"abcdefghij0123456789")
    assert sorted(size for size, _ in both) == [10, 20]
    assert await writer.write(sandbox, "exec_1", bytes(reader.taken[5:]) + b"!", 5, close=True) == (21, False)
    assert len(reader.taken) == 21
    # What was done may be asked for again; what was not may not.
    assert await writer.write(sandbox, "exec_1", b"j!", 19, close=True) == (21, False)
    with pytest.raises(StdinClosedError):
        await writer.write(sandbox, "exec_1", b"more", None, close=False)
    with pytest.raises(StdinOffsetError, match="22"):
        await writer.write(sandbox, "exec_1", b"", 22, close=False)
    assert sandbox.bytes_in == 21


async def test_a_program_that_does_not_read_is_said_to_be_full(db: Database) -> None:
    sandbox = live_sandbox(Reader(step=4, most=6))
    with pytest.raises(StdinFullError, match="6 bytes of 'data' were taken, 6 in all"):
        await input_of(db).write(sandbox, "exec_1", b"0123456789", None, close=True)


async def test_what_waits_for_programs_to_read_is_bounded(db: Database) -> None:
    sandbox, writer = live_sandbox(Reader(step=4, most=6)), input_of(db)
    writes = [writer.write(sandbox, "exec_1", bytes(8 * 1024 * 1024), None, close=False) for _ in range(5)]
    ends = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(end) for end in ends] == [StdinFullError] * 3 + [BusyError] * 2
    assert sandbox.input_bytes == 0
