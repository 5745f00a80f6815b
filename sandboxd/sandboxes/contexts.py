"""Contexts of a sandbox: kept and run by its agent, nothing of them is in the store."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sandboxd.agentlink.contexts import Context
from sandboxd.agentlink.errors import AgentRefusedError
from sandboxd.identity.errors import IdempotencyConflictError
from sandboxd.kit.clock import Clock
from sandboxd.kit.errors import BadRequestError, ConflictError
from sandboxd.kit.ids import derived_id, is_id, new_id
from sandboxd.sandboxes.errors import (
    BusyError,
    ContextBusyError,
    ContextNotFoundError,
)
from sandboxd.sandboxes.live import LiveSandbox

HOME = "/home/user"
_PRINTABLE = re.compile(r"[^\x20-\x7e]")


class ContextService:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def create(
        self,
        sandbox: LiveSandbox,
        language: str,
        cwd: str,
        env: dict[str, str],
        *,
        fingerprint: str,
        key: str | None = None,
    ) -> Context:
        """A context that takes calls; with a key, the one that it stands for, for as long as that is there.
        Raises BadRequestError for a language or folder that is not there, BusyError,
        IdempotencyConflictError."""
        context_id = new_id("ctx") if key is None else derived_id("ctx", sandbox.project_id, sandbox.id, key)
        cwd = cwd if cwd.startswith("/") else f"{HOME}/{cwd}"
        with self._work(sandbox, context_id, key):
            return await sandbox.agent.contexts.create(
                context_id, language, cwd, {**sandbox.env, **env}, fingerprint
            )

    async def list(self, sandbox: LiveSandbox) -> list[Context]:
        """All of them, the oldest first."""
        with self._work(sandbox):
            found = await sandbox.agent.contexts.list()
        return [context for context in found if is_id(context.id)]

    async def get(self, sandbox: LiveSandbox, context_id: str) -> Context:
        for context in await self.list(sandbox):
            if context.id == context_id:
                return context
        raise ContextNotFoundError(context_id)

    async def restart(self, sandbox: LiveSandbox, context_id: str) -> Context:
        with self._work(sandbox, context_id):
            return await sandbox.agent.contexts.restart(context_id)

    async def interrupt(self, sandbox: LiveSandbox, context_id: str) -> Context:
        with self._work(sandbox, context_id):
            return await sandbox.agent.contexts.interrupt(context_id)

    async def delete(self, sandbox: LiveSandbox, context_id: str) -> None:
        with self._work(sandbox, context_id):
            await sandbox.agent.contexts.delete(context_id)

    @contextmanager
    def _work(self, sandbox: LiveSandbox, context_id: str = "", key: str | None = None) -> Iterator[None]:
        if context_id and not is_id(context_id):
            raise ContextNotFoundError(context_id)
        sandbox.touch(self._clock.now())
        try:
            yield
        except AgentRefusedError as error:
            raise _explain(error, context_id, key) from error


def _explain(error: AgentRefusedError, context_id: str, key: str | None) -> Exception:
    # The agent's words may be those of a process of the tenant's.
    reason = _PRINTABLE.sub("?", error.message)
    match error.agent_code:
        case "unknown_context":
            return ContextNotFoundError(context_id)
        case "unknown_language":
            return BadRequestError(f"'language': {reason}.", param="language", code="unknown_language")
        case "cwd_not_found":
            return BadRequestError(f"{reason}.", param="cwd", code="cwd_not_found")
        case "context_exists" if key is not None:
            return IdempotencyConflictError(key)
        case "context_lost":
            return ConflictError(reason, param="context_id", code="context_lost")
        case "busy":
            return ContextBusyError(reason)
        case "start_failed":
            return BusyError(reason)
        case "unknown_operation":
            return ConflictError(
                "This sandbox was created by an older release and has no contexts; create a new one.",
                param="id",
                code="unsupported",
            )
        case _:
            return BadRequestError(f"The context is refused: {reason}.", code=error.agent_code)
