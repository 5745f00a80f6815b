"""`8080 sandbox exec` and `run`: programs in a sandbox, with the terminal, the pipes and the exit code of
this side."""

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from e80_cli.commands.options import (
    AsJson,
    Cpu,
    Disk,
    Env,
    ExecTimeout,
    Image,
    Memory,
    SandboxId,
    Save,
    Stdin,
    sandbox_options,
)
from e80_cli.exits import OK, PLATFORM_FAILED
from e80_cli.output import Output
from e80_cli.script import Script
from e80_cli.session import run
from e80_cli.words import variables

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80

RUN_GRACE_S = 60
"""How much longer than its program a sandbox of `run` may live, should nobody be left to stop it."""


def execute(
    context: typer.Context,
    sandbox_id: SandboxId,
    command: Annotated[list[str] | None, typer.Argument(help="Program and arguments, after `--`.")] = None,
    code: Annotated[str | None, typer.Option("--code", "-c", help="Code to run instead.")] = None,
    language: Annotated[
        Literal["python", "bash"] | None, typer.Option("--language", help="Of --code; Python by itself.")
    ] = None,
    within: Annotated[
        str | None, typer.Option("--context", help="Run --code in this context.", metavar="CONTEXT")
    ] = None,
    stdin: Stdin = False,
    tty: Annotated[
        bool, typer.Option("--tty", "-t", help="Give it this terminal: keys, size, colours.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave it running, and print its id.")
    ] = False,
    user: Annotated[str | None, typer.Option("--user", "-u", help="user (as always) or nobody.")] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", help="Folder to run it in.")] = None,
    env: Env = None,
    timeout_s: ExecTimeout = None,
    save: Save = None,
    as_json: AsJson = False,
) -> int:
    """Run a program in a sandbox; output comes live, the exit code is the program's.

    With -it the program has your terminal, Ctrl-C included; `~.` at the beginning of a line leaves it. With
    -i alone it has your stdin, byte for byte. With -d it goes on by itself: see `8080 sandbox logs`. Without
    -t or -d Ctrl-C ends the program.

    Exit codes: the program's own, 128 + signal, 124 after a timeout, 125 when the platform failed. With
    --json the events of the run are printed, one a line.

    \b
    Examples:
      8080 sandbox exec -it sbx_0abc -- bash
      8080 sandbox exec sbx_0abc -- ls -la /home/user
      8080 sandbox exec sbx_0abc --code 'print(6*7)'
      8080 sandbox exec sbx_0abc --context ctx_0abc --code 'plt.plot(x)' --save plots
      tar c . | 8080 sandbox exec -i sbx_0abc -- tar x
      8080 sandbox exec -d sbx_0abc -- python3 -m http.server
    """
    output = Output(as_json=as_json)
    _check(command, code, tty=tty, detach=detach, stdin=stdin, as_json=as_json)
    if code is None and (within or language):
        raise typer.BadParameter("this is for --code", param_hint="--context" if within else "--language")
    program: dict[str, Any] = {"command": command} if code is None else {"code": code}
    options = {"language": language, "context": within, "user": user}
    body = program | {name: value for name, value in options.items() if value is not None}
    body |= _exec_options(cwd, env, timeout_s)

    async def work(client: "AsyncEighty80") -> int:
        # Terminals and asyncio are for those who run something.
        from e80_cli import execution  # noqa: PLC0415
        from e80_cli.showing import Results  # noqa: PLC0415

        if detach:
            started = await client.api.execs.start(sandbox_id, body)
            if as_json:
                output.data(started.raw)
            else:
                output.line(started.id)
                output.note(f"its output: `8080 sandbox logs -f {sandbox_id} {started.id}`")
            return OK
        if tty:
            return await execution.run_on_terminal(client, sandbox_id, body, output)
        results = Results(output, save)
        return await execution.run(client, sandbox_id, body, output, stdin=stdin, results=results)

    return run(context, output, work, platform_failed=PLATFORM_FAILED)


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
    body = _exec_options(None, env, timeout_s) | program.body
    options = sandbox_options(image, cpu_mhz, memory_size_mb, disk_size_mb, {}, {})
    if timeout_s is not None:
        options["timeout_s"] = timeout_s + RUN_GRACE_S

    async def work(client: "AsyncEighty80") -> int:
        from e80_sdk.sources import Source  # noqa: PLC0415

        from e80_cli import execution  # noqa: PLC0415

        async with client.sandbox(**options) as sandbox:
            if program.upload is not None:
                await client.api.files.write(sandbox.id, program.path, Source.of(program.upload))
            return await execution.run(client, sandbox.id, body, output, stdin=stdin)

    return run(context, output, work, platform_failed=PLATFORM_FAILED)


def _check(
    command: list[str] | None, code: str | None, *, tty: bool, detach: bool, stdin: bool, as_json: bool
) -> None:
    if (code is None) == (not command):
        raise typer.BadParameter("give either a command after `--` or --code CODE", param_hint="COMMAND")
    if detach and (tty or stdin):
        raise typer.BadParameter("nobody is there to type: leave -i and -t away", param_hint="--detach")
    if not tty:
        return
    if code is not None:
        raise typer.BadParameter("code has no terminal; run a command, such as python3", param_hint="--tty")
    if as_json:
        raise typer.BadParameter("a terminal takes no JSON: leave -t or --json away", param_hint="--tty")
    if not os.isatty(0):
        raise typer.BadParameter("stdin is no terminal: leave -t away", param_hint="--tty")


def _exec_options(cwd: str | None, env: list[str] | None, timeout_s: float | None) -> dict[str, Any]:
    options: dict[str, Any] = {"cwd": cwd, "env": variables(env) or None, "timeout_s": timeout_s}
    return {name: value for name, value in options.items() if value is not None}
