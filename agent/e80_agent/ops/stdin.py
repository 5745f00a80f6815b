"""stdin: input for an exec whose stdin is open."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection
from e80_agent.stdin import BUFFER

WAIT_S = 5.0


def write_stdin(agent: Agent, connection: Connection, header: Dict[str, Any], body: bytes) -> None:
    """Header: id, offset (of the body in all input, null: it follows on what came), close. Answers {size,
    open}: takes what there is room for, and if there is none waits WAIT_S for some. Closes after the last
    byte of the body was taken. What lies before `size` was taken before, and is left out. The body may be as
    large as the buffer."""
    run = agent.execs.get(header["id"])
    if run is None:
        connection.fail("unknown_exec", "no exec %s here" % header["id"])
        return
    stdin = run.stdin
    offset = header.get("offset")
    start = stdin.size if offset is None else int(offset)
    if not 0 <= start <= stdin.size:
        raise ValueError("offset %d of %d" % (start, stdin.size))
    if len(body) > BUFFER:
        raise ValueError("%d bytes at once" % len(body))
    close = header.get("close") is True
    end = start + len(body)
    if not stdin.open and not _is_repetition(end, stdin.size, close, offset is not None):
        connection.fail("stdin_closed", "the stdin of exec %s is closed" % run.id)
        return

    def answer() -> None:
        timer.cancel()
        stdin.stop_waiting(go_on)
        connection.reply({"ok": True, "size": stdin.size, "open": stdin.open})

    def go_on() -> None:
        # By now others may have been served.
        rest = body[max(0, stdin.size - start) :] if offset is not None else body
        taken = stdin.take(rest) if stdin.open else 0
        if taken == len(rest) and close:
            stdin.finish()
        if taken or not rest or not stdin.open:
            answer()
        else:
            stdin.wait(go_on)

    timer = agent.loop.call_later(WAIT_S, answer)
    go_on()


def _is_repetition(end: int, size: int, close: bool, is_numbered: bool) -> bool:
    """Whether a request asks for nothing that has not been done: it may have been sent twice."""
    return end <= size and (is_numbered or close)
