"""What un-awaited calls do inside `async with`: the properties that the seeds' snippets rest on."""

import asyncio
import gc
import time

import anyio
import pytest
import uvloop
from e80_sdk import (
    AsyncSandbox,
    BadRequestError,
    Eighty80,
    ExecResult,
    NotAwaitedError,
    NotFoundError,
    Pending,
    eighty80_app,
)

from tests.e80_sdk.fake_server import FakeServer, Fault
from tests.e80_sdk.gaps import until, with_longest_gap


async def test_a_call_has_started_before_it_is_awaited(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        pending = sandbox.files.write("a.txt", b"1")
        assert isinstance(pending, Pending)
        await until(lambda: login.count("PUT", "/files") == 1)
        assert await pending == 1
    assert login.alive() == []


async def test_the_snippet_of_the_docs_gives_the_text(login: FakeServer) -> None:
    app = eighty80_app()

    @app.tool
    async def run_python(code: str) -> str:
        """Execute Python code in a sandboxed environment and return the result.

        Args:
            code: Python code to execute. Use print() to output results.
        """
        async with app.sandbox() as sandbox:
            return sandbox.run_python(code)

    result = await run_python("print(6*7)")
    assert result == "42\n"
    assert isinstance(result, ExecResult)
    assert login.alive() == []


async def test_twenty_at_once_do_not_block_the_loop(login: FakeServer) -> None:
    app = eighty80_app()

    @app.tool
    async def run_python(code: str) -> str:
        async with app.sandbox() as sandbox:
            return sandbox.run_python(code)

    async def twenty() -> list[str]:
        return await asyncio.gather(*(run_python(f"print({n}*2)") for n in range(20)))

    # What blocks a loop blocks it each time; a machine that is busy with something else does not.
    gaps = []
    for _ in range(4):
        results, gap_s = await with_longest_gap(twenty())
        assert results == [f"{n * 2}\n" for n in range(20)]
        gaps.append(gap_s)
        if gap_s < 0.1:
            break
    assert min(gaps) < 0.1
    assert login.alive() == []


async def test_leaving_the_block_waits_and_then_stops(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        sandbox.run("sleep 0.3; echo done > finished")
    assert login.file(sandbox.id, "finished").read_text() == "done\n"
    assert [one.path.rsplit("/")[-1] for one in login.seen] == ["sandboxes", "exec", "stop"]


async def test_using_a_pending_as_its_value_says_await_it(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        pending = sandbox.run_python("print(1)")
        for use in (
            lambda: bool(pending),
            lambda: len(pending),
            lambda: pending.stdout,
            lambda: str(pending),
            lambda: f"{pending}",
            lambda: pending == "1\n",
            lambda: pending + "x",
            lambda: pending[0],
            lambda: "1" in pending,
            lambda: list(pending),
        ):
            with pytest.raises(NotAwaitedError, match="await it"):
                use()
        assert "await it" in repr(pending)
        assert not hasattr(pending, "stdout")
        assert await pending == "1\n"
        assert await pending == "1\n", "awaiting twice gives the value twice"


async def test_iterating_what_is_no_stream_says_so(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        with pytest.raises(NotAwaitedError, match="stream=True"):
            async for _ in sandbox.run_python("print(1)"):
                pass


async def test_an_exception_in_the_block_cancels_what_is_pending(login: FakeServer) -> None:
    started: list[Pending[ExecResult]] = []

    async def block() -> None:
        async with Eighty80().sandbox() as sandbox:
            started.append(sandbox.run("sleep 30"))
            await until(lambda: login.count("POST", "/exec") == 1)
            _ = 1 / 0

    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        await block()
    assert time.monotonic() - began < 10
    assert login.alive() == []
    with pytest.raises(asyncio.CancelledError):
        await started[0]


async def test_an_error_nobody_awaited_is_raised_at_the_end(login: FakeServer) -> None:
    async def block() -> None:
        async with Eighty80().sandbox() as sandbox:
            sandbox.files.read("nowhere")
            sandbox.files.read("nowhere-else")

    with pytest.raises(NotFoundError, match="nowhere") as caught:
        await block()
    assert any("files.read() failed too" in note for note in caught.value.__notes__)
    assert login.alive() == []


async def test_an_error_that_was_awaited_is_not_raised_again(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        with pytest.raises(NotFoundError):
            await sandbox.files.read("nowhere")


async def test_a_failed_call_is_noted_on_the_exception_of_the_block(login: FakeServer) -> None:
    async def block() -> None:
        async with Eighty80().sandbox() as sandbox:
            pending = sandbox.files.read("nowhere")
            await until(lambda: pending._task.done())
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        await block()
    assert "nowhere" in caught.value.__notes__[0]


async def test_a_call_waits_for_an_unawaited_write_before_it(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        sandbox.files.write("big.bin", b"x" * 5_000_000)
        assert await sandbox.run("wc -c < big.bin") == "5000000\n"


async def test_a_failed_write_fails_what_came_after_it_once(login: FakeServer) -> None:
    login.workspace("sbx_" + "0" * 26).joinpath("taken").mkdir()

    async def block() -> None:
        async with Eighty80().sandbox() as sandbox:
            sandbox.files.write("taken", b"x")
            sandbox.run("echo not run > ran")

    with pytest.raises(BadRequestError, match="is a directory") as caught:
        await block()
    assert not hasattr(caught.value, "__notes__")
    assert login.count("POST", "/exec") == 0


async def test_a_timeout_around_the_block_still_stops_the_sandbox(login: FakeServer) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5), Eighty80().sandbox() as sandbox:
            sandbox.run("sleep 30")
    assert login.alive() == []


async def test_a_block_cancelled_while_it_leaves_still_stops_the_sandbox(login: FakeServer) -> None:
    async def leave() -> None:
        async with Eighty80().sandbox() as sandbox:
            sandbox.run("sleep 30")

    task = asyncio.create_task(leave())
    await until(lambda: login.count("POST", "/exec") == 1)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert login.alive() == []


async def test_a_create_that_is_cancelled_leaves_no_sandbox(login: FakeServer) -> None:
    login.create_delay_s = 0.3

    async def enter() -> None:
        async with Eighty80().sandbox():
            pytest.fail("the block must not be entered")

    task = asyncio.create_task(enter())
    await until(lambda: login.count("POST", "/sandboxes") == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(login.sandboxes) == 1
    assert login.alive() == []


async def test_iterating_a_stream_gives_chunks_then_the_result(login: FakeServer) -> None:
    code = (
        "import sys; sys.stdout.buffer.write(b'\\xff\\xfe'); sys.stdout.flush(); print('e', file=sys.stderr)"
    )
    async with Eighty80().sandbox() as sandbox:
        pending = sandbox.run_python(code, stream=True)
        chunks = [chunk async for chunk in pending]
        result = await pending
    assert b"".join(chunk.data for chunk in chunks if chunk.stream == "stdout") == b"\xff\xfe"
    assert "".join(chunk for chunk in chunks if chunk.stream == "stderr") == "e\n"
    assert result.stderr == "e\n"


async def test_a_stream_that_nobody_iterates_comes_to_its_end(login: FakeServer) -> None:
    code = "for i in range(2000):\n  print('x' * 4000, flush=True)"
    async with Eighty80().sandbox() as sandbox:
        returned = sandbox.run_python(code, stream=True)
        broken_off = sandbox.run_python(code, stream=True)
        async for _ in broken_off:
            break
    assert len(await returned) == 2000 * 4001
    assert len(await broken_off) == 2000 * 4001


async def test_callbacks_may_be_coroutine_functions(login: FakeServer) -> None:
    plain: list[str] = []
    awaited: list[str] = []

    async def later(chunk: str) -> None:
        await asyncio.sleep(0)
        awaited.append(chunk)

    async with Eighty80().sandbox() as sandbox:
        code = "import sys; print('o'); print('e', file=sys.stderr)"
        await sandbox.run_python(code, on_stdout=plain.append, on_stderr=later)
    assert "".join(plain) == "o\n"
    assert "".join(awaited) == "e\n"


async def test_an_error_in_a_callback_ends_the_call(login: FakeServer) -> None:
    def refuse(chunk: str) -> None:
        raise KeyError(chunk)

    async with Eighty80().sandbox() as sandbox:
        with pytest.raises(KeyError):
            await sandbox.run("echo x; sleep 30", on_stdout=refuse)


async def test_the_block_outlives_a_stop_that_fails(
    login: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    login.faults.append(
        Fault("POST", "/stop", 500, body={"error": {"message": "broken", "code": "internal_error"}})
    )
    async with Eighty80().sandbox() as sandbox:
        result = await sandbox.run("echo kept")
    assert result == "kept\n"
    assert "could not be stopped" in caplog.text


async def test_stop_inside_the_block_is_not_repeated(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        await sandbox.stop()
    assert login.count("POST", "/stop") == 1


async def test_an_unentered_block_explains_itself(login: FakeServer) -> None:
    with pytest.raises(AttributeError, match="async with"):
        Eighty80().sandbox().run_python("1")  # type: ignore[attr-defined]  # the misuse under test
    with pytest.raises(TypeError, match="did you mean 'memory_size_mb'"):
        Eighty80().sandbox(memory_mb=5)  # type: ignore[call-arg]  # the misuse under test


async def test_a_block_cannot_be_entered_twice_at_once(login: FakeServer) -> None:
    block = Eighty80().sandbox()
    async with block:
        with pytest.raises(RuntimeError, match="entered already"):
            async with block:
                pass
    async with block as again:
        assert isinstance(again, AsyncSandbox)
    assert login.alive() == []


def test_blocks_work_in_one_loop_after_the_other(login: FakeServer) -> None:
    client = Eighty80()

    async def once() -> str:
        async with client.sandbox() as sandbox:
            return await sandbox.run("echo hello")

    assert [asyncio.run(once()) for _ in range(3)] == ["hello\n"] * 3
    gc.collect()  # an unclosed connection would warn, and warnings are errors


async def test_a_cancelled_anyio_scope_still_stops_the_sandbox(login: FakeServer) -> None:
    """What a web framework does when its client disconnects: it cancels each further await anew."""
    with anyio.move_on_after(0.5) as scope:
        async with Eighty80().sandbox() as sandbox:
            await sandbox.run("sleep 30")
    assert scope.cancelled_caught
    assert len(login.sandboxes) == 1
    assert login.alive() == []


async def test_a_call_may_be_given_a_time(login: FakeServer) -> None:
    async with Eighty80().sandbox() as sandbox:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.run("sleep 30"), 0.2)
        assert await sandbox.run("echo on") == "on\n"


def test_it_runs_on_uvloop(login: FakeServer) -> None:
    async def once() -> str:
        async with Eighty80().sandbox() as sandbox:
            return await sandbox.run("echo hello")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(once()) == "hello\n"
