"""What this host and engine can promise: one line per fact, with the fix where something falls short."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandboxd.kit.settings import Settings
from sandboxd.runtimes.base import Capabilities, Check

# First fixed releases of runc, from its own security advisories.
_RUNC_FIXES = [
    ((1, 1, 12), "CVE-2024-21626"),
    ((1, 1, 14), "CVE-2024-45310"),
    ((1, 2, 8), "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881"),
]
# Debian's backports, from its changelog: the release string that has the fix although the number is lower.
_DEBIAN_BACKPORTS = {"CVE-2024-21626": "1.1.5+ds1-1+deb12u1"}
# An older one does not know AT_NO_AUTOMOUNT, which coreutils pass to statx.
_GVISOR_WITH_LS = "20230101"
_HOST_UDS = re.compile(r"--?(host-uds=(open|all)|fsgofer-host-uds(=true)?)")
_GIB = 1024**3


def inspect(info: dict[str, Any], settings: Settings) -> Capabilities:
    """Reads the engine's own account and the host's limits. Blocking."""
    options = [str(item) for item in info.get("SecurityOptions") or []]
    userns = any("userns" in item for item in options)
    level = 2 if settings.runtime == "runsc" else 1 if userns else 0
    checks = [
        _isolation(level),
        _engine(info),
        _runtime_version(info, settings.runtime),
        _seccomp(options, settings.runtime),
        _userns(userns),
        _live_restore(info),
        _cgroup(info),
        _tool("mkfs.ext4", "apt-get install e2fsprogs"),
        _tool("mount", "apt-get install mount"),
        _loop_devices(),
        _processes(),
        _terminals(),
        _inotify(info),
        _core_dumps(),
        _memory(info),
        _disk(settings.state_dir),
    ]
    return replace(offers(settings.runtime), isolation_level=level, checks=checks)


def offers(runtime: str) -> Capabilities:
    """What sandboxes of a runtime can do, whatever the host."""
    # runsc has no `update` command.
    return Capabilities(runtime=runtime, isolation_level=0, pause=True, update=runtime == "runc")


def _isolation(level: int) -> Check:
    names = {0: "runc", 1: "runc with user namespaces", 2: "gVisor"}
    message = {
        0: "containers share the host's kernel: a bug in it can be an escape",
        1: "root in a container is nobody on the host; the kernel is still shared",
        2: "tenant code meets gVisor's kernel, not the host's",
    }
    fix = "for hostile tenants install gVisor and set SANDBOXD_RUNTIME=runsc" if level == 0 else ""
    return Check(
        "isolation", "warn" if level == 0 else "ok", f"{level} ({names[level]})", message[level], fix
    )


def _engine(info: dict[str, Any]) -> Check:
    return Check("engine", "ok", str(info.get("ServerVersion")), f"storage {info.get('Driver')}")


def _runtime_version(info: dict[str, Any], runtime: str) -> Check:
    name = "runtime"
    if runtime not in info.get("Runtimes", {}):
        return Check(
            name, "fail", runtime, "the engine does not know this runtime", "register it in daemon.json"
        )
    if runtime == "runsc":
        return _gvisor(info["Runtimes"][runtime])
    text = _version("runc")
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        return Check(name, "warn", text, "cannot tell the version of runc", "check its advisories yourself")
    version = tuple(int(part) for part in found.groups())
    # Debian's full release is in the engine's account, runc itself prints only the upstream part.
    release = str(info.get("RuncCommit", {}).get("ID", ""))
    known = [
        cve for fixed, cve in _RUNC_FIXES if version < fixed and release != _DEBIAN_BACKPORTS.get(cve, "-")
    ]
    if known:
        return Check(
            name,
            "warn",
            f"runc {text}",
            f"known vulnerabilities: {', '.join(known)}",
            "upgrade runc to 1.2.8 or newer",
        )
    return Check(name, "ok", f"runc {text}", "no known vulnerability in our list")


def _gvisor(registered: dict[str, Any]) -> Check:
    """What the engine was told of runsc: the agent has to reach a socket of the host through it."""
    path, arguments = str(registered.get("path") or ""), registered.get("runtimeArgs") or []
    if path and not any(_HOST_UDS.fullmatch(str(argument)) for argument in arguments):
        return Check(
            "runtime",
            "fail",
            " ".join([path, *map(str, arguments)])[:100],
            "no sandbox can reach the daemon",
            'add "--host-uds=open" and "--network=none" to its runtimeArgs in daemon.json',
        )
    text = _version(path or "runsc")
    date = re.search(r"20\d{6}", text)
    if date is None or date.group() < _GVISOR_WITH_LS:
        return Check(
            "runtime",
            "warn",
            f"runsc {text}",
            "in builds of 2022 `ls`, `stat` and others fail with EINVAL everywhere; Python is not concerned",
            "install a newer runsc from gvisor.dev",
        )
    return Check("runtime", "ok", f"runsc {text}", "limits of a running sandbox cannot be changed")


def _version(program: str) -> str:
    try:
        out = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=5, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return out.split("\n", 1)[0].partition(" version ")[2].strip()[:60] or "unknown"


def _seccomp(options: list[str], runtime: str) -> Check:
    if runtime == "runsc":
        return Check("seccomp", "ok", "gVisor's own", "the sentry filters its calls to the host by itself")
    if any("seccomp" in item for item in options):
        return Check("seccomp", "ok", "own profile", "an allow list that is stricter than the engine's")
    return Check(
        "seccomp",
        "fail",
        "off",
        "the engine cannot filter system calls",
        "use a kernel and engine with seccomp",
    )


def _userns(userns: bool) -> Check:
    if userns:
        return Check(
            "user_namespaces",
            "fail",
            "on",
            "workspaces for remapped ids are not supported yet",
            "turn userns-remap off",
        )
    return Check(
        "user_namespaces",
        "ok",
        "off",
        "the agent is the host's root without rights; tenants have ids of their own",
    )


def _live_restore(info: dict[str, Any]) -> Check:
    if info.get("LiveRestoreEnabled"):
        return Check("live_restore", "ok", "on", "sandboxes survive a restart of the engine")
    return Check(
        "live_restore",
        "warn",
        "off",
        "a restart of the engine ends every sandbox",
        'put {"live-restore": true} into /etc/docker/daemon.json and reload dockerd',
    )


def _cgroup(info: dict[str, Any]) -> Check:
    missing = [
        name for name in ("MemoryLimit", "SwapLimit", "PidsLimit", "CpuCfsQuota") if not info.get(name)
    ]
    value = f"v{info.get('CgroupVersion')}"
    if missing:
        return Check(
            "cgroup",
            "warn",
            value,
            f"the engine cannot enforce: {', '.join(missing)}",
            "boot with cgroup_enable=memory swapaccount=1",
        )
    return Check("cgroup", "ok", value, "limits for memory, swap, CPU and processes are enforced")


def _tool(name: str, fix: str) -> Check:
    path = shutil.which(name)
    if path is None:
        return Check(name, "fail", "missing", "workspaces cannot be made without it", fix)
    return Check(name, "ok", path, "needed for workspaces")


def _loop_devices() -> Check:
    if Path("/dev/loop-control").exists():
        return Check("loop_devices", "ok", "yes", "workspaces are files with a hard quota")
    return Check("loop_devices", "fail", "no", "the kernel offers no loop devices", "modprobe loop")


def _processes() -> Check:
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    if pid_max < 65536:
        return Check(
            "pid_max",
            "warn",
            str(pid_max),
            "many busy sandboxes can use up the host's process ids",
            "sysctl kernel.pid_max=4194304",
        )
    return Check("pid_max", "ok", str(pid_max), "room for many sandboxes")


def _terminals() -> Check:
    # One count for all of the host, and nothing but it limits how many a sandbox opens.
    most = int(Path("/proc/sys/kernel/pty/max").read_text())
    if most < 65536:
        return Check(
            "pty_max",
            "warn",
            str(most),
            "one sandbox can use up the host's pseudo terminals",
            "sysctl kernel.pty.max=1048576",
        )
    return Check("pty_max", "ok", str(most), "room for many sandboxes")


def _inotify(info: dict[str, Any]) -> Check:
    # The shim of each container waits for its memory events with one of root's, on v2 only.
    most = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    if most < 1024 and str(info.get("CgroupVersion")) == "2":
        return Check(
            "inotify",
            "warn",
            str(most),
            "each sandbox takes one of root's inotify instances",
            "sysctl fs.inotify.max_user_instances=8192",
        )
    return Check("inotify", "ok", str(most), "instances of root's; sandboxes have users of their own")


def _core_dumps() -> Check:
    # A limit of no size does not count for a pipe: the kernel starts its program, on the host and as root.
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith("|"):
        return Check(
            "core_pattern",
            "warn",
            pattern[:60],
            "a program on the host gets the memory of tenant processes that crash",
            "sysctl kernel.core_pattern=core",
        )
    return Check("core_pattern", "ok", pattern[:60], "crashes in sandboxes leave nothing on the host")


def _memory(info: dict[str, Any]) -> Check:
    total = int(info.get("MemTotal") or 0)
    return Check(
        "memory", "ok" if total > _GIB else "warn", f"{total / _GIB:.1f} GiB", f"{os.cpu_count()} CPUs"
    )


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    if free < 2 * _GIB:
        return Check(
            "disk",
            "warn",
            f"{free / _GIB:.1f} GiB free",
            f"at {folder}",
            "free some space or move SANDBOXD_STATE_DIR",
        )
    return Check("disk", "ok", f"{free / _GIB:.1f} GiB free", f"at {folder}")
