"""Interpreters that keep their state, from either face, and what they show in a notebook."""

import asyncio
import base64
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from e80_sdk import (
    AsyncContext,
    BadRequestError,
    Context,
    ContextInfo,
    ContextLostError,
    Eighty80,
    ExecResult,
    NotFoundError,
    Result,
    Sandbox,
)
from IPython.core.formatters import DisplayFormatter

from tests.e80_sdk.fake_server import FakeServer
from tests.e80_sdk.gaps import until

if TYPE_CHECKING:
    from tests.conftest import Daemon

PNG = b"\x89PNG\r\n\x1a\n not quite"
FIGURE = {"text/plain": "<Figure>", "image/png": base64.b64encode(PNG).decode()}
TABLE = {"text/plain": "   a\n0  1", "text/html": "<table><script>alert(1)</script></table>"}
BODY = {
    "id": "exec_1",
    "status": "completed",
    "exit_code": 0,
    "stdout": "hello\n",
    "stderr": "",
    "duration_ms": 1,
}


def shown(value: object) -> dict[str, object]:
    """What a notebook would show."""
    data, _metadata = DisplayFormatter().format(value)
    return dict(data)


def test_a_result_shows_in_a_notebook_and_runs_nothing_there() -> None:
    """HTML of a sandbox must not become a part of the notebook's page, which may do all that its user may."""
    assert shown(Result(FIGURE)) == FIGURE
    table = shown(Result(TABLE))
    assert table["text/plain"] == TABLE["text/plain"]
    assert str(table["text/html"]).startswith('<iframe sandbox=""')
    assert "<script>" not in str(table["text/html"])
    assert "&lt;script&gt;" in str(table["text/html"])
    assert shown(Result({"application/javascript": "alert(1)", "text/plain": "x"})) == {"text/plain": "x"}
    assert shown(Result({"image/svg+xml": "<svg onload='alert(1)'/>"})).keys() == {"text/plain", "text/html"}


def test_a_result_by_its_types() -> None:
    result = Result(
        FIGURE | {"application/json": {"a": [1]}, "text/markdown": "*x*", "image/svg+xml": "<svg/>"}
    )
    assert (result.text, result.html, result.png, result.jpeg) == ("<Figure>", None, PNG, None)
    assert (result.json, result.markdown, result.svg) == ({"a": [1]}, "*x*", "<svg/>")
    assert repr(Result({"text/html": "x"})) == "<Result text/html>"
    assert Result({"image/png": "no base64!"}).png != PNG
    assert Result({"text/plain": 5}).text is None


def test_an_exec_result_shows_all_that_the_code_showed() -> None:
    result = ExecResult.from_body(BODY | {"results": [FIGURE, TABLE, {"text/plain": "42"}]})
    assert result == "hello\n<Figure>\n   a\n0  1\n42"
    page = str(shown(result)["text/html"])
    assert (
        page.index("hello") < page.index("data:image/png;base64,") < page.index("<iframe") < page.index("42")
    )
    assert shown(result)["text/plain"] == result
    assert shown(ExecResult.from_body(BODY | {"results": [{"text/plain": "42"}]})) == {
        "text/plain": "hello\n42"
    }
    assert shown(ExecResult.from_body(BODY)) == {"text/plain": "hello\n"}
    error = {"name": "E", "value": "<b>", "traceback": "Traceback <b>"}
    failed = ExecResult.from_body(BODY | {"status": "failed", "error": error, "results": [FIGURE]})
    assert str(shown(failed)["text/html"]).endswith("<pre>Traceback &lt;b&gt;</pre>")


def test_results_arrive_in_streams(login: FakeServer) -> None:
    login.script = [
        ("stdout", b"1\n"),
        ("result", b'{"text/plain": "42", "image/png": "AAAA"}'),
        ("stdout", b"2"),
    ]
    heard: list[object] = []
    with Eighty80() as client, client.sandbox() as sandbox:
        context = Context(client._core.api, sandbox.id, _info(), client._portal)
        with context.run("x", stream=True, on_result=heard.append) as stream:
            chunks = [(chunk.stream, str(chunk)) for chunk in stream]
        assert login.last("POST", "/exec").body == {"code": "x", "context": "ctx_1", "stream": True}
        with pytest.raises(TypeError, match="no option 'cwd'"):
            context.run("x", cwd="/")  # type: ignore[call-overload]  # the misuse under test
    assert chunks == [("stdout", "1\n"), ("result", "42\n"), ("stdout", "2")]
    assert [one.data for one in heard if isinstance(one, Result)] == [
        {"text/plain": "42", "image/png": "AAAA"}
    ]


async def test_calls_of_a_context_run_in_their_order_and_end_before_it(login: FakeServer) -> None:
    async with Eighty80() as client, client.sandbox() as sandbox:
        context = AsyncContext(client.api, sandbox.id, _info(), sandbox._calls)
        login.script = [("stdout", b"x")]
        async with context:
            for number in range(10):
                context.run(str(number))
        codes = [one.body["code"] for one in login.seen if one.path.endswith("/exec")]
        assert codes == [str(number) for number in range(10)]
        assert login.seen[-1].method == "DELETE"


