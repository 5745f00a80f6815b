"""Entry point of `8080`: puts the command groups together and turns usage errors into exit code 64."""

# No `from __future__ import annotations` where typer reads them: it would compile each from its text again.
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from e80_cli.commands import apikey, history, sandbox
from e80_cli.commands.doctor import doctor
from e80_cli.commands.env import env
from e80_cli.exits import CANCELLED, FAILED, OK, USAGE
from e80_cli.session import Login, show_help

# Help is plain text: rich's would double the start-up time, and examples can be copied from plain text.
app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"max_content_width": 100}
)
app.add_typer(sandbox.group, name="sandbox")
app.add_typer(apikey.group, name="apikey")
app.command("events")(history.events)
app.command("usage")(history.usage)
app.command("audit")(history.audit)
app.command("env")(env)
app.command("doctor")(doctor)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="Server root; else _8080_BASE_URL, else the stored one.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="Key; else _8080_API_KEY (safer), else the stored one.")
    ] = None,
    patience_s: Annotated[
        float | None,
        typer.Option("--patience-s", min=0, help="How long to wait for a server that does not answer."),
    ] = None,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> int:
    """Run code in isolated sandboxes.

    \b
    Examples:
      8080 sandbox run script.py            create, run, stop; the script's exit code
      id=$(8080 sandbox create)             a sandbox to keep
      8080 sandbox exec $id -- ls -la
      8080 events --follow                  what happens to sandboxes
      8080 usage --from 7d                  what they used
      8080 doctor                           what is wrong, and how to fix it
    """
    context.obj = Login(base_url, api_key, patience_s)
    if show_version:
        from importlib.metadata import version  # noqa: PLC0415 (20 ms, for this option alone)

        sys.stdout.write(f"8080 {version('e80')}\n")
        raise typer.Exit(OK)
    show_help(context)
    return OK


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code = app(list(arguments), prog_name="8080", standalone_mode=False)
    except TyperException as exc:
        return _usage_error(exc)
    except Abort:
        sys.stderr.write("cancelled\n")
        return CANCELLED
    return code if isinstance(code, int) else OK


def main() -> None:
    """The console script."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more. Python would say so again when it closes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or FAILED
    sys.exit(code)


def _usage_error(exc: TyperException) -> int:
    context = getattr(exc, "ctx", None)
    sys.stderr.write(f"error: {exc.format_message()}\n")
    if context is not None:
        sys.stderr.write(f"{context.get_usage()}\nhint: `{context.command_path} --help` shows examples\n")
    # 2 is "cancelled" here; typer means "wrong usage" by it
    return USAGE if exc.exit_code == 2 else FAILED
