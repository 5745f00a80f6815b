"""The runtime contract: limits that change while a sandbox runs, and what it has used."""

import contextlib
import statistics
import time
from dataclasses import replace

import pytest

from sandboxd.agentlink.exec_log import Output
from sandboxd.runtimes.base import Phase
from sandboxd.runtimes.docker import selfcheck
from sandboxd.runtimes.docker.container import BACKGROUND_SHARES, SHARES
from sandboxd.runtimes.errors import LimitBelowUseError, RuntimeFaultError, SpecRefusedError
from tests.conformance.sandbox import RUNTIMES, SANDBOX, Limits, agent_of, killed, make_spec, printed, request

pytestmark = pytest.mark.docker

BURN = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
HOLD = "held = b'1' * (100 << 20)\nprint('held', flush=True)\nimport time; time.sleep(60)"


# Those runtimes that can; the others refuse, which is tested, too.
can_update = pytest.mark.parametrize(
    "settings", [name for name in RUNTIMES if selfcheck.offers(name).update], indirect=True
)


async def test_a_runtime_that_cannot_update_says_so_and_refuses(runtime, settings):
    offered = (await runtime.capabilities()).update
    assert offered is selfcheck.offers(settings.runtime).update
    handle = await runtime.create(await make_spec(runtime))
    with contextlib.nullcontext() if offered else pytest.raises(SpecRefusedError, match="update"):
        await runtime.update(SANDBOX, 0.5, 512)
    assert Limits(handle).memory_mb() == (512 if offered else 256)


@can_update
async def test_limits_go_up_and_down_while_it_runs(runtime):
    handle = await runtime.create(await make_spec(runtime))
    limits = Limits(handle)
    for cpus, memory_mb in ((2.0, 512), (0.25, 96), (1.0, 256)):
        await runtime.update(SANDBOX, cpus, memory_mb)
        assert limits.cpu_quota_us() == cpus * 50_000
        assert limits.memory_mb() == limits.memory_and_swap_mb() == memory_mb
    # What is lifted in need is put back to what it is now.
    await runtime.limit_cpus(SANDBOX, None)
    await runtime.update(SANDBOX, 0.5, 256)
    assert limits.cpu_quota_us() == 25_000
    assert await printed(agent_of(runtime), "print(1)") == "1\n"


async def test_one_in_the_background_gives_way_and_comes_to_the_front(runtime):
    handle = await runtime.create(replace(await make_spec(runtime), background=True))
    # The agent dials from inside: from then on the driver knows the container's groups.
    assert await printed(agent_of(runtime), "print(1)") == "1\n"
    limits = Limits(handle)
    assert limits.cpu_shares() == BACKGROUND_SHARES
    for background, shares in ((False, SHARES), (True, BACKGROUND_SHARES), (False, SHARES)):
        await runtime.set_background(SANDBOX, background)
        assert limits.cpu_shares() == shares
    with pytest.raises(RuntimeFaultError, match="keeps its share"):
        await runtime.set_background("sbx_nobody", False)


@can_update
async def test_a_limit_below_use_changes_nothing(runtime):
    handle = await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    run = agent.run(request(HOLD))
    async for event in run:
        assert isinstance(event, Output)
        break
    for memory_mb in (64, 100):
        with pytest.raises(LimitBelowUseError, match=str(memory_mb)):
            await runtime.update(SANDBOX, 0.25, memory_mb)
        assert Limits(handle).memory_mb() == Limits(handle).memory_and_swap_mb() == 256
        assert Limits(handle).cpu_quota_us() == 50_000
    assert [known.finished for known in (await agent.hello()).execs] == [False]
    await run.aclose()


@can_update
async def test_where_the_kernel_refuses_nothing_is_half_done(runtime, monkeypatch):
    # Memory that came after we had looked: cgroup v1 refuses by itself, v2 would end processes.
    handle = await runtime.create(await make_spec(runtime))
    run = agent_of(runtime).run(request(HOLD))
    async for _ in run:
        break
    group = runtime._held[SANDBOX].cgroup
    assert group is not None
    if group.version == 2:
        return  # any limit is taken; the look before is all there is
    monkeypatch.setattr(type(group), "pinned_bytes", lambda self: 0)
    with pytest.raises(LimitBelowUseError):
        await runtime.update(SANDBOX, 0.25, 64)
    assert Limits(handle).memory_mb() == Limits(handle).memory_and_swap_mb() == 256
    assert Limits(handle).cpu_quota_us() == 50_000
    facts = await runtime._inspect(handle)
    assert facts["HostConfig"]["Memory"] == 256 << 20
    assert facts["HostConfig"]["CpuQuota"] == 50_000
    await run.aclose()


@can_update
async def test_cached_files_do_not_count_as_use(runtime):
    handle = await runtime.create(await make_spec(runtime, memory_mb=256))
    write = "for i in range(3): open('big', 'wb').write(bytes(48 << 20)); open('big', 'rb').read()"
    await printed(agent_of(runtime), write)
    await runtime.update(SANDBOX, 1.0, 64)
    assert Limits(handle).memory_mb() == 64


@can_update
async def test_a_paused_sandbox_can_be_updated_and_stays_paused(runtime):
    handle = await runtime.create(await make_spec(runtime))
    await agent_of(runtime).hello()
    await runtime.pause(SANDBOX)
    await runtime.update(SANDBOX, 0.5, 192)
    assert (await runtime.observe(handle)).phase is Phase.PAUSED
    assert Limits(handle).memory_mb() == 192
    await runtime.resume(SANDBOX)
    assert await printed(agent_of(runtime), "print(1)") == "1\n"


async def test_what_is_not_there_is_not_updated(runtime):
    with pytest.raises(RuntimeFaultError):
        await runtime.update("sbx_nobody", 1.0, 256)
    assert await runtime.usage("sbx_nobody") is None


async def test_usage_grows_with_work_and_ends_with_the_sandbox(runtime, settings):
    handle = await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    await agent.hello()
    before = await runtime.usage(SANDBOX)
    assert before is not None
    await printed(agent, BURN)
    after = await runtime.usage(SANDBOX)
    # gVisor counts the time that it was not given as well, and so ends sooner on a busy machine.
    least = 0.4 if settings.runtime == "runc" else 0.1
    assert least < after.cpu_s - before.cpu_s < 5
    run = agent.run(request(HOLD, "exec_2"))
    async for _ in run:
        break
    held = await runtime.usage(SANDBOX)
    assert 90 < held.memory_mb - before.memory_mb < 150
    await run.aclose()
    await killed(runtime, handle)
    assert await runtime.usage(SANDBOX) is None


async def test_usage_is_cheap_and_asks_nothing_of_the_engine(runtime, monkeypatch):
    await runtime.create(await make_spec(runtime))
    await agent_of(runtime).hello()
    await runtime.usage(SANDBOX)

    async def refuse(*_: object) -> None:
        raise AssertionError("the engine was asked")

    monkeypatch.setattr(runtime._engine, "call", refuse)
    times = []
    for _ in range(200):
        began = time.perf_counter()
        assert await runtime.usage(SANDBOX) is not None
        times.append(time.perf_counter() - began)
    monkeypatch.undo()
    print(f"usage: p50 {statistics.median(times) * 1e6:.0f} us")  # noqa: T201 - seen with -rP
    assert statistics.median(times) < 0.002
