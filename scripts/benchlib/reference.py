"""What we are measured against: the docker command doing the same work with the same image and limits."""

import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from sandboxd.runtimes.base import SandboxSpec
from sandboxd.runtimes.docker import container
from scripts.benchlib.client import PLAIN, PLAIN_OUTPUT
from scripts.benchlib.daemon import docker, remove_containers
from scripts.benchlib.figures import BenchError

IMAGE = "e80/default:latest"
READY_S = 60.0
_LABEL = f"e80.bench={os.getpid()}"
_SPEC = SandboxSpec("bench", "bench", IMAGE, 1.0, 512, 1024, 65536, 256, 199999, "runc")
_ANSWER = f"""
with open({container.LINK_TARGET + "/ready"!r}, "w") as file:
    print(6*7, file=file)
import signal
signal.pause()
"""


def run_once() -> float:
    """Milliseconds of `docker run --rm IMAGE python3 -c 'print(6*7)'`."""
    start = time.perf_counter()
    said = docker("run", "--rm", "--label", _LABEL, IMAGE, "python3", "-c", PLAIN)
    elapsed = time.perf_counter() - start
    if said != PLAIN_OUTPUT:
        raise BenchError(f"docker run answered {said!r}")
    return elapsed * 1000


def exec_in(sandbox_id: str) -> float:
    """Milliseconds of `docker exec SANDBOX python3 -c 'print(6*7)'`."""
    start = time.perf_counter()
    said = docker("exec", sandbox_id, "python3", "-c", PLAIN)
    elapsed = time.perf_counter() - start
    if said != PLAIN_OUTPUT:
        raise BenchError(f"docker exec answered {said!r}")
    return elapsed * 1000


class RawContainer:
    """A container hardened as a sandbox's, with the same mounts and limits, started by `docker run -d`. Its
    Python answers through a FIFO. There is no agent, no quota on the workspace, nobody to talk to it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="e80ref", dir="/tmp"))
        self._fifo = -1

    def __enter__(self) -> "RawContainer":
        link = self._folder / "link"
        for name in ("link", "agent", "workspace/home", "workspace/tmp"):
            (self._folder / name).mkdir(parents=True)
        (link / "passwd").write_text(container.passwd(_SPEC))
        (link / "group").write_text(container.group(_SPEC))
        (self._folder / "seccomp.json").write_text(container.seccomp_profile())
        os.mkfifo(link / "ready", 0o600)
        # Also for writing, so that opening does not wait for the container.
        self._fifo = os.open(link / "ready", os.O_RDWR)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fifo)
        remove_containers(f"e80.bench.folder={self._folder.name}")
        shutil.rmtree(self._folder)

    def start(self) -> float:
        """Milliseconds from the command's start until the container's Python has answered."""
        start = time.perf_counter()
        process = subprocess.Popen(
            [*_command(self._folder), "python3", "-c", _ANSWER],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        readable, _, _ = select.select([self._fifo], [], [], READY_S)
        elapsed = time.perf_counter() - start
        _, said = process.communicate(timeout=READY_S)
        if not readable or os.read(self._fifo, 100) != PLAIN_OUTPUT.encode():
            raise BenchError(f"docker run -d came to nothing: {said.decode()}")
        return elapsed * 1000


def _command(folder: Path) -> list[str]:
    """The container's configuration as options of `docker run`: made from our own, so that both are alike."""
    config = container.container_config(
        _SPEC,
        owner="bench",
        link_dir=str(folder / "link"),
        agent_dir=str(folder / "agent"),
        workspace_dir=str(folder / "workspace"),
        seccomp=str(folder / "seccomp.json"),
    )
    host: dict[str, Any] = config["HostConfig"]
    url = os.environ.get("SANDBOXD_DOCKER_URL")
    command = ["docker", *(["--host", url] if url else []), "run", "--detach"]
    command += ["--label", _LABEL, "--label", f"e80.bench.folder={folder.name}"]
    command += ["--user", config["User"], "--hostname", config["Hostname"], "--no-healthcheck"]
    command += ["--network", host["NetworkMode"], "--read-only", "--log-driver", host["LogConfig"]["Type"]]
    command += ["--ipc", host["IpcMode"], "--cgroupns", host["CgroupnsMode"]]
    command += ["--cpu-period", str(host["CpuPeriod"]), "--cpu-quota", str(host["CpuQuota"])]
    command += ["--pids-limit", str(host["PidsLimit"])]
    command += ["--memory", str(host["Memory"]), "--memory-swap", str(host["MemorySwap"])]
    command += [f"--cap-drop={name}" for name in host["CapDrop"]]
    command += [f"--cap-add={name}" for name in host["CapAdd"]]
    command += [f"--security-opt={option}" for option in host["SecurityOpt"]]
    command += [f"--ulimit={limit['Name']}={limit['Soft']}:{limit['Hard']}" for limit in host["Ulimits"]]
    command += [f"--sysctl={name}={value}" for name, value in host["Sysctls"].items()]
    command += ["--oom-score-adj", str(host["OomScoreAdj"])]
    command += [f"--tmpfs={target}:{options}" for target, options in host["Tmpfs"].items()]
    for mount in host["Mounts"]:
        mode = "ro" if mount["ReadOnly"] else "rw"
        command.append(f"--volume={mount['Source']}:{mount['Target']}:{mode}")
    return [*command, config["Image"]]


def clean_up() -> None:
    """Removes what an interrupted run has left in the engine."""
    remove_containers(_LABEL)
