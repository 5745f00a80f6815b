"""Running a program in a sandbox from a terminal: its output live and byte for byte, its end as an exit
code."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from e80_sdk.results import ExecChunk, ExecResult

from e80_cli.exits import exit_code_of_program
from e80_cli.output import Output

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80

_OUTPUT = ("exec.stdout.delta", "exec.stderr.delta")


async def follow(client: AsyncEighty80, sandbox_id: str, body: Mapping[str, Any], output: Output) -> int:
    """Run it, pass its output on, and return its exit code; with `--json` the events are the output."""
    code = 1
    async with aclosing(client.api.execs.events(sandbox_id, body)) as events:
        async for event in events:
            if output.as_json:
                output.data(event)
            elif event.get("type") in _OUTPUT:
                chunk = ExecChunk.from_event(event)
                output.raw(chunk.stream, chunk.data)
            if event.get("type") == "exec.completed":
                result = ExecResult.from_body(event.get("exec") or {})
                code = exit_code_of_program(result)
                _explain(result, output)
    return code


def _explain(result: ExecResult, output: Output) -> None:
    """Say what the exit code alone does not."""
    if output.as_json:
        return
    if result.status == "timed_out":
        output.warn(f"8080: timed out after {result.duration_ms / 1000:.1f} s; allow more with --timeout-s")
    elif result.status == "oom":
        output.warn("8080: out of memory; allow more with --memory-size-mb when the sandbox is created")
    elif result.status == "lost":
        output.warn("8080: the program was lost together with its sandbox")
    if result.truncated:
        where = f"; all of it is in {result.output_path} in the sandbox" if result.output_path else ""
        output.warn(f"8080: the recorded output was cut{where}")
