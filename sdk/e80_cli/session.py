"""One command against one server: log in, run, and turn what happens into an exit code."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from e80_sdk.errors import E80Error

from e80_cli.exits import FAILED, exit_code_of
from e80_cli.output import Output

if TYPE_CHECKING:
    from e80_sdk.client import AsyncEighty80

Work = Callable[["AsyncEighty80"], Awaitable[int]]


@dataclass(frozen=True)
class Login:
    """What the options before the command say about the server, the key and how long to wait."""

    base_url: str | None = None
    api_key: str | None = None
    patience_s: float | None = None


def login_of(context: typer.Context) -> Login:
    """The options before the command."""
    found = context.find_object(Login)
    return found or Login()


def show_help(context: typer.Context) -> None:
    """The callback of a group: its name alone asks for its help."""
    if context.invoked_subcommand is None:
        sys.stdout.write(f"{context.get_help()}\n")


def run(context: typer.Context, output: Output, work: Work, *, platform_failed: int = FAILED) -> int:
    """Do the work with a client and return the exit code; errors of the SDK are printed."""
    # asyncio and the HTTP stack take 150 ms to load: only commands that talk to a server pay for them.
    from e80_cli.event_loop import drive  # noqa: PLC0415

    try:
        return drive(work, login_of(context))
    except E80Error as error:
        output.error(error)
        return exit_code_of(error, platform_failed=platform_failed)
