"""signal: to an exec's process group; SIGKILL ends all that the exec started."""

from __future__ import annotations

import signal
from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection


def send_signal(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id, signal (number), cancel: ends the exec as its deadline would, instead. Answers {delivered}:
    for an exec that has ended it came too late, which is no error."""
    number = int(header["signal"])
    if not 1 <= number < signal.NSIG:
        raise ValueError("signal %d" % number)
    run = agent.execs.get(header["id"])
    if run is None:
        connection.fail("unknown_exec", "no exec %s here" % header["id"])
        return
    if header.get("cancel"):
        running = not run.finished
        agent.execs.kill(run, "killed")
        connection.reply({"ok": True, "delivered": running})
        return
    connection.reply({"ok": True, "delivered": agent.execs.signal(run, number)})
