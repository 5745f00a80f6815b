"""The process of a context: takes calls from the agent one by one and tells what comes of them.

Runs in a forked child that has become the tenant, in one process with tenant code. What there is to know of a
language is in notebook.py and bash.py.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn, Optional, Protocol, Tuple

from e80_agent import channel, protocol
from e80_agent.fork import receive_fds


class Unsupported(Exception):
    """This image cannot do it; `code` is one of protocol.ERROR_CODES."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Reporter:
    """What a call tells beside its output. Usable from any thread of the tenant's."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._in_call = False

    def set_in_call(self, in_call: bool) -> None:
        with self._lock:
            self._in_call = in_call

    def send(self, kind: int, payload: bytes) -> None:
        if os.getpid() != self._pid:
            return  # a fork of the tenant's has nothing to tell
        # An interrupt must not come between a record and its answer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            with self._lock:
                if kind == channel.RESULT and not self._in_call:
                    return  # a thread of the tenant's, between two calls
                self._sock.sendall(protocol.pack_record(kind, payload))
                if kind == channel.RESULT:
                    self._sock.recv(1)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Language(Protocol):
    ended: Optional[int]  # the exit status of this process, once it can take no more calls

    def run(self, code: str, out: int, err: int) -> int:
        """Runs one call with the descriptors as stdout and stderr, which it closes; returns its exit code."""


def serve(language: str, fd: int) -> NoReturn:
    """Serves calls from the socket `fd` until the agent hangs up, then ends the process."""
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    reporter = Reporter(sock)
    try:
        speaker = _make(language, reporter)
    except Unsupported as error:
        reporter.send(channel.FAULT, ("%s %s" % (error.code, error)).encode("utf-8", "replace"))
        os._exit(1)
    except Exception as error:
        reporter.send(channel.FAULT, ("start_failed %s: %s" % (type(error).__name__, error)).encode()[:1000])
        os._exit(1)
    pid = os.getpid()
    reporter.send(channel.READY, b"")
    while True:
        number, code, fds = _receive(sock)
        cpu_s, base_kb = _usage()
        exit_code = 1
        reporter.set_in_call(True)
        try:
            exit_code = speaker.run(code, *fds)
        except BaseException:
            traceback.print_exc()  # our own fault: this life of the context is over
            os._exit(1)
        if os.getpid() != pid:
            os._exit(exit_code & 0xFF)  # the call has forked, and both have come back from it
        reporter.set_in_call(False)
        cpu_now_s, now_kb = _usage()
        done = channel.Done(number, exit_code & 0xFF, (cpu_now_s - cpu_s) * 1000, max(0, now_kb - base_kb))
        if speaker.ended is not None:
            reporter.send(channel.ENDING, b"")
        sock.sendall(channel.pack_done(done))
        if speaker.ended is not None:
            os._exit(speaker.ended)


def _make(language: str, reporter: Reporter) -> Language:
    if language == "bash":
        from e80_agent import bash

        return bash.Bash()
    try:
        from e80_agent import notebook
    except ImportError as error:
        message = "contexts of Python need IPython, which this image does not have (%s)" % error
        raise Unsupported("unknown_language", message) from error
    return notebook.Notebook(reporter)


def _receive(sock: socket.socket) -> Tuple[int, str, Tuple[int, int]]:
    head, fds = receive_fds(sock, channel.REQUEST.size, 2)
    if len(head) < channel.REQUEST.size or len(fds) != 2:
        os._exit(0)
    number, size = channel.REQUEST.unpack(head)
    parts = []
    while size:
        part = sock.recv(min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return number, b"".join(parts).decode("utf-8", "surrogateescape"), (fds[0], fds[1])


def _usage() -> Tuple[float, int]:
    """CPU time of this process and its children that have ended, and its memory at its peak in KiB."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return cpu_s, own.ru_maxrss


def flush(*streams: Any) -> None:
    for stream in streams:
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue  # the tenant's own object by now, or closed, or nobody reads it any more


def redirect(out: int, err: int) -> None:
    """Makes the descriptors stdout and stderr of this process and of all that it starts, and closes them."""
    flush(sys.stdout, sys.stderr)
    for fd, target in ((out, 1), (err, 2)):
        os.dup2(fd, target)
        os.close(fd)
