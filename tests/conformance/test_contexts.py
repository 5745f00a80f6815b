"""Contexts on every driver: state that stays, over a new daemon and a pause; an interrupt that reaches."""

import asyncio
import dataclasses

import pytest

from sandboxd.agentlink.client import Agent
from sandboxd.agentlink.errors import AgentRefusedError
from sandboxd.agentlink.exec_log import Event, Outcome, Output, Result
from sandboxd.kit.settings import Settings
from sandboxd.runtimes.docker import selfcheck
from sandboxd.runtimes.registry import create_runtime
from tests.conformance.sandbox import SANDBOX, agent_of, make_spec, request

pytestmark = pytest.mark.docker


async def call(agent: Agent, context: str, code: str, name: str, timeout_s: float = 30) -> list[Event]:
    wanted = dataclasses.replace(request(code, name, timeout_s=timeout_s), context=context)
    return [event async for event in agent.run(wanted)]


async def make_contexts(agent: Agent, settings: Settings) -> list[str]:
    """One of each language that the driver's image has; the other's is refused in words."""
    await agent.contexts.create("bash", "bash", "/home/user", {"NAME": "value"}, "")
    if settings.runtime == "runsc":  # its engine has a small image
        with pytest.raises(AgentRefusedError, match="IPython") as refused:
            await agent.contexts.create("python", "python", "/home/user", {}, "")
        assert refused.value.agent_code == "unknown_language"
        return ["bash"]
    await agent.contexts.create("python", "python", "/home/user", {"NAME": "value"}, "")
    return ["bash", "python"]


async def test_state_stays_between_calls_and_over_what_happens_between_them(runtime, settings):
    earlier = create_runtime(settings)
    await earlier.start()
    handle = await earlier.create(await make_spec(earlier, memory_mb=512))
    made = await make_contexts(agent_of(earlier), settings)
    await call(agent_of(earlier), "bash", 'cd /tmp; x=$NAME; f() { echo "$x in $(pwd)"; }', "exec_1")
    if "python" in made:
        await call(agent_of(earlier), "python", "import os\nx = os.environ['NAME']", "exec_2")
    await earlier.close()
    await runtime.adopt(SANDBOX, handle)
    if selfcheck.offers(settings.runtime).pause:
        await runtime.pause(SANDBOX)
        await runtime.resume(SANDBOX)
    agent = agent_of(runtime)
    said = await call(agent, "bash", "f; echo err >&2; exit 3", "exec_3")
    assert {(event.is_stderr, event.data) for event in said if isinstance(event, Output)} == {
        (False, b"value in /tmp\n"),
        (True, b"err\n"),
    }
    assert [event.exit_code for event in said if isinstance(event, Outcome)] == [3]
    if "python" in made:
        shown = await call(agent, "python", "print('out'); x", "exec_4")
        assert shown[:2] == [Output(False, b"out\n"), Result({"text/plain": "'value'"})]
    assert [item.executions for item in await agent.contexts.list()] == [2] * len(made)


CODES = {
    "python": ("x = 1\nimport time; time.sleep(60)", "print(x)"),
    "bash": ("x=1; sleep 60; x=2", "echo $x"),
}


async def test_an_interrupt_keeps_the_state_and_a_restart_does_not(runtime, settings):
    await runtime.create(await make_spec(runtime, memory_mb=512))
    agent = agent_of(runtime)
    for language in await make_contexts(agent, settings):
        code, probe = CODES[language]
        ended = await call(agent, language, code, f"exec_{language}_1", timeout_s=0.5)
        assert [event.reason for event in ended if isinstance(event, Outcome)] == ["timeout"]
        assert (await call(agent, language, probe, f"exec_{language}_2"))[0] == Output(False, b"1\n")
        running = asyncio.ensure_future(call(agent, language, code, f"exec_{language}_3"))
        while not running.done():
            await agent.contexts.interrupt(language)
            await asyncio.wait([running], timeout=0.1)
        assert isinstance((await running)[-1], Outcome)
        assert (await agent.contexts.restart(language)).status == "idle"
        assert Output(False, b"1\n") not in await call(agent, language, probe, f"exec_{language}_4")
        await agent.contexts.delete(language)
    assert await agent.contexts.list() == []
