"""The event loop of a command. Loaded only by commands that talk to a server; holds all that needs
asyncio."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from e80_sdk.client import AsyncEighty80

from e80_cli.exits import INTERRUPTED

if TYPE_CHECKING:
    from e80_cli.session import Login, Work

# A person waits: a server that is down is reported within a second.
MAX_RETRIES = 2


def drive(work: Work, login: Login) -> int:
    """Run the work on a loop. Ctrl-C, SIGTERM and SIGHUP cancel it, let it clean up, and give 128 +
    signal."""
    received: list[int] = []
    try:
        return asyncio.run(_main(work, login, received))
    except asyncio.CancelledError:
        return 128 + received[0] if received else INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED


async def _main(work: Work, login: Login, received: list[int]) -> int:
    task = asyncio.current_task()
    assert task is not None

    def end(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, int(number))
    async with AsyncEighty80(login.api_key, login.base_url, max_retries=MAX_RETRIES) as client:
        return await work(client)
