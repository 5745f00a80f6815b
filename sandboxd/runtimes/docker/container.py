"""What the hardened container of a sandbox looks like to the engine.

Each line is there for an attack; docs/design/isolation.md has the table.
"""

import json
from importlib.resources import files
from typing import Any

from sandboxd.runtimes.base import SandboxSpec

OWNER_LABEL = "sandboxd.owner"
SANDBOX_LABEL = "sandboxd.sandbox"
PROJECT_LABEL = "sandboxd.project"

AGENT_TARGET = "/opt/e80"
LINK_TARGET = "/run/e80"

# Root without rights, but for those a PID 1 needs to become the tenant and to end what the tenant started.
CAPABILITIES = ["SETUID", "SETGID", "KILL"]

# On top of what tenant code may start: the agent, its parents, a main process for each exec (those are made
# by us, whatever the tenant's own limit says) and a helper for each file that is read or written.
AGENT_PROCESSES = 160

# gVisor ends when the host refuses it a thread, and on ptrace it had 24 for each process of a fork bomb.
# Its own kernel enforces the tenant's RLIMIT_NPROC, so this is a fence around gVisor itself.
_HOST_THREADS = {"runsc": 16}

# What the kernel keeps outside of every other limit, or keeps after the process that made it has ended.
_SYSCTLS = {
    "kernel.shm_rmid_forced": "1",
    "kernel.shmall": "16384",
    "kernel.msgmni": "64",
    "kernel.sem": "250 4000 100 128",
}
SOCKET_MEMORY = 64 * 1024 * 1024
_MAX_SHM_MB = 64

_BOOT = f"""
import sys
sys.path.insert(0, {AGENT_TARGET!r})
from e80_agent.launch import launch_first
launched = launch_first()
from e80_agent.main import main
main({LINK_TARGET!r}, launched)
"""

# Whoever uses up the quota waits for the rest of the period, and the agent with it: Docker's 100 ms show in
# the slowest runs. In much less than 50 ms the agent and its interpreter could not start without such a wait.
# Of the CPU, when several want it: an eighth for those in the background, not nothing, or they would never
# be ready on a busy host.
SHARES = 1024
BACKGROUND_SHARES = 128
CPU_PERIOD_US = 50_000

# Docker's own list, and what says something about the host that no program needs.
_MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/diskstats",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/modules",
    "/proc/partitions",
    "/proc/pressure",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
    # Names of the host's disks, and of the neighbours' workspaces: /sys/block/loop*/loop/backing_file.
    "/sys/block",
    "/sys/class/bdi",
    "/sys/class/block",
    "/sys/dev/block",
    "/sys/devices/virtual/bdi",
    "/sys/devices/virtual/block",
    "/sys/fs/ext4",
    "/sys/kernel/slab",
]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def seccomp_profile() -> str:
    """The profile as the engine takes it: JSON text."""
    return json.dumps(json.loads((files(__package__) / "seccomp.json").read_text()), separators=(",", ":"))


def container_config(
    spec: SandboxSpec, *, owner: str, link_dir: str, agent_dir: str, workspace_dir: str, seccomp: str
) -> dict[str, Any]:
    """The body of the engine's create call."""
    return {
        "Image": spec.image,
        "Entrypoint": ["python3", "-I", "-S", "-B", "-c", _BOOT],
        "Cmd": [],
        "User": "0:0",
        "WorkingDir": "/",
        "Hostname": "sandbox",
        "Labels": {OWNER_LABEL: owner, SANDBOX_LABEL: spec.id, PROJECT_LABEL: spec.project_id or "pool"},
        "Healthcheck": {"Test": ["NONE"]},
        "StopSignal": "SIGKILL",
        "HostConfig": {
            "Runtime": spec.runtime,
            "NetworkMode": "none",
            "CapDrop": ["ALL"],
            "CapAdd": CAPABILITIES,
            "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp}"],
            "ReadonlyRootfs": True,
            "MaskedPaths": _MASKED,
            "ReadonlyPaths": _READ_ONLY,
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "LogConfig": {"Type": "none"},
            "RestartPolicy": {"Name": "no"},
            "CpuPeriod": CPU_PERIOD_US,
            "CpuShares": BACKGROUND_SHARES if spec.background else SHARES,
            "CpuQuota": cpu_quota_us(spec.cpus),
            "Memory": spec.memory_mb * 1024 * 1024,
            "MemorySwap": spec.memory_mb * 1024 * 1024,
            # When the host is out of memory, anything in a sandbox goes before any process of the host's.
            "OomScoreAdj": 500,
            "PidsLimit": (spec.max_processes + spec.nobody_processes + AGENT_PROCESSES)
            * _HOST_THREADS.get(spec.runtime, 1),
            "Ulimits": [
                {"Name": "nofile", "Soft": 4096, "Hard": 4096},
                {"Name": "core", "Soft": 0, "Hard": 0},
            ],
            # Without a limit of their own, files here would cost host memory outside the workspace's quota.
            "Tmpfs": {
                "/dev/shm": "rw,nosuid,nodev,noexec,mode=1777,nr_inodes=4096,"
                f"size={min(_MAX_SHM_MB, spec.memory_mb // 4)}m"
            },
            # gVisor has its own kernel and no use for them.
            "Sysctls": _SYSCTLS if spec.runtime == "runc" else {},
            "Mounts": [
                _bind(agent_dir, AGENT_TARGET, read_only=True),
                _bind(link_dir, LINK_TARGET, read_only=True),
                _bind(f"{link_dir}/passwd", "/etc/passwd", read_only=True),
                _bind(f"{link_dir}/group", "/etc/group", read_only=True),
                _bind(f"{workspace_dir}/home", "/home/user", read_only=False),
                _bind(f"{workspace_dir}/tmp", "/tmp", read_only=False),
            ],
        },
    }


def cpu_quota_us(cpus: float) -> int:
    return int(cpus * CPU_PERIOD_US)


def passwd(spec: SandboxSpec) -> str:
    """Names for the ids that programs look up; those of the two users are this sandbox's own."""
    uid, nobody = spec.uid, spec.nobody_uid
    return (
        "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"nobody:x:{nobody}:{nobody}:nobody:/tmp:/bin/bash\n"
        f"user:x:{uid}:{uid}:user:/home/user:/bin/bash\n"
    )


def group(spec: SandboxSpec) -> str:
    return f"root:x:0:\ntty:x:5:\nnogroup:x:65534:\nnobody:x:{spec.nobody_uid}:\nuser:x:{spec.uid}:\n"


def _bind(source: str, target: str, *, read_only: bool) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }
