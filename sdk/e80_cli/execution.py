"""Running a program in a sandbox from here: its output live and byte for byte, its end as an exit code."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from e80_sdk.errors import ConflictError, E80Error, NotFoundError
from e80_sdk.pending import undisturbed
from e80_sdk.results import ExecResult

from e80_cli.amounts import size
from e80_cli.exits import INTERRUPTED, PLATFORM_FAILED, exit_code_of_program
from e80_cli.output import Output
from e80_cli.showing import Results, Screen
from e80_cli.stdin import Left, feed
from e80_cli.terminal import Escape, Terminal

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80

T = TypeVar("T")
_TERM = re.compile(r"[A-Za-z0-9._+-]{1,64}")
MIB = 2**20
SPOOL_BYTES = 64 * MIB
"""What a server keeps of long output unless its operator says otherwise: so many whole MiB. Nobody says where
it was cut."""
QUIET_S = 0.5
HANG_UP_S = 2.0
"""How long a leaving terminal waits until its program is told."""


async def run(
    client: AsyncEighty80,
    sandbox_id: str,
    body: Mapping[str, Any],
    output: Output,
    *,
    stdin: bool = False,
    results: Results | None = None,
) -> int:
    """Run it, pass its output on and, if wanted, stdin to it; return its exit code. With `--json` the events
    are the output. Whoever leaves (Ctrl-C) ends it."""
    execs, screen = client.api.execs, Screen(output, results)
    events = execs.events(sandbox_id, {**body, "stdin_open": True} if stdin else body)

    async def fed(beside: asyncio.TaskGroup) -> None:
        feeding: list[asyncio.Task[None]] = []

        def begun(exec_id: str) -> None:
            feeding.append(beside.create_task(feed(execs, sandbox_id, exec_id)))

        await _show(events, screen, begun=begun if stdin else None)
        for task in feeding:
            task.cancel()

    await _with_tasks(fed)
    _explain(screen.result, output)
    if screen.result.truncated and not output.as_json:
        return await _show_rest(client, sandbox_id, screen)
    return exit_code_of_program(screen.result)


async def follow(
    client: AsyncEighty80,
    sandbox_id: str,
    exec_id: str,
    output: Output,
    *,
    after: int | None = None,
    results: Results | None = None,
) -> int:
    """Print what an exec has written and writes, to its end, and return its exit code. Whoever leaves leaves
    it alone."""
    screen = Screen(output, results)
    await _show(client.api.execs.follow(sandbox_id, exec_id, after=after), screen)
    _explain(screen.result, output)
    return exit_code_of_program(screen.result)


async def run_on_terminal(
    client: AsyncEighty80, sandbox_id: str, body: Mapping[str, Any], output: Output
) -> int:
    """Run it with a terminal that is the user's: keys, size, colours. A connection that breaks is taken up
    again. Whoever leaves (`~.`, SIGTERM, a closed window) hangs up on the program, as a terminal does."""
    execs, terminal = client.api.execs, Terminal()
    rows, cols = terminal.size
    term = os.environ.get("TERM", "")
    pty = {"rows": rows, "cols": cols, "term": term if _TERM.fullmatch(term) else "xterm-256color"}
    started = await _started(client, sandbox_id, {**body, "pty": pty}, output)

    async def resize(rows: int, cols: int) -> None:
        with suppress(ConflictError, NotFoundError):  # the program ended meanwhile
            await execs.resize(sandbox_id, started.id, rows, cols)

    async def session(beside: asyncio.TaskGroup) -> int:
        tasks = [
            beside.create_task(feed(execs, sandbox_id, started.id, escape=Escape())),
            beside.create_task(terminal.watch_size(resize)),
        ]
        code = await follow(client, sandbox_id, started.id, output)
        for task in tasks:
            task.cancel()
        return code

    try:
        with terminal.raw(), output.on_raw_terminal():
            code = await _with_tasks(session)
            terminal.program_ended()
            return code
    except BaseException as reason:
        await undisturbed(_hang_up(client, sandbox_id, started.id, output))
        if isinstance(reason, Left):
            return INTERRUPTED
        raise


async def show_so_far(
    client: AsyncEighty80,
    sandbox_id: str,
    exec_id: str,
    output: Output,
    *,
    after: int | None = None,
    results: Results | None = None,
) -> None:
    """Print what the events have told so far. A stream of events does not say where that ends: it is where as
    much has come as there was when it began, or where nothing comes for a while."""
    execs = client.api.execs
    known = await execs.get(sandbox_id, exec_id)
    events, screen = execs.follow(sandbox_id, exec_id, after=after), Screen(output, results)
    if known.status != "running":
        await _show(events, screen)
        return
    countable = after is None and not known.results
    there = len(f"{known.stdout}{known.stderr}".encode(errors="replace")) if countable else math.inf
    async with aclosing(events):
        while screen.passed.total() < there:
            try:
                async with asyncio.timeout(QUIET_S):
                    event = await anext(events, None)
            except TimeoutError:
                return
            if event is None:
                return
            screen.show(event)


async def _show(
    events: AsyncGenerator[dict[str, Any]], screen: Screen, *, begun: Callable[[str], None] | None = None
) -> None:
    async with aclosing(events):
        async for event in events:
            if begun is not None and event["type"] == "exec.started":
                begun(event["exec"]["id"])
            screen.show(event)


async def _show_rest(client: AsyncEighty80, sandbox_id: str, screen: Screen) -> int:
    """Print what came after the recorded output was cut, where it goes into a pipe or a file and the sandbox
    has it; a part of an archive that looks like all of it is worse than an error."""
    result, output = screen.result, screen.output
    code = exit_code_of_program(result)
    if output.on_terminal or result.output_path is None:
        where = f"; all of it is in {result.output_path} in the sandbox" if result.output_path else ""
        output.warn(f"8080: the output was cut after {size(screen.passed.total())}{where}")
        return code if output.on_terminal else code or PLATFORM_FAILED
    kept = 0
    for stream in ("stdout", "stderr"):
        at, passed = 0, screen.passed[stream]
        path = f"{result.output_path}/{stream}"
        async with aclosing(client.api.files.chunks(sandbox_id, path)) as chunks:
            async for chunk in chunks:
                output.raw(stream, chunk[max(0, passed - at) :])
                at += len(chunk)
        kept += at
    if (kept >= SPOOL_BYTES and kept % MIB == 0) or kept <= screen.passed.total():
        output.warn(f"8080: the output was cut after {size(kept)}")
        return code or PLATFORM_FAILED
    if kept % MIB == 0:
        output.warn(f"8080: if this server keeps no more than {size(kept)}, the output was cut there")
    return code


async def _with_tasks(work: Callable[[asyncio.TaskGroup], Awaitable[T]]) -> T:
    """Do the work with tasks beside it. The first error of any of them ends all."""
    try:
        async with asyncio.TaskGroup() as beside:
            return await work(beside)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _started(
    client: AsyncEighty80, sandbox_id: str, body: Mapping[str, Any], output: Output
) -> ExecResult:
    """Start it. Whoever leaves while the server is at it waits for the answer, to hang up: nobody else would
    know its id."""

    async def start(beside: asyncio.TaskGroup) -> ExecResult:
        starting = beside.create_task(client.api.execs.start(sandbox_id, body))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await undisturbed(_abandon(client, sandbox_id, starting, output))
            raise

    return await _with_tasks(start)


async def _abandon(
    client: AsyncEighty80, sandbox_id: str, starting: asyncio.Task[ExecResult], output: Output
) -> None:
    await asyncio.wait([starting], timeout=HANG_UP_S)
    if not starting.done():
        starting.cancel()
    elif starting.exception() is None:
        await _hang_up(client, sandbox_id, starting.result().id, output)


async def _hang_up(client: AsyncEighty80, sandbox_id: str, exec_id: str, output: Output) -> None:
    try:
        async with asyncio.timeout(HANG_UP_S):
            await client.api.execs.signal(sandbox_id, exec_id, "SIGHUP")
    except (E80Error, TimeoutError):
        output.warn(f"8080: {exec_id} was left running; `8080 sandbox kill {sandbox_id} {exec_id}` ends it")


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
