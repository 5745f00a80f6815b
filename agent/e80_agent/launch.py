"""Starts parent interpreters. Imports next to nothing, so that the first one starts up beside the agent: the
agent's own imports take four times as long as it takes Python to start.
"""

from __future__ import annotations

import os
import sys

# The socket module itself would import a third of what the agent does.
from _socket import AF_UNIX, SOCK_SEQPACKET, socketpair

HOME = "/home/user"
# `nobody` has no folder of its own, only the one that is everybody's.
NOBODY_HOME = "/tmp"

# The first entry of the path would be the working directory: it is taken away before anything is imported.
_START = (
    "import sys; sys.path[0] = %r; from e80_agent import interpreter; del sys.path[0]; "
    "interpreter.main(preload=%r, tenant_env=%r)"
)


def base_environment(image_env: dict[str, str]) -> dict[str, str]:
    """What tenant code gets: the image's own variables and those every program expects to find."""
    env = dict(image_env)
    env.pop("HOSTNAME", None)
    env.update(HOME=HOME, USER="user", LOGNAME="user", SHELL="/bin/bash")
    env.setdefault("LANG", "C.UTF-8")
    env.setdefault("TMPDIR", "/tmp")
    path = env.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    local = HOME + "/.local/bin"
    env["PATH"] = path if local in path.split(":") else local + ":" + path
    return env


def nobody_environment(base_env: dict[str, str]) -> dict[str, str]:
    """What is different for the user `nobody`; the programs that `user` has installed are not for it."""
    path = [entry for entry in base_env["PATH"].split(":") if not entry.startswith(HOME + "/")]
    return {"HOME": NOBODY_HOME, "USER": "nobody", "LOGNAME": "nobody", "PATH": ":".join(path)}


def launch(preload: list[str], extra_env: dict[str, str], tenant_env: dict[str, str]) -> tuple[int, int]:
    """The pid of a new parent interpreter and our end of its control socket. Raises OSError."""
    env = {name: value for name, value in tenant_env.items() if not name.startswith("PYTHON")}
    # No user site-packages: a .pth file there would be tenant code in a process of root.
    env.update(extra_env, HOME="/nonexistent")
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = _START % (here, preload, tenant_env)
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-B", "-c", code],
            env,
            # Every other descriptor of ours closes by itself.
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_RDWR, 0),
            ],
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return pid, ours.detach()


def launch_first() -> tuple[int, int]:
    """The parent that every sandbox has, for `main`."""
    return launch([], {}, base_environment(dict(os.environ)))
