"""`8080 sandbox context`: interpreters that keep their state from one call to the next."""

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from e80_cli.amounts import span
from e80_cli.commands.options import AsJson, Env, SandboxId
from e80_cli.exits import OK
from e80_cli.output import Output, printable
from e80_cli.session import run, show_help
from e80_cli.words import variables

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80
    from e80_sdk.records import ContextInfo

group = typer.Typer(
    help="Interpreters that keep variables and imports: create, list, restart, interrupt, delete.",
    rich_markup_mode=None,
    invoke_without_command=True,
    callback=show_help,
)
ContextId = Annotated[str, typer.Argument(help="Id of a context.", metavar="CONTEXT")]


@group.command("create")
def create(
    context: typer.Context,
    sandbox_id: SandboxId,
    language: Annotated[
        Literal["python", "bash"], typer.Option("--language", help="What it runs.")
    ] = "python",
    cwd: Annotated[str | None, typer.Option("--cwd", help="Folder to start in.")] = None,
    env: Env = None,
    as_json: AsJson = False,
) -> int:
    """Start a context in a sandbox and print its id.

    \b
    Examples:
      ctx=$(8080 sandbox context create sbx_0abc)
      8080 sandbox exec sbx_0abc --context $ctx --code 'x = 41'
      8080 sandbox exec sbx_0abc --context $ctx --code 'x + 1'
      8080 sandbox context create sbx_0abc --language bash --cwd /tmp
    """
    output = Output(as_json=as_json)
    options: dict[str, Any] = {"language": language, "cwd": cwd, "env": variables(env) or None}
    body = {name: value for name, value in options.items() if value is not None}

    async def work(client: "AsyncEighty80") -> int:
        _print(await client.api.contexts.create(sandbox_id, body), output)
        return OK

    return run(context, output, work)


@group.command("list")
def list_contexts(context: typer.Context, sandbox_id: SandboxId, as_json: AsJson = False) -> int:
    """List the contexts of a sandbox; in a pipe, their ids alone.

    \b
    Examples:
      8080 sandbox context list sbx_0abc
      8080 sandbox context list sbx_0abc --json | jq '.data[] | select(.status == "lost")'
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        found = await client.api.contexts.list(sandbox_id)
        if as_json:
            output.data({"object": "list", "data": [one.raw for one in found]})
        elif output.on_terminal:
            columns = ("ID", "LANGUAGE", "STATUS", "RUNS", "AGE", "UNUSED FOR", "CWD")
            output.table(columns, [_row(one) for one in found])
        else:
            for one in found:
                output.line(one.id)
        return OK

    return run(context, output, work)


@group.command("restart")
def restart(
    context: typer.Context, sandbox_id: SandboxId, context_id: ContextId, as_json: AsJson = False
) -> int:
    """Give a context a new process; its state is gone, its id stays. Brings back one that is lost.

    \b
    Examples:
      8080 sandbox context restart sbx_0abc ctx_0abc
    """
    return _change(context, as_json, lambda client: client.api.contexts.restart(sandbox_id, context_id))


@group.command("interrupt")
def interrupt(
    context: typer.Context, sandbox_id: SandboxId, context_id: ContextId, as_json: AsJson = False
) -> int:
    """Interrupt what runs in a context, as Ctrl-C does; its state stays.

    \b
    Examples:
      8080 sandbox context interrupt sbx_0abc ctx_0abc
    """
    return _change(context, as_json, lambda client: client.api.contexts.interrupt(sandbox_id, context_id))


@group.command("delete")
def delete(
    context: typer.Context,
    sandbox_id: SandboxId,
    ids: Annotated[list[str], typer.Argument(help="Ids of contexts.", metavar="CONTEXT...")],
    as_json: AsJson = False,
) -> int:
    """End contexts, and print their ids. One that is gone already is no error.

    \b
    Examples:
      8080 sandbox context delete sbx_0abc ctx_0abc
      8080 sandbox context list sbx_0abc | xargs 8080 sandbox context delete sbx_0abc
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        for context_id in ids:
            await client.api.contexts.delete(sandbox_id, context_id)
            if as_json:
                output.data({"id": context_id, "object": "sandbox.context", "deleted": True})
            else:
                output.line(context_id)
        return OK

    return run(context, output, work)


def _change(
    context: typer.Context, as_json: bool, change: Callable[["AsyncEighty80"], Awaitable["ContextInfo"]]
) -> int:
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        _print(await change(client), output)
        return OK

    return run(context, output, work)


def _print(info: "ContextInfo", output: Output) -> None:
    if output.as_json:
        output.data(info.raw)
    else:
        output.line(info.id)


def _row(one: "ContextInfo") -> tuple[str, ...]:
    now = time.time()
    ages = ("" if at is None else span(now - at) for at in (one.created_at, one.last_used_at))
    return (one.id, one.language or "", one.status, str(one.executions), *ages, printable(one.cwd or ""))
