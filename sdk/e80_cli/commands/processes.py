"""`8080 sandbox ps`, `logs` and `kill`: what runs in a sandbox, what it says, and its end."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from e80_sdk.errors import E80Error

from e80_cli.amounts import span
from e80_cli.commands.options import AsJson, Limit, SandboxId, Save
from e80_cli.exits import OK, PLATFORM_FAILED, exit_code_of
from e80_cli.output import Output, printable
from e80_cli.session import run

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80
    from e80_sdk.records import ExecInfo

TITLE_CHARACTERS = 60
ExecIds = Annotated[list[str], typer.Argument(help="Ids of execs.", metavar="EXEC...")]


def ps(
    context: typer.Context,
    sandbox_id: SandboxId,
    every: Annotated[bool, typer.Option("--all", "-a", help="Those that have ended, too.")] = False,
    limit: Limit = None,
    as_json: AsJson = False,
) -> int:
    """List what runs in a sandbox, newest first; in a pipe, the ids alone.

    \b
    Examples:
      8080 sandbox ps sbx_0abc
      8080 sandbox ps --all --limit 20 sbx_0abc
      8080 sandbox ps sbx_0abc | xargs 8080 sandbox kill sbx_0abc
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        status = None if every else "running"
        found = await client.api.execs.list(sandbox_id, status=status, limit=limit)
        if as_json:
            output.data({"object": "list", "data": [one.raw for one in found]})
        elif output.on_terminal:
            columns = ("ID", "KIND", "STATUS", "AGE", "CONTEXT", "TITLE")
            output.table(columns, [_row(one) for one in found])
        else:
            for one in found:
                output.line(one.id)
        return OK

    return run(context, output, work)


def logs(
    context: typer.Context,
    sandbox_id: SandboxId,
    exec_id: Annotated[
        str | None, typer.Argument(help="Id of an exec; the newest by itself.", metavar="EXEC")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until it ends.")] = False,
    after: Annotated[
        int | None, typer.Option("--after", min=0, help="What comes after that event.", metavar="NUMBER")
    ] = None,
    save: Save = None,
    as_json: AsJson = False,
) -> int:
    """Print what an exec has written so far, to stdout and stderr as it did.

    With --follow it goes on to the end, over restarts of the server too, and the exit code is the program's;
    Ctrl-C leaves the program alone. Output that is not kept any more is missed, and stderr says so. With
    --json the events are printed, whose `sequence_number` is what --after takes.

    \b
    Examples:
      8080 sandbox logs sbx_0abc
      8080 sandbox logs -f sbx_0abc exec_0abc
      8080 sandbox logs sbx_0abc exec_0abc --json | tail -n 1 | jq .sequence_number
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        from e80_cli import execution  # noqa: PLC0415 (asyncio, which other commands have no use for)
        from e80_cli.showing import Results  # noqa: PLC0415

        wanted = exec_id or await _newest(client, sandbox_id)
        results = Results(output, save)
        if follow:
            return await execution.follow(client, sandbox_id, wanted, output, after=after, results=results)
        await execution.show_so_far(client, sandbox_id, wanted, output, after=after, results=results)
        return OK

    return run(context, output, work, platform_failed=PLATFORM_FAILED)


def kill(
    context: typer.Context,
    sandbox_id: SandboxId,
    exec_ids: ExecIds,
    signal: Annotated[
        str, typer.Option("--signal", "-s", help="Name or number; KILL ends all that it started.")
    ] = "TERM",
    as_json: AsJson = False,
) -> int:
    """Send a signal to execs, and print their ids. One that has ended already is no error.

    \b
    Examples:
      8080 sandbox kill sbx_0abc exec_0abc
      8080 sandbox kill -s INT sbx_0abc exec_0abc
      8080 sandbox ps sbx_0abc | xargs 8080 sandbox kill --signal KILL sbx_0abc
    """
    output = Output(as_json=as_json)
    wanted = int(signal) if signal.isdigit() else signal

    async def work(client: "AsyncEighty80") -> int:
        code = OK
        for exec_id in exec_ids:
            try:
                delivered = await client.api.execs.signal(sandbox_id, exec_id, wanted)
            except E80Error as error:
                output.error(error)
                code = exit_code_of(error)
                continue
            if as_json:
                output.data({"exec_id": exec_id, "signal": signal, "delivered": delivered})
                continue
            output.line(exec_id)
            if not delivered:
                output.note(f"{exec_id} had ended already")
        return code

    return run(context, output, work)


async def _newest(client: "AsyncEighty80", sandbox_id: str) -> str:
    for one in await client.api.execs.list(sandbox_id, limit=1):
        return one.id
    raise E80Error(f"nothing has run in {sandbox_id} yet", code="exec_not_found")


def _row(one: "ExecInfo") -> tuple[str, ...]:
    end = one.signal or one.exit_code
    status = one.status if end is None or one.status == "completed" else f"{one.status} ({end})"
    age = "" if one.started_at is None else span(time.time() - one.started_at)
    title = printable((one.title or "").split("\n", 1)[0])
    if len(title) > TITLE_CHARACTERS:
        title = f"{title[: TITLE_CHARACTERS - 1]}…"
    return (one.id, one.kind or "", status, age, one.context or "", title)
