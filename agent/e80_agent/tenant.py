"""Becoming the tenant: what a forked child does, as root, before it runs anything that is not ours."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from e80_agent import launch

HOME = launch.HOME

# Group ids from here up mark which exec a process belongs to. Only CAP_SETGID can drop a supplementary
# group, and a tenant has no capability, so setsid, double forks and exec keep the mark: see sweep.py.
TAG_BASE = 0x40000000

_NICE = 19

_TOUCHED_SIGNALS = (
    signal.SIGCHLD,
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
)


USERS = ("user", "nobody")


def check_user(name: Any) -> str:
    """Raises ValueError when there is no user of that name."""
    if name not in USERS:
        raise ValueError("user %r" % (name,))
    return str(name)


class User(NamedTuple):
    """A user that tenant code can run as. `env` is what sets its environment apart from that of `user`."""

    name: str
    uid: int
    gid: int
    max_processes: int
    env: Dict[str, str]


class Tenant:
    """Who tenant code runs as in this sandbox: `user`, whose ids stand here, or `nobody`, which shares /tmp
    with it and nothing else."""

    def __init__(self, config: Dict[str, Any], base_env: Dict[str, str]) -> None:
        self.uid: int = config["uid"]
        self.gid: int = config["gid"]
        self.max_processes: int = config["max_processes"]
        self.nobody_uid: int = config["nobody_uid"]
        self.base_env = base_env
        self._users = {
            "user": User("user", self.uid, self.gid, self.max_processes, {}),
            "nobody": User(
                "nobody",
                self.nobody_uid,
                self.nobody_uid,
                config["nobody_max_processes"],
                launch.nobody_environment(base_env),
            ),
        }

    def user(self, name: str) -> User:
        return self._users[name]

    def environment(self, extra: Dict[str, str], name: str = "user") -> Dict[str, str]:
        env = dict(self.base_env)
        env.update(self.user(name).env)
        env.update(extra)
        return env


def become(uid: int, gid: int, tag: Optional[int], max_processes: int) -> None:
    """Gives up root for good: groups, limits, uid. The order matters, each step needs the ones before."""
    os.setgroups([] if tag is None else [tag])
    os.setresgid(gid, gid, gid)
    # Counted per uid and the uid is this user's own: it keeps the agent room to fork under a fork bomb.
    resource.setrlimit(resource.RLIMIT_NPROC, (max_processes, max_processes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Within the sandbox only: the agent and its parents are scheduled first, however many tenants spin.
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    os.setresuid(uid, uid, uid)


def act_as(uid: int, gid: int) -> None:
    """Takes the tenant's rights to files, and none besides, without becoming its process.

    Permission to signal goes by the real and the saved uid, which stay root's: a tenant that could stop or
    end a helper could make the agent wait for it."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(0, uid, 0)


@contextlib.contextmanager
def rights_of(uid: int) -> Iterator[None]:
    """For PID 1: what is opened meanwhile belongs to `uid`, which can open it again, as /dev/stdout or by the
    name of a terminal. For system calls that do not block. The real and the saved ids stay root's, so nobody
    can signal or trace us meanwhile."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def offer_to_oom_killer() -> None:
    """Makes this process, not the agent, the first choice when the sandbox is out of memory."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        try:
            os.write(fd, b"1000")
        finally:
            os.close(fd)
    except OSError:
        # gVisor accepts no such write; there the kernel ends the whole sandbox and the daemon reports it.
        return


def default_signals() -> None:
    """What a program expects at its start; Python ignores SIGPIPE and SIGXFSZ and we watch SIGCHLD."""
    signal.set_wakeup_fd(-1)
    for number in _TOUCHED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def keep_only(descriptors: List[int]) -> None:
    """Moves the given descriptors to 0, 1, 2, ... and closes every other one."""
    # First out of the way, so that no dup2 overwrites one that is still to be moved.
    floor = max(max(descriptors), len(descriptors)) + 1
    parked = [_dup_above(fd, floor) for fd in descriptors]
    for target, fd in enumerate(parked):
        os.dup2(fd, target, inheritable=True)
    os.closerange(len(descriptors), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _dup_above(fd: int, floor: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD, floor)
