"""Contexts of one sandbox, through its agent."""

from dataclasses import dataclass
from typing import Any, Literal

from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.agentlink.wire import CALL_TIMEOUT_S, Dial, call, count, number, text

# A start may wait for the warm interpreter, and an end for whatever the context has started.
LIFE_TIMEOUT_S = 30.0
# More than the agent allows, and few enough to look at them all.
MAX_LISTED = 256


@dataclass(frozen=True, slots=True)
class Context:
    """`created_at` and `last_used_at` are times on the sandbox's clock, in seconds since 1970."""

    id: str
    language: str
    cwd: str
    status: Literal["idle", "busy", "lost"]
    executions: int
    created_at: float
    last_used_at: float


class Contexts:
    """Raises AgentRefusedError, LinkBrokenError, and what `dial` raises."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial

    async def create(
        self, context_id: str, language: str, cwd: str, env: dict[str, str], fingerprint: str
    ) -> Context:
        """Starts a context and waits until it takes calls. May be repeated with the same fingerprint: then it
        returns what there is."""
        header = {
            "op": "context_create",
            "id": context_id,
            "language": language,
            "cwd": cwd,
            "env": env,
            "fingerprint": fingerprint,
        }
        return await self._one(header)

    async def list(self) -> list[Context]:
        reply = await call(self._dial, {"op": "context_list"}, CALL_TIMEOUT_S)
        found = reply.get("contexts")
        return [_context(item) for item in (found if isinstance(found, list) else [])[:MAX_LISTED]]

    async def restart(self, context_id: str) -> Context:
        """A new process for it, without the state of the old one."""
        return await self._one({"op": "context_restart", "id": context_id})

    async def interrupt(self, context_id: str) -> Context:
        return await self._one({"op": "context_interrupt", "id": context_id})

    async def delete(self, context_id: str) -> None:
        """Ends it and all it started, and returns when nothing of that is left."""
        await call(self._dial, {"op": "context_delete", "id": context_id}, LIFE_TIMEOUT_S)

    async def _one(self, header: dict[str, Any]) -> Context:
        reply = await call(self._dial, header, LIFE_TIMEOUT_S)
        context = _context(reply.get("context"))
        if context.id != header["id"]:
            raise LinkBrokenError("the agent answered with another context")
        return context


def _context(fact: object) -> Context:
    if not isinstance(fact, dict):
        raise LinkBrokenError("the agent sent no context")
    status = fact.get("status")
    if status not in ("idle", "busy", "lost"):
        raise LinkBrokenError("the agent sent an unknown status of a context")
    return Context(
        id=text(fact.get("id"), 64),
        language=text(fact.get("language"), 32),
        cwd=text(fact.get("cwd"), 4096),
        status=status,
        executions=count(fact, "executions"),
        created_at=number(fact, "created_at"),
        last_used_at=number(fact, "last_used_at"),
    )
