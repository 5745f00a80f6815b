"""The runtime contract, checked on every driver. A new driver adds its name to the fixture."""

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandboxd.agentlink.client import Agent, Event, ExecRequest, Outcome, Output
from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.kit.settings import Settings
from sandboxd.runtimes.base import Handle, Phase, SandboxSpec
from sandboxd.runtimes.docker.driver import DockerRuntime
from sandboxd.runtimes.errors import (
    AgentUnreachableError,
    EngineUnavailableError,
    ImageNotFoundError,
    ImageUnusableError,
)
from sandboxd.runtimes.registry import create_runtime

pytestmark = pytest.mark.docker

SANDBOX = "sbx_conformance"


@pytest.fixture
def settings(engine, tmp_path_factory) -> Settings:
    root = Path(f"/tmp/e80-c{tmp_path_factory.mktemp('c').name[-3:]}")
    root.mkdir(exist_ok=True)
    return Settings(state_dir=root / "state", run_dir=root / "run")


@pytest.fixture(params=["docker"])
async def runtime(settings: Settings, request) -> AsyncIterator[DockerRuntime]:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    driver = create_runtime(settings)
    await driver.start()
    yield driver
    for owned in await driver.list():
        await driver.delete(owned.sandbox_id)
    assert driver.leftovers() == set()
    await driver.close()


async def make_spec(runtime: DockerRuntime, name: str = SANDBOX) -> SandboxSpec:
    image = await runtime.ensure_image("e80/default:latest")
    return SandboxSpec(
        id=name,
        project_id="proj_x",
        image=image.digest,
        cpus=1.0,
        memory_mb=256,
        disk_mb=64,
        max_files=4096,
        max_processes=64,
        uid=233_000,
        runtime="runc",
    )


def agent_of(runtime: DockerRuntime, name: str = SANDBOX) -> Agent:
    return Agent(lambda timeout_s: runtime.dial(name, timeout_s))


def request(code: str, name: str = "exec_1", *, stream: bool = True) -> ExecRequest:
    return ExecRequest(
        id=name,
        env={},
        cwd="/home/user",
        timeout_s=30,
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


async def test_create_reach_observe_delete(runtime):
    handle = await runtime.create(await make_spec(runtime))
    hello = await agent_of(runtime).hello()
    assert hello.protocol == 1
    assert (await runtime.observe(handle)).phase is Phase.RUNNING
    assert [(item.sandbox_id, item.handle) for item in await runtime.list()] == [(SANDBOX, handle)]
    await runtime.delete(SANDBOX)
    assert (await runtime.observe(handle)).phase is Phase.GONE
    await runtime.delete(SANDBOX)  # again: success
    assert await runtime.list() == []


async def test_create_twice_is_one_sandbox(runtime):
    spec = await make_spec(runtime)
    assert await runtime.create(spec) == await runtime.create(spec)
    assert len(await runtime.list()) == 1


async def test_nobody_answers_for_a_sandbox_that_is_not_there(runtime):
    with pytest.raises(AgentUnreachableError):
        await runtime.dial("sbx_nobody", 1)
    assert (await runtime.observe(Handle("nobody"))).phase is Phase.GONE


async def test_deleting_ends_those_who_wait_for_the_agent(runtime):
    await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    await agent.hello()
    run = asyncio.ensure_future(output(agent.run(request("import time; time.sleep(100)"))))
    while not (await agent.hello()).execs:
        continue
    await runtime.delete(SANDBOX)
    with pytest.raises(LinkBrokenError):
        await asyncio.wait_for(run, 10)


async def test_an_exec_survives_a_new_daemon_with_nothing_lost_or_doubled(runtime, settings):
    earlier = create_runtime(settings)
    await earlier.start()
    handle = await earlier.create(await make_spec(earlier))
    code = "import time\nfor i in range(30): print(i); time.sleep(0.05)"
    seen = b""
    first = agent_of(earlier).run(request(code))
    async for event in first:
        assert isinstance(event, Output)
        seen += event.data
        if seen.count(b"\n") >= 5:
            break
    # The process is gone without a word: no attempt to take up the stream again.
    await first.aclose()
    await earlier.close()
    await runtime.adopt(SANDBOX, handle)
    agent = agent_of(runtime)
    assert "exec_1" in (await agent.hello()).execs
    everything, outcome = await output(agent.attach("exec_1"))
    assert everything == b"".join(b"%d\n" % i for i in range(30))
    assert everything.startswith(seen)
    assert (outcome.reason, outcome.exit_code) == ("exit", 0)
    again, _ = await output(agent.attach("exec_1"))
    assert again == everything


async def test_a_lost_connection_is_taken_up_again(runtime):
    await runtime.create(await make_spec(runtime))
    streams = []

    async def dial(timeout_s: float):
        stream = await runtime.dial(SANDBOX, timeout_s)
        streams.append(stream)
        return stream

    code = "import time\nfor i in range(40): print(i); time.sleep(0.02)"
    data = b""
    async for event in Agent(dial).run(request(code)):
        if isinstance(event, Output):
            data += event.data
            if data.count(b"\n") in (5, 15, 25):
                streams[-1].writer.transport.abort()
    assert data == b"".join(b"%d\n" % i for i in range(40))


async def test_an_exec_id_never_runs_twice(runtime):
    await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    code = "open('count', 'a').write('x'); print('ran')"
    await output(agent.run(request(code)))
    with pytest.raises(Exception, match="started before"):
        await output(agent.run(request(code)))
    data, _ = await output(agent.run(request("print(open('count').read())", "exec_2")))
    assert data == b"x\n"


async def test_the_share_of_cpu_can_be_lifted_and_put_back(runtime):
    spec = await make_spec(runtime)
    await runtime.create(spec)
    agent = agent_of(runtime)
    code = (
        "import glob\n"
        "v1 = '/sys/fs/cgroup/cpu/cpu.cfs_quota_us'\n"
        "print(open(v1 if glob.glob(v1) else '/sys/fs/cgroup/cpu.max').read().split()[0])"
    )
    limits = []
    for number, cpus in enumerate((None, 0.5, spec.cpus)):
        await runtime.limit_cpus(SANDBOX, cpus)
        data, _ = await output(agent.run(request(code, f"exec_{number}")))
        limits.append(int(data))
    assert limits[0] > 50_000 * (os.cpu_count() or 1)
    assert limits[1:] == [25_000, 50_000]


async def test_images_that_cannot_serve_are_told_apart(runtime, engine):
    with pytest.raises(ImageNotFoundError, match="no/such"):
        await runtime.ensure_image("no/such:image")
    empty = engine.api.import_image_from_data(_empty_tar(), repository="e80-test-empty", tag="latest")
    assert empty
    try:
        with pytest.raises(ImageUnusableError, match="python3"):
            await runtime.ensure_image("e80-test-empty:latest")
    finally:
        engine.images.remove("e80-test-empty:latest", force=True)


async def test_an_engine_that_is_away_is_not_an_answer(settings, runtime):
    away = create_runtime(settings.model_copy(update={"docker_url": "tcp://127.0.0.1:1"}))
    with pytest.raises(EngineUnavailableError, match="SANDBOXD_DOCKER_URL"):
        await away.list()
    with pytest.raises(EngineUnavailableError):
        await away.observe(Handle("x"))
    await away.close()


def _empty_tar() -> bytes:
    # Two zero blocks end a tar archive; one folder, because the engine wants a layer.
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("etc")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return buffer.getvalue()
