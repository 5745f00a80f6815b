"""Clients that stand still: their connection is cut when it has not moved for a while, and who serves them
sees them hang up. What they hold, say a place for work in a sandbox, would else be held for ever: a client
whose network has gone never says that it has left."""

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

# As long as that a client may take nothing, or send nothing of a body that it has begun. It can come back.
STALLED_S = 300.0
# Where the server puts what cuts the connection.
ABORT = "sandboxd.abort"


def cut_of(scope: Scope) -> Callable[[], None] | None:
    """What cuts off the client of a request, where the server has such a thing."""
    cut: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT)
    return cut


def receiving(scope: Scope, receive: Receive, stalled_s: float = STALLED_S) -> Receive:
    """`receive` for clients that send their body at all."""
    cut = cut_of(scope)
    if cut is None:
        return receive
    more = True

    async def receive_in_time() -> Message:
        nonlocal more
        if not more:  # now it tells only that the client has left, which may be in hours
            return await receive()
        timer = asyncio.get_running_loop().call_later(stalled_s, cut)
        try:
            message = await receive()
        finally:
            timer.cancel()
        more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    return receive_in_time


def sending(scope: Scope, send: Send, stalled_s: float = STALLED_S) -> Send:
    """`send` for clients that take what they are sent. Costs a timer for each piece."""
    cut = cut_of(scope)
    if cut is None:
        return send

    async def send_in_time(message: Message) -> None:
        timer = asyncio.get_running_loop().call_later(stalled_s, cut)
        try:
            await send(message)
        finally:
            timer.cancel()

    return send_in_time
