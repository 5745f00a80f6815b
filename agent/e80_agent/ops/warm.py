"""warm: loads the interpreter that has the heavy libraries imported."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection


def warm(agent: Agent, connection: Connection, _header: Dict[str, Any], _body: bytes) -> None:
    """Answers at once; `hello` tells when it is warm. The daemon asks when the machine has time for it."""
    agent.interpreters.start_warm()
    connection.reply({"ok": True, "warm": agent.interpreters.warm.ready})
