"""`8080 events`, `usage`, `audit` and `sandbox execs`: what happened, and what it took."""

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from e80_cli.amounts import hours, moment, pairs, size
from e80_cli.commands.options import AsJson, Limit, SandboxId
from e80_cli.exits import OK
from e80_cli.output import Output
from e80_cli.session import run
from e80_cli.words import instant

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80
    from e80_sdk.records import AuditEntry, ExecInfo, SandboxEvent, UsageRow

EVENTS = 50


def execs(context: typer.Context, sandbox_id: SandboxId, limit: Limit = None, as_json: AsJson = False) -> int:
    """List what ran and runs in a sandbox, newest first; in a pipe, the ids alone.

    \b
    Examples:
      8080 sandbox execs sbx_0abc
      8080 sandbox execs sbx_0abc --json | jq '.data[] | select(.status != "completed")'
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        found = await client.api.execs.list(sandbox_id, limit=limit)
        if as_json:
            output.data({"object": "list", "data": [one.raw for one in found]})
        elif output.on_terminal:
            output.table(("ID", "STATUS", "EXIT", "KIND", "STARTED", "TOOK"), [_exec(one) for one in found])
        else:
            for one in found:
                output.line(one.id)
        return OK

    return run(context, output, work)


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and print what comes.")] = False,
    sandbox_id: Annotated[
        str | None, typer.Option("--sandbox", help="Of this sandbox.", metavar="ID")
    ] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Of this type, as sandbox.stopped.")] = None,
    after: Annotated[str | None, typer.Option("--after", help="After this event.", metavar="ID")] = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> int:
    """Print what happened to sandboxes, oldest first, one event a line.

    Without --follow, the last 50, or all after --after. With it, what happens from now on, or after --after,
    until Ctrl-C; when the server restarts it goes on after the last event that it printed.

    \b
    Examples:
      8080 events
      8080 events --follow
      8080 events -f --type sandbox.failed --json | jq -r .sandbox_id
      8080 events --sandbox sbx_0abc
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        found = client.api.history.events
        if follow or after is not None:
            following = found(follow=follow, sandbox_id=sandbox_id, type=kind, after=after, limit=limit)
            async with aclosing(following) as coming:
                async for event in coming:
                    _print(event, output)
                    output.flush()
            return OK
        newest = found(sandbox_id=sandbox_id, type=kind, limit=limit or EVENTS, order="desc")
        for event in [one async for one in newest][::-1]:
            _print(event, output)
        return OK

    return run(context, output, work)


def usage(
    context: typer.Context,
    start: Annotated[str | None, typer.Option("--from", help="From then on.", metavar="TIME")] = None,
    end: Annotated[str | None, typer.Option("--to", help="Up to then; else now.", metavar="TIME")] = None,
    bucket: Annotated[Literal["hour", "day"], typer.Option("--bucket", help="What a row covers.")] = "day",
    as_json: AsJson = False,
) -> int:
    """Show what the project used, by the day or the hour, and in all; the last 30 days unless told otherwise.

    TIME is a day or a time of your clock (2026-11-21, 2026-11-21T08:00), Unix seconds, or how long ago
    (90m, 24h, 7d).

    \b
    Examples:
      8080 usage
      8080 usage --from 24h --bucket hour
      8080 usage --from 2026-11-01 --to 2026-12-01 --json | jq .total
    """
    output = Output(as_json=as_json)
    times = (
        None if start is None else instant("--from", start),
        None if end is None else instant("--to", end),
    )

    async def work(client: "AsyncEighty80") -> int:
        used = await client.api.history.usage(*times, bucket)
        if as_json:
            output.data(used.raw)
            return OK
        columns = ("START", "SANDBOX TIME", "CPU TIME", "IN", "OUT", "EXECS", "SANDBOXES")
        rows = [(moment(row.start)[: 10 if bucket == "day" else 16], *_used(row)) for row in used.rows]
        output.rows(columns, [*rows, ("total", *_used(used.total))])
        return OK

    return run(context, output, work)


def audit(
    context: typer.Context,
    action: Annotated[str | None, typer.Option("--action", help="Only this action.")] = None,
    resource_id: Annotated[
        str | None, typer.Option("--resource", help="Only on this id.", metavar="ID")
    ] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> int:
    """Show who changed what, newest first.

    \b
    Examples:
      8080 audit
      8080 audit --resource sbx_0abc
      8080 audit --limit 500 --json | jq -r '.data[].actor' | sort | uniq -c
    """
    output = Output(as_json=as_json)

    async def work(client: "AsyncEighty80") -> int:
        found = await client.api.history.audit(action=action, resource_id=resource_id, limit=limit)
        if as_json:
            output.data({"object": "list", "data": [entry.raw for entry in found]})
        else:
            columns = ("TIME", "ACTION", "RESOURCE", "ACTOR", "CLIENT", "DETAILS")
            output.rows(columns, [_entry(entry) for entry in found])
        return OK

    return run(context, output, work)


def _exec(one: "ExecInfo") -> tuple[str, ...]:
    end = one.signal or ("" if one.exit_code is None else str(one.exit_code))
    took = "" if one.duration_ms is None else hours(one.duration_ms / 1000)
    return (one.id, one.status, end, one.kind or "", moment(one.started_at), took)


def _print(event: "SandboxEvent", output: Output) -> None:
    if output.as_json:
        output.data(event.raw)
        return
    words = (moment(event.created_at), f"{event.sandbox_id:38}", f"{event.type:16}", pairs(event.data))
    output.line("  ".join(words).rstrip())


def _used(row: "UsageRow") -> tuple[str, ...]:
    amounts = (hours(row.sandbox_seconds), hours(row.cpu_seconds), size(row.bytes_in), size(row.bytes_out))
    return (*amounts, str(row.execs), str(row.sandboxes))


def _entry(entry: "AuditEntry") -> tuple[str, ...]:
    who = (entry.action, entry.resource_id or "-", entry.actor or "-", entry.client or "-")
    return (moment(entry.created_at), *who, pairs(entry.details))
