"""attach: the log of an exec from an offset on, running or finished."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection


def attach(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id, offset (bytes of the log already received). Unknown ids are an error: never run again."""
    run = agent.execs.get(header["id"])
    if run is None:
        connection.fail("unknown_exec", "no exec %s here" % header["id"])
        return
    offset = int(header.get("offset", 0))
    if not 0 <= offset <= len(run.log):
        raise ValueError("offset %d of %d" % (offset, len(run.log)))
    connection.follow(run, offset, eager=True)
