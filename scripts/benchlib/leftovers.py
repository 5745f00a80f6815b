"""What sandboxes have on the host while they live, and what must be gone when they have ended."""

from pathlib import Path

from scripts.benchlib.daemon import docker
from scripts.benchlib.kernel import children, state

_GROUPS = Path("/sys/fs/cgroup")
_DEVICES = Path("/sys/block")


def control_groups() -> set[str]:
    """Those of containers, by whomever: `docker/<id>`, on each controller."""
    found: set[str] = set()
    for pattern in ("docker/*", "*/docker/*", "system.slice/docker-*.scope"):
        found.update(str(path) for path in _GROUPS.glob(pattern) if path.is_dir())
    return found


def members(root: Path) -> set[str]:
    """The sandboxes that have a container of the installation in `root`."""
    owner = (root / "state/installation").read_text().strip()
    names = docker("ps", "--all", "--filter", f"label=sandboxd.owner={owner}", "--format", "{{.Names}}")
    return set(names.split())


def left(root: Path, alive: set[str], groups_before: set[str], daemon_pid: int) -> list[str]:
    """What there is of sandboxes that are not `alive`, and zombies of the daemon."""
    found = [f"container {name}" for name in members(root) - alive]
    found += paths_left(root, alive)
    there = docker("ps", "--all", "--quiet", "--no-trunc").split()
    new_groups = control_groups() - groups_before
    found += [group for group in new_groups if not any(container in group for container in there)]
    return [*found, *(f"zombie {pid}" for pid in children(daemon_pid) if state(pid) == "Z")]


def paths_left(root: Path, alive: set[str]) -> list[str]:
    """Mounts, files behind loop devices, folders of sockets and of workspaces."""
    paths = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for device in _DEVICES.glob("loop*/loop/backing_file"):
        try:
            paths.append(device.read_text().strip())
        except OSError:  # it was let go between our look at the folder and at the file
            continue
    for pattern in ("run/*/sbx_*", "state/workspaces/sbx_*"):
        paths += [str(path) for path in root.glob(pattern)]
    of_sandboxes = [path for path in paths if path.startswith(f"{root}/") and "sbx_" in path]
    return [path for path in of_sandboxes if not any(name in path for name in alive)]
