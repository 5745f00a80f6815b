"""What a client may ask for: sizes and times against this server's limits, and a project's quotas."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.identity.service import Principal
from sandboxd.kit.settings import Settings
from sandboxd.sandboxes import store
from sandboxd.sandboxes.errors import LimitError, QuotaError
from sandboxd.sandboxes.store import Size

MIN_CPU_MHZ = 100
MIN_MEMORY_SIZE_MB = 64
MIN_DISK_SIZE_MB = 16


@dataclass(frozen=True, slots=True)
class NewSandbox:
    """What a client asks for; None where it leaves the choice to the server."""

    image: str | None = None
    cpu_mhz: int | None = None
    memory_size_mb: int | None = None
    disk_size_mb: int | None = None
    gpu_count: int = 0
    timeout_s: float | None = 300
    idle_timeout_s: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    wait: bool = True


class Limits:
    """The settings' word on sizes, times and quotas."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def size(self, wanted: NewSandbox) -> Size:
        """The size that was asked for, or the server's. Raises LimitError."""
        settings = self._settings
        if wanted.gpu_count != 0:
            raise LimitError(
                f"gpu_count {wanted.gpu_count}: this server has no GPU runtime, ask for 0", param="gpu_count"
            )
        self.timeout(wanted.timeout_s)
        self.idle_timeout(wanted.idle_timeout_s)
        disk_size_mb = settings.disk_size_mb
        if wanted.disk_size_mb is not None:
            disk_size_mb = wanted.disk_size_mb
            _within("disk_size_mb", disk_size_mb, MIN_DISK_SIZE_MB, settings.max_disk_size_mb)
        return Size(
            image=wanted.image or settings.default_image,
            cpu_mhz=settings.cpu_mhz if wanted.cpu_mhz is None else self.cpu(wanted.cpu_mhz),
            memory_size_mb=settings.memory_size_mb
            if wanted.memory_size_mb is None
            else self.memory(wanted.memory_size_mb),
            disk_size_mb=disk_size_mb,
            runtime=settings.runtime,
        )

    def default_size(self) -> Size:
        return self.size(NewSandbox(timeout_s=1))

    def cpu(self, cpu_mhz: int) -> int:
        _within("cpu_mhz", cpu_mhz, MIN_CPU_MHZ, self._settings.max_cpu_mhz)
        return cpu_mhz

    def memory(self, memory_size_mb: int) -> int:
        _within("memory_size_mb", memory_size_mb, MIN_MEMORY_SIZE_MB, self._settings.max_memory_size_mb)
        return memory_size_mb

    def timeout(self, timeout_s: float | None) -> None:
        if timeout_s is not None:
            _within("timeout_s", timeout_s, 1, self._settings.max_timeout_s)
        elif not self._settings.allow_no_timeout:
            raise LimitError(
                "timeout_s null: sandboxes without a timeout are not allowed here, "
                f"ask for up to {self._settings.max_timeout_s}",
                param="timeout_s",
            )

    def idle_timeout(self, idle_timeout_s: float | None) -> None:
        if idle_timeout_s is not None:
            _within("idle_timeout_s", idle_timeout_s, 1, self._settings.max_timeout_s)

    async def check_quota(
        self,
        session: AsyncSession,
        principal: Principal,
        *,
        sandboxes: int,
        cpu_mhz: int,
        memory_size_mb: int,
    ) -> None:
        """Raises QuotaError when the project would have more than its quota with this on top."""
        quota, settings = principal.quota, self._settings
        limits = {
            "sandboxes": quota.sandboxes if quota.sandboxes is not None else settings.quota_sandboxes or None,
            "cpu_mhz": quota.cpu_mhz if quota.cpu_mhz is not None else settings.quota_cpu_mhz or None,
            "memory_size_mb": quota.memory_size_mb
            if quota.memory_size_mb is not None
            else settings.quota_memory_size_mb or None,
        }
        if all(limit is None for limit in limits.values()):
            return
        held = await store.held_by(session, principal.project_id)
        more = {"sandboxes": sandboxes, "cpu_mhz": cpu_mhz, "memory_size_mb": memory_size_mb}
        for name, limit in limits.items():
            has = getattr(held, name)
            # What asks for nothing more of it is fine, even over a quota that was lowered.
            if limit is not None and more[name] > 0 and has + more[name] > limit:
                raise QuotaError(name, limit=limit, held=has, wanted=more[name])


def _within(name: str, value: float, low: int, high: int) -> None:
    if not low <= value <= high:
        raise LimitError(f"{name} {value:g}: must be from {low} to {high} on this server", param=name)
