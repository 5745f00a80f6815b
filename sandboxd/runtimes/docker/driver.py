"""The Docker driver of the runtime contract. The only part of the daemon that knows containers."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import structlog

from sandboxd.kit.settings import Settings
from sandboxd.kit.streams import Stream
from sandboxd.runtimes.base import (
    Capabilities,
    Exited,
    Handle,
    Image,
    Observation,
    Owned,
    Phase,
    SandboxSpec,
    Usage,
)
from sandboxd.runtimes.docker import cgroups, container, selfcheck
from sandboxd.runtimes.docker.agent_files import AgentFiles
from sandboxd.runtimes.docker.cgroups import Cgroup
from sandboxd.runtimes.docker.engine import AlreadyExists, Engine, NotFound
from sandboxd.runtimes.docker.instance import EngineInstance
from sandboxd.runtimes.docker.link import Link, write_config
from sandboxd.runtimes.docker.workspace import Workspaces
from sandboxd.runtimes.errors import (
    AgentUnreachableError,
    EngineUnavailableError,
    FreezeFailedError,
    LimitBelowUseError,
    RuntimeFaultError,
    SpecRefusedError,
)

log = structlog.get_logger(__name__)

_PHASES = {
    "created": Phase.CREATED,
    "running": Phase.RUNNING,
    "paused": Phase.PAUSED,
    "restarting": Phase.RUNNING,
}
_MIB = 1024 * 1024


@dataclass(slots=True)
class _Held:
    """What this process holds of one sandbox. Its control groups are found once, and then never asked for."""

    link: Link
    runtime: str
    handle: Handle | None = None
    cgroup: Cgroup | None = None

    def is_inside(self, pid: int) -> bool:
        """Whether a process of the host is one of the container's."""
        try:
            groups = Path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            return False
        if self.handle is None or self.handle not in groups:
            return False
        if self.cgroup is None:
            self.take(cgroups.parse(groups))
        return True

    def take(self, cgroup: Cgroup | None) -> None:
        self.cgroup = cgroup
        if cgroup is not None:
            cgroup.limit_socket_memory()


