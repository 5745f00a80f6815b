"""Contexts: made, listed, restarted, interrupted, deleted; and the calls in them."""

from __future__ import annotations

from typing import Any, Dict, Optional

from e80_agent.agent import Agent
from e80_agent.contexts import MAX_QUEUED, Context, Fault
from e80_agent.link import Connection
from e80_agent.ops import command


def create(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id, language, cwd, env, fingerprint. Answers {context} when it takes calls. A repeated request
    is answered with what is there, if the fingerprint is the same, or with context_exists."""
    known = agent.contexts.get(header["id"])
    if known is not None and known.fingerprint != header["fingerprint"]:
        connection.fail("context_exists", "context %s was made by another request" % known.id)
    elif known is not None and known.status == "busy" and not known.executions:
        known.start(lambda fault: _answer(agent, connection, header, fault))
    elif known is not None:
        _answer(agent, connection, header, None)
    else:
        fault = agent.contexts.create(header, lambda fault: _answer(agent, connection, header, fault))
        if fault is not None:
            connection.fail(*fault)


def list_all(agent: Agent, connection: Connection, _header: Dict[str, Any], _body: bytes) -> None:
    """Answers {contexts}."""
    connection.reply({"ok": True, "contexts": [_show(context) for context in agent.contexts.all()]})


def restart(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id. Answers {context} when its new process takes calls."""
    context = _find(agent, connection, header)
    if context is not None:
        agent.contexts.restart(context, lambda fault: _answer(agent, connection, header, fault))


def interrupt(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id. Answers {context}, without waiting for what the interrupt does."""
    context = _find(agent, connection, header)
    if context is not None:
        context.interrupt()
        _answer(agent, connection, header, None)


def delete(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id. Answers when nothing of it is left."""
    context = _find(agent, connection, header)
    if context is not None:
        agent.contexts.delete(context, lambda: connection.reply({"ok": True}))


def run_in_context(agent: Agent, connection: Connection, header: Dict[str, Any], body: bytes) -> None:
    """Header: id, context, timeout_s, output_limit, spool_limit, stream; with a key fingerprint and resume,
    too. Body: the code. Answers with the exec's log; its time begins when the calls before it have ended."""
    context = agent.contexts.get(header["context"])
    known = agent.execs.get(header["id"])
    if (known is None and not agent.execs.is_gone(header["id"])) or (known is not None and known.fault):
        fault = _refusal(context, header["context"])
        if fault is not None:
            connection.fail(*fault)
            return
    run = command.admit(agent, connection, header, b"", context)
    if run is None:
        return
    assert context is not None
    connection.follow(run, 0, eager=bool(header.get("stream")))
    context.add(run, body)


def _refusal(context: Optional[Context], context_id: str) -> Optional[Fault]:
    if context is None:
        return "unknown_context", "no context %s here" % context_id
    if context.lost is not None:
        return "context_lost", context.lost_message
    if context.full:
        return "context_busy", "%d calls wait in context %s, the limit" % (MAX_QUEUED, context.id)
    return None


def _find(agent: Agent, connection: Connection, header: Dict[str, Any]) -> Optional[Context]:
    context = agent.contexts.get(header["id"])
    if context is None:
        connection.fail("unknown_context", "no context %s here" % header["id"])
    return context


def _answer(agent: Agent, connection: Connection, header: Dict[str, Any], fault: Optional[Fault]) -> None:
    context = agent.contexts.get(header["id"])
    if fault is not None:
        connection.fail(*fault)
    elif context is None:
        connection.fail("unknown_context", "context %s was deleted meanwhile" % header["id"])
    else:
        connection.reply({"ok": True, "context": _show(context)})


def _show(context: Context) -> Dict[str, Any]:
    return {
        "id": context.id,
        "language": context.language,
        "cwd": context.cwd,
        "status": context.status,
        "executions": context.executions,
        "created_at": context.created_at,
        "last_used_at": context.last_used_at,
        "lost": context.lost,
    }
