"""`8080 apikey`: the keys of the project, and the one this machine uses."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from e80_sdk.config import ConfigFiles, config_dir, load_connection
from e80_sdk.errors import E80Error

from e80_cli.exits import CANCELLED, OK, USAGE, exit_code_of
from e80_cli.output import Output
from e80_cli.session import login_of, run, show_help

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80

group = typer.Typer(
    help="Create, list and revoke API keys; store the one to use.",
    rich_markup_mode=None,
    invoke_without_command=True,
    callback=show_help,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: one object a line.")]


@group.command("set")
def set_key(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="The key, or - to read it from stdin.", metavar="KEY|-")] = "-",
    base_url: Annotated[str | None, typer.Option("--base-url", help="Server that the key is for.")] = None,
    as_json: AsJson = False,
) -> int:
    """Store the key (and the server) that this user's commands and programs use. The file is mode 0600.

    \b
    Examples:
      8080 apikey set -                     (asks, or reads stdin)
      8080 apikey set --base-url http://10.0.0.5:8080 - < key.txt
    """
    output = Output(as_json=as_json)
    if key != "-":
        output.warn("warning: a key typed here stays in the shell's history; use `8080 apikey set -`")
    else:
        key = _ask_key()
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        output.warn("error: that is no API key: it must be one line of letters, digits and signs")
        return USAGE
    login = login_of(context)
    try:
        server = load_connection(base_url=base_url or login.base_url).base_url
        files = _files()
        files.store_key(server, key)
    except (E80Error, OSError) as exc:
        error = exc if isinstance(exc, E80Error) else E80Error(f"cannot store the key: {exc}", code="local")
        output.error(error)
        return exit_code_of(error)
    if as_json:
        output.data({"base_url": server, "credentials": str(files.credentials)})
    else:
        output.note(f"stored the key for {server} in {files.credentials}")
    return OK


@group.command("list")
def list_keys(context: typer.Context, as_json: AsJson = False) -> int:
    """List the project's keys; in a pipe, their ids alone.

    \b
    Examples:
      8080 apikey list
      8080 apikey list --json | jq -r '.data[] | select(.revoked_at == null).id'
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        found = [key async for key in client.api.pages("/v1/apikeys", {})]
        if as_json:
            output.data({"object": "list", "data": found})
        elif output.on_terminal:
            output.table(
                ("ID", "NAME", "PREFIX", "CREATED", "LAST USED", "STATE"), [_row(key) for key in found]
            )
        else:
            for key in found:
                output.line(str(key["id"]))
        return OK

    return run(context, output, work)


@group.command("create")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    as_json: AsJson = False,
) -> int:
    """Create a key and print it. It is shown this once; the server keeps only its hash.

    \b
    Examples:
      8080 apikey create ci
      8080 apikey create laptop | ssh laptop 8080 apikey set -
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        made = await client.request("POST", "/v1/apikeys", {"name": name}, idempotency_key=True)
        if as_json:
            output.data(made)
        else:
            output.line(str(made["key"]))
            output.note(f"{made['id']}: keep the key now, it cannot be shown again")
        return OK

    return run(context, output, work)


@group.command("revoke")
def revoke(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(help="Ids of keys.", metavar="ID...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> int:
    """Revoke keys, at once and for good.

    \b
    Examples:
      8080 apikey revoke key_0f3a9
      8080 apikey revoke --yes key_0f3a9
    """
    output = Output(as_json=as_json)
    if sys.stdin.isatty() and not yes and not typer.confirm(f"Revoke {', '.join(ids)} for good?", err=True):
        output.warn("nothing was revoked")
        return CANCELLED

    async def work(client: "AsyncEighty80") -> int:
        code = OK
        for key_id in ids:
            try:
                gone = await client.request("POST", f"/v1/apikeys/{key_id}/revoke", {})
            except E80Error as error:
                output.error(error)
                code = exit_code_of(error)
                continue
            if as_json:
                output.data(gone)
            else:
                output.line(str(gone["id"]))
        return code

    return run(context, output, work)


def _files() -> ConfigFiles:
    return ConfigFiles(config_dir())


def _ask_key() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("API key", hide_input=True, err=True))
    return sys.stdin.readline()


def _row(key: dict[str, Any]) -> tuple[str, ...]:
    state = "revoked" if key.get("revoked_at") else "active"
    times = (_day(key["created_at"]), _day(key["last_used_at"]))
    return (str(key["id"]), str(key["name"]), str(key["prefix"]), *times, state)


def _day(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