def _info() -> ContextInfo:
    return ContextInfo.from_body({"id": "ctx_1", "status": "idle", "language": "python"})


@pytest.mark.docker
def test_state_stays_between_calls(real_sandbox: Sandbox) -> None:
    """Multi-step tool use needs sessions that stay (llm-sandbox#43, agent-sandbox#296)."""
    with real_sandbox.context(cwd="/tmp", env={"STAGE": "test"}) as context:
        assert context.run("import os\nx = 6 * 7\nprint(os.getcwd(), os.environ['STAGE'])") == "/tmp test\n"
        result = context.run("x")
        assert (str(result), result.stdout, [one.text for one in result.results]) == ("42", "", ["42"])
        failed = context.run("print('before')\n1/0")
        assert failed.error is not None
        assert (failed.status, failed.error.name) == ("failed", "ZeroDivisionError")
        assert context.run("print(x)") == "42\n"
        assert [one.id for one in real_sandbox.contexts()] == [context.id]
        assert real_sandbox.get_context(context.id).run("x + 1") == "43"
        assert context.restart().id == context.id
        lost = context.run("x")
        assert lost.error is not None
        assert lost.error.name == "NameError"
        real_sandbox.start_python("1").wait()
    assert real_sandbox.contexts() == []
    with pytest.raises(NotFoundError):
        context.run("1")
    context.delete()
    with real_sandbox.context("bash") as shell:
        shell.run("cd /tmp; word=hello")
        assert shell.run("echo $word $PWD") == "hello /tmp\n"
    with pytest.raises(BadRequestError, match="cobol"):
        real_sandbox.context("cobol")


@pytest.mark.docker
def test_pictures_and_tables(real_sandbox: Sandbox) -> None:
    with real_sandbox.context() as context:
        drawn = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\n"
        result = context.run(drawn + "import pandas\npandas.DataFrame({'a': [1]})", timeout_s=60)
        assert result.ok, result
        [picture] = [one for one in result.results if one.png]
        assert picture.png is not None
        assert picture.png.startswith(b"\x89PNG")
        assert any(one.html and "<table" in one.html for one in result.results)
        assert "image/png" in shown(picture)
        assert "<img src=" in str(shown(result)["text/html"])


@pytest.mark.docker
def test_an_interrupt_keeps_the_state(real_sandbox: Sandbox) -> None:
    with real_sandbox.context() as context, ThreadPoolExecutor() as pool:
        context.run("kept = 1")
        heard: list[str] = []
        code = "import time\nprint('on', flush=True)\ntime.sleep(60)"
        running = pool.submit(context.run, code, on_stdout=heard.append)
        asyncio.run(until(lambda: heard))
        assert real_sandbox.get_context(context.id).info.status == "busy"
        context.interrupt()
        result = running.result(20)
        assert result.error is not None
        assert result.error.name == "KeyboardInterrupt"
        with context.run("print('on', flush=True)\nimport time\ntime.sleep(60)", stream=True) as stream:
            assert next(iter(stream)) == "on\n"
        assert context.run("kept") == "1", "leaving a call interrupts it, and the state stays"
        assert context.run("import os\nos.kill(os.getpid(), 9)").status in ("killed", "failed", "lost")
        with pytest.raises(ContextLostError):
            context.run("kept")
        context.restart()
        assert context.run("1") == "1"


@pytest.mark.docker
async def test_contexts_of_an_async_sandbox(real_client: Eighty80) -> None:
    async with real_client.sandbox() as sandbox:
        async with sandbox.context() as context:
            context.run("x = 1")
            for _ in range(5):
                context.run("x *= 2")
            pending = context.run("print(x)\nx", stream=True)
            assert [(chunk.stream, str(chunk)) async for chunk in pending] == [
                ("stdout", "32\n"),
                ("result", "32\n"),
            ]
            assert [one.id for one in await sandbox.contexts()] == [context.id]
        other = await sandbox.context("bash")
        assert await other.run("echo hi") == "hi\n"
        await other.delete()
        assert await sandbox.contexts() == []


@pytest.mark.docker
def test_a_call_goes_on_over_a_restart(own_daemon: "Daemon") -> None:
    killed: list[str] = []

    def kill_once(chunk: str) -> None:
        if not killed and "5" in chunk:
            killed.append(chunk)
            own_daemon.stop(signal.SIGKILL)
            own_daemon.start()

    code = "import time\nfor n in range(40):\n    print(n, flush=True)\n    time.sleep(0.05)\nkept = n"
    with (
        Eighty80(own_daemon.api_key, own_daemon.base_url) as client,
        client.sandbox() as sandbox,
        sandbox.context() as context,
    ):
        result = context.run(f"{code}\nkept", on_stdout=kill_once)
        assert killed
        assert result.stdout == "".join(f"{n}\n" for n in range(40))
        assert [one.text for one in result.results] == ["39"]
        assert context.run("kept + 1") == "40"
