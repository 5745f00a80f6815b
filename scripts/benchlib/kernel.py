"""What the kernel says of the host, of a process, and of a container's control groups (version 1 or 2)."""

import os
from dataclasses import dataclass
from pathlib import Path

from scripts.benchlib.daemon import docker
from scripts.benchlib.figures import BenchError

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """The groups of one container."""

    memory: Path
    cpu: Path
    cpuacct: Path
    shim_pid: int

    @classmethod
    def of(cls, container: str) -> "Group":
        pid = docker("inspect", "--format", "{{.State.Pid}}", container).strip()
        paths = {}
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _number, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                paths[controller] = _ROOT / controller / path.lstrip("/")
        if "memory" in paths:
            return cls(paths["memory"], paths["cpu"], paths["cpuacct"], _parent(pid))
        return cls(paths[""], paths[""], paths[""], _parent(pid))

    def memory_mb(self) -> float:
        """What this container alone costs: anonymous and shared memory, and the kernel's own for it (page
        tables, stacks, slabs). Not the page cache: files of the image are there once for all containers."""
        facts = _table(self.memory / "memory.stat")
        if "total_rss" in facts:
            kernel = int((self.memory / "memory.kmem.usage_in_bytes").read_text())
            return (facts["total_rss"] + facts["total_shmem"] + kernel) / 2**20
        return (facts["anon"] + facts["shmem"] + facts["kernel"]) / 2**20

    def shim_mb(self) -> float:
        """What the engine's own process for this container costs; pages shared with others count in part."""
        for line in Path(f"/proc/{self.shim_pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
        raise BenchError(f"/proc/{self.shim_pid}/smaps_rollup has no Pss")

    def cpu_ms(self) -> float:
        usage = self.cpuacct / "cpuacct.usage"
        if usage.exists():
            return int(usage.read_text()) / 1e6
        return _table(self.cpu / "cpu.stat")["usage_usec"] / 1e3

    def throttled(self) -> int:
        """In how many periods its CPU quota was used up."""
        return _table(self.cpu / "cpu.stat")["nr_throttled"]


def process_cpu_ms(pid: int) -> float:
    """CPU time that a process, with all its threads, has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def resident_kb(pid: int) -> int:
    """Memory of a process, without pages of files: those are the kernel's to drop."""
    return _field(pid, "RssAnon")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def state(pid: int) -> str:
    """One letter: Z is a zombie. Empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def available_mb() -> float:
    """What the host could give to new processes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise BenchError("/proc/meminfo has no MemAvailable")


def _field(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise BenchError(f"/proc/{pid}/status has no {name}")


def _parent(pid: str) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _table(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in file.read_text().splitlines())}
