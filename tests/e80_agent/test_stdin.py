"""Input for an exec that runs: bounded, counted, and none of it lost or doubled."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from e80_agent.ops import stdin as operation
from e80_agent.stdin import BUFFER, Stdin


class Loop:
    """Descriptors that become writable, and time that passes, when the test says so."""

    def __init__(self) -> None:
        self.writers: dict[int, Any] = {}
        self.timers: list[Any] = []

    def set_writer(self, fd: int, callback: Any) -> None:
        if callback is None:
            self.writers.pop(fd, None)
        else:
            self.writers[fd] = callback

    def forget(self, fd: int) -> None:
        self.writers.pop(fd, None)

    def call_later(self, delay_s: float, callback: Any) -> Any:
        timer = SimpleNamespace(callback=callback, delay_s=delay_s)
        timer.cancel = lambda: setattr(timer, "callback", None)
        self.timers.append(timer)
        return timer

    def turn(self) -> None:
        for callback in list(self.writers.values()):
            callback()


class Program:
    """The other end of the pipe."""

    def __init__(self, loop: Loop, data: bytes = b"", stays_open: bool = True) -> None:
        self.stdin = Stdin(data, stays_open)
        self.fd, writer = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(writer, False)
        self.stdin.own(writer)
        self.loop = loop
        self.got = b""

    def reads(self) -> bool:
        """Takes all there is; whether the end of input has come."""
        while True:
            self.loop.turn()
            try:
                part = os.read(self.fd, 1 << 20)
            except BlockingIOError:
                return False
            if not part:
                return True
            self.got += part

    def ends(self) -> None:
        os.close(self.fd)


@pytest.fixture
def loop() -> Loop:
    return Loop()


class Ask:
    """Requests to one exec, and their answers."""

    def __init__(self, loop: Loop, program: Program) -> None:
        self.run = SimpleNamespace(id="exec_1", stdin=program.stdin)
        self.agent: Any = SimpleNamespace(loop=loop, execs=SimpleNamespace(get={"exec_1": self.run}.get))
        self.answers: list[Any] = []

    def __call__(self, data: bytes, offset: int | None = None, close: bool = False) -> Any:
        """The answer, None while there is none."""
        before = len(self.answers)
        header = {"id": "exec_1", "offset": offset, "close": close}
        operation.write_stdin(self.agent, self, header, data)  # type: ignore[arg-type]  # a fake
        return self.answers[-1] if len(self.answers) > before else None

    def reply(self, header: dict[str, Any]) -> None:
        self.answers.append((header["size"], header["open"]))

    def fail(self, code: str, _message: str) -> None:
        self.answers.append(code)


def test_what_is_given_at_the_start_counts_and_comes_first(loop):
    program = Program(loop, b"first")
    ask = Ask(loop, program)
    # The process is not there yet.
    assert ask(b"second", 5) == (11, True)
    program.stdin.start(loop)
    assert ask(b"", None, close=True) == (11, False)
    assert program.reads() is True
    assert program.got == b"firstsecond"
    program.ends()


def test_repeating_a_request_does_no_harm(loop):
    program = Program(loop)
    program.stdin.start(loop)
    ask = Ask(loop, program)
    for _ in range(3):
        assert ask(b"abc", 0) == (3, True)
    assert ask(b"bcdef", 1) == (6, True)
    with pytest.raises(ValueError, match="offset"):
        ask(b"x", 7)
    for _ in range(3):
        assert ask(b"end", 6, close=True) == (9, False)
    assert ask(b"", None, close=True) == (9, False)
    assert ask(b"x", None) == "stdin_closed"
    assert ask(b"x", 9) == "stdin_closed"
    assert program.reads() is True
    assert program.got == b"abcdefend"
    program.ends()


def test_what_there_is_no_room_for_waits_and_is_left_to_the_next_request(loop):
    program = Program(loop)
    program.stdin.start(loop)
    ask = Ask(loop, program)
    assert ask(bytes(BUFFER), 0) == (BUFFER, True)
    assert ask(b"x" * 10, BUFFER, close=True) is None
    timer = loop.timers[-1]
    assert timer.delay_s == operation.WAIT_S
    # Nobody reads: the answer says so, in time, and nothing is left behind of the request.
    timer.callback()
    assert ask.answers[-1] == (BUFFER, True)
    assert program.stdin._waiting == []
    assert ask(b"x" * 10, BUFFER, close=True) is None
    loop.turn()
    assert ask.answers[-1] == (BUFFER + 10, False)
    assert loop.timers[-1].callback is None
    assert program.reads() is True
    assert program.got == bytes(BUFFER) + b"x" * 10
    program.ends()


def test_more_than_the_buffer_at_once_is_refused(loop):
    program = Program(loop)
    with pytest.raises(ValueError, match="at once"):
        Ask(loop, program)(bytes(BUFFER + 1))
    program.stdin.close()
    program.ends()


def test_a_program_that_closes_its_input_or_ends_lets_nobody_wait(loop):
    program = Program(loop)
    program.stdin.start(loop)
    ask = Ask(loop, program)
    assert ask(bytes(BUFFER)) == (BUFFER, True)
    assert ask(b"x") is None
    program.ends()
    loop.turn()
    assert ask.answers[-1] == (BUFFER, False)
    assert ask(b"x") == "stdin_closed"
    assert loop.writers == {}
    program.stdin.close()


def test_input_that_is_closed_from_the_start_is_closed_for_all(loop):
    program = Program(loop, b"all of it", stays_open=False)
    program.stdin.start(loop)
    assert Ask(loop, program)(b"more") == "stdin_closed"
    assert program.reads() is True
    assert program.got == b"all of it"
    assert Stdin(b"", stays_open=False).wanted is False
    program.ends()
