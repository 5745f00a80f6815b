"""Arguments and options that several commands share."""

from typing import Annotated

import typer
from e80_sdk.options import SandboxOptions

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
ExecTimeout = Annotated[
    float | None, typer.Option("--timeout-s", "--timeout", help="Limit in seconds.", metavar="SECONDS")
]
Stdin = Annotated[bool, typer.Option("--stdin", "-i", help="Pass stdin on.")]
Save = Annotated[
    str | None, typer.Option("--save", help="Keep pictures and other results there.", metavar="DIR")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")]


def sandbox_options(
    image: str | None,
    cpu_mhz: int | None,
    memory_size_mb: int | None,
    disk_size_mb: int | None,
    labels: dict[str, str],
    env: dict[str, str],
) -> SandboxOptions:
    """What the options of a command say about a new sandbox."""
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
