"""Whether the host has room for another sandbox. A start waits for room, within a bound, or is refused."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import structlog

from sandboxd.kit.metrics import Metrics
from sandboxd.kit.settings import Settings
from sandboxd.sandboxes.errors import HostFullError

log = structlog.get_logger(__name__)

# What a sandbox takes before it does anything, and may not have taken yet while it starts.
START_MEMORY_MB = 64
RETRY_S = 0.25
RETRY_AFTER_S = 5
# Creates that may wait at once. Each looks again and again: a flood would keep the daemon from others.
MAX_WAITING = 100
INOTIFY_INTERVAL_S = 10.0
_MB = 1024 * 1024
_INOTIFY_LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")


class Admission:
    """`starting` tells how many sandboxes are being started right now."""

    def __init__(self, settings: Settings, metrics: Metrics, starting: Callable[[], int]) -> None:
        self._settings = settings
        self._metrics = metrics
        self._starting = starting
        self._inotify_used = 0
        self._waiting = 0

    async def wait(self) -> None:
        """Returns when there is room. Raises HostFullError when there is none for `admission_wait_s`."""
        shortage = self.shortage()
        if shortage is None:
            return
        resource, message = shortage
        log.warning("admission.waits", resource=resource, message=message)
        self._metrics.admission_waits.labels(resource).inc()
        self._waiting += 1
        try:
            await self._wait(shortage)
        finally:
            self._waiting -= 1

    async def _wait(self, shortage: tuple[str, str] | None) -> None:
        loop = asyncio.get_running_loop()
        patience_s = self._settings.admission_wait_s if self._waiting <= MAX_WAITING else 0.0
        deadline = loop.time() + patience_s
        while shortage is not None:
            if loop.time() >= deadline:
                resource, message = shortage
                self._metrics.admission_refusals.labels(resource).inc()
                raise HostFullError(
                    f"The server has no room for another sandbox: {message}. Stop some sandboxes, or try "
                    "again later.",
                    retry_after_s=RETRY_AFTER_S,
                )
            await asyncio.sleep(RETRY_S)
            shortage = self.shortage()

    def shortage(self) -> tuple[str, str] | None:
        """What there is too little of, and in words; None when there is room. Cheap: asks the kernel."""
        settings = self._settings
        free_mb = psutil.virtual_memory().available // _MB - self._starting() * START_MEMORY_MB
        if free_mb < settings.min_free_memory_mb:
            return "memory", f"{free_mb} MB of memory are available, under {settings.min_free_memory_mb}"
        disk_mb = psutil.disk_usage(str(settings.state_dir)).free // _MB
        if disk_mb < settings.min_free_disk_mb:
            return "disk", f"{disk_mb} MB of disk are free, under {settings.min_free_disk_mb}"
        processes = _process_limit() - _processes()
        if processes < settings.min_free_processes:
            return "processes", f"{processes} process ids are left, under {settings.min_free_processes}"
        inotify = int(_INOTIFY_LIMIT.read_text()) - self._inotify_used
        if inotify < settings.min_free_inotify:
            return "inotify", f"{inotify} inotify instances are left, under {settings.min_free_inotify}"
        return None

    async def count_inotify(self) -> None:
        """A job: counts what root holds, which nothing but a walk through /proc tells."""
        self._inotify_used = await asyncio.to_thread(_inotify_of_root)


def _processes() -> int:
    # The fourth field counts "running/all" threads of the host.
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])


def _process_limit() -> int:
    names = ("/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max")
    return min(int(Path(name).read_text()) for name in names)


def _inotify_of_root() -> int:
    count = 0
    with os.scandir("/proc") as processes:
        for process in processes:
            if not process.name.isdigit():
                continue
            try:
                if process.stat().st_uid == 0:
                    with os.scandir(f"{process.path}/fd") as files:
                        count += sum(os.readlink(file.path) == "anon_inode:inotify" for file in files)
            except OSError:
                continue  # it has just ended, or closed the descriptor
    return count
