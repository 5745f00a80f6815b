"""Stdin of this process as the input of a program in a sandbox: byte for byte, as fast as it is taken."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from e80_sdk.errors import NotFoundError, StdinClosedError, StdinFullError

if TYPE_CHECKING:
    from e80_sdk.execs import ExecApi

    from e80_cli.terminal import Escape

PIECE_BYTES = 192 * 1024
"""Of one request; the sandbox holds 256 KiB that the program has not read."""


class Left(Exception):
    """The user typed the way out."""


async def feed(
    execs: ExecApi, sandbox_id: str, exec_id: str, *, escape: Escape | None = None, fd: int = 0
) -> None:
    """Pass stdin on until it ends, and close the program's then; returns early when the program has closed
    it. Bytes are numbered, so that none is lost or doubled when a connection breaks.

    Raises:
        Left: `escape` found the way out.
        E80Error: The server cannot be reached, or refuses.
    """
    offset = 0
    try:
        async with aclosing(pieces(fd)) as coming:
            async for piece in coming:
                data, leave = (piece, False) if escape is None else escape.typed(piece)
                if data:
                    await _write(execs, sandbox_id, exec_id, data, offset)
                    offset += len(data)
                if leave:
                    raise Left
        await execs.write(sandbox_id, exec_id, b"", offset=offset, close=True)
    except (StdinClosedError, NotFoundError):  # the program has ended, or will read no more
        return


async def pieces(fd: int) -> AsyncGenerator[bytes]:
    """What comes from a file, pipe or terminal, until its end. Its mode stays as it is: that of a terminal is
    shared with stdout and with the shell that started us."""
    while await _readable(fd):
        try:
            data = os.read(fd, PIECE_BYTES)
            # A pipe gives 64 KiB at a time; what waits already goes along.
            while data and len(data) < PIECE_BYTES and select.select([fd], [], [], 0)[0]:
                more = os.read(fd, PIECE_BYTES - len(data))
                if not more:
                    break
                data += more
        except OSError:  # EIO: the terminal is gone; EBADF: started without stdin
            return
        if not data:
            return
        yield data


async def _write(execs: ExecApi, sandbox_id: str, exec_id: str, data: bytes, offset: int) -> None:
    end = offset + len(data)
    while True:
        try:
            state = await execs.write(sandbox_id, exec_id, data, offset=offset)
        except StdinFullError:
            continue  # asked for ten seconds already; a program may read nothing for as long as it likes
        if state.size >= end:
            return


async def _readable(fd: int) -> bool:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # a file on disk: always readable, and not for epoll
        return True
    except OSError:
        return False
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
    return True
