"""Arguments and options that several commands share."""

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SandboxId = Annotated[str, typer.Argument(help="Id of a sandbox.", metavar="ID")]
SandboxIds = Annotated[list[str], typer.Argument(help="Ids of sandboxes.", metavar="ID...")]
Image = Annotated[str | None, typer.Option("--image", help="Image to start from.")]
Cpu = Annotated[int | None, typer.Option("--cpu-mhz", help="CPU in MHz; 2500 is one core.")]
Memory = Annotated[int | None, typer.Option("--memory-size-mb", help="Memory limit.")]
Disk = Annotated[int | None, typer.Option("--disk-size-mb", help="Size of the workspace.")]
LifeTime = Annotated[
    str | None, typer.Option("--timeout-s", help="Life time in seconds, or `none`.", metavar="SECONDS|none")
]
IdleTimeout = Annotated[
    str | None,
    typer.Option(
        "--idle-timeout-s", "--idle-timeout", help="Stop it when unused for so long.", metavar="SECONDS|none"
    ),
]
Label = Annotated[list[str] | None, typer.Option("--label", help="Label, KEY=VALUE; repeatable.")]
Env = Annotated[
    list[str] | None, typer.Option("--env", "-e", help="Variable, NAME=VALUE, or NAME to pass it on.")
]
ExecTimeout = Annotated[float | None, typer.Option("--timeout-s", help="Limit in seconds.")]
Stdin = Annotated[bool, typer.Option("--stdin", "-i", help="Pass stdin (text) on.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")]
