"""The runtime contract, checked on every driver: making, reaching, adopting and ending a sandbox."""

import asyncio
import contextlib
import dataclasses
import io
import os
import tarfile
from collections.abc import AsyncIterator

import docker
import pytest
from e80_agent.protocol import PROTOCOL_VERSION

from sandboxd.agentlink.client import Agent
from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.agentlink.exec_log import Output
from sandboxd.runtimes.base import Exited, Handle, Phase
from sandboxd.runtimes.errors import (
    AgentUnreachableError,
    EngineUnavailableError,
    ImageNotFoundError,
    ImageUnusableError,
)
from sandboxd.runtimes.registry import create_runtime
from tests.conformance.sandbox import SANDBOX, Limits, agent_of, killed, make_spec, output, printed, request

pytestmark = pytest.mark.docker


async def test_create_reach_observe_delete(runtime):
    handle = await runtime.create(await make_spec(runtime))
    hello = await agent_of(runtime).hello()
    assert hello.protocol == PROTOCOL_VERSION
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
    assert [known.id for known in (await agent.hello()).execs] == ["exec_1"]
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
    handle = await runtime.create(spec)
    await agent_of(runtime).hello()
    limits = []
    for cpus in (None, 0.5, spec.cpus):
        await runtime.limit_cpus(SANDBOX, cpus)
        limits.append(Limits(handle).cpu_quota_us())
    assert limits[0] > 50_000 * (os.cpu_count() or 1)
    assert limits[1:] == [25_000, 50_000]


async def test_a_sandbox_may_belong_to_no_project_yet(runtime):
    spec = dataclasses.replace(await make_spec(runtime), project_id=None)
    await runtime.create(spec)
    assert (await agent_of(runtime).hello()).protocol == PROTOCOL_VERSION


async def test_a_fork_bomb_ends_with_its_exec_and_the_sandbox_lives(runtime):
    await runtime.create(await make_spec(runtime, memory_mb=1024))
    agent = agent_of(runtime)
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    run = asyncio.ensure_future(output(agent.run(request(bomb, timeout_s=2))))
    await asyncio.sleep(2.5)
    # What the daemon does for a bomb that starves its agent.
    await runtime.limit_cpus(SANDBOX, None)
    _, outcome = await asyncio.wait_for(run, 25)
    assert outcome.reason == "timeout"
    assert await printed(agent, "print('alive')", "exec_2") == "alive\n"


async def test_the_peer_of_a_connection_is_looked_at(runtime):
    handle = await runtime.create(await make_spec(runtime))
    await agent_of(runtime).hello()
    # A process of ours knows the way to the socket, and is in no sandbox's groups.
    reader, writer = await asyncio.open_unix_connection(str(runtime._links_dir / SANDBOX / "agent.sock"))
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(1), 5) == b""
    writer.close()
    assert (await runtime.observe(handle)).phase is Phase.RUNNING


async def test_tenant_code_cannot_reach_what_is_the_agents(runtime):
    await runtime.create(await make_spec(runtime))
    code = (
        "import errno, os, socket\n"
        "def attempt(function, *arguments):\n"
        "    try: function(*arguments)\n"
        "    except OSError as error: print(errno.errorcode[error.errno])\n"
        "    else: print('done')\n"
        "attempt(socket.socket(socket.AF_UNIX).connect, '/run/e80/agent.sock')\n"
        "attempt(open, '/run/e80/config.json')\n"
        "attempt(os.unlink, '/run/e80/agent.sock')\n"
        "attempt(os.kill, 1, 9)\n"
        "attempt(open, '/proc/1/mem')\n"
    )
    words = (await printed(agent_of(runtime), code)).split()
    assert words[:2] == ["EACCES", "EACCES"]
    assert "done" not in words


async def test_what_an_exec_started_ends_with_it(runtime):
    await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    start = (
        "import os, signal, sys, time\n"
        "if os.fork(): time.sleep(0.3); sys.exit()\n"
        "os.setsid()\n"
        "if os.fork(): os._exit(0)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open('pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    await printed(agent, start)
    look = (
        "import os\ntry: os.kill(int(open('pid').read()), 0); print('alive')\nexcept OSError: print('gone')"
    )
    assert await printed(agent, look, "exec_2") == "gone\n"


async def test_files_and_commands(runtime):
    await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(16):
            yield bytes(65536)

    assert await agent.files.write(b"/home/user/a/big", chunks()) == (1 << 20, True)
    content = await agent.files.read(b"/home/user/a/big")
    assert b"".join([chunk async for chunk in content.chunks]) == bytes(1 << 20)
    command = dataclasses.replace(
        request("", "exec_1"), code=None, argv=("bash", "-c", "cat; id -u; echo $((6*7))"), stdin=b"hi\n"
    )
    data, outcome = await output(agent.run(command))
    assert data.split() == [b"hi", b"233000", b"42"]
    assert outcome.exit_code == 0


async def test_images_that_cannot_serve_are_told_apart(runtime, settings):
    engine = docker.DockerClient(base_url=settings.docker_url)
    with pytest.raises(ImageNotFoundError, match="no/such"):
        await runtime.ensure_image("no/such:image")
    for name in ("__proto__", "UPPER", "a b", "../x", "e80/default:latest:latest"):
        with pytest.raises(ImageNotFoundError, match=r"not how images are named|not in the engine"):
            await runtime.ensure_image(name)
    empty = engine.api.import_image_from_data(_empty_tar(), repository="e80-test-empty", tag="latest")
    assert empty
    try:
        with pytest.raises(ImageUnusableError, match="python3"):
            await runtime.ensure_image("e80-test-empty:latest")
    finally:
        engine.images.remove("e80-test-empty:latest", force=True)
        engine.close()


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


async def test_an_end_between_two_watches_is_told_by_the_second(runtime):
    async def next_exit() -> Exited:
        async for exited in runtime.watch():
            return exited
        raise AssertionError("the engine hung up")

    handle = await runtime.create(await make_spec(runtime))
    watching = asyncio.ensure_future(next_exit())
    await asyncio.sleep(0.2)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await killed(runtime, handle)
    told = await asyncio.wait_for(next_exit(), 10)
    assert (told.sandbox_id, told.handle) == (SANDBOX, handle)
