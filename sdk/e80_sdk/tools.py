"""Tools: a Python function as a model sees it. Schema from type hints and docstring, arguments validated on
every call."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from e80_sdk.errors import ToolArgumentError
from e80_sdk.pending import settle

P = ParamSpec("P")
R = TypeVar("R")

_SECTIONS = re.compile(
    r"(args|arguments|parameters|returns?|yields?|raises|examples?|notes?|warnings?|see also):\s*"
)
_ARGS = re.compile(r"(args|arguments|parameters):\s*")
_PARAM = re.compile(r"(\s*)\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tool:
    """A function with its schema.

    Attributes:
        name: Name under which a model calls it.
        description: What the docstring says, without its sections.
        function: The function itself.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str | None = None, description: str | None = None
    ) -> None:
        """Read the function.

        Raises:
            TypeError: The function cannot be described to a model; the message says why.
        """
        self.function = function
        self.name = name or function.__name__
        if not _NAME.fullmatch(self.name):
            raise TypeError(f"tool name {self.name!r} must be 1 to 64 letters, digits, _ or -; pass name=...")
        summary, texts = read_docstring(
            inspect.getdoc(function) or "", set(inspect.signature(function).parameters)
        )
        self.description = description or summary
        self._signature = inspect.signature(function)
        self._arguments = self._model(texts)

    def definition(self) -> dict[str, Any]:
        """The entry for the `tools` list of a chat completion."""
        schema = _without_titles(self._arguments.model_json_schema(by_alias=True))
        parameters = {"type": "object", "properties": {}, **schema, "additionalProperties": False}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }

    async def call(self, arguments: str | Mapping[str, Any]) -> Any:
        """Call the function with what a model sent: a JSON object, as text or decoded.

        A coroutine or `Pending` is awaited to the end; a plain function runs in a thread.

        Raises:
            ToolArgumentError: The arguments do not fit; the message names each field at fault.
        """
        checked = self._check(_decoded(self.name, arguments))
        bound = self._signature.bind_partial()
        bound.arguments.update(checked)
        if inspect.iscoroutinefunction(self.function):
            return await settle(self.function(*bound.args, **bound.kwargs))
        return await settle(await asyncio.to_thread(self.function, *bound.args, **bound.kwargs))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """Arguments of a direct call, validated.

        Raises:
            TypeError: They do not match the signature.
            ToolArgumentError: A value has the wrong type.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.arguments.update(self._check(dict(bound.arguments)))
        return bound

    def _check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            checked = self._arguments.model_validate(arguments)
        except ValidationError as exc:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in exc.errors()
            )
            raise ToolArgumentError(f"arguments of tool {self.name!r} do not fit: {faults}") from exc
        names = {f"arg_{index}": name for index, name in enumerate(self._signature.parameters)}
        return {names[field]: getattr(checked, field) for field in checked.model_fields_set}

    def _model(self, texts: Mapping[str, str]) -> type[BaseModel]:
        try:
            hints = get_type_hints(self.function, include_extras=True)
        except NameError as exc:
            raise TypeError(f"tool {self.name!r}: its type hints cannot be resolved: {exc}") from exc
        fields: dict[str, Any] = {}
        for index, parameter in enumerate(self._signature.parameters.values()):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise TypeError(
                    f"tool {self.name!r}: parameter {parameter} cannot be named in a call; name it plainly"
                )
            default = ... if parameter.default is parameter.empty else parameter.default
            # Fields carry an alias because a parameter may be called like an attribute of BaseModel.
            info = Field(default, alias=parameter.name, description=texts.get(parameter.name))
            fields[f"arg_{index}"] = (hints.get(parameter.name, Any), info)
        try:
            return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)
        except PydanticUserError as exc:
            raise TypeError(f"tool {self.name!r}: a type hint has no JSON schema: {exc.message}") from exc


def make_tool(function: Callable[P, R], tool: Tool) -> Callable[P, R]:
    """The function as before, with its arguments validated and a returned `Pending` awaited."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            bound = tool.bind(args, kwargs)
            return await settle(function(*bound.args, **bound.kwargs))

        return call_async  # type: ignore[return-value]  # for a coroutine function R is the coroutine it returns

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = tool.bind(args, kwargs)
        return function(*bound.args, **bound.kwargs)

    return call


def read_docstring(text: str, parameters: set[str]) -> tuple[str, dict[str, str]]:
    """The description without its sections, and the text for each parameter from the Args section."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if _SECTIONS.fullmatch(line.strip().lower())), len(lines))
    summary = "\n".join(lines[:start]).strip()
    texts: dict[str, str] = {}
    inside, current, depth = False, "", 0
    for line in lines[start:]:
        if _SECTIONS.fullmatch(line.strip().lower()):
            inside = _ARGS.fullmatch(line.strip().lower()) is not None
            continue
        found = _PARAM.fullmatch(line)
        if not inside or not line.strip():
            continue
        if found and found[2] in parameters and (not current or len(found[1]) <= depth):
            depth, current = len(found[1]), found[2]
            texts[current] = found[3].strip()
        elif current:
            texts[current] = f"{texts[current]} {line.strip()}".strip()
    return summary, texts


def _decoded(name: str, arguments: str | Mapping[str, Any]) -> Mapping[str, Any]:
    value: object = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments or "{}")
        except ValueError as exc:
            raise ToolArgumentError(f"arguments of tool {name!r} are not JSON: {exc}") from exc
    if not isinstance(value, Mapping):
        raise ToolArgumentError(f"arguments of tool {name!r} must be a JSON object, not {arguments!r:.100}")
    return value


def _without_titles(schema: Any, *, names: bool = False) -> Any:
    """The schema without the titles that pydantic adds; `names` says that the keys are names of
    properties."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_titles(value, names=not names and key in ("properties", "$defs"))
        for key, value in schema.items()
        if names or key != "title"
    }
