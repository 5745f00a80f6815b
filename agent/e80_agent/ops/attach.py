"""attach: the log of an exec from an offset on, running or finished."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection


def attach(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id, offset (bytes of the log already received). Unknown ids are an error: never run again.

    A log that keeps the newest output may begin later: then the answer has `base`, where it begins, and
    `dropped`, how much output there was before."""
    run = agent.execs.get(header["id"])
    if run is None:
        connection.fail("unknown_exec", "no exec %s here" % header["id"])
        return
    offset = int(header.get("offset", 0))
    if not 0 <= offset <= run.log.end:
        raise ValueError("offset %d of %d" % (offset, run.log.end))
    connection.follow(run, offset, eager=True)
