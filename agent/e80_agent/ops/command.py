"""command: runs a program; also how every exec is admitted and started."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from typing import Any, Dict, List, Optional

from e80_agent import tenant
from e80_agent.agent import Agent
from e80_agent.execs import MAX_RUNNING, Exec, Session
from e80_agent.link import Connection
from e80_agent.terminal import take_as_controlling

DEFAULT_TERM = "xterm-256color"

_START_ERRORS = {
    errno.ENOENT: "command_not_found",
    errno.EACCES: "command_not_executable",
    errno.E2BIG: "bad_request",
    errno.ENOEXEC: "command_not_executable",
    errno.ENOTDIR: "command_not_found",
    errno.ENAMETOOLONG: "command_not_found",
    errno.ELOOP: "command_not_found",
    errno.EPERM: "command_not_executable",
    errno.ETXTBSY: "command_not_executable",
}

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_command(agent: Agent, connection: Connection, header: Dict[str, Any], body: bytes) -> None:
    """Header: id, argv, env, cwd, timeout_s, output_limit, spool_limit, stream; with a key fingerprint and
    resume, too. Optional: user, stdin_open, pty (rows, cols), ring. Body: stdin. Answers with the exec's log,
    or why the program cannot be started."""
    run = admit(agent, connection, header, body)
    if run is None:
        return
    theirs = pipes(agent, run, with_error=False)
    env = agent.tenant.environment(header["env"], run.user)
    if run.pty_size is not None:
        env.setdefault("TERM", DEFAULT_TERM)
    start(agent, connection, run, header["argv"], env, header, theirs)


def admit(
    agent: Agent,
    connection: Connection,
    header: Dict[str, Any],
    stdin: bytes,
    session: Optional[Session] = None,
) -> Optional[Exec]:
    """A new exec under the id the daemon gave it, or None after the answer: a refusal or, when this is the
    repetition of a request that came before, the log of what that one started."""
    known = agent.execs.get(header["id"])
    if known is not None and known.finished and known.fault is not None and header.get("resume"):
        agent.execs.forget(known)  # nothing of it ever ran
        known = None
    if known is not None:
        _resume(connection, header, known)
        return None
    if header.get("resume") and agent.execs.is_gone(header["id"]):
        connection.fail("exec_gone", "exec %s ran before; its output is no longer here" % header["id"])
        return None
    if agent.execs.running() >= MAX_RUNNING:
        connection.fail("busy", "%d execs are running, the limit" % MAX_RUNNING)
        return None
    return agent.execs.create(header, stdin, session)


def _resume(connection: Connection, header: Dict[str, Any], known: Exec) -> None:
    if not header.get("resume"):
        connection.fail("exec_exists", "exec %s was started before; attach to it" % known.id)
    elif header.get("fingerprint") != known.fingerprint:
        connection.fail("exec_differs", "exec %s was started by another request" % known.id)
    else:
        connection.follow(known, 0, eager=True, resumed=True)


def pipes(agent: Agent, run: Exec, with_error: bool) -> List[int]:
    """The descriptors for a program that is about to be started; without them there never was an exec."""
    try:
        return agent.execs.open_pipes(run, with_error)
    except OSError:
        agent.execs.forget(run)
        raise


def start(
    agent: Agent,
    connection: Connection,
    run: Exec,
    argv: List[str],
    env: Dict[str, str],
    header: Dict[str, Any],
    theirs: List[int],
) -> None:
    """Forks and executes `argv` as the tenant with `theirs` as descriptors 0, 1, 2, ..., which it closes.

    A program that cannot be started shows when the fork has ended: nothing here waits for a process that
    is already the tenant, for another one of the same uid could have stopped it."""
    failed_r, failed_w = os.pipe()
    # A signal to the new exec must not be met by our own handlers, which the child has until it sheds them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        pid = os.fork()
        if pid == 0:
            _become_program(agent, run, argv, env, header["cwd"], [*theirs, failed_w])
    except OSError:
        agent.execs.forget(run)
        os.close(failed_r)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for fd in [*theirs, failed_w]:
            os.close(fd)

    def exited(_pid: int, status: int, usage: Any) -> None:
        run.fault = _start_fault(failed_r, argv, header["cwd"])
        cpu_ms = (usage.ru_utime + usage.ru_stime) * 1000
        agent.execs.exited(run, status, cpu_ms, usage.ru_maxrss)

    agent.loop.on_exit(pid, exited)
    agent.execs.started(run, pid)
    connection.follow(run, 0, eager=bool(header.get("stream")))


def _become_program(
    agent: Agent, run: Exec, argv: List[str], env: Dict[str, str], cwd: str, descriptors: List[int]
) -> None:
    # In the child. The last descriptor reports a failure and closes by itself when exec succeeds.
    failed = len(descriptors) - 1
    step = "start"
    try:
        os.setsid()
        tenant.default_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        tenant.keep_only(descriptors)
        os.set_inheritable(failed, False)
        if run.pty_size is not None:
            take_as_controlling(0)
        tenant.offer_to_oom_killer()
        user = agent.tenant.user(run.user)
        tenant.become(user.uid, user.gid, run.tag, user.max_processes)
        os.umask(0o022)
        step = "cwd"
        os.chdir(cwd)
        step = "exec"
        program = shutil.which(argv[0], path=env.get("PATH")) or argv[0]
        os.execve(program, argv, env)
    except OSError as error:
        os.write(failed, b"%s %d" % (step.encode(), error.errno or 0))
    except BaseException:
        os.write(failed, b"start 0")
    finally:
        os._exit(127)


def _start_fault(failed_r: int, argv: List[str], cwd: str) -> Optional[Dict[str, str]]:
    """What the child said before it became the program, if it did not get that far."""
    os.set_blocking(failed_r, False)
    try:
        step, _, number = os.read(failed_r, 64).partition(b" ")
    except BlockingIOError:
        return None
    finally:
        os.close(failed_r)
    if not step:
        return None
    reason = os.strerror(int(number))
    if step == b"cwd":
        return {"code": "cwd_not_found", "message": "cwd %r: %s" % (cwd, reason)}
    code = _START_ERRORS.get(int(number), "start_failed") if step == b"exec" else "start_failed"
    return {"code": code, "message": "%r: %s" % (argv[0][:200], reason)}
