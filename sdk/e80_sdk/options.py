"""The keyword options of create and exec, and their translation to request bodies. The server checks the
values."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypedDict

from e80_sdk.results import ExecChunk

OnChunk = Callable[[ExecChunk], Awaitable[None] | None]


class SandboxOptions(TypedDict, total=False):
    """Options of create; whatever is left out is decided by the server."""

    image: str
    cpu_mhz: int
    memory_size_mb: int
    disk_size_mb: int
    gpu_count: int
    timeout_s: float | None
    labels: Mapping[str, str]
    env: Mapping[str, str]
    network: Mapping[str, Any]
    project: str


class ExecOptions(TypedDict, total=False):
    """Options of `run_python` and `run`."""

    cwd: str
    env: Mapping[str, str]
    stdin: str
    timeout_s: float
    on_stdout: OnChunk
    on_stderr: OnChunk


class PythonOptions(ExecOptions, total=False):
    """Options of `run_python` alone."""

    fresh: bool


def sandbox_body(options: SandboxOptions) -> dict[str, Any]:
    """The body of a create request.

    Raises:
        TypeError: An option does not exist.
    """
    _check_names("sandbox", options, SandboxOptions)
    return dict(options)


def python_body(code: str, options: PythonOptions) -> tuple[dict[str, Any], _Callbacks]:
    """The body of an exec of Python code, and the callbacks that came with the options.

    Raises:
        TypeError: The code is not text or an option does not exist.
    """
    if not isinstance(code, str):
        raise TypeError(f"code must be text (str), not {type(code).__name__}")
    _check_names("run_python", options, PythonOptions)
    return {"code": str(code), "language": "python", **_plain(options)}, _Callbacks(options)


def command_body(command: str | Sequence[str], options: ExecOptions) -> tuple[dict[str, Any], _Callbacks]:
    """The body of an exec of a command: text goes to `bash -lc`, a sequence is the argument vector.

    Raises:
        TypeError: The command is neither, or an option does not exist.
    """
    argv = [command] if isinstance(command, str) else command
    if not isinstance(argv, list | tuple) or not all(isinstance(word, str) for word in argv):
        raise TypeError(f"command must be text or a list of texts, not {command!r:.100}")
    _check_names("run", options, ExecOptions)
    return {"command": command if isinstance(command, str) else list(argv), **_plain(options)}, _Callbacks(
        options
    )


class _Callbacks:
    """Who wants to see output as it comes."""

    def __init__(self, options: ExecOptions) -> None:
        self._wanted = {"stdout": options.get("on_stdout"), "stderr": options.get("on_stderr")}

    def __bool__(self) -> bool:
        return any(self._wanted.values())

    def __call__(self, chunk: ExecChunk) -> Awaitable[None] | None:
        wanted = self._wanted[chunk.stream]
        return wanted(chunk) if wanted else None


def _plain(options: ExecOptions) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("on_stdout", "on_stderr")}


def _check_names(what: str, options: Mapping[str, Any], known: Any) -> None:
    names = sorted(known.__optional_keys__)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise TypeError(f"{what}() has no option {name!r}; {hint}")
