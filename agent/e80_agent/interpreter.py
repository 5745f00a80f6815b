"""A parent interpreter: a process apart from the agent that forks the children which run tenant code.

It holds no key and no connection to the daemon, imports nothing that a tenant can write, and never runs
tenant code. One child is always forked ahead; it becomes the tenant only when its request arrives.
Run as `python -c` by interpreters.py with the control socket on descriptor 3.
"""

from __future__ import annotations

import atexit
import importlib
import os
import select
import signal
import socket
import struct
import sys
import traceback
import warnings
from typing import Dict, FrozenSet, List

from e80_agent import runner
from e80_agent.fork import send_fds

CONTROL_FD = 3
_RETRY_S = 0.02

# parent -> agent: kind, pid, wait status, CPU time in ms, growth of memory in KiB over the parent's own
REPORT = struct.Struct(">cIidI")
READY = b"R"
SPARE = b"S"
EXITED = b"X"
# agent -> parent
FORK = b"F"


def main(preload: List[str], tenant_env: Dict[str, str]) -> None:
    """Serves forks, with the environment of tenant code, until the agent goes away."""
    control = socket.socket(fileno=CONTROL_FD)
    _preload(preload)
    runner.prepare(tenant_env)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        # A fork copies only the calling thread; locks that the others hold would stay locked for ever.
        raise SystemExit("interpreter: %d threads after the imports, cannot fork safely" % threads)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    own_kb = _resident_kb()
    control.sendall(REPORT.pack(READY, os.getpid(), 0, 0.0, own_kb))
    owed = 0
    while True:
        readable, _, _ = select.select([control.fileno(), wake_r], [], [], _RETRY_S if owed else None)
        if wake_r in readable:
            _report_exits(control, wake_r, own_kb)
        if control.fileno() in readable:
            if control.recv(1) != FORK:
                return
            owed += 1
        while owed and _fork_ahead(control, [wake_r, wake_w]):
            owed -= 1


def _fork_ahead(control: socket.socket, wake: List[int]) -> bool:
    """False when there is no room for another process right now: whoever took it, it comes back."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            pid = os.fork()
        except OSError:
            return False
        if pid == 0:
            _run_child(control, ours, theirs, wake)
        send_fds(control, REPORT.pack(SPARE, pid, 0, 0.0, 0), [ours.fileno()])
    return True


def _run_child(control: socket.socket, ours: socket.socket, theirs: socket.socket, wake: List[int]) -> None:
    try:
        control.close()
        ours.close()
        for fd in wake:
            os.close(fd)
        runner.child(theirs)
    except BaseException:
        # Nobody above this frame may ever run: it is a copy of the parent's loop.
        traceback.print_exc()
    finally:
        os._exit(1)


def _report_exits(control: socket.socket, wake_r: int, own_kb: int) -> None:
    try:
        while os.read(wake_r, 512):
            continue
    except BlockingIOError:
        pass
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        cpu_ms = (usage.ru_utime + usage.ru_stime) * 1000
        control.sendall(REPORT.pack(EXITED, pid, status, cpu_ms, max(0, usage.ru_maxrss - own_kb)))


def _preload(names: List[str]) -> None:
    config_dir = os.environ.get("MPLCONFIGDIR")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            # The image does not have it: then nobody can import it, and there is nothing to warm.
            continue
    if names:
        _preload_hidden()
    folder = os.environ.get("MPLCONFIGDIR")
    if folder and folder != config_dir:
        # matplotlib made it, because root has no home here, and each child would try to remove it at its end.
        atexit.unregister(sys.modules["shutil"].rmtree)
        try:
            os.rmdir(folder)
        except OSError:
            return


def _preload_hidden() -> None:
    """Imports what contexts need and takes it out of sight again: a library that finds IPython among the
    modules takes every run for a notebook."""
    before = set(sys.modules)
    try:
        with warnings.catch_warnings():  # restores the filters
            importlib.import_module("e80_agent.notebook")
    except ImportError:
        pass  # an image without IPython: its contexts will say so
    standard: FrozenSet[str] = getattr(sys, "stdlib_module_names", frozenset())
    for name in set(sys.modules) - before:
        if name.partition(".")[0] not in standard:
            runner.hidden[name] = sys.modules.pop(name)


def _resident_kb() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
