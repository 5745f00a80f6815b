"""python: runs code in a fork of a parent interpreter, or in a new one when asked to."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, Dict, List, Optional

from e80_agent import interpreters, runner
from e80_agent.agent import Agent
from e80_agent.execs import Exec
from e80_agent.fork import send_fds
from e80_agent.link import Connection
from e80_agent.ops import command

_SEND_S = 5.0


def run_python(agent: Agent, connection: Connection, header: Dict[str, Any], body: bytes) -> None:
    """Header: id, code_size, env, cwd, timeout_s, output_limit, spool_limit, stream, fresh; with a key
    fingerprint and resume, too. Optional: user, stdin_open, ring. Body: the code (code_size bytes), then
    stdin. Answers with the exec's log."""
    if header.get("pty") is not None:
        raise ValueError("a terminal is for commands")
    run = command.admit(agent, connection, header, body[header["code_size"] :])
    if run is None:
        return
    code = body[: header["code_size"]]
    if header.get("fresh") or interpreters.needs_fresh(header["env"]):
        _run_fresh(agent, connection, header, run, code)
        return
    parent = agent.interpreters.choose(code)
    connection.follow(run, 0, eager=bool(header.get("stream")))

    def forked(pid: int, sock: socket.socket) -> None:
        if run.ending or run.finished:
            sock.close()  # it timed out before there was a child; without its socket the child ends
            return
        try:
            theirs = agent.execs.open_pipes(run, with_error=True)
        except OSError as error:
            sock.close()
            run.fault = {"code": "start_failed", "message": str(error.strerror)}
            agent.execs.exited(run, 0, 0.0, 0)
            return

        def exited(status: int, cpu_ms: float, grown_kb: int) -> None:
            run.fault = _start_fault(sock, header["cwd"])
            agent.execs.exited(run, status, cpu_ms, grown_kb)
            agent.interpreters.run_ended(parent)

        parent.watch(pid, exited)
        agent.execs.started(run, pid)
        _hand_over(sock, agent, run, header, code, theirs)

    parent.take(forked)


def _hand_over(
    sock: socket.socket,
    agent: Agent,
    run: Exec,
    header: Dict[str, Any],
    code: bytes,
    theirs: List[int],
) -> None:
    user = agent.tenant.user(run.user)
    request = runner.pack_request(
        {
            "uid": user.uid,
            "gid": user.gid,
            "tag": run.tag,
            "max_processes": user.max_processes,
            "env": dict(user.env, **header["env"]) if user.env else header["env"],
            "cwd": header["cwd"],
        },
        code,
    )
    try:
        # The child is still ours and reads at once; the limit is for one that was killed meanwhile.
        sock.settimeout(_SEND_S)
        send_fds(sock, request[: runner.REQUEST.size], theirs)
        sock.sendall(request[runner.REQUEST.size :])
    except OSError:
        return  # it is dead, and its exit is about to be reported
    finally:
        for fd in theirs:
            os.close(fd)


def _start_fault(sock: socket.socket, cwd: str) -> Optional[Dict[str, str]]:
    """What the child said before it became the tenant, if it did not get that far."""
    with sock:
        sock.setblocking(False)
        try:
            reason = sock.recv(256)
        except OSError:
            return None
    return {"code": "cwd_not_found", "message": "cwd %r: %s" % (cwd, reason.decode())} if reason else None


def _run_fresh(agent: Agent, connection: Connection, header: Dict[str, Any], run: Exec, code: bytes) -> None:
    code_fd = os.memfd_create("code", 0)
    with os.fdopen(code_fd, "wb", closefd=False) as file:
        file.write(code)
    os.lseek(code_fd, 0, os.SEEK_SET)
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    start = (
        "import sys; sys.path.insert(0, %r); from e80_agent import runner; "
        "del sys.path[0]; runner.fresh(%d)" % (os.path.dirname(here), runner.ERROR_FD + 1)
    )
    theirs = command.pipes(agent, run, with_error=True)
    argv = [sys.executable, "-c", start]
    command.start(
        agent,
        connection,
        run,
        argv,
        tenant_env(agent.tenant.environment(header["env"], run.user)),
        header,
        theirs + [code_fd],
    )


def tenant_env(env: Dict[str, str]) -> Dict[str, str]:
    """Unbuffered by lines, like the forked interpreters, so that a stream shows each print at once."""
    return dict({"PYTHONUNBUFFERED": "1"}, **env)
