"""The daemon's listener for one agent: who gets in, who does not, and what a bad peer costs."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from e80_agent import protocol

from sandboxd.runtimes.base import SandboxSpec
from sandboxd.runtimes.docker.link import Link, write_config
from sandboxd.runtimes.errors import AgentUnreachableError


def spec(uid: int) -> SandboxSpec:
    return SandboxSpec(
        id="sbx_test",
        project_id=None,
        image="image",
        cpus=1,
        memory_mb=64,
        disk_mb=64,
        max_files=1024,
        max_processes=64,
        uid=uid,
        runtime="runc",
    )


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[Link]:
    write_config(tmp_path, spec(200_000))
    listener = Link("sbx_test", tmp_path, None)
    await listener.open()
    yield listener
    await listener.close()


class Peer:
    """Whoever connects."""

    def __init__(self, link: Link) -> None:
        self.link = link

    async def __aenter__(self) -> "Peer":
        path = str(self.link.folder / "agent.sock")
        self.reader, self.writer = await asyncio.open_unix_connection(path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)

    async def prove(self, role: bytes = protocol.ROLE_STREAM, key: bytes | None = None) -> bytes:
        nonce = await self.reader.readexactly(protocol.NONCE_SIZE)
        proof = protocol.proof(key or self.link._key, role, nonce)
        self.writer.write(proof)
        return proof

    async def is_hung_up_on(self) -> bool:
        async with asyncio.timeout(2):
            try:
                while await self.reader.read(1000):
                    continue
            except ConnectionError:
                pass
        return True


async def settled(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true within 2 s")


async def test_who_proves_the_key_is_served(link):
    async with Peer(link) as peer:
        await peer.prove()
        stream = await link.dial(2)
        stream.writer.write(b"hello")
        assert await peer.reader.readexactly(5) == b"hello"
        stream.close()
        assert await peer.is_hung_up_on()


@pytest.mark.parametrize(
    "answer",
    [
        b"S" + b"\0" * 32,
        b"C" + b"\0" * 32,
        b"X" + b"\0" * 32,
        b"\0" * 33,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"S" * 100_000,
    ],
)
async def test_who_does_not_is_hung_up_on(link, answer):
    async with Peer(link) as peer:
        await peer.reader.readexactly(protocol.NONCE_SIZE)
        peer.writer.write(answer)
        assert await peer.is_hung_up_on()
    with pytest.raises(AgentUnreachableError):
        await link.dial(0.05)


async def test_a_proof_counts_for_its_connection_and_role_only(link):
    async with Peer(link) as first, Peer(link) as second:
        proof = await first.prove()
        await second.reader.readexactly(protocol.NONCE_SIZE)
        second.writer.write(proof)
        assert await second.is_hung_up_on()
    async with Peer(link) as third:
        nonce = await third.reader.readexactly(protocol.NONCE_SIZE)
        third.writer.write(b"C" + protocol.proof(link._key, b"S", nonce)[1:])
        assert await third.is_hung_up_on()
    assert not link.connected


async def test_the_key_of_another_sandbox_opens_nothing(link, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_config(other, spec(200_001))
    neighbour = Link("sbx_other", other, None)
    await neighbour.open()
    async with Peer(link) as peer:
        await peer.prove(key=neighbour._key)
        assert await peer.is_hung_up_on()
    await neighbour.close()


async def test_a_process_outside_of_the_container_is_hung_up_on(link):
    seen = []
    link.peer_check = lambda pid: bool(seen.append(pid))
    async with Peer(link) as peer:
        assert await peer.is_hung_up_on()
    link.peer_check = None
    async with Peer(link) as peer:
        await peer.prove()
        (await link.dial(2)).close()
    assert len(seen) == 1


async def test_peers_that_hang_up_at_any_byte(link):
    for size in range(protocol.PROOF_SIZE):
        async with Peer(link) as peer:
            nonce = await peer.reader.readexactly(protocol.NONCE_SIZE)
            peer.writer.write(protocol.proof(link._key, b"S", nonce)[:size])
    async with Peer(link) as peer:
        await peer.prove()
        (await link.dial(2)).close()


async def test_connections_have_a_limit_and_room_comes_back(link):
    peers = [Peer(link) for _ in range(protocol.MAX_CONNECTIONS)]
    for peer in peers:
        await peer.__aenter__()
        await peer.reader.readexactly(protocol.NONCE_SIZE)
    async with Peer(link) as late:
        assert await late.is_hung_up_on()
    for peer in peers:
        await peer.__aexit__()
    await settled(lambda: not link._writers)
    async with Peer(link) as peer:
        await peer.prove()
        (await link.dial(2)).close()


async def test_a_later_control_connection_takes_over(link):
    async with Peer(link) as first, Peer(link) as second:
        await first.prove(protocol.ROLE_CONTROL)
        await settled(lambda: link.connected)
        await second.prove(protocol.ROLE_CONTROL)
        assert await first.is_hung_up_on()
        waiting = asyncio.ensure_future(link.dial(2))
        assert await second.reader.readexactly(1) == b"\1"
        async with Peer(link) as stream:
            await stream.prove()
            (await waiting).close()


async def test_words_on_the_control_connection_end_it(link):
    async with Peer(link) as peer:
        await peer.prove(protocol.ROLE_CONTROL)
        peer.writer.write(b"x" * 100_000)
        assert await peer.is_hung_up_on()
    assert not link.connected


async def test_closing_tells_those_who_wait(link):
    waiting = asyncio.ensure_future(link.dial(10))
    await asyncio.sleep(0)
    await link.close()
    with pytest.raises(AgentUnreachableError):
        await waiting
    with pytest.raises(AgentUnreachableError):
        await link.dial(1)


def test_key_and_socket_are_for_root_only(tmp_path):
    write_config(tmp_path, spec(200_000))
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o400

    async def check() -> None:
        link = Link("sbx_test", tmp_path, None)
        await link.open()
        assert (tmp_path / "agent.sock").stat().st_mode & 0o777 == 0o600
        await link.close()

    asyncio.run(check())


async def test_what_lies_where_the_socket_should_be_is_replaced_not_followed(tmp_path):
    write_config(tmp_path, spec(200_000))
    victim = tmp_path / "victim.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(victim))
        (tmp_path / "agent.sock").symlink_to(victim)
        link = Link("sbx_test", tmp_path, None)
        await link.open()
        assert not (tmp_path / "agent.sock").is_symlink()
        await link.close()


async def test_a_paused_link_refuses_at_once_and_serves_again_after_resume(link):
    async with Peer(link) as control, Peer(link) as waits, Peer(link) as used:
        await control.prove(protocol.ROLE_CONTROL)
        await used.prove()
        stream = await link.dial(2)
        await waits.prove()
        await settled(lambda: link.connected)
        waiting = [asyncio.ensure_future(link.dial(60)) for _ in range(2)]
        await asyncio.sleep(0.1)
        link.pause()
        link.pause()  # again: nothing more
        # One of them had its connection just before.
        with pytest.raises(AgentUnreachableError, match="paused"):
            await waiting[1]
        assert await (await waiting[0]).reader.read(1) == b""
        assert await stream.reader.read(1) == b""
        for peer in (control, waits, used):
            assert await peer.is_hung_up_on()
    assert not link.connected
    with pytest.raises(AgentUnreachableError, match="paused"):
        await link.dial(60)
    async with Peer(link) as early:
        assert await early.is_hung_up_on()
    link.resume()
    async with Peer(link) as peer:
        await peer.prove()
        (await link.dial(2)).close()


async def test_a_peer_that_does_not_read_cannot_hold_up_a_pause(link):
    async with Peer(link) as peer:
        await peer.prove()
        stream = await link.dial(2)
        stream.writer.write(bytes(8 << 20))
        link.pause()
        await asyncio.wait_for(asyncio.gather(stream.writer.wait_closed(), return_exceptions=True), 2)
