"""`8080 sandbox`: create, list, get and stop sandboxes; run programs in them; copy files."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from e80_sdk.options import SandboxOptions

from e80_cli import transfer
from e80_cli.amounts import moment, span
from e80_cli.amounts import pairs as words_of
from e80_cli.batch import for_each
from e80_cli.commands import changes, history
from e80_cli.commands.options import (
    AsJson,
    Cpu,
    Disk,
    Env,
    ExecTimeout,
    IdleTimeout,
    Image,
    Label,
    LifeTime,
    Limit,
    Memory,
    SandboxId,
    SandboxIds,
    Stdin,
)
from e80_cli.execution import follow
from e80_cli.exits import FAILED, OK, PLATFORM_FAILED
from e80_cli.output import Output
from e80_cli.script import Script
from e80_cli.session import run, show_help
from e80_cli.words import pairs, seconds, text_of, variables

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80
    from e80_sdk.results import SandboxInfo

RUN_GRACE_S = 60
"""How much longer than its program a sandbox of `run` may live, should nobody be left to stop it."""

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
    options = _options(image, cpu_mhz, memory_size_mb, disk_size_mb, labels, variables(env))
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


@group.command("exec")
def execute(
    context: typer.Context,
    sandbox_id: SandboxId,
    command: Annotated[list[str] | None, typer.Argument(help="Program and arguments, after `--`.")] = None,
    code: Annotated[str | None, typer.Option("--code", "-c", help="Python code to run instead.")] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", help="Folder to run it in.")] = None,
    env: Env = None,
    timeout_s: ExecTimeout = None,
    stdin: Stdin = False,
    as_json: AsJson = False,
) -> int:
    """Run a program in a sandbox; output comes live, the exit code is the program's.

    Exit codes: the program's own, 128 + signal, 124 after a timeout, 125 when the platform failed. With
    --json the events of the run are printed, one a line.

    \b
    Examples:
      8080 sandbox exec sbx_0abc -- ls -la /home/user
      8080 sandbox exec sbx_0abc --code 'print(6*7)'
      8080 sandbox exec sbx_0abc -- bash -c 'wc -l < data.csv'
      8080 sandbox exec sbx_0abc -i -- tr a-z A-Z < notes.txt
    """
    output = Output(as_json=as_json)
    if (code is None) == (not command):
        raise typer.BadParameter("give either a command after `--` or --code CODE", param_hint="COMMAND")
    program: dict[str, Any] = {"command": command} if code is None else {"code": code, "language": "python"}
    body = program | _exec_options(cwd, env, timeout_s, stdin)

    async def work(client: "AsyncEighty80") -> int:
        return await follow(client, sandbox_id, body, output)

    return run(context, output, work, platform_failed=PLATFORM_FAILED)


@group.command("run", context_settings={"allow_interspersed_args": False})
def run_script(
    context: typer.Context,
    script: Annotated[
        str | None, typer.Argument(help="Script file, or - for stdin.", metavar="SCRIPT")
    ] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.", metavar="ARGS")] = None,
    code: Annotated[str | None, typer.Option("--code", "-c", help="Python code instead of a script.")] = None,
    image: Image = None,
    cpu_mhz: Cpu = None,
    memory_size_mb: Memory = None,
    disk_size_mb: Disk = None,
    env: Env = None,
    timeout_s: ExecTimeout = None,
    stdin: Stdin = False,
    as_json: AsJson = False,
) -> int:
    """Run a Python script in a sandbox of its own, which is stopped whatever happens.

    Options come before the script; what follows it belongs to the script. Output comes live and byte for
    byte. Exit codes: the script's own, 128 + signal, 124 after a timeout, 125 when the platform failed.
    With --json the events of the run are printed, one a line.

    \b
    Examples:
      8080 sandbox run script.py
      8080 sandbox run --timeout-s 600 --memory-size-mb 2048 train.py --epochs 3
      8080 sandbox run -c 'import sys; print(sys.version)'
      cat script.py | 8080 sandbox run -
    """
    output = Output(as_json=as_json)
    program = Script.of(code, [*([] if script is None else [script]), *(arguments or [])], stdin=stdin)
    body = _exec_options(None, env, timeout_s, stdin and not program.takes_stdin) | program.body
    options = _options(image, cpu_mhz, memory_size_mb, disk_size_mb, {}, {})
    if timeout_s is not None:
        options["timeout_s"] = timeout_s + RUN_GRACE_S

    async def work(client: "AsyncEighty80") -> int:
        async with client.sandbox(**options) as sandbox:
            if program.upload is not None:
                await client.api.write_file(sandbox.id, program.path, program.upload)
            return await follow(client, sandbox.id, body, output)

    return run(context, output, work, platform_failed=PLATFORM_FAILED)


@group.command("cp")
def copy(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Local path, - for stdin, or ID:PATH.", metavar="SOURCE")],
    target: Annotated[str, typer.Argument(help="ID:PATH, local path, or - for stdout.", metavar="TARGET")],
    as_json: AsJson = False,
) -> int:
    """Copy a file to or from a sandbox. The target changes only when all of the file has arrived.

    A target that ends in / is a folder. Paths in the sandbox may be relative to /home/user.

    \b
    Examples:
      8080 sandbox cp data.csv sbx_0abc:data.csv
      8080 sandbox cp sbx_0abc:/home/user/plot.png .
      8080 sandbox cp sbx_0abc:log.txt - | less
    """
    output = Output(as_json=as_json)
    origin, goal = transfer.parse_place(source), transfer.parse_place(target)
    if (origin is None) == (goal is None):
        raise typer.BadParameter(
            "exactly one of SOURCE and TARGET must be ID:PATH", param_hint="SOURCE TARGET"
        )
    if origin is not None and as_json and target == "-":
        raise typer.BadParameter("stdout cannot take the file and JSON; name a file", param_hint="TARGET")

    async def work(client: "AsyncEighty80") -> int:
        if goal is not None:
            path, size = await transfer.upload(client, source, goal)
        else:
            assert origin is not None
            path, size = await transfer.download(client, origin, target)
        if as_json:
            output.data({"source": source, "target": target, "path": path, "size": size})
        else:
            output.note(f"{size} bytes -> {path}")
        return OK

    return run(context, output, work, platform_failed=FAILED)


def _options(
    image: str | None,
    cpu_mhz: int | None,
    memory_size_mb: int | None,
    disk_size_mb: int | None,
    labels: dict[str, str],
    env: dict[str, str],
) -> SandboxOptions:
    options: SandboxOptions = {}
    if image is not None:
        options["image"] = image
    if cpu_mhz is not None:
        options["cpu_mhz"] = cpu_mhz
    if memory_size_mb is not None:
        options["memory_size_mb"] = memory_size_mb
    if disk_size_mb is not None:
        options["disk_size_mb"] = disk_size_mb
    if labels:
        options["labels"] = labels
    if env:
        options["env"] = env
    return options


def _exec_options(
    cwd: str | None, env: list[str] | None, timeout_s: float | None, stdin: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"cwd": cwd, "env": variables(env) or None, "timeout_s": timeout_s}
    if stdin:
        options["stdin"] = text_of("stdin", sys.stdin.buffer.read())
    return {name: value for name, value in options.items() if value is not None}


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
