"""The terminal and stdin of this side, without a server."""

import asyncio
import os
import pty
import signal
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from e80_cli.stdin import PIECE_BYTES, pieces
from e80_cli.terminal import Escape, Terminal


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    leader, follower = pty.openpty()
    yield leader, follower
    os.close(leader)
    os.close(follower)


@pytest.mark.parametrize(
    ("typed", "passed", "leaves"),
    [
        ([b"ls ~\r"], b"ls ~\r", False),
        ([b"~."], b"", True),
        ([b"ls\r~."], b"ls\r", True),
        ([b"ls\r", b"~", b"."], b"ls\r", True),
        ([b"~~."], b"~.", False),
        ([b"~/bin\r"], b"~/bin\r", False),
        ([b"a~."], b"a~.", False),
        ([b"\r~", b"\r~", b"."], b"\r~\r", True),
        ([bytes(range(256))], bytes(range(256)), False),
    ],
)
def test_the_way_out_is_found_at_the_beginning_of_a_line(
    typed: list[bytes], passed: bytes, leaves: bool
) -> None:
    escape, out, left = Escape(), b"", False
    for data in typed:
        assert not left
        got, left = escape.typed(data)
        out += got
    assert (out, left) == (passed, leaves)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
def test_a_terminal_is_as_before_whatever_ends_the_block(
    ends: tuple[int, int], error: type[BaseException]
) -> None:
    before = termios.tcgetattr(ends[1])

    def work() -> None:
        with Terminal(ends[1]).raw():
            assert termios.tcgetattr(ends[1])[3] & termios.ECHO == 0
            raise error

    with pytest.raises(error):
        work()
    assert termios.tcgetattr(ends[1]) == before


def test_a_terminal_that_is_gone_is_no_error(ends: tuple[int, int]) -> None:
    gone = os.dup(ends[1])
    with Terminal(gone).raw():
        os.close(gone)


def test_the_size_is_what_the_server_takes(ends: tuple[int, int]) -> None:
    terminal = Terminal(ends[1])
    assert terminal.size == (24, 80), "a terminal that knows no size"
    termios.tcsetwinsize(ends[0], (5000, 7))
    assert terminal.size == (1000, 7)


async def test_sizes_are_told_one_at_a_time_and_the_last_one_always(ends: tuple[int, int]) -> None:
    terminal, told = Terminal(ends[1]), []
    first, second = asyncio.Event(), asyncio.Event()

    async def tell(rows: int, cols: int) -> None:
        told.append((rows, cols))
        if len(told) == 1:
            first.set()
            for rows in range(30, 60):
                termios.tcsetwinsize(ends[0], (rows, 99))
                os.kill(os.getpid(), signal.SIGWINCH)
                await asyncio.sleep(0)
        else:
            second.set()

    watching = asyncio.ensure_future(terminal.watch_size(tell))
    await asyncio.sleep(0)
    termios.tcsetwinsize(ends[0], (20, 90))
    os.kill(os.getpid(), signal.SIGWINCH)
    async with asyncio.timeout(10):
        await first.wait()
        await second.wait()
    watching.cancel()
    await asyncio.wait([watching])
    assert told == [(20, 90), (59, 99)]
    assert signal.getsignal(signal.SIGWINCH) == signal.SIG_DFL


async def test_pieces_of_a_pipe_are_all_of_it_and_wait_without_work() -> None:
    data = os.urandom(3_000_000)
    reader, writer = os.pipe()

    def write() -> None:
        with open(writer, "wb") as file:
            file.write(data)

    got = b""
    writing = asyncio.ensure_future(asyncio.to_thread(write))
    async for piece in pieces(reader):
        assert 0 < len(piece) <= PIECE_BYTES
        got += piece
        await asyncio.sleep(0)
    await writing
    os.close(reader)
    assert got == data


async def test_pieces_of_a_file_and_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * (PIECE_BYTES + 1))
    with (tmp_path / "f").open("rb") as file:
        assert [len(piece) async for piece in pieces(file.fileno())] == [PIECE_BYTES, 1]
    closed = os.open(os.devnull, os.O_RDONLY)
    assert [piece async for piece in pieces(closed)] == []
    os.close(closed)
    assert [piece async for piece in pieces(closed)] == []


async def test_waiting_for_a_pipe_can_be_given_up() -> None:
    """A blocked thread would keep the command from ending."""
    reader, writer = os.pipe()
    waiting = asyncio.ensure_future(anext(pieces(reader)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    os.close(reader)
    os.close(writer)
