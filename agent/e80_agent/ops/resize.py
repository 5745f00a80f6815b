"""resize: the size of an exec's terminal."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection
from e80_agent.terminal import check_size


def resize(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id, rows, cols. An exec that has ended has no terminal any more."""
    rows, cols = check_size(header["rows"], header["cols"])
    run = agent.execs.get(header["id"])
    if run is None:
        connection.fail("unknown_exec", "no exec %s here" % header["id"])
    elif run.pty_size is None:
        connection.fail("no_terminal", "exec %s was not started with a terminal" % run.id)
    elif run.ending or run.terminal is None:
        connection.fail("no_terminal", "exec %s has ended, and its terminal with it" % run.id)
    else:
        run.terminal.resize(rows, cols)
        connection.reply({"ok": True})
