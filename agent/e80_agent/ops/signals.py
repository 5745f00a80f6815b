"""signal: to an exec's process group; SIGKILL ends all that the exec started."""

from __future__ import annotations

import signal
from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection


def send_signal(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id, signal (number). A finished exec is no error: the signal came too late."""
    number = signal.Signals(header["signal"])
    run = agent.execs.get(header["id"])
    if run is None:
        connection.fail("unknown_exec", "no exec %s here" % header["id"])
        return
    agent.execs.signal(run, number)
    connection.reply({"ok": True, "finished": run.finished})
