"""Whose turn it is in a context, and what becomes of a call that has to end; its process is a fake."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from e80_agent import channel, protocol
from e80_agent.contexts import GRACE_S, MAX_CONTEXTS, MAX_QUEUED, MAX_RESULTS, Context, Contexts
from e80_agent.execs import Exec, Execs
from e80_agent.tenant import User


class Loop:
    """Runs what is due when it is told that time has passed."""

    def __init__(self) -> None:
        self.timers: list[Any] = []

    def call_later(self, delay_s: float, callback: Any) -> Any:
        timer = Timer(delay_s, callback)
        self.timers.append(timer)
        return timer

    def fire(self, delay_s: float) -> None:
        due = [timer for timer in self.timers if timer.delay_s == delay_s and not timer.cancelled]
        self.timers = [timer for timer in self.timers if timer not in due]
        for timer in due:
            timer.callback()

    def set_reader(self, *_: Any) -> None:
        """Nothing is ever readable here."""

    forget = set_writer = set_reader


class Timer:
    def __init__(self, delay_s: float, callback: Any) -> None:
        self.delay_s, self.callback, self.cancelled = delay_s, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Process:
    """Writes down what it is told."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.pid = 4711
        self.told: list[Any] = []

    def send(self, number: int, code: bytes, fds: list[int]) -> None:
        self.told.append((number, code))
        close(fds)

    def interrupt(self) -> None:
        self.told.append("interrupt")

    def acknowledge(self) -> None:
        self.told.append("ack")

    def signal(self, number: int) -> bool:
        self.told.append(number)
        return True

    def kill(self) -> None:
        self.told.append("kill")

    def keep_tails(self, fds: list[int]) -> None:
        close(fds)

    def says(self, kind: int, payload: bytes = b"") -> None:
        self.context.said(kind, payload)

    def ends(self, number: int, exit_code: int = 0) -> None:
        self.context.said(channel.DONE, channel.pack_done(channel.Done(number, exit_code, 1.0, 0))[5:])


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class Fakes(Contexts):
    def start_process(self, context: Context) -> Any:
        self.process = Process(context)
        return self.process


@pytest.fixture
def contexts() -> Fakes:
    loop: Any = Loop()
    tenant: Any = SimpleNamespace(user=lambda _name: User("user", 1, 1, 1, {}))
    execs = Execs(loop, tenant, list)
    return Fakes(loop, None, execs, None, list)  # type: ignore[arg-type]  # fakes


def make(contexts: Fakes, name: str = "ctx_1") -> Context:
    said: list[Any] = []
    header = {"id": name, "language": "python", "cwd": "/", "env": {}, "fingerprint": ""}
    assert contexts.create(header, said.append) is None
    contexts.process.says(channel.READY)
    assert said == [None]
    context = contexts.get(name)
    assert context is not None
    return context


def add(contexts: Fakes, context: Context, name: str, timeout_s: float = 10.0) -> Exec:
    header = {"op": "context_exec", "id": name, "output_limit": 1000, "timeout_s": timeout_s}
    run = contexts.execs.create(header, b"", context)
    context.add(run, name.encode())
    return run


def test_calls_run_one_after_another_and_their_time_begins_with_their_turn(contexts):
    context = make(contexts)
    first, second = add(contexts, context, "a", 11.0), add(contexts, context, "b", 12.0)
    assert contexts.process.told == [(1, b"a")]
    assert (first.waiting, second.waiting) == (False, True)
    assert [timer.delay_s for timer in contexts.loop.timers if timer.delay_s in (11.0, 12.0)] == [11.0]
    contexts.process.ends(1)
    assert (first.finished, contexts.process.told) == (True, [(1, b"a"), (2, b"b")])
    assert [timer.delay_s for timer in contexts.loop.timers if timer.delay_s in (11.0, 12.0)] == [11.0, 12.0]
    contexts.process.ends(2)
    assert (context.status, context.executions) == ("idle", 2)


def test_a_call_that_is_cancelled_in_the_queue_never_runs(contexts):
    context = make(contexts)
    first, second, third = (add(contexts, context, name) for name in "abc")
    contexts.execs.kill(second, "killed")
    assert (second.finished, second.reason) == (True, "killed")
    contexts.process.ends(1)
    assert contexts.process.told[-1] == (2, b"c")
    assert (first.reason, third.finished) == ("exit", False)


def test_the_queue_is_full_at_its_limit(contexts):
    context = make(contexts)
    for number in range(MAX_QUEUED + 1):
        assert not context.full
        add(contexts, context, f"exec_{number}")
    assert context.full


