"""`8080 sandbox cp` and `8080 sandbox files`: files and folders of a sandbox."""

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from e80_cli.amounts import moment, size
from e80_cli.commands.options import AsJson, Limit, SandboxId
from e80_cli.exits import OK
from e80_cli.output import Output, printable
from e80_cli.places import parse_place
from e80_cli.session import run, show_help

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80
    from e80_sdk.records import FileEntry

group = typer.Typer(
    help="Look at, move and remove files of a sandbox; `8080 sandbox cp` copies them.",
    rich_markup_mode=None,
    invoke_without_command=True,
    callback=show_help,
)
Path = Annotated[str, typer.Argument(help="Path in the sandbox; relative to /home/user.", metavar="PATH")]
Folder = Annotated[str, typer.Argument(help="A folder; relative to /home/user.", metavar="PATH")]


def copy(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Local path, - for stdin, or ID:PATH.", metavar="SOURCE")],
    target: Annotated[str, typer.Argument(help="ID:PATH, local path, or - for stdout.", metavar="TARGET")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Folders, too.")] = False,
    as_json: AsJson = False,
) -> int:
    """Copy a file, or with -r a folder, to or from a sandbox.

    A file changes only when all of it has arrived. A target that is a folder, or ends in /, is where it goes
    under its own name. Paths in the sandbox may be relative to /home/user. A folder keeps modes, times and
    links that stay inside of it; a link out of it is refused.

    \b
    Examples:
      8080 sandbox cp data.csv sbx_0abc:data.csv
      8080 sandbox cp sbx_0abc:/home/user/plot.png .
      8080 sandbox cp -r src sbx_0abc:/home/user/
      8080 sandbox cp sbx_0abc:log.txt - | less
    """
    output = Output(as_json=as_json)
    origin, goal = parse_place(source), parse_place(target)
    if (origin is None) == (goal is None):
        raise typer.BadParameter(
            "exactly one of SOURCE and TARGET must be ID:PATH", param_hint="SOURCE TARGET"
        )
    if origin is not None and as_json and target == "-":
        raise typer.BadParameter("stdout cannot take the file and JSON; name a file", param_hint="TARGET")

    async def work(client: "AsyncEighty80") -> int:
        from e80_cli import transfer  # noqa: PLC0415 (asyncio, which other commands have no use for)

        if goal is not None:
            copied = await transfer.upload(client, source, goal, recursive=recursive)
        else:
            assert origin is not None
            copied = await transfer.download(client, origin, target, recursive=recursive)
        what = {"size": copied.size} if copied.entries is None else {"entries": copied.entries}
        if as_json:
            output.data({"source": source, "target": target, "path": copied.path, **what})
        else:
            amount = f"{copied.size} bytes" if copied.entries is None else f"{copied.entries} entries"
            output.note(f"{amount} -> {printable(copied.path)}")
        return OK

    return run(context, output, work)


@group.command("ls")
def list_files(
    context: typer.Context,
    sandbox_id: SandboxId,
    path: Folder = ".",
    limit: Limit = None,
    as_json: AsJson = False,
) -> int:
    """List a folder, by name; in a pipe, the names alone.

    \b
    Examples:
      8080 sandbox files ls sbx_0abc
      8080 sandbox files ls sbx_0abc /tmp --json | jq '.data[] | select(.type == "file").size'
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        async with aclosing(client.api.files.list(sandbox_id, path, limit=limit)) as coming:
            found = [entry async for entry in coming]
        if as_json:
            output.data({"object": "list", "data": [entry.raw for entry in found]})
        elif output.on_terminal:
            output.table(("NAME", "TYPE", "SIZE", "MODE", "OWNER", "MODIFIED"), [_row(one) for one in found])
        else:
            for entry in found:
                output.name(entry.name)
        return OK

    return run(context, output, work)


@group.command("stat")
def stat(
    context: typer.Context,
    sandbox_id: SandboxId,
    path: Path,
    follow: Annotated[bool, typer.Option("--follow", "-L", help="Where a link leads.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show what there is at a path.

    \b
    Examples:
      8080 sandbox files stat sbx_0abc data.csv
      8080 sandbox files stat sbx_0abc data.csv --json | jq .size
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        entry = await client.api.files.stat(sandbox_id, path, follow=follow)
        if as_json:
            output.data(entry.raw)
            return OK
        shown = {
            "path": entry.path,
            "type": entry.type,
            "size": str(entry.size),
            "mode": entry.mode or "-",
            "owner": entry.owner or "-",
            "modified": moment(entry.modified_at),
            "link to": entry.link_target or "-",
        }
        output.fields({name: printable(value) for name, value in shown.items()})
        return OK

    return run(context, output, work)


@group.command("mkdir")
def mkdir(
    context: typer.Context,
    sandbox_id: SandboxId,
    path: Path,
    mode: Annotated[str | None, typer.Option("--mode", "-m", help="Such as 0755.")] = None,
    as_json: AsJson = False,
) -> int:
    """Make a folder, and those above it. One that is there already is no error.

    \b
    Examples:
      8080 sandbox files mkdir sbx_0abc data/raw
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        _print(await client.api.files.mkdir(sandbox_id, path, mode=mode), output)
        return OK

    return run(context, output, work)


@group.command("mv")
def move(
    context: typer.Context,
    sandbox_id: SandboxId,
    source: Path,
    target: Annotated[str, typer.Argument(help="Its new path.", metavar="TARGET")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> int:
    """Give a file or folder another path. What is there already is replaced only with --force.

    \b
    Examples:
      8080 sandbox files mv sbx_0abc draft.md final.md
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        _print(await client.api.files.move(sandbox_id, source, target, overwrite=force), output)
        return OK

    return run(context, output, work)


@group.command("rm")
def remove(
    context: typer.Context,
    sandbox_id: SandboxId,
    path: Path,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="A folder with all that is in it.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Remove a file or an empty folder; with -r a folder and all that is in it.

    \b
    Examples:
      8080 sandbox files rm sbx_0abc old.csv
      8080 sandbox files rm -r sbx_0abc build
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        await client.api.files.remove(sandbox_id, path, recursive=recursive)
        if as_json:
            output.data({"path": path, "object": "sandbox.file", "deleted": True})
        return OK

    return run(context, output, work)


@group.command("url")
def url(
    context: typer.Context,
    sandbox_id: SandboxId,
    path: Path,
    method: Annotated[
        Literal["download", "upload"], typer.Option("--method", help="What it is for.")
    ] = "download",
    expires_in_s: Annotated[
        int, typer.Option("--expires-in-s", help="How long it works.", metavar="SECONDS")
    ] = 3600,
    as_json: AsJson = False,
) -> int:
    """Print an address for one file that works without a key, until it expires.

    \b
    Examples:
      curl -o plot.png "$(8080 sandbox files url sbx_0abc plot.png)"
      curl -T data.csv "$(8080 sandbox files url sbx_0abc data.csv --method upload)"
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        made = await client.api.files.url(sandbox_id, path, method, expires_in_s=expires_in_s)
        if as_json:
            output.data(made.raw)
        else:
            output.line(made.url)
            output.note(f"works until {moment(made.expires_at)}")
        return OK

    return run(context, output, work)


def _print(entry: "FileEntry", output: Output) -> None:
    if output.as_json:
        output.data(entry.raw)
    else:
        output.name(entry.path)


def _row(entry: "FileEntry") -> tuple[str, ...]:
    name = printable(entry.name)
    if entry.link_target is not None:
        name = f"{name} -> {printable(entry.link_target)}"
    much = size(entry.size) if entry.type == "file" else ""
    return (name, entry.type, much, entry.mode or "", entry.owner or "", moment(entry.modified_at))
