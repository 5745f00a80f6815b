"""PID 1 of a sandbox: reads its configuration, starts the interpreters and the link, and serves."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any, Dict, Iterator, Tuple

from e80_agent import launch, ops, tenant
from e80_agent.execs import Execs
from e80_agent.interpreters import Interpreters
from e80_agent.link import Connection, Link
from e80_agent.loop import Loop


class Agent:
    """What the operations work with."""

    def __init__(self, folder: str, launched: Tuple[int, int]) -> None:
        with open(os.path.join(folder, "config.json"), "rb") as file:
            config: Dict[str, Any] = json.loads(file.read())
        self.started = time.monotonic()
        self.loop = Loop()
        self.tenant = tenant.Tenant(config, launch.base_environment(dict(os.environ)))
        self.interpreters = Interpreters(self.loop, self.tenant.base_env, launched)
        self.execs = Execs(self.loop, self.tenant, self.own_pids)
        self.link = Link(
            self.loop, os.path.join(folder, "agent.sock"), bytes.fromhex(config["key"]), self._request
        )

    def serve(self) -> None:
        self.link.start()
        self.loop.run()

    def own_pids(self) -> Iterator[int]:
        """Processes that are ours, so that a sweep need not look at them."""
        yield os.getpid()
        yield from self.interpreters.pids()

    def _request(self, connection: Connection, header: Dict[str, Any], body: bytes) -> None:
        operation = ops.OPERATIONS.get(str(header.get("op")))
        self.link.used(connection)
        if operation is None:
            connection.fail("unknown_operation", "this agent knows %s" % ", ".join(sorted(ops.OPERATIONS)))
            return
        try:
            operation(self, connection, header, body)
        except (KeyError, TypeError, ValueError) as error:
            connection.fail("bad_request", "%s: %r" % (header.get("op"), error))
        except OSError as error:
            # Out of processes or descriptors: this request fails, the agent goes on.
            connection.fail("start_failed", "%s: %s" % (header.get("op"), error.strerror))


def main(folder: str, launched: Tuple[int, int]) -> None:
    """Serves until the container ends. `folder` holds config.json and agent.sock, read-only; `launched` is
    what launch_first() gave."""
    os.umask(0o077)
    os.chdir("/")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(0))
    sys.stdin.close()
    Agent(folder, launched).serve()
