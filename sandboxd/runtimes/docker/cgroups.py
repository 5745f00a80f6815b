"""A container's accounts and limits as the kernel keeps them: read straight from its control groups.

Both layouts: one tree for each controller (v1), or one for all (v2).
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandboxd.runtimes.base import Usage
from sandboxd.runtimes.docker import container

ROOT = Path("/sys/fs/cgroup")
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Where the accounts of one container are. The folders go when its last process does."""

    version: int
    cpu: Path
    accounts: Path
    memory: Path

    def usage(self) -> Usage | None:
        """CPU time since the start and memory now, without the page cache that the kernel would give up
        first; None when the group is gone. A few small reads."""
        try:
            if self.version == 2:
                cpu_s = _fields(self.accounts / "cpu.stat")["usage_usec"] / 1e6
            else:
                cpu_s = int((self.accounts / "cpuacct.usage").read_bytes()) / 1e9
            memory = self._memory_bytes() - self._memory_stat("inactive_file")
            limit = self._memory_limit()
        except (OSError, KeyError, ValueError):
            return None
        return Usage(cpu_s=cpu_s, memory_mb=max(0, memory) / _MIB, memory_limit_mb=limit)

    def pinned_bytes(self) -> int:
        """Memory that a lower limit could not get back: all but what is cached of files. Raises OSError."""
        cached = self._memory_stat("inactive_file") + self._memory_stat("active_file")
        return max(0, self._memory_bytes() - cached)

    def limit_cpu(self, quota_us: int) -> None:
        """CPU time in each period of `container.CPU_PERIOD_US`. Raises OSError."""
        if self.version == 2:
            (self.cpu / "cpu.max").write_text(f"{quota_us} {container.CPU_PERIOD_US}")
        else:
            (self.cpu / "cpu.cfs_quota_us").write_text(str(quota_us))

    def set_shares(self, shares: int) -> None:
        """The part of the CPU when several want it; 1024 is the ordinary one, as on v1. Raises OSError."""
        if self.version == 2:
            # As runc translates it: 2 to 262144 onto 1 to 10000.
            (self.cpu / "cpu.weight").write_text(str(1 + (shares - 2) * 9999 // 262142))
        else:
            (self.cpu / "cpu.shares").write_text(str(shares))

    def limit_socket_memory(self) -> None:
        """Bounds the buffers of network sockets where v1 would not count them as memory: one sandbox could
        take all that the host has for TCP. Engines accept such a limit, but no longer set it."""
        if self.version == 1:
            with contextlib.suppress(OSError):
                (self.memory / "memory.kmem.tcp.limit_in_bytes").write_text(str(container.SOCKET_MEMORY))

    def _memory_bytes(self) -> int:
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return int((self.memory / name).read_bytes())

    def _memory_limit(self) -> int | None:
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        text = (self.memory / name).read_bytes().strip()
        return None if text == b"max" else int(text) // _MIB

    def _memory_stat(self, name: str) -> int:
        # v1 tells its children's part apart.
        return _fields(self.memory / "memory.stat")[name if self.version == 2 else f"total_{name}"]


def parse(text: str, root: Path = ROOT) -> Cgroup | None:
    """The groups in the text of a /proc/PID/cgroup; None when no controller that is needed is there."""
    paths: dict[str, Path] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            paths[name] = root / controllers / path.lstrip("/")
    if {"cpu", "cpuacct", "memory"} <= paths.keys():
        return Cgroup(1, cpu=paths["cpu"], accounts=paths["cpuacct"], memory=paths["memory"])
    unified = paths.get("")
    return None if unified is None else Cgroup(2, cpu=unified, accounts=unified, memory=unified)


def of_process(pid: int) -> Cgroup | None:
    """The groups that a process of the host is in; None when it has ended."""
    try:
        return parse(Path(f"/proc/{pid}/cgroup").read_text())
    except OSError:
        return None


def _fields(file: Path) -> Mapping[str, int]:
    return {
        name: int(value) for name, _, value in (line.partition(" ") for line in file.read_text().splitlines())
    }
