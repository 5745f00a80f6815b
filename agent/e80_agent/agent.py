"""What the operations work with: the parts of one agent, made from its configuration."""

from __future__ import annotations

import os
import time
from typing import Any, Dict, Iterator, Tuple

from e80_agent import launch, tenant
from e80_agent.contexts import Contexts
from e80_agent.execs import Execs
from e80_agent.interpreters import Interpreters
from e80_agent.loop import Loop


class Agent:
    def __init__(self, config: Dict[str, Any], launched: Tuple[int, int]) -> None:
        self.started = time.monotonic()
        self.loop = Loop()
        self.tenant = tenant.Tenant(config, launch.base_environment(dict(os.environ)))
        self.interpreters = Interpreters(self.loop, self.tenant.base_env, launched)
        self.execs = Execs(self.loop, self.tenant, self.own_pids)
        self.contexts = Contexts(self.loop, self.tenant, self.execs, self.interpreters, self.own_pids)

    def own_pids(self) -> Iterator[int]:
        """Processes that are ours, so that a sweep need not look at them."""
        yield os.getpid()
        yield from self.interpreters.pids()
