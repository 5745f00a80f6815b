"""`8080 sandbox pause`, `resume` and `update`: what can be done to a sandbox between its start and its
end."""

from typing import TYPE_CHECKING

import typer
from e80_sdk.options import SandboxChanges

from e80_cli.batch import for_each
from e80_cli.commands.options import AsJson, Cpu, IdleTimeout, Label, LifeTime, Memory, SandboxId, SandboxIds
from e80_cli.exits import OK
from e80_cli.output import Output
from e80_cli.session import run
from e80_cli.words import pairs, seconds

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80


def pause(context: typer.Context, ids: SandboxIds, as_json: AsJson = False) -> int:
    """Halt sandboxes and print their ids: memory is kept, no CPU is used. A paused one is no error.

    \b
    Examples:
      8080 sandbox pause sbx_0abc
      8080 sandbox list --label job=42 | xargs 8080 sandbox pause
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        return await for_each(ids, client.api.pause, output)

    return run(context, output, work)


def resume(context: typer.Context, ids: SandboxIds, as_json: AsJson = False) -> int:
    """Let paused sandboxes go on where they were, and print their ids. A running one is no error.

    \b
    Examples:
      8080 sandbox resume sbx_0abc
      8080 sandbox list --status paused | xargs 8080 sandbox resume
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        return await for_each(ids, client.api.resume, output)

    return run(context, output, work)


def update(
    context: typer.Context,
    sandbox_id: SandboxId,
    timeout_s: LifeTime = None,
    idle_timeout_s: IdleTimeout = None,
    label: Label = None,
    cpu_mhz: Cpu = None,
    memory_size_mb: Memory = None,
    as_json: AsJson = False,
) -> int:
    """Change a sandbox while it runs, and print its id. What is not named stays as it is.

    --timeout-s counts from now. Labels that are given replace all that it has.

    \b
    Examples:
      8080 sandbox update sbx_0abc --timeout-s 3600
      8080 sandbox update sbx_0abc --idle-timeout none --memory-size-mb 2048
      8080 sandbox update sbx_0abc --label job=42 --label stage=test --json
    """
    output = Output(as_json=as_json)
    changes: SandboxChanges = {}
    if timeout_s is not None:
        changes["timeout_s"] = seconds("--timeout-s", timeout_s)
    if idle_timeout_s is not None:
        changes["idle_timeout_s"] = seconds("--idle-timeout", idle_timeout_s)
    if label is not None:
        changes["labels"] = pairs("--label", label)
    if cpu_mhz is not None:
        changes["cpu_mhz"] = cpu_mhz
    if memory_size_mb is not None:
        changes["memory_size_mb"] = memory_size_mb
    if not changes:
        raise typer.BadParameter("name something to change, such as --timeout-s 3600", param_hint="OPTIONS")

    async def work(client: "AsyncEighty80") -> int:
        info = await client.api.update(sandbox_id, changes)
        if as_json:
            output.data(info.raw)
        else:
            output.line(info.id)
        return OK

    return run(context, output, work)
