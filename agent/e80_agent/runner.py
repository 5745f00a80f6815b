"""Runs one piece of tenant code in a forked child: becomes the tenant, then executes and reports.

Everything here runs in the child. What it writes to the error channel is as untrusted as its output.
"""

from __future__ import annotations

import atexit
import linecache
import marshal
import os
import signal
import site
import socket
import struct
import sys
import traceback
import types
from typing import Any, Dict, List, NoReturn

from e80_agent import channel, failure, protocol, serve, tenant
from e80_agent.fork import receive_fds

try:
    import ctypes
except ImportError:  # python3-minimal has no ctypes
    ctypes = None  # type: ignore[assignment]

ERROR_FD = 3
_START_FD = 4
FILENAME = "<code>"
_PR_SET_DUMPABLE = 4
_LIBC = ctypes.CDLL(None) if ctypes else None

REQUEST = struct.Struct(">II")

# What a parent has imported for contexts alone: in other children it is as if it were not there.
hidden: Dict[str, types.ModuleType] = {}


def pack_request(header: Dict[str, Any], code: bytes) -> bytes:
    # Not JSON: agent and child are the same Python, and each page that a parser written in Python touches
    # is a page for the child to copy.
    data = marshal.dumps(header)
    return REQUEST.pack(len(data), len(code)) + data + code


def prepare(env: Dict[str, str]) -> None:
    """In the parent, once: what a new interpreter has in place and a fork can inherit as it is."""
    os.environ.clear()
    os.environ.update(env)
    sys.path.insert(0, "")
    sys.dont_write_bytecode = False
    sys.argv = ["-c"]
    _open_standard_streams()


def child(sock: socket.socket) -> None:
    """Waits for a request from the agent, then runs it and ends the process. Does ahead of it what can be."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Until there is code to interrupt, it ends the process; the parent ignores it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.umask(0o022)
    tenant.offer_to_oom_killer()
    prefix, fds = receive_fds(sock, REQUEST.size, 4)
    if len(prefix) < REQUEST.size:
        os._exit(0)
    header_size, code_size = REQUEST.unpack(prefix)
    header = marshal.loads(_read(sock, header_size))
    code = _read(sock, code_size)
    context = header.get("context")
    tenant.keep_only([*fds, sock.detach()])
    try:
        _become_tenant(header)
        os.chdir(header["cwd"])
    except OSError as error:
        if context is not None:
            _report_start(len(fds), error, header["cwd"])
            os._exit(127)
        # The agent reads this when it sees the exit. Closing without a word means that all is well.
        os.write(_START_FD, (error.strerror or "unknown error").encode())
        os._exit(127)
    if context is not None:
        _set_up_python(header)
        sys.modules.update(hidden)
        serve.serve(context, len(fds))
    os.close(_START_FD)
    _set_up_python(header)
    run(code)


def _report_start(channel_fd: int, error: OSError, cwd: str) -> None:
    reason = "cwd_not_found cwd %r: %s" % (cwd, error.strerror or "unknown error")
    os.write(channel_fd, protocol.pack_record(channel.FAULT, reason.encode("utf-8", "replace")))


def fresh(code_fd: int) -> None:
    """Entry of a new interpreter (`fresh`): already the tenant, the code comes from a descriptor."""
    with os.fdopen(code_fd, "rb") as file:
        code = file.read()
    run(code)


def run(code: bytes) -> NoReturn:
    """Executes `code` as __main__ and ends the process with the exit status Python would give."""
    os.set_inheritable(ERROR_FD, False)
    status = _execute(code)
    try:
        threading = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()  # waits for non-daemon threads, as at exit
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = status or 120
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        status = status or 120
    # No teardown: it would cost as much as the fork, and the kernel frees it all.
    os._exit(status)


def _become_tenant(header: Dict[str, Any]) -> None:
    tenant.become(header["uid"], header["gid"], header["tag"], header["max_processes"])
    if _LIBC is not None:
        # A change of uid makes /proc/self root's, and then a program that opens /dev/stdout is refused.
        _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def _set_up_python(header: Dict[str, Any]) -> None:
    """What a new interpreter would have done by itself, had it been started here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(header["env"])
    user_site = os.path.join(
        os.environ.get("HOME", tenant.HOME),
        ".local/lib/python%d.%d/site-packages" % sys.version_info[:2],
    )
    if os.path.isdir(user_site):
        site.addsitedir(user_site)
    # A fork repeats its parent's random state; `random` reseeds itself, numpy's global state does not.
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _open_standard_streams() -> None:
    """Python's streams on descriptors that will be others in each child, as a rule pipes: opened on pipes,
    because a stream asks once whether its descriptor can seek."""
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")[0] or "utf-8"
    kept = [(fd, os.dup(fd)) for fd in (0, 1, 2)]
    for fd, end in zip((0, 1), os.pipe()):
        os.dup2(end, fd)
        os.close(end)
    os.dup2(1, 2)
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding, errors="surrogateescape", closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, errors="surrogateescape", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # type: ignore[misc]
    # Line by line, as on a terminal: whoever follows the run sees each print when it happens.
    sys.stdout.reconfigure(line_buffering=True)
    sys.stderr.reconfigure(line_buffering=True)
    for fd, original in kept:
        os.dup2(original, fd)
        os.close(original)


def _execute(code: bytes) -> int:
    main = types.ModuleType("__main__")
    main.__builtins__ = sys.modules["builtins"]  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    try:
        source = code.decode("utf-8")
        lines: List[str] = source.splitlines(keepends=True)
        linecache.cache[FILENAME] = (len(source), None, lines, FILENAME)
        exec(compile(source, FILENAME, "exec", dont_inherit=True), main.__dict__)
        return 0
    except SystemExit as error:
        return _exit_status(error)
    except KeyboardInterrupt as error:
        _report(error)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 130
    except BaseException as error:
        _report(error)
        return 1


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> None:
    """The traceback, from the tenant's first frame on: on stderr, and as data on the error channel."""
    text = failure.traceback_of(error, FILENAME.__eq__)
    try:
        if sys.excepthook is sys.__excepthook__:
            sys.stderr.write(text)
        else:
            sys.excepthook(type(error), error, failure.theirs(error, FILENAME.__eq__))
        sys.stderr.flush()
    except Exception:
        _write(2, text.encode("utf-8", "backslashreplace"))
    _write(ERROR_FD, failure.pack(error, text))


def _write(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except OSError:
        # The tenant closed the descriptor: its own loss, and there is the other one.
        return


def _read(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = sock.recv(min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
