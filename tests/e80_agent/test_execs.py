"""What the agent knows of execs: repeated requests, forgotten logs, deadlines that stand still."""

import os
import resource
from types import SimpleNamespace
from typing import Any

import pytest
from e80_agent.execs import KEPT_FINISHED, Exec, Execs
from e80_agent.ops import command, timers


class Loop:
    """Holds timers, and never runs them."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.cancelled = 0

    def call_later(self, delay_s: float, _callback: Any) -> Any:
        self.delays.append(delay_s)
        return SimpleNamespace(cancel=self._cancel)

    def _cancel(self) -> None:
        self.cancelled += 1

    def forget(self, fd: int) -> None:
        """Nothing is watched here."""


class Connection:
    """Writes down what it is answered with."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def fail(self, code: str, _message: str) -> None:
        self.said.append(code)

    def follow(self, run: Exec, offset: int, eager: bool, resumed: bool = False) -> None:
        self.said.append((run.id, offset, resumed))

    def reply(self, header: dict[str, Any]) -> None:
        self.said.append(header)


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def agent(loop: Loop) -> Any:
    return SimpleNamespace(execs=Execs(loop, None, list))  # type: ignore[arg-type]  # fakes


def header(exec_id: str, **more: Any) -> dict[str, Any]:
    return {"op": "python", "id": exec_id, "output_limit": 1000, "timeout_s": 10.0, **more}


def ask(agent: Any, exec_id: str, **more: Any) -> Any:
    """What a request is answered; None when it starts an exec."""
    connection = Connection()
    command.admit(agent, connection, header(exec_id, **more), b"")  # type: ignore[arg-type]  # a fake
    return connection.said[0] if connection.said else None


def finish(agent: Any, exec_id: str) -> None:
    run = agent.execs.get(exec_id)
    run.ending = True
    agent.execs._finish(run)


def test_a_request_without_a_key_never_runs_twice(agent):
    assert ask(agent, "exec_1") is None
    assert ask(agent, "exec_1") == "exec_exists"
    finish(agent, "exec_1")
    assert ask(agent, "exec_1") == "exec_exists"


def test_a_repeated_request_follows_the_exec_running_or_ended(agent):
    assert ask(agent, "exec_1", fingerprint="a", resume=True) is None
    for _ in range(2):
        assert ask(agent, "exec_1", fingerprint="a", resume=True) == ("exec_1", 0, True)
        assert ask(agent, "exec_1", fingerprint="b", resume=True) == "exec_differs"
        if not agent.execs.get("exec_1").finished:
            finish(agent, "exec_1")
    assert len(agent.execs.all()) == 1


def test_what_could_not_be_started_is_started_by_a_repeated_request(agent):
    assert ask(agent, "exec_1", fingerprint="a", resume=True) is None
    run = agent.execs.get("exec_1")
    run.fault = {"code": "start_failed", "message": "no room"}
    finish(agent, "exec_1")
    assert ask(agent, "exec_1", fingerprint="a", resume=True) is None
    assert agent.execs.get("exec_1") is not run
    assert agent.execs.running() == 1


def test_evicted_execs_with_a_key_are_remembered_within_a_bound(loop):
    agent = SimpleNamespace(execs=Execs(loop, None, list, remembered=100))  # type: ignore[arg-type]  # fakes
    total = 300 + KEPT_FINISHED
    for number in range(total):
        assert ask(agent, f"exec_{number}", fingerprint="a", resume=True) is None
        finish(agent, f"exec_{number}")
        assert ask(agent, f"plain_{number}") is None
        finish(agent, f"plain_{number}")
    answers = [ask(agent, f"exec_{number}", fingerprint="a", resume=True) for number in range(total)]
    gone = answers.count("exec_gone")
    assert 100 <= gone <= 200
    # The last ones evicted, and none that still has its log; the oldest are as good as new.
    first = answers.index("exec_gone")
    assert answers[first : first + gone] == ["exec_gone"] * gone
    assert answers[first + gone] == (f"exec_{first + gone}", 0, True)


def test_deadlines_stand_still_and_go_on_with_what_was_left(agent, loop):
    ask(agent, "exec_1")
    run = agent.execs.get("exec_1")
    run.started -= 4
    run.created -= 4
    stop, go = Connection(), Connection()
    for _ in range(2):
        timers.timers(agent, stop, {"run": False}, b"")  # type: ignore[arg-type]  # a fake
    assert (loop.cancelled, agent.execs.held) == (1, True)
    ask(agent, "exec_2")
    assert loop.delays == [10.0]
    # Three seconds of it pass.
    agent.execs._held_since -= 3
    run.started -= 3
    run.created -= 3
    assert agent.execs.left_s(run) == pytest.approx(6, abs=0.1)
    for _ in range(2):
        timers.timers(agent, go, {"run": True}, b"")  # type: ignore[arg-type]  # a fake
    assert stop.said == go.said == [{"ok": True}] * 2
    assert loop.delays[1:] == [pytest.approx(6, abs=0.1), pytest.approx(10, abs=0.1)]
    assert agent.execs.left_s(run) == pytest.approx(6, abs=0.1)
    assert agent.execs.held is False


def test_an_exec_that_ended_while_deadlines_stood_still_gets_none(agent, loop):
    ask(agent, "exec_1")
    agent.execs.hold()
    finish(agent, "exec_1")
    agent.execs.release()
    assert loop.delays == [10.0]


@pytest.mark.parametrize("more", [{}, {"pty": {"rows": 24, "cols": 80}}])
@pytest.mark.parametrize("room", range(5))
def test_an_exec_for_which_there_are_too_few_descriptors_keeps_none(agent, more, room):
    agent.execs._tenant = SimpleNamespace(user=lambda _name: SimpleNamespace(uid=os.geteuid()))
    run = agent.execs.create(header("exec_1", stdin_open=True, **more), b"in")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + room, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            agent.execs.open_pipes(run, True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.listdir("/proc/self/fd") == before