def test_a_deadline_interrupts_twice_and_then_takes_the_context(contexts):
    context = make(contexts)
    run, waits = add(contexts, context, "a"), add(contexts, context, "b")
    contexts.loop.fire(10.0)
    contexts.loop.fire(GRACE_S / 2)
    assert contexts.process.told[1:] == ["interrupt", "interrupt"]
    contexts.loop.fire(GRACE_S / 2)
    assert (contexts.process.told[-1], context.status) == ("kill", "lost")
    context.over(9, 1.0, 0)
    assert (run.reason, waits.fault and waits.fault["code"]) == ("timeout", "context_lost")
    assert "its time was over" in context.lost_message


def test_a_call_that_ends_in_its_grace_keeps_the_context(contexts):
    context = make(contexts)
    run = add(contexts, context, "a")
    contexts.loop.fire(10.0)
    contexts.process.ends(1, 130)
    contexts.loop.fire(GRACE_S / 2)
    assert (run.reason, context.status, contexts.process.told[-1]) == ("timeout", "idle", "interrupt")


def test_a_restart_waits_for_the_end_and_begins_anew(contexts):
    context = make(contexts)
    run, said = add(contexts, context, "a"), []
    before = contexts.process
    contexts.restart(context, said.append)
    assert (before.told[-1], said) == ("kill", [])
    context.over(9, 1.0, 0)
    assert (run.reason, contexts.process is before) == ("killed", False)
    contexts.process.says(channel.READY)
    assert (said, context.status, context.executions) == ([None], "idle", 0)
    after = add(contexts, context, "b")
    contexts.process.ends(1)
    assert after.reason == "exit"


def test_a_shell_that_ends_with_its_call_takes_no_other(contexts):
    context = make(contexts)
    add(contexts, context, "a")
    waits = add(contexts, context, "b")
    contexts.process.says(channel.ENDING)
    contexts.process.ends(1, 3)
    assert (contexts.process.told, context.status) == ([(1, b"a")], "lost")
    context.over(0x300, 1.0, 0)
    assert waits.fault is not None


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (channel.DONE, channel.pack_done(channel.Done(7, 0, 1.0, 0))[5:]),
        (channel.DONE, b""),
        (channel.FAULT, b"busy no"),
        (channel.FAULT, b"made_up no"),
    ],
)
def test_what_no_process_of_ours_says_ends_it(contexts, kind, payload):
    context = make(contexts)
    add(contexts, context, "a")
    with pytest.raises(protocol.ProtocolError):
        contexts.process.says(kind, payload)


def test_what_is_shown_between_two_calls_goes_nowhere(contexts):
    context = make(contexts)
    contexts.process.says(channel.RESULT, b"{}")
    run = add(contexts, context, "a")
    contexts.process.ends(1)
    contexts.process.says(channel.DONE, b"garbage")
    assert (run.finished, contexts.process.told) == (True, [(1, b"a")])


def test_results_of_a_call_are_bounded_together(contexts):
    context = make(contexts)
    run = add(contexts, context, "a")
    for _ in range(5):
        contexts.process.says(channel.RESULT, b'"' + b"x" * (MAX_RESULTS // 3) + b'"')
    assert len(run.log) < MAX_RESULTS + 1000
    assert b"left out" in run.log.read(0, len(run.log))
    assert contexts.process.told.count("ack") == 5


def test_one_that_cannot_start_is_forgotten_and_says_why(contexts):
    said: list[Any] = []
    contexts.create({"id": "ctx_1", "language": "python", "cwd": "/", "env": {}}, said.append)
    contexts.process.says(channel.FAULT, b"unknown_language no IPython here")
    assert said == []
    contexts.process.context.over(0x100, 0.0, 0)
    assert (said, contexts.all()) == ([("unknown_language", "no IPython here")], [])


def test_there_is_a_limit_and_a_list_of_languages(contexts):
    header = {"id": "ctx_x", "language": "cobol", "cwd": "/", "env": {}}
    fault = contexts.create(header, print)
    assert fault == ("unknown_language", "no cobol here: contexts speak python, bash")
    for number in range(MAX_CONTEXTS):
        make(contexts, f"ctx_{number}")
    fault = contexts.create({**header, "language": "bash"}, print)
    assert fault is not None
    assert fault[0] == "busy"


def test_a_context_that_is_deleted_while_it_restarts_gets_no_new_process(contexts):
    """It would be in no list, and nobody could end it."""
    context, said = make(contexts), []
    before = contexts.process
    contexts.restart(context, lambda fault: said.append(("restarted", fault)))
    contexts.delete(context, lambda: said.append(("deleted", None)))
    context.over(9, 1.0, 0)
    assert contexts.process is before
    assert (said, contexts.all()) == ([("restarted", None), ("deleted", None)], [])
