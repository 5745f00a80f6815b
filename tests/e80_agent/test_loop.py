"""The agent's loop: what is cancelled does not stay, and what is not comes in its order."""

import signal
import time

import pytest
from e80_agent.loop import Loop, Timer


class Enough(BaseException):
    """Ends a loop that has no end of its own; no fault of a callback."""


@pytest.fixture
def loop():
    handler, wakeup_fd = signal.getsignal(signal.SIGCHLD), signal.set_wakeup_fd(-1)
    loop = Loop()
    loop.hold_orphans()  # what other tests have started is not its own to reap
    yield loop
    signal.set_wakeup_fd(wakeup_fd)
    signal.signal(signal.SIGCHLD, handler)


def test_cancelled_timers_do_not_pile_up_until_they_are_due(loop):
    kept: list[Timer] = [loop.call_later(3600, lambda: None) for _ in range(10)]
    for _ in range(10_000):
        loop.call_later(3600, lambda: None).cancel()
    assert len(loop._timers) <= 300
    assert {id(entry[2]) for entry in loop._timers} >= {id(timer) for timer in kept}


def test_timers_come_in_order_also_after_a_clean_up(loop):
    came: list[int] = []

    def note(number: int) -> None:
        came.append(number)
        if number == 2:
            raise Enough

    for number in (2, 0, 1):
        loop.call_later(number / 100, lambda number=number: note(number))
    for _ in range(1000):
        loop.call_later(3600, lambda: None).cancel()
    before = time.monotonic()
    with pytest.raises(Enough):
        loop.run()
    assert came == [0, 1, 2]
    assert time.monotonic() - before < 5
