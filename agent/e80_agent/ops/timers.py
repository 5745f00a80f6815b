"""timers: whether the deadlines of execs run. They do not while the daemon has the sandbox frozen."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection


def timers(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: run. False stops the clock, true lets it go on with what was left; both may be repeated. An
    exec begun while it stands has all of its time when it goes on."""
    if header["run"]:
        agent.execs.release()
    else:
        agent.execs.hold()
    connection.reply({"ok": True})
