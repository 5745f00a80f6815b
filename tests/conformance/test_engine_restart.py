"""The engine goes and comes back under a driver: what lives on, what does not, and how that shows."""

import asyncio
import contextlib
import gc
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandboxd.kit.settings import Settings
from sandboxd.runtimes.base import Exited, Phase
from sandboxd.runtimes.docker.driver import DockerRuntime
from sandboxd.runtimes.errors import AgentUnreachableError, EngineUnavailableError
from sandboxd.runtimes.registry import create_runtime
from tests import engines
from tests.conformance.sandbox import SANDBOX, agent_of, killed, make_spec, output, printed, request, settled

pytestmark = [
    pytest.mark.docker,
    # docker-py leaves the socket of a connection that was refused to the collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

COUNT = "import time\nfor i in range(60): print(i, flush=True); time.sleep(0.05)"
COUNTED = b"".join(b"%d\n" % i for i in range(60))


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What was left to the collector goes here, not in the middle of a test that does not expect it."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def lasting(engine) -> Iterator[engines.OwnEngine]:
    """With live-restore: containers outlive it."""
    with engines.own_engine(live_restore=True) as own:
        yield own


@contextlib.asynccontextmanager
async def installation(own: engines.OwnEngine) -> AsyncIterator[DockerRuntime]:
    root = Path(tempfile.mkdtemp(prefix="e80-r", dir="/tmp"))
    (root / "state").mkdir()
    driver = create_runtime(
        Settings(
            state_dir=root / "state", run_dir=root / "run", docker_url=own.url, default_image=engines.IMAGE
        )
    )
    await driver.start()
    try:
        yield driver
        for owned in await driver.list():
            await driver.delete(owned.sandbox_id)
        assert driver.leftovers() == set()
    finally:
        await driver.close()
        shutil.rmtree(root)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_with_live_restore_sandboxes_outlive_the_engine(lasting, end):
    async with installation(lasting) as runtime:
        handle = await runtime.create(await make_spec(runtime))
        frozen = await runtime.create(await make_spec(runtime, "sbx_frozen"))
        agent = agent_of(runtime)
        await agent.hello()
        await agent_of(runtime, "sbx_frozen").hello()
        await runtime.pause("sbx_frozen")
        before = await runtime.instance()
        assert await runtime.instance() == before
        run = asyncio.ensure_future(output(agent.run(request(COUNT))))

        await asyncio.to_thread(getattr(lasting, end))
        for call in (runtime.list(), runtime.observe(handle), runtime.instance(), runtime.pause(SANDBOX)):
            with pytest.raises(EngineUnavailableError):
                await call
        # None of this needs the engine.
        assert await printed(agent, "print('still here')", "exec_2") == "still here\n"
        assert (await runtime.usage(SANDBOX)).cpu_s > 0
        await runtime.limit_cpus(SANDBOX, 0.5)
        with pytest.raises(AgentUnreachableError, match="paused"):
            await runtime.dial("sbx_frozen", 60)

        await asyncio.to_thread(lasting.start)
        assert await runtime.instance() != before
        phases = {item.sandbox_id: item.phase for item in await runtime.list()}
        assert phases == {SANDBOX: Phase.RUNNING, "sbx_frozen": Phase.PAUSED}
        data, outcome = await run
        assert data == COUNTED
        assert outcome.reason == "exit"
        await runtime.update(SANDBOX, 1.0, 192)
        await runtime.resume("sbx_frozen")
        assert await printed(agent_of(runtime, "sbx_frozen"), "print(2)") == "2\n"
        assert (await runtime.observe(frozen)).phase is Phase.RUNNING


async def test_without_live_restore_a_restart_ends_them_and_shows(engine):
    with engines.own_engine() as own:
        async with installation(own) as runtime:
            handle = await runtime.create(await make_spec(runtime))
            await agent_of(runtime).hello()
            before = await runtime.instance()
            await asyncio.to_thread(own.restart)
            assert (await runtime.observe(handle)).phase is Phase.EXITED
            assert await runtime.usage(SANDBOX) is None
            assert await runtime.instance() != before
            with pytest.raises(AgentUnreachableError):
                await runtime.dial(SANDBOX, 0.5)
            await runtime.delete(SANDBOX)
            await runtime.create(await make_spec(runtime))
            assert await printed(agent_of(runtime), "print(1)") == "1\n"


async def test_watching_ends_with_the_engine_and_can_begin_again(lasting):
    async with installation(lasting) as runtime:
        seen: list[Exited] = []

        async def watch() -> None:
            async for exited in runtime.watch():
                seen.append(exited)  # noqa: PERF401 - others look at it meanwhile

        async def has_seen() -> bool:
            return bool(seen)

        watching = asyncio.ensure_future(watch())
        # The engine tells of what happens after it was asked: until the first exit was seen, it may not be.
        handle = await runtime.create(await make_spec(runtime))
        await agent_of(runtime).hello()
        await killed(runtime, handle)
        await settled(has_seen)
        assert seen == [Exited(SANDBOX, handle)]
        await asyncio.to_thread(lasting.kill)
        with contextlib.suppress(EngineUnavailableError):
            await asyncio.wait_for(watching, 10)
        with pytest.raises(EngineUnavailableError):
            await anext(aiter(runtime.watch()))

        await asyncio.to_thread(lasting.start)
        await runtime.delete(SANDBOX)
        seen.clear()
        watching = asyncio.ensure_future(watch())
        handle = await runtime.create(await make_spec(runtime))
        await agent_of(runtime).hello()
        await killed(runtime, handle)
        await settled(has_seen)
        assert seen == [Exited(SANDBOX, handle)]
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_installations_on_one_engine_do_not_meet(lasting):
    client = lasting.client()
    foreign = client.containers.run(engines.IMAGE, ["sleep", "600"], detach=True, network_mode="none")
    try:
        async with installation(lasting) as first, installation(lasting) as second:
            mine = await first.create(await make_spec(first, "sbx_first"))
            yours = await second.create(await make_spec(second, "sbx_second"))
            assert [item.handle for item in await first.list()] == [mine]
            assert [item.handle for item in await second.list()] == [yours]
            assert first.leftovers() == {"sbx_first"}
            # Even the same name on the same engine is another's.
            with pytest.raises(AgentUnreachableError):
                await first.dial("sbx_second", 1)
        foreign.reload()
        assert foreign.status == "running"
    finally:
        foreign.remove(force=True)
        client.close()
