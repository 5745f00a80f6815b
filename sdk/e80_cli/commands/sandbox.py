"""`8080 sandbox`: create, list, get and stop sandboxes; run programs in them; copy files."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e80_cli.amounts import moment, span
from e80_cli.amounts import pairs as words_of
from e80_cli.batch import for_each
from e80_cli.commands import changes, contexts, execute, files, history, processes
from e80_cli.commands.options import (
    AsJson,
    Cpu,
    Disk,
    Env,
    IdleTimeout,
    Image,
    Label,
    LifeTime,
    Limit,
    Memory,
    SandboxId,
    SandboxIds,
    sandbox_options,
)
from e80_cli.exits import OK
from e80_cli.output import Output
from e80_cli.session import run, show_help
from e80_cli.words import pairs, seconds, variables

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80
    from e80_sdk.results import SandboxInfo

group = typer.Typer(
    help="Create sandboxes, run programs in them, copy files, pause and change them.",
    rich_markup_mode=None,
    invoke_without_command=True,
    callback=show_help,
)


@group.command("create")
def create(
    context: typer.Context,
    image: Image = None,
    cpu_mhz: Cpu = None,
    memory_size_mb: Memory = None,
    disk_size_mb: Disk = None,
    timeout_s: LifeTime = None,
    idle_timeout_s: IdleTimeout = None,
    label: Label = None,
    env: Env = None,
    as_json: AsJson = False,
) -> int:
    """Start a sandbox and print its id.

    \b
    Examples:
      id=$(8080 sandbox create)
      8080 sandbox create --image python:3.12 --memory-size-mb 1024 --timeout-s 3600
      8080 sandbox create --timeout-s none --idle-timeout 600
      8080 sandbox create --label job=42 --env STAGE=test --json
    """
    output = Output(as_json=as_json)
    labels = pairs("--label", label)
    options = sandbox_options(image, cpu_mhz, memory_size_mb, disk_size_mb, labels, variables(env))
    if timeout_s is not None:
        options["timeout_s"] = seconds("--timeout-s", timeout_s)
    if idle_timeout_s is not None:
        options["idle_timeout_s"] = seconds("--idle-timeout", idle_timeout_s)

    async def work(client: "AsyncEighty80") -> int:
        info = await client.api.create(options)
        if as_json:
            output.data(info.raw)
        else:
            output.line(info.id)
            output.note(f"running{_until(info)}; stop it with `8080 sandbox stop {info.id}`")
        return OK

    return run(context, output, work)


@group.command("list")
def list_sandboxes(
    context: typer.Context,
    status: Annotated[
        str | None, typer.Option("--status", help="Only that status; `all` shows ended ones too.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Only those with this label, KEY=VALUE; repeatable.")
    ] = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> int:
    """List sandboxes, newest first; in a pipe, their ids alone.

    \b
    Examples:
      8080 sandbox list
      8080 sandbox list --status all --limit 10
      8080 sandbox list --status paused --label job=42
      8080 sandbox list --json | jq -r '.data[].id'
      8080 sandbox list | xargs 8080 sandbox stop
    """
    output = Output(as_json=as_json)
    labels = pairs("--label", label)

    async def work(client: "AsyncEighty80") -> int:
        found = await client.api.list(status=status, labels=labels, limit=limit)
        if as_json:
            output.data({"object": "list", "data": [info.raw for info in found]})
        elif output.on_terminal:
            output.table(("ID", "STATUS", "IMAGE", "AGE", "ENDS", "LABELS"), [_row(info) for info in found])
        else:
            for info in found:
                output.line(info.id)
        return OK

    return run(context, output, work)


@group.command("get")
def get(context: typer.Context, sandbox_id: SandboxId, as_json: AsJson = False) -> int:
    """Show a sandbox, alive or ended.

    \b
    Examples:
      8080 sandbox get sbx_0abc
      8080 sandbox get sbx_0abc --json | jq -r .termination_reason
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        info = await client.api.get(sandbox_id)
        if as_json:
            output.data(info.raw)
        else:
            output.fields({name: _shown(name, value) for name, value in info.raw.items() if name != "object"})
        return OK

    return run(context, output, work)


@group.command("stop")
def stop(
    context: typer.Context,
    ids: SandboxIds,
    as_json: AsJson = False,
) -> int:
    """Stop sandboxes and print their ids. One that has ended already is no error.

    \b
    Examples:
      8080 sandbox stop sbx_0abc
      8080 sandbox list | xargs 8080 sandbox stop
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        return await for_each(ids, client.api.stop, output)

    return run(context, output, work)


group.command("pause")(changes.pause)
group.command("resume")(changes.resume)
group.command("update")(changes.update)
group.command("execs")(history.execs)


group.command("ps")(processes.ps)
group.command("logs")(processes.logs)
group.command("kill")(processes.kill)
group.add_typer(contexts.group, name="context")
group.command("exec")(execute.execute)
group.command("cp")(files.copy)
group.add_typer(files.group, name="files")
group.command("run", context_settings={"allow_interspersed_args": False})(execute.run_script)


def _row(info: "SandboxInfo") -> tuple[str, ...]:
    status = info.status if info.termination_reason is None else f"{info.status} ({info.termination_reason})"
    now = time.time()
    age = "" if info.created_at is None else span(now - info.created_at)
    ends = "" if info.expires_at is None or not info.alive else f"in {span(info.expires_at - now)}"
    return (info.id, status, info.image or "", age, ends, words_of(dict(info.labels)))


def _until(info: "SandboxInfo") -> str:
    return "" if info.expires_at is None else f" for {span(info.expires_at - time.time())}"


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_at") and isinstance(value, int | float):
        return moment(value)
    if isinstance(value, dict):
        return words_of(value) or "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return str(value)
