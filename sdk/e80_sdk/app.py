"""`eighty80_app()`: a FastAPI application that knows tools, endpoints and sandboxes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar, Unpack, overload

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute

from e80_sdk.blocks import SandboxBlock
from e80_sdk.client import Eighty80
from e80_sdk.errors import ToolArgumentError
from e80_sdk.options import SandboxOptions
from e80_sdk.pending import settle
from e80_sdk.tools import Tool, make_tool

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class _SettlingRoute(APIRoute):
    """A route whose endpoint may return a `Pending`."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, _settling(endpoint), **options)


class Eighty80App(FastAPI):
    """An ASGI application: everything of FastAPI, plus tools, endpoints and sandboxes.

    Attributes:
        Request: The request class, for annotations: `request: app.Request`.
    """

    Request = Request

    def __init__(self, *, api_key: str | None = None, base_url: str | None = None, **options: Any) -> None:
        """See `eighty80_app`."""
        given = options.pop("lifespan", None)
        super().__init__(**options, lifespan=functools.partial(_lifespan, given))
        self.router.route_class = _SettlingRoute
        self._login = (api_key, base_url)
        self._tools: dict[str, Tool] = {}

    @functools.cached_property
    def client(self) -> Eighty80:
        """The client that `sandbox()` uses; made on first use, so that an app can be imported without a
        key."""
        return Eighty80(*self._login)

    def endpoint(self, path: str, **options: Any) -> Callable[[F], F]:
        """Register a POST route; options as for `app.post`. The function may return a `Pending`."""
        return self.post(path, **options)

    def sandbox(self, **options: Unpack[SandboxOptions]) -> SandboxBlock:
        """A sandbox for the length of a block; see `Eighty80.sandbox`."""
        return self.client.sandbox(**options)

    @overload
    def tool(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def tool(
        self, /, *, name: str | None = None, description: str | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def tool(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        description: str | None = None,
    ) -> Any:
        """Register a function as a tool: `@app.tool`, or `@app.tool(name=..., description=...)`.

        The schema comes from the type hints and the docstring with its `Args:` section. The function stays
        callable; its arguments are validated, and a returned `Pending` is awaited.

        Raises:
            TypeError: The function cannot be described to a model, or there is a tool of that name.
        """

        def register(function: Callable[P, R]) -> Callable[P, R]:
            tool = Tool(function, name=name, description=description)
            if tool.name in self._tools:
                raise TypeError(f"there is a tool {tool.name!r} already; pass name=... to tell them apart")
            self._tools[tool.name] = tool
            return make_tool(function, tool)

        return register if function is None else register(function)

    def get_tools(self) -> list[dict[str, Any]]:
        """All tools, as the `tools` list of an OpenAI chat completion."""
        return [tool.definition() for tool in self._tools.values()]

    async def call_tool(self, name: str, arguments: str | Mapping[str, Any]) -> Any:
        """Call a tool with what a model sent (a JSON object, as text or decoded) and return its result.

        Raises:
            ToolArgumentError: There is no such tool, or the arguments do not fit it.
        """
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(sorted(self._tools)) or "none"
            raise ToolArgumentError(f"there is no tool {name!r}; there are: {known}", code="tool_not_found")
        return await tool.call(arguments)


def eighty80_app(*, api_key: str | None = None, base_url: str | None = None, **options: Any) -> Eighty80App:
    """Make an application.

    Args:
        api_key: Key for `app.sandbox()`; else found as `Eighty80` finds it.
        base_url: Server for `app.sandbox()`; likewise.
        options: Options of `fastapi.FastAPI`.

    Returns:
        An ASGI application with `get`, `post`, ..., `endpoint`, `tool`, `get_tools`, `call_tool`,
        `sandbox`, `Request`.
    """
    return Eighty80App(api_key=api_key, base_url=base_url, **options)


@asynccontextmanager
async def _lifespan(given: Callable[[FastAPI], Any] | None, app: Eighty80App) -> AsyncGenerator[Any]:
    # Held while the app serves, so that its requests share connections instead of opening one each.
    async with app.client:
        if given is None:
            yield None
        else:
            async with given(app) as state:
                yield state


def _settling(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    # A plain function runs in a thread without a loop, where no Pending can come from.
    if not inspect.iscoroutinefunction(endpoint):
        return endpoint

    @functools.wraps(endpoint)
    async def settled(*args: Any, **kwargs: Any) -> Any:
        return await settle(await endpoint(*args, **kwargs))

    return settled
