"""`8080 doctor`: what works and what does not, with a fix per line; this machine first, then the server."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from e80_sdk.config import ConfigFiles, Connection, config_dir, is_loopback, load_connection
from e80_sdk.errors import E80Error

from e80_cli.exits import FAILED, OK
from e80_cli.output import Output
from e80_cli.session import Login, login_of, run

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    message: str
    fix: str | None = None
    scope: Literal["client", "server"] = "client"


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check this machine's configuration and the server; say how to fix what is wrong.

    The exit code is 1 when a check fails.

    \b
    Examples:
      8080 doctor
      8080 doctor --json | jq '.data[] | select(.status != "ok")'
    """
    output = Output(as_json=as_json)
    login = login_of(context)
    checks: list[Check] = []
    isolation: dict[str, Any] = {}
    try:
        connection = load_connection(api_key=login.api_key, base_url=login.base_url)
    except E80Error as error:
        checks.append(Check("config", "fail", "", error.message, "repair the file or the variable"))
    else:
        checks += _local_checks(connection)

        async def work(client: "AsyncEighty80") -> int:
            await _server_checks(client, checks, isolation)
            return OK

        code = run(context, output, work)
        if code != OK:
            return code
    _report(output, checks, isolation)
    return FAILED if any(check.status == "fail" for check in checks) else OK


def _local_checks(connection: Connection) -> Iterator[Check]:
    files = ConfigFiles(config_dir())
    yield Check("server", "ok", connection.base_url, f"server from {connection.base_url_source}")
    if not connection.base_url.startswith("https:") and not is_loopback(connection.base_url):
        yield Check(
            "transport",
            "warn",
            connection.base_url,
            "the key travels unencrypted",
            "put TLS in front of the server and use https, or reach it through an SSH tunnel",
        )
    if connection.api_key is None:
        yield Check("api_key", "fail", "none", connection.missing_key(), "run `8080 apikey set -`")
    else:
        shown = f"{connection.api_key[:14]}..." if len(connection.api_key) > 20 else "set"
        yield Check("api_key", "ok", shown, f"key from {connection.api_key_source}")
    for path in (files.folder, files.credentials):
        yield from _permissions(path)


def _permissions(path: Path) -> Iterator[Check]:
    if not path.exists():
        return
    mode = path.stat().st_mode & 0o777
    unsafe = mode & (0o022 if path.is_dir() else 0o077)
    if unsafe:
        wanted = "go-w" if path.is_dir() else "600"
        message = f"{path} is open to other users (mode {mode:04o})"
        yield Check("permissions", "fail", str(path), message, f"chmod {wanted} {path}")
    else:
        yield Check("permissions", "ok", str(path), f"mode {mode:04o}")


async def _server_checks(client: "AsyncEighty80", checks: list[Check], isolation: dict[str, Any]) -> None:
    started = time.perf_counter()
    try:
        health = await client.health()
    except E80Error as error:
        fix = "start it with `scripts/up`, or set _8080_BASE_URL"
        checks.append(Check("reachable", "fail", client.connection.base_url, error.message, fix))
        return
    took = f"{(time.perf_counter() - started) * 1000:.0f} ms"
    checks.append(Check("reachable", "ok", took, f"server version {health.get('version', 'unknown')}"))
    if client.connection.api_key is None:
        return
    try:
        key = await client.request("GET", "/v1/apikeys/current")
    except E80Error as error:
        fix = "run `8080 apikey set -` with a key of this server; `sandboxd create-key` on its host makes one"
        checks.append(Check("api_key_valid", "fail", error.code, error.message, fix))
        return
    checks.append(Check("api_key_valid", "ok", str(key.get("id", "")), f"key {key.get('name')!r} is valid"))
    try:
        report = await client.request("GET", "/v1/doctor")
    except E80Error as error:
        fix = "see the server's log"
        checks.append(Check("server_checks", "fail", error.code, error.message, fix, "server"))
        return
    checks += [_server_check(item) for item in report.get("data", [])]
    isolation |= report.get("isolation") or {}


def _server_check(item: dict[str, Any]) -> Check:
    status = item.get("status")
    return Check(
        str(item.get("name", "")),
        status if status in ("ok", "warn") else "fail",
        str(item.get("value", "")),
        str(item.get("message") or ""),
        item.get("fix") or None,
        "server",
    )


def _report(output: Output, checks: list[Check], isolation: dict[str, Any]) -> None:
    if output.as_json:
        data = [asdict(check) for check in checks]
        output.data({"object": "list", "data": data, "isolation": isolation or None})
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = output.styled(f"{check.status:4}", _COLORS[check.status])
        text = "  ".join(part for part in (check.value, check.message) if part)
        fix = f"  -> fix: {check.fix}" if check.fix and check.status != "ok" else ""
        output.line(f"{mark}  {check.scope:6}  {check.name:{width}}  {text}{fix}")
    if isolation:
        output.line(f"isolation level {isolation.get('level')} ({isolation.get('runtime')})")


__all__ = ["Check", "Login", "doctor"]
