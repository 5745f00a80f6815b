"""watch: tells of changes below a path for as long as the daemon listens."""

from __future__ import annotations

import json
import os
import select
from typing import Any, Dict, List

from e80_agent.agent import Agent
from e80_agent.helper import Reply, in_child, path_of
from e80_agent.inotify import Change, Watcher
from e80_agent.link import Connection

# How long the second half of a move may take to come; the kernel makes both in one go.
_MOVE_MS = 20


def watch(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: path, recursive. Answers {}, then a RECORD_DATA record of JSON for each change (type, path,
    source; paths relative to the one watched), and RECORD_END when the path itself is gone."""
    path, recursive = path_of(header), header["recursive"] is True
    in_child(agent, connection, lambda reply: _watch(reply, path, recursive))


def _watch(reply: Reply, path: bytes, recursive: bool) -> None:
    watcher = Watcher(path, recursive)
    reply.head()
    poll = select.poll()
    poll.register(watcher.fd, select.POLLIN)
    # The daemon sends nothing more: whatever comes from it is its end.
    poll.register(reply.sock, select.POLLIN)
    while not watcher.over:
        ready = poll.poll(_MOVE_MS if watcher.pending else None)
        if any(fd == reply.sock.fileno() for fd, _ in ready):
            return
        _send(reply, watcher.read())
    reply.end()


def _send(reply: Reply, changes: List[Change]) -> None:
    for change in changes:
        fact = {"type": change.kind, "path": _text(change.path)}
        if change.source is not None:
            fact["source"] = _text(change.source)
        reply.data(json.dumps(fact).encode("ascii"))


def _text(path: bytes) -> str:
    return os.fsencode(path).decode("utf-8", "surrogateescape")
