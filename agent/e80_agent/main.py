"""PID 1 of a sandbox: reads its configuration, starts the agent and its link, and serves."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, Dict, Tuple

from e80_agent import ops
from e80_agent.agent import Agent
from e80_agent.link import Connection, Link


def main(folder: str, launched: Tuple[int, int]) -> None:
    """Serves until the container ends. `folder` holds config.json and agent.sock, read-only; `launched` is
    what launch_first() gave."""
    os.umask(0o077)
    os.chdir("/")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(0))
    sys.stdin.close()
    with open(os.path.join(folder, "config.json"), "rb") as file:
        config: Dict[str, Any] = json.loads(file.read())
    agent = Agent(config, launched)

    def request(connection: Connection, header: Dict[str, Any], body: bytes) -> None:
        link.used(connection)
        ops.serve(agent, connection, header, body)

    link = Link(agent.loop, os.path.join(folder, "agent.sock"), bytes.fromhex(config["key"]), request)
    link.start()
    agent.loop.run()
