"""The app builder: endpoints, tools, requests, over real HTTP."""

import asyncio
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import httpx2
import pytest
from e80_sdk import Eighty80App, ExecResult, ToolArgumentError, eighty80_app
from fastapi import FastAPI
from pydantic import BaseModel, Field

from tests.e80_sdk.fake_server import FakeServer


def request(app: Any, method: str, path: str, **options: Any) -> httpx2.Response:
    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def test_it_is_a_fastapi_app(login: FakeServer) -> None:
    app = eighty80_app(title="mine")
    assert isinstance(app, FastAPI)
    assert app.title == "mine"

    @app.get("/plain")
    def plain() -> dict[str, int]:
        return {"a": 1}

    assert request(app, "GET", "/plain").json() == {"a": 1}


def test_an_endpoint_is_a_post_and_may_return_a_pending(login: FakeServer) -> None:
    app = eighty80_app()

    @app.endpoint("/run")
    async def run(request: app.Request):
        body = await request.json()
        async with app.sandbox() as sandbox:
            return sandbox.run_python(body["code"])

    @app.post("/typed")
    async def typed(code: str) -> str:
        async with app.sandbox() as sandbox:
            return sandbox.run_python(code)

    answer = request(app, "POST", "/run", json={"code": "print(6*7)"})
    assert (answer.status_code, answer.json()) == (200, "42\n")
    assert request(app, "POST", "/typed", params={"code": "print(1)"}).json() == "1\n"
    assert request(app, "GET", "/run").status_code == 405
    assert login.alive() == []


async def test_requests_share_connections_while_the_app_serves(login: FakeServer) -> None:
    started: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        started.append(app.title)
        yield {"state": 1}

    app = eighty80_app(title="mine", lifespan=lifespan)
    async with app.router.lifespan_context(app) as state:
        assert state == {"state": 1}
        pools = app.client._core.api.transport._pools
        assert len(pools) == 1
        async with app.sandbox() as sandbox:
            await sandbox.run("true")
        assert len(pools) == 1
    assert started == ["mine"]
    assert len(pools) == 0


def test_an_app_can_be_made_without_a_key(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_8080_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("_8080_API_KEY", raising=False)
    assert isinstance(eighty80_app(), Eighty80App)


def test_tools_are_described_for_a_model() -> None:
    app = eighty80_app()

    class Place(BaseModel):
        """Where."""

        latitude: float = Field(description="Degrees north.")
        title: str = "here"

    @app.tool
    async def weather(
        place: Place,
        unit: Literal["C", "F"] = "C",
        days: Annotated[int, Field(ge=1)] = 1,
        note: str | None = None,
    ) -> str:
        """Tell the weather.

        It looks outside.

        Args:
            place: Where to look,
                in degrees.
            unit (str): Unit of the answer.

        Returns:
            days: not an argument.
        """
        return f"{place.title} {unit} {days} {note}"

    @app.tool(name="other-name", description="Other text.")
    def plain(anything, copy: bool = False):
        return anything, copy

    tool, other = app.get_tools()
    assert tool["type"] == "function"
    function = tool["function"]
    assert (function["name"], function["description"]) == (
        "weather",
        "Tell the weather.\n\nIt looks outside.",
    )
    parameters = function["parameters"]
    assert parameters["type"] == "object"
    assert parameters["required"] == ["place"]
    assert parameters["additionalProperties"] is False
    assert "title" not in parameters
    properties = parameters["properties"]
    assert list(properties) == ["place", "unit", "days", "note"]
    assert properties["place"]["description"] == "Where to look, in degrees."
    assert properties["unit"] == {
        "default": "C",
        "description": "Unit of the answer.",
        "enum": ["C", "F"],
        "type": "string",
    }
    assert properties["days"] == {"default": 1, "minimum": 1, "type": "integer"}
    assert set(parameters["$defs"]["Place"]["properties"]) == {"latitude", "title"}
    assert other["function"]["name"] == "other-name"
    assert other["function"]["parameters"]["properties"]["copy"]["type"] == "boolean"


def test_the_args_of_a_docstring_without_indentation_are_read() -> None:
    app = eighty80_app()

    @app.tool
    async def run_python(code: str) -> str:
        """
        Execute Python code in a sandboxed environment and return the result.
        Args:
        code: Python code to execute. Use print() to output results.
        """
        return code

    function = app.get_tools()[0]["function"]
    assert function["description"] == "Execute Python code in a sandboxed environment and return the result."
    assert function["parameters"]["properties"]["code"]["description"].startswith("Python code to execute.")


def test_a_tool_without_parameters() -> None:
    app = eighty80_app()

    @app.tool
    def now() -> str:
        """Say the time."""
        return "late"

    expected = {"type": "object", "properties": {}, "additionalProperties": False}
    assert app.get_tools()[0]["function"]["parameters"] == expected
    assert now() == "late"


async def test_a_decorated_function_stays_callable_and_checks_its_arguments() -> None:
    app = eighty80_app()

    @app.tool
    async def double(number: int, times: int = 2) -> int:
        return number * times

    @app.tool
    def plain(number: int) -> int:
        return number

    assert double.__name__ == "double"
    assert await double(4) == 8
    assert await double(number=4, times=3) == 12
    assert plain(1) == 1
    with pytest.raises(ToolArgumentError, match=r"number: .*integer"):
        await double("four")  # type: ignore[arg-type]  # the misuse under test
    with pytest.raises(ToolArgumentError, match="'plain'"):
        plain([])  # type: ignore[arg-type]  # the misuse under test
    with pytest.raises(TypeError, match="missing"):
        plain()  # type: ignore[call-arg]  # the misuse under test


async def test_a_model_calls_tools_by_name(login: FakeServer) -> None:
    app = eighty80_app()

    @app.tool
    async def run_python(code: str) -> str:
        async with app.sandbox() as sandbox:
            return sandbox.run_python(code)

    @app.tool
    def blocking(code: str = "print(2)") -> str:
        with app.sandbox() as sandbox:
            return sandbox.run_python(code)

    result = await app.call_tool("run_python", '{"code": "print(1)"}')
    assert result == "1\n"
    assert isinstance(result, ExecResult)
    assert await app.call_tool("blocking", {}) == "2\n"
    for name, arguments, message in [
        ("nothing", "{}", "there is no tool 'nothing'; there are: blocking, run_python"),
        ("run_python", "{", "not JSON"),
        ("run_python", "[]", "must be a JSON object"),
        ("run_python", "{}", "code: Field required"),
        ("run_python", '{"code": 5}', "code: .*string"),
        ("run_python", '{"code": "1", "more": 1}', "more: .*not permitted"),
    ]:
        with pytest.raises(ToolArgumentError, match=message):
            await app.call_tool(name, arguments)
    assert login.alive() == []
    app.client.close()


def test_functions_that_no_model_could_call_are_refused() -> None:
    app = eighty80_app()

    def star(*args: int) -> None: ...
    def only(number: int, /) -> None: ...
    def odd(number: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821 (the misuse under test)
    def thing(number: asyncio.Lock) -> None: ...

    for function in (star, only, odd, thing, lambda: None):
        with pytest.raises(TypeError):
            app.tool(function)

    @app.tool
    def once() -> None: ...

    with pytest.raises(TypeError, match="already"):
        app.tool(once)
