"""What the conformance tests do with a sandbox: make one, run something in it, read its limits."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from sandboxd.agentlink.client import Agent, ExecRequest
from sandboxd.agentlink.exec_log import Event, Outcome, Output
from sandboxd.runtimes.base import Handle, Phase, SandboxSpec
from sandboxd.runtimes.docker.driver import DockerRuntime

RUNTIMES = ["runc", "runsc"]
SANDBOX = "sbx_conformance"


async def make_spec(
    runtime: DockerRuntime, name: str = SANDBOX, memory_mb: int = 256, cpus: float = 1.0
) -> SandboxSpec:
    settings = runtime._settings
    image = await runtime.ensure_image(settings.default_image)
    return SandboxSpec(
        id=name,
        project_id="proj_x",
        image=image.digest,
        cpus=cpus,
        memory_mb=memory_mb,
        disk_mb=64,
        max_files=4096,
        max_processes=64,
        uid=233_000,
        runtime=settings.runtime,
    )


def agent_of(runtime: DockerRuntime, name: str = SANDBOX) -> Agent:
    return Agent(lambda timeout_s: runtime.dial(name, timeout_s))


def request(code: str, name: str = "exec_1", *, stream: bool = True, timeout_s: float = 30) -> ExecRequest:
    return ExecRequest(
        id=name,
        env={},
        cwd="/home/user",
        timeout_s=timeout_s,
        output_limit=1 << 20,
        spool_limit=0,
        stream=stream,
        code=code.encode(),
    )


async def output(events: AsyncIterator[Event]) -> tuple[bytes, Outcome]:
    data = b""
    async for event in events:
        if isinstance(event, Output):
            data += event.data
        elif isinstance(event, Outcome):
            return data, event
    raise AssertionError("no outcome")


async def printed(agent: Agent, code: str, name: str = "exec_1") -> str:
    data, _ = await output(agent.run(request(code, name)))
    return data.decode()


class Limits:
    """The kernel's own words about a container's limits, looked up by its id in the host's groups."""

    def __init__(self, handle: str) -> None:
        self._handle = handle

    def cpu_quota_us(self) -> int:
        v1 = self._file("cpu", "cpu.cfs_quota_us")
        return int(v1.read_text()) if v1 else int(self._unified("cpu.max").split()[0])

    def cpu_shares(self) -> int:
        """In v1's unit, whichever the host has."""
        v1 = self._file("cpu", "cpu.shares")
        if v1:
            return int(v1.read_text())
        # The way back from cgroup v2's weight is not exact: to the nearest power of two.
        return 1 << round(math.log2(2 + (int(self._unified("cpu.weight")) - 1) * 262142 / 9999))

    def memory_mb(self) -> int:
        v1 = self._file("memory", "memory.limit_in_bytes")
        return int(v1.read_text() if v1 else self._unified("memory.max")) >> 20

    def memory_and_swap_mb(self) -> int:
        v1 = self._file("memory", "memory.memsw.limit_in_bytes")
        if v1:
            return int(v1.read_text()) >> 20
        return self.memory_mb() + (int(self._unified("memory.swap.max")) >> 20)

    def _unified(self, name: str) -> str:
        file = self._file("", name)
        assert file is not None
        return file.read_text()

    def _file(self, controller: str, name: str) -> Path | None:
        return next((Path("/sys/fs/cgroup") / controller).rglob(f"*{self._handle}*/{name}"), None)


async def settled(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until it has come true."""
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come true within 20 s")


async def killed(runtime: DockerRuntime, handle: Handle) -> None:
    """Ends the container from outside, as the operator may."""

    async def has_ended() -> bool:
        return (await runtime.observe(handle)).phase is Phase.EXITED

    await runtime._engine.call(lambda client: client.kill(handle))
    await settled(has_ended)
