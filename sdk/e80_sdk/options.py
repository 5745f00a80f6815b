"""The keyword options of create and exec, and their translation to request bodies. The server checks the
values."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from e80_sdk.mime import Result
from e80_sdk.results import ExecChunk

OnChunk = Callable[[ExecChunk], Awaitable[None] | None]
OnResult = Callable[[Result], Awaitable[None] | None]
Pty = bool | Mapping[str, Any]
"""A terminal for a command: True, or its size, `{"rows": 40, "cols": 120}`."""


class SandboxOptions(TypedDict, total=False):
    """Options of create; whatever is left out is decided by the server.

    `idempotency_key` is one of your own, for a create that may be repeated by another process too.
    """

    image: str
    cpu_mhz: int
    memory_size_mb: int
    disk_size_mb: int
    gpu_count: int
    timeout_s: float | None
    idle_timeout_s: float | None
    labels: Mapping[str, str]
    env: Mapping[str, str]
    network: Mapping[str, Any]
    project: str
    idempotency_key: str


class SandboxChanges(TypedDict, total=False):
    """What can be changed in a sandbox that is alive; whatever is left out stays as it is."""

    timeout_s: float | None
    idle_timeout_s: float | None
    labels: Mapping[str, str]
    network: Mapping[str, Any]
    cpu_mhz: int
    memory_size_mb: int


class _Options(TypedDict, total=False):
    cwd: str
    env: Mapping[str, str]
    stdin: str
    user: str
    idempotency_key: str


class ExecOptions(_Options, total=False):
    """Options of `run_python` and `run`."""

    timeout_s: float
    on_stdout: OnChunk
    on_stderr: OnChunk


class PythonOptions(ExecOptions, total=False):
    """Options of `run_python`."""

    fresh: bool


class CommandOptions(ExecOptions, total=False):
    """Options of `run`."""

    pty: Pty


class StartOptions(_Options, total=False):
    """Options of `start_python` and `start`."""

    timeout_s: float | None
    stdin_open: bool


class PythonStartOptions(StartOptions, total=False):
    """Options of `start_python`."""

    fresh: bool


class CommandStartOptions(StartOptions, total=False):
    """Options of `start`."""

    pty: Pty


class CellOptions(TypedDict, total=False):
    """Options of code in a context."""

    timeout_s: float
    on_stdout: OnChunk
    on_stderr: OnChunk
    on_result: OnResult
    idempotency_key: str


def sandbox_body(options: SandboxOptions) -> dict[str, Any]:
    """The body of a create request.

    Raises:
        TypeError: An option does not exist.
    """
    _check_names("sandbox", options, SandboxOptions)
    return {name: value for name, value in options.items() if name != "idempotency_key"}


def changes_body(changes: SandboxChanges) -> dict[str, Any]:
    """The body of an update.

    Raises:
        TypeError: Such a change does not exist.
    """
    _check_names("update", changes, SandboxChanges)
    return dict(changes)


@dataclass(frozen=True)
class Program:
    """What is to be run: the body of the request, the caller's own idempotency key, and who wants to see
    output as it comes."""

    body: dict[str, Any]
    key: str | None
    on_chunk: OnChunk | None


def python_program(code: str, options: PythonOptions | PythonStartOptions, *, start: bool = False) -> Program:
    """An exec of Python code.

    Raises:
        TypeError: The code is not text or an option does not exist.
    """
    if start:
        _check_names("start_python", options, PythonStartOptions)
    else:
        _check_names("run_python", options, PythonOptions)
    return _program({"code": _checked_code(code), "language": "python"}, options)


def command_program(
    command: str | Sequence[str], options: CommandOptions | CommandStartOptions, *, start: bool = False
) -> Program:
    """An exec of a command: text goes to `bash -lc`, a sequence is the argument vector.

    Raises:
        TypeError: The command is neither, or an option does not exist.
    """
    argv = [command] if isinstance(command, str) else command
    if not isinstance(argv, list | tuple) or not all(isinstance(word, str) for word in argv):
        raise TypeError(f"command must be text or a list of texts, not {command!r:.100}")
    if start:
        _check_names("start", options, CommandStartOptions)
    else:
        _check_names("run", options, CommandOptions)
    body: dict[str, Any] = {"command": command if isinstance(command, str) else list(argv)}
    made = _program(body, options)
    pty = made.body.pop("pty", False)
    if pty or isinstance(pty, Mapping):
        made.body["pty"] = dict(pty) if isinstance(pty, Mapping) else {}
    return made


def cell_program(code: str, context_id: str, options: CellOptions) -> Program:
    """An exec of code in a context.

    Raises:
        TypeError: The code is not text or an option does not exist.
    """
    _check_names("run", options, CellOptions)
    return _program({"code": _checked_code(code), "context": context_id}, options)


_OURS = ("on_stdout", "on_stderr", "on_result", "idempotency_key")


def _program(body: dict[str, Any], options: Mapping[str, Any]) -> Program:
    plain = {name: value for name, value in options.items() if name not in _OURS}
    wanted = {name: options.get(f"on_{name}") for name in ("stdout", "stderr", "result")}

    def on_chunk(chunk: ExecChunk) -> Awaitable[None] | None:
        call = wanted[chunk.stream]
        if call is None:
            return None
        made: Awaitable[None] | None = call(chunk if chunk.result is None else chunk.result)
        return made

    return Program(body | plain, options.get("idempotency_key"), on_chunk if any(wanted.values()) else None)


def _checked_code(code: str) -> str:
    if not isinstance(code, str):
        raise TypeError(f"code must be text (str), not {type(code).__name__}")
    return str(code)


def _check_names(what: str, options: Mapping[str, Any], known: Any) -> None:
    names = sorted(known.__optional_keys__)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise TypeError(f"{what}() has no option {name!r}; {hint}")
