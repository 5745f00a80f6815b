"""The runtime contract: freezing a sandbox and letting it go on."""

import asyncio
import contextlib
import time

import pytest

from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.agentlink.exec_log import Output
from sandboxd.runtimes.base import Phase
from sandboxd.runtimes.docker import selfcheck
from sandboxd.runtimes.errors import AgentUnreachableError, RuntimeFaultError, SpecRefusedError
from sandboxd.runtimes.registry import create_runtime
from tests.conformance.sandbox import RUNTIMES, SANDBOX, agent_of, killed, make_spec, output, printed, request

pytestmark = pytest.mark.docker

COUNT = "import time\nfor i in range(40): print(i, flush=True); time.sleep(0.02)"
COUNTED = b"".join(b"%d\n" % i for i in range(40))


# Those runtimes that can; the others refuse, which is tested, too.
can_pause = pytest.mark.parametrize(
    "settings", [name for name in RUNTIMES if selfcheck.offers(name).pause], indirect=True
)


async def test_a_runtime_that_cannot_pause_says_so_and_refuses(runtime, settings):
    offered = (await runtime.capabilities()).pause
    assert offered is selfcheck.offers(settings.runtime).pause
    handle = await runtime.create(await make_spec(runtime))
    await agent_of(runtime).hello()
    for call, phase in ((runtime.pause, Phase.PAUSED), (runtime.resume, Phase.RUNNING)):
        with contextlib.nullcontext() if offered else pytest.raises(SpecRefusedError, match="pause"):
            await call(SANDBOX)
        assert (await runtime.observe(handle)).phase is (phase if offered else Phase.RUNNING)


@can_pause
async def test_an_exec_goes_on_after_a_pause_with_nothing_lost(runtime):
    handle = await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    seen = b""
    begun = asyncio.Event()

    async def read() -> None:
        nonlocal seen
        async for event in agent.run(request(COUNT)):
            assert isinstance(event, Output)
            seen += event.data
            if seen.count(b"\n") >= 5:
                begun.set()

    reader = asyncio.ensure_future(read())
    await asyncio.wait_for(begun.wait(), 10)
    await runtime.pause(SANDBOX)
    await runtime.pause(SANDBOX)  # again: success
    with pytest.raises((LinkBrokenError, AgentUnreachableError)):
        await asyncio.wait_for(reader, 5)
    began = time.monotonic()
    with pytest.raises(AgentUnreachableError, match="paused"):
        await runtime.dial(SANDBOX, 60)
    assert time.monotonic() - began < 1
    assert (await runtime.observe(handle)).phase is Phase.PAUSED
    assert [item.phase for item in await runtime.list()] == [Phase.PAUSED]

    before = await runtime.usage(SANDBOX)
    await asyncio.sleep(1)
    after = await runtime.usage(SANDBOX)
    assert after.cpu_s - before.cpu_s < 0.1

    await runtime.resume(SANDBOX)
    await runtime.resume(SANDBOX)
    assert (await runtime.observe(handle)).phase is Phase.RUNNING
    everything, outcome = await output(agent.attach("exec_1"))
    assert everything == COUNTED
    assert everything.startswith(seen)
    assert (outcome.reason, outcome.exit_code) == ("exit", 0)
    assert await printed(agent, "print('after')", "exec_2") == "after\n"


@can_pause
async def test_the_agent_is_back_soon_after_a_resume(runtime):
    await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    await agent.hello()
    times = []
    for _ in range(5):
        await runtime.pause(SANDBOX)
        began = time.monotonic()
        await runtime.resume(SANDBOX)
        await agent.hello()
        times.append(time.monotonic() - began)
    print(f"resume to an answer: p50 {sorted(times)[2] * 1000:.0f} ms")  # noqa: T201 - seen with -rP
    assert sorted(times)[2] < 2


@can_pause
async def test_a_paused_sandbox_can_be_deleted(runtime):
    handle = await runtime.create(await make_spec(runtime))
    await agent_of(runtime).hello()
    await runtime.pause(SANDBOX)
    await asyncio.wait_for(runtime.delete(SANDBOX), 10)
    assert (await runtime.observe(handle)).phase is Phase.GONE
    assert runtime.leftovers() == set()
    assert await runtime.usage(SANDBOX) is None


@can_pause
async def test_a_new_daemon_takes_up_a_paused_sandbox(runtime, settings):
    earlier = create_runtime(settings)
    await earlier.start()
    handle = await earlier.create(await make_spec(earlier))
    await agent_of(earlier).hello()
    await earlier.pause(SANDBOX)
    await earlier.close()
    await runtime.adopt(SANDBOX, handle)
    with pytest.raises(AgentUnreachableError, match="paused"):
        await runtime.dial(SANDBOX, 60)
    assert await runtime.usage(SANDBOX) is not None
    await runtime.resume(SANDBOX)
    assert await printed(agent_of(runtime), "print(1)") == "1\n"


@can_pause
async def test_what_does_not_run_cannot_be_paused(runtime):
    with pytest.raises(RuntimeFaultError):
        await runtime.pause("sbx_nobody")
    with pytest.raises(RuntimeFaultError):
        await runtime.resume("sbx_nobody")
    handle = await runtime.create(await make_spec(runtime))
    await agent_of(runtime).hello()
    await killed(runtime, handle)
    with pytest.raises(RuntimeFaultError, match="exited"):
        await runtime.pause(SANDBOX)
    with pytest.raises(RuntimeFaultError, match="exited"):
        await runtime.resume(SANDBOX)
