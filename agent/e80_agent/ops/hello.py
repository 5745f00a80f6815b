"""hello: what this agent is and what it has; also the health check."""

from __future__ import annotations

import sys
import time
from typing import Any, Dict

from e80_agent import protocol
from e80_agent.agent import Agent
from e80_agent.link import Connection


def hello(agent: Agent, connection: Connection, _header: Dict[str, Any], _body: bytes) -> None:
    """Answers {protocol, python, uptime_s, faults, ready, warm, held, execs}; of each exec {id, kind, keyed,
    finished, size, ring, age_s, left_s, waiting, context}."""
    now = time.monotonic()
    connection.reply(
        {
            "ok": True,
            "protocol": protocol.PROTOCOL_VERSION,
            "python": "%d.%d.%d" % sys.version_info[:3],
            "uptime_s": round(time.monotonic() - agent.started, 3),
            "faults": agent.loop.faults,
            "ready": agent.interpreters.bare.ready,
            "warm": agent.interpreters.warm.ready,
            "held": agent.execs.held,
            "execs": [
                {
                    "id": run.id,
                    "kind": run.kind,
                    "keyed": run.fingerprint is not None,
                    "finished": run.finished,
                    "size": run.log.end,
                    "ring": run.log.ring,
                    "age_s": round(now - run.created, 3),
                    "left_s": agent.execs.left_s(run),
                    "waiting": run.waiting,
                    "context": run.context,
                }
                for run in agent.execs.all()
            ],
        }
    )
