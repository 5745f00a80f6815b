"""A connection that carries one request after another; what it carries is its users' affair."""

import asyncio
from typing import Protocol


class Stream(Protocol):
    """One authenticated connection to a peer, between requests."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def release(self) -> None:
        """Gives a connection back that is between requests; another caller may get it. From then on this
        object is of no more use, and a second `release` or a `close` does nothing."""

    def close(self) -> None:
        """Ends the connection. May be called twice."""
