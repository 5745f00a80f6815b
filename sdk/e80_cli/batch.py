"""The same small thing for each of several ids: one that fails does not keep the others from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from e80_sdk.errors import E80Error

from e80_cli.exits import OK, exit_code_of
from e80_cli.output import Output

if TYPE_CHECKING:
    from e80_sdk.results import SandboxInfo


async def for_each(
    ids: Sequence[str], change: Callable[[str], Awaitable[SandboxInfo]], output: Output
) -> int:
    """Print each id when it is done, each error on stderr; returns the exit code of the last error."""
    code = OK
    for sandbox_id in ids:
        try:
            info = await change(sandbox_id)
        except E80Error as error:
            output.error(error)
            code = exit_code_of(error)
            continue
        if output.as_json:
            output.data(info.raw)
        else:
            output.line(info.id)
    return code
