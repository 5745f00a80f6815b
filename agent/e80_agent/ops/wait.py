"""wait: how an exec ends, without its output."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent import protocol
from e80_agent.agent import Agent
from e80_agent.execs import Exec
from e80_agent.link import Connection

# So that the answer fits into a header, however much of it has to be escaped.
_MAX_ERROR = 64 * 1024


def wait(agent: Agent, connection: Connection, header: Dict[str, Any], _body: bytes) -> None:
    """Header: id. Answers once the exec has ended: {end, error}, the payloads of these records of its log."""
    run = agent.execs.get(header["id"])
    if run is None:
        connection.fail("unknown_exec", "no exec %s here" % header["id"])
        return
    for follower in list(run.followers):
        if isinstance(follower, _Waiting) and follower.is_gone:
            run.followers.remove(follower)
    waiting = _Waiting(run, connection)
    if run.finished:
        waiting.log_grew()
    else:
        run.followers.append(waiting)


class _Waiting:
    def __init__(self, run: Exec, connection: Connection) -> None:
        self._run = run
        self._connection = connection

    @property
    def is_gone(self) -> bool:
        return self._connection.sock.fileno() < 0

    def log_grew(self) -> None:
        run = self._run
        if not run.finished or self.is_gone:
            return
        end = run.log.read(run.log.last + protocol.RECORD.size, protocol.MAX_RECORD)
        error = bytes(run.error[:_MAX_ERROR]).decode("utf-8", "replace") if run.error else None
        self._connection.reply({"ok": True, "end": end.decode("utf-8", "replace"), "error": error})

    def log_drops(self, start: int, end: int) -> None:
        """Nothing of it is wanted."""