class DockerRuntime:
    """See runtimes.base.Runtime and ImageStore."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._owner = ""
        self._engine = Engine(settings.docker_url)
        self._workspaces = Workspaces(settings.state_dir / "workspaces")
        self._agent_files = AgentFiles(self._engine, settings.state_dir / "agents")
        self._instance = EngineInstance(self._engine)
        self._links_dir = settings.run_dir
        self._held: dict[str, _Held] = {}
        self._seccomp = container.seccomp_profile()
        self._watched_until = 0.0

    async def start(self) -> None:
        self._workspaces.open()
        self._owner = _installation(self._settings.state_dir)
        # A folder of its own for each installation, should two of them share a run folder.
        self._links_dir = self._settings.run_dir / self._owner
        self._links_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        await self._engine.open()
        self._watched_until = time.time()

    async def close(self) -> None:
        for held in list(self._held.values()):
            await held.link.close()
        self._held.clear()
        await self._engine.close()

    async def ping(self) -> None:
        await self._engine.call(lambda client: client.ping(), timeout_s=2.0)

    async def capabilities(self) -> Capabilities:
        info = await self._engine.call(lambda client: client.info())
        return await asyncio.to_thread(selfcheck.inspect, info, self._settings)

    async def ensure_image(self, ref: str) -> Image:
        return await self._agent_files.ensure_image(ref)

    async def create(self, spec: SandboxSpec) -> Handle:
        if spec.runtime == "runsc":
            info = await self._engine.call(lambda client: client.info())
            if "runsc" not in info.get("Runtimes", {}):
                raise SpecRefusedError(
                    "the engine has no runtime 'runsc'; register it or set SANDBOXD_RUNTIME=runc"
                )
        self._workspaces.prepare(spec.id, spec.uid)
        folder = self._write_link_folder(spec)
        held = self._held.get(spec.id)
        if held is None:
            held = self._held[spec.id] = _Held(Link(spec.id, folder, None), spec.runtime)
            await held.link.open()
        config = container.container_config(
            spec,
            owner=self._owner,
            link_dir=str(folder),
            agent_dir=str(self._agent_files.path(spec.image)),
            workspace_dir=str(self._workspaces.mount_point(spec.id)),
            seccomp=self._seccomp,
        )
        async with asyncio.TaskGroup() as group:
            # Stand-ins will do for the create call; the workspace must be there when the container starts.
            made = group.create_task(self._make_container(spec.id, config))
            group.create_task(self._workspaces.create(spec.id, spec.disk_mb, spec.max_files))
        handle = made.result()
        self._pin(held, handle)
        await self._engine.call(lambda client: client.start(handle))
        return handle

    async def _make_container(self, sandbox_id: str, config: dict[str, Any]) -> Handle:
        try:
            made = await self._engine.call(
                lambda client: client.create_container_from_config(config, sandbox_id)  # type: ignore[no-untyped-call]  # untyped in the stubs
            )
        except AlreadyExists:
            made = await self._engine.call(lambda client: client.inspect_container(sandbox_id))
        except NotFound as error:
            raise RuntimeFaultError(f"the image of sandbox {sandbox_id} has just been removed") from error
        return Handle(str(made["Id"]))

    def _write_link_folder(self, spec: SandboxSpec) -> Path:
        folder = self._links_dir / spec.id
        if not (folder / "config.json").exists():
            folder.mkdir(mode=0o711, exist_ok=True)
            folder.chmod(0o711)
            for name, text in (("passwd", container.passwd(spec)), ("group", container.group(spec))):
                (folder / name).write_text(text)
                (folder / name).chmod(0o644)
            write_config(folder, spec)
        return folder

    def _pin(self, held: _Held, handle: Handle) -> None:
        # With gVisor the one who dials is its gofer, a process of the host in the container's groups as well.
        held.handle = handle
        held.link.peer_check = held.is_inside

    async def delete(self, sandbox_id: str) -> None:
        held = self._held.pop(sandbox_id, None)
        if held is not None:
            await held.link.close()
        if held is None or held.link.paused:
            # The signal that ends it arrives when it is thawed; with gVisor the engine waits 10 s for that.
            with contextlib.suppress(NotFound, AlreadyExists, RuntimeFaultError):
                await self._engine.call(lambda client: client.unpause(sandbox_id))
        try:
            await self._engine.call(lambda client: client.remove_container(sandbox_id, force=True, v=True))
        except NotFound:
            pass
        except AlreadyExists:
            # "Removal is already in progress": wait for it, so that the workspace is free afterwards.
            await self._until_gone(sandbox_id)
        await self._workspaces.remove(sandbox_id)
        await asyncio.to_thread(shutil.rmtree, self._links_dir / sandbox_id, True)

    async def _until_gone(self, sandbox_id: str) -> None:
        try:
            await self._engine.call(lambda client: client.wait(sandbox_id, condition="removed"))
        except NotFound:
            return

    async def adopt(self, sandbox_id: str, handle: Handle) -> None:
        if sandbox_id in self._held:
            return
        held = _Held(Link(sandbox_id, self._links_dir / sandbox_id, None), self._settings.runtime)
        # Before the await: a second caller must not open a second listener.
        self._held[sandbox_id] = held
        try:
            facts = await self._inspect(handle)
            # It was made under the settings of that day.
            held.runtime = str(facts["HostConfig"]["Runtime"])
            self._pin(held, handle)
            if facts["State"]["Status"] == "paused":
                held.link.pause()
            held.take(await asyncio.to_thread(cgroups.of_process, int(facts["State"]["Pid"])))
            await held.link.open()
        except (OSError, ValueError, KeyError) as error:
            raise RuntimeFaultError(f"the link folder of sandbox {sandbox_id} is gone: {error}") from error
        finally:
            if not held.link.is_open:
                self._held.pop(sandbox_id, None)

    async def _inspect(self, name: str) -> Any:
        try:
            return await self._engine.call(lambda client: client.inspect_container(name))
        except NotFound as error:
            raise RuntimeFaultError(f"the engine has no sandbox {name}") from error

    async def observe(self, handle: Handle) -> Observation:
        try:
            facts = await self._engine.call(lambda client: client.inspect_container(handle))
        except NotFound:
            return Observation(Phase.GONE)
        state = facts["State"]
        phase = _PHASES.get(state["Status"], Phase.EXITED)
        return Observation(phase, bool(state.get("OOMKilled")), state.get("ExitCode"))

    async def list(self) -> Sequence[Owned]:
        filters = {"label": [f"{container.OWNER_LABEL}={self._owner}", container.SANDBOX_LABEL]}
        found = await self._engine.call(lambda client: client.containers(all=True, filters=filters))
        return [
            Owned(
                sandbox_id=item["Labels"][container.SANDBOX_LABEL],
                handle=Handle(item["Id"]),
                phase=_PHASES.get(item["State"], Phase.EXITED),
            )
            for item in found
        ]

    async def watch(self) -> AsyncIterator[Exited]:
        # docker-py's events() holds a thread for ever; this connection ends when its reader is cancelled.
        path = self._settings.docker_url.removeprefix("unix://")
        filters = {
            "type": ["container"],
            "event": ["die"],
            "label": [f"{container.OWNER_LABEL}={self._owner}"],
        }
        # From the last event that came, so that none is missed between two connections; the engine keeps 256.
        params = {"filters": json.dumps(filters), "since": f"{self._watched_until:.9f}"}
        transport = httpx2.AsyncHTTPTransport(uds=path)
        timeout = httpx2.Timeout(10.0, read=None)
        async with httpx2.AsyncClient(transport=transport, timeout=timeout) as client:
            request = client.stream("GET", "http://engine/events", params=params)
            try:
                async with request as response:
                    async for line in response.aiter_lines():
                        event = json.loads(line)
                        self._watched_until = event["timeNano"] / 1e9
                        sandbox_id = event["Actor"]["Attributes"].get(container.SANDBOX_LABEL)
                        if sandbox_id:
                            yield Exited(sandbox_id, Handle(event["Actor"]["ID"]))
            except httpx2.HTTPError as error:
                raise EngineUnavailableError(f"lost the engine's events: {error}") from error

    async def dial(self, sandbox_id: str, timeout_s: float) -> Stream:
        held = self._held.get(sandbox_id)
        if held is None:
            raise AgentUnreachableError(f"sandbox {sandbox_id} is not served by this daemon")
        return await held.link.dial(timeout_s)

    async def limit_cpus(self, sandbox_id: str, cpus: float | None) -> None:
        # More than the host has: the engine knows no way to take a quota away again.
        quota = container.cpu_quota_us(cpus if cpus is not None else (os.cpu_count() or 1) + 1)
        held = self._held.get(sandbox_id)
        if held is not None and held.cgroup is not None:
            # Straight to the kernel: in no time, with the engine busy or away, and where runsc has no update.
            with contextlib.suppress(OSError):
                held.cgroup.limit_cpu(quota)
                return
        await self._engine.call(
            lambda client: client.update_container(
                sandbox_id, cpu_period=container.CPU_PERIOD_US, cpu_quota=quota
            )
        )

    async def set_background(self, sandbox_id: str, background: bool) -> None:
        held = self._held.get(sandbox_id)
        try:
            if held is None or held.cgroup is None:
                raise FileNotFoundError("its control group is not known")
            held.cgroup.set_shares(container.BACKGROUND_SHARES if background else container.SHARES)
        except OSError as error:
            raise RuntimeFaultError(f"sandbox {sandbox_id} keeps its share of CPU: {error}") from error

    async def update(self, sandbox_id: str, cpus: float, memory_mb: int) -> None:
        held = self._offered(sandbox_id, "update")
        limit = memory_mb * _MIB
        # v2 takes a limit below present use, and ends processes until it holds.
        await self._refuse_below_use(sandbox_id, held, limit)
        try:
            # One call: what it cannot do in full, it takes back.
            await self._engine.call(
                lambda client: client.update_container(
                    sandbox_id,
                    cpu_period=container.CPU_PERIOD_US,
                    cpu_quota=container.cpu_quota_us(cpus),
                    mem_limit=limit,
                    memswap_limit=limit,
                )
            )
        except NotFound as error:
            raise RuntimeFaultError(f"the engine has no sandbox {sandbox_id}") from error
        except RuntimeFaultError as error:
            if "unable to set memory limit" in error.message:
                raise _below_use(sandbox_id, limit) from error
            raise

    async def _refuse_below_use(self, sandbox_id: str, held: _Held, limit: int) -> None:
        cgroup = await self._cgroup(sandbox_id, held)
        try:
            if cgroup is not None and cgroup.pinned_bytes() > limit:
                raise _below_use(sandbox_id, limit)
        except OSError as error:
            raise RuntimeFaultError(f"sandbox {sandbox_id} does not run: {error}") from error

    async def pause(self, sandbox_id: str) -> None:
        held = self._offered(sandbox_id, "pause")
        try:
            await self._engine.call(lambda client: client.pause(sandbox_id))
        except (AlreadyExists, NotFound, RuntimeFaultError) as error:
            phase = (await self.observe(Handle(sandbox_id))).phase
            if phase is Phase.RUNNING:
                raise FreezeFailedError(
                    f"sandbox {sandbox_id} runs on, it could not be frozen: {error}; send it again"
                ) from error
            _expect(sandbox_id, phase, Phase.PAUSED, error)
        held.link.pause()

    async def resume(self, sandbox_id: str) -> None:
        held = self._offered(sandbox_id, "pause")
        # First: the agent dials the moment that it is thawed.
        held.link.resume()
        try:
            await self._engine.call(lambda client: client.unpause(sandbox_id))
        except (AlreadyExists, NotFound, RuntimeFaultError) as error:
            try:
                phase = (await self.observe(Handle(sandbox_id))).phase
                _expect(sandbox_id, phase, Phase.RUNNING, error)
            except RuntimeFaultError:
                held.link.pause()
                raise

    def _offered(self, sandbox_id: str, capability: str) -> _Held:
        held = self._held.get(sandbox_id)
        if held is None:
            raise RuntimeFaultError(f"sandbox {sandbox_id} is not served by this daemon")
        if not getattr(selfcheck.offers(held.runtime), capability):
            raise SpecRefusedError(f"sandboxes of the runtime {held.runtime} offer no {capability}")
        return held

    async def usage(self, sandbox_id: str) -> Usage | None:
        held = self._held.get(sandbox_id)
        if held is None:
            return None
        cgroup = await self._cgroup(sandbox_id, held)
        return None if cgroup is None else cgroup.usage()

    async def _cgroup(self, sandbox_id: str, held: _Held) -> Cgroup | None:
        """Asks the engine where nobody has dialled yet who could be looked at."""
        if held.cgroup is None:
            try:
                facts = await self._engine.call(lambda client: client.inspect_container(sandbox_id))
            except NotFound:
                return None
            if facts["State"]["Pid"]:
                held.take(cgroups.of_process(int(facts["State"]["Pid"])))
        return held.cgroup

    async def instance(self) -> str:
        return await self._instance.name()

    def leftovers(self) -> set[str]:
        """Ids of which something is left on this host: a workspace or a link folder."""
        return {*self._workspaces.list(), *os.listdir(self._links_dir)}


def _below_use(sandbox_id: str, limit: int) -> LimitBelowUseError:
    return LimitBelowUseError(
        f"sandbox {sandbox_id} uses more memory than {limit // _MIB} MB now; free some of it first",
        param="memory_size_mb",
    )


def _expect(sandbox_id: str, found: Phase, wanted: Phase, error: Exception) -> None:
    """Whether a call that was refused was for nothing, because it is so already."""
    if found is not wanted:
        raise RuntimeFaultError(f"sandbox {sandbox_id} is {found}, not {wanted}: {error}") from error


def _installation(state_dir: Path) -> str:
    """What marks this installation's containers: made once, kept with the store that knows them."""
    path = state_dir / "installation"
    if not path.exists():
        partial = path.with_suffix(".part")
        partial.write_text(secrets.token_hex(8))
        partial.replace(path)
    return path.read_text().strip()
