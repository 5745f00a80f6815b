"""Bash in a context: one interactive shell that reads our lines, and beside it this process, which speaks to
the agent.

Interactive, because such a shell goes back to its prompt when it is interrupted, where others end. What it
runs are files, of our own descriptors: while it reads one it is as quiet as in a script.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from types import FrameType
from typing import List, Optional

from e80_agent import serve

# Out of the way of scripts, which use low numbers; closed while tenant code runs.
_TELL_FD = 219
_INIT = "set +o history +H; unset HISTFILE PROMPT_COMMAND MAILCHECK; PS1= PS2=; builtin echo e 0 >&%d\n"
# The second line is what is left when an interrupt throws the rest of the first away.
_CALL = (
    "builtin source /proc/%d/fd/%d </dev/null >/proc/%d/fd/%d 2>/proc/%d/fd/%d %d>&-; "
    "builtin echo s $? >&%d\n"
    "builtin echo e $? >&%d\n"
)
_MAX_TOLD = 65536


class Bash:
    def __init__(self) -> None:
        self.ended: Optional[int] = None
        self._told_r, told_w = os.pipe()
        self._wake_r, wake_w = os.pipe()
        for fd in (self._wake_r, wake_w, self._told_r):
            os.set_blocking(fd, False)
        os.dup2(told_w, _TELL_FD)
        os.close(told_w)
        try:
            self._shell = subprocess.Popen(
                ["bash", "--noprofile", "--norc", "-i"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[_TELL_FD],
                start_new_session=True,  # an interrupt is for the shell and what it waits for
            )
        except (FileNotFoundError, PermissionError) as error:
            message = "contexts of bash need bash, which this image does not have (%s)" % error.strerror
            raise serve.Unsupported("unknown_language", message) from error
        except OSError as error:
            raise serve.Unsupported("start_failed", "bash: %s" % error.strerror) from error
        os.close(_TELL_FD)
        self._running = False
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        self._send(_INIT % _TELL_FD)
        self._wait()

    def run(self, code: str, out: int, err: int) -> int:
        file = os.memfd_create("code", 0)
        try:
            if "\0" in code:
                os.write(err, b"bash: the code holds a NUL character\n")
                return 2
            with os.fdopen(file, "wb", closefd=False) as writer:
                writer.write(code.encode("utf-8", "surrogateescape"))
            own, told = os.getpid(), _TELL_FD
            self._running = True
            self._send(_CALL % (own, file, own, out, own, err, told, told, told))
            return self._wait()
        finally:
            self._running = False
            for fd in (file, out, err):
                os.close(fd)

    def _send(self, line: str) -> None:
        assert self._shell.stdin is not None
        try:
            self._shell.stdin.write(line.encode())
            self._shell.stdin.flush()
        except BrokenPipeError:
            return  # it has ended, which is about to show

    def _wait(self) -> int:
        """The status that the shell tells when it is done, or its own if it has ended."""
        told = b""
        while True:
            select.select([self._told_r, self._wake_r], [], [])
            _drain(self._wake_r)
            status = self._shell.poll()
            told = (told + _drain(self._told_r))[-_MAX_TOLD:]
            lines = [line.split() for line in told.split(b"\n")[:-1]]
            if status is not None:
                self.ended = status if status >= 0 else 128 - status
                return self.ended
            if any(line[:1] == [b"e"] for line in lines):
                return next((_number(line) for line in lines if len(line) == 2), 1)

    def _interrupted(self, _number: int, _frame: Optional[FrameType]) -> None:
        if self._running:
            try:
                os.killpg(self._shell.pid, signal.SIGINT)
            except ProcessLookupError:
                return


def _drain(fd: int) -> bytes:
    try:
        return os.read(fd, _MAX_TOLD)
    except BlockingIOError:
        return b""


def _number(line: List[bytes]) -> int:
    return int(line[1]) & 0xFF if line[1].isdigit() else 1
