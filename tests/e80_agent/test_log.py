"""What an exec's log keeps, and what a follower of it gets, however slow it is."""

import json
import socket
from types import SimpleNamespace
from typing import Any

from e80_agent import protocol
from e80_agent.execs import Exec
from e80_agent.link import Connection
from e80_agent.log import MAX_RECORD, Log
from hypothesis import example, given, settings
from hypothesis import strategies as st

KINDS = st.sampled_from([protocol.RECORD_STDOUT, protocol.RECORD_STDERR])
WRITES = st.lists(st.tuples(KINDS, st.binary(min_size=1, max_size=300), st.booleans()), max_size=40)


def records(data: bytes) -> list[tuple[int, bytes]]:
    """The records in it, which it must be made of to the last byte."""
    found = []
    at = 0
    while at < len(data):
        kind, size = protocol.RECORD.unpack_from(data, at)
        at += protocol.RECORD.size
        assert len(data) - at >= size
        found.append((kind, data[at : at + size]))
        at += size
    return found


def by_byte(writes: list[tuple[int, bytes]]) -> list[tuple[int, int]]:
    return [(kind, byte) for kind, data in writes for byte in data]


@given(WRITES, st.integers(1, 2000))
def test_a_ring_holds_the_end_of_what_was_written_and_counts_the_rest(writes, limit):
    log = Log(limit, True, lambda start, end: None)
    for kind, data, is_sent in writes:
        log.output(kind, data)
        if is_sent:
            log.sent = log.end
    kept = by_byte(records(log.read(log.base, len(log))))
    everything = by_byte([(kind, data) for kind, data, _ in writes])
    assert kept == everything[len(everything) - len(kept) :]
    assert log.dropped == len(everything) - len(kept)
    # One record is kept, whatever its size.
    assert len(log) <= max(limit, limit // 4 + 1 + protocol.RECORD.size)
    if everything:
        assert kept


@given(WRITES, st.integers(1, 2000), st.booleans())
def test_what_was_sent_stays_as_it_was_at_its_offset(writes, limit, is_ring):
    log = Log(limit, is_ring, lambda start, end: None)
    seen: dict[int, int] = {}
    for kind, data, is_sent in writes:
        log.output(kind, data)
        if is_sent:
            log.sent = log.end
            seen.update(enumerate(log.read(log.base, len(log)), log.base))
    for offset, byte in enumerate(log.read(log.base, len(log)), log.base):
        assert seen.get(offset, byte) == byte


@given(WRITES, st.integers(1, 2000))
def test_a_plain_log_holds_the_beginning(writes, limit):
    log = Log(limit, False, lambda start, end: None)
    for kind, data, _ in writes:
        log.output(kind, data)
    kept = by_byte(records(log.read(0, len(log))))
    everything = by_byte([(kind, data) for kind, data, _ in writes])
    assert kept == everything[: len(kept)]
    assert (log.base, log.dropped) == (0, 0)
    assert len(log) <= limit + protocol.RECORD.size


def test_what_is_no_output_does_not_count_against_it():
    log = Log(1000, False, lambda start, end: None)
    log.append(protocol.RECORD_RESULT, bytes(5000))
    assert log.has_room(1000)
    log.output(protocol.RECORD_STDOUT, b"x" * 900)
    log.append(protocol.RECORD_RESULT, b"second")
    kinds = [kind for kind, _ in records(log.read(0, len(log)))]
    assert kinds == [protocol.RECORD_RESULT, protocol.RECORD_STDOUT, protocol.RECORD_RESULT]


def test_a_flood_of_tiny_writes_is_no_flood_of_records():
    for is_ring in (False, True):
        log = Log(10 * MAX_RECORD, is_ring, lambda start, end: None)
        for _ in range(10_000):
            log.output(protocol.RECORD_STDOUT, b"x")
        assert len(records(log.read(0, len(log)))) == 1


class Wire:
    """A connection that follows an exec, and its other end, which reads when it is told to."""

    def __init__(self, run: Exec, offset: int = 0) -> None:
        loop = SimpleNamespace(set_writer=self._set_writer, set_reader=None, forget=lambda fd: None)
        link = SimpleNamespace(loop=loop, gone=lambda connection: None)
        self.connection = Connection(link, protocol.ROLE_STREAM)  # type: ignore[arg-type]  # a fake
        self.connection.sock.close()
        self.connection.sock, self.ours = socket.socketpair()
        self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.connection.sock.setblocking(False)
        self.ours.setblocking(False)
        self._on_writable: Any = None
        self.got = b""
        self.connection.follow(run, offset, eager=True)

    def _set_writer(self, _fd: int, callback: Any) -> None:
        self._on_writable = callback

    def read(self, size: int) -> int:
        try:
            part = self.ours.recv(size)
        except BlockingIOError:
            return 0
        self.got += part
        if self._on_writable is not None:
            self._on_writable()
        return len(part)

    def close(self) -> None:
        self.connection.close()
        self.ours.close()

    def log(self) -> tuple[dict[str, Any], list[tuple[int, bytes]]]:
        size = protocol.header_length(self.got[:4])
        return protocol.parse_header(self.got[4 : 4 + size]), records(self.got[4 + size :])


def ring(limit: int) -> Exec:
    return Exec({"op": "command", "id": "exec_1", "output_limit": limit, "ring": True}, 1)


STEPS = st.lists(st.tuples(KINDS, st.integers(1, 300_000), st.integers(0, 300_000)), max_size=30)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1000, 1_000_000), st.integers(0, 5))
# Records leave while a part of one has been taken to be sent.
@example([(protocol.RECORD_STDOUT, 300_000, 0)] * 10, 1_000_000, 2)
def test_a_slow_follower_is_told_how_much_it_missed_and_gets_the_rest_unharmed(steps, limit, late):
    run = ring(limit)
    written: list[tuple[int, bytes]] = []
    wires = [Wire(run)]
    for number, (kind, size, read) in enumerate(steps):
        data = bytes([number % 256]) * size
        written.append((kind, data))
        run.output(kind, data)
        if number == late:
            wires.append(Wire(run))
        wires[0].read(read)
    run.finished = True
    run.append(protocol.RECORD_END, b"{}")
    everything = b"".join(data for _, data in written)
    kinds = b"".join(bytes([kind]) * len(data) for kind, data in written)
    for wire in wires:
        while wire.read(1 << 20):
            continue
        wire.close()
        reply, found = wire.log()
        offset, at = int(reply.get("base", 0)), int(reply.get("dropped", 0))
        for kind, payload in found[:-1]:
            if kind == protocol.RECORD_GAP:
                gap = json.loads(payload)
                assert gap["base"] > offset
                offset, at = gap["base"], at + gap["missed"]
                continue
            behind = at + len(payload)
            assert everything[at:behind] == payload
            assert kinds[at:behind] == bytes([kind]) * len(payload)
            offset, at = offset + protocol.RECORD.size + len(payload), behind
        assert at == len(everything)
        assert found[-1] == (protocol.RECORD_END, b"{}")
        assert offset + protocol.RECORD.size + 2 == run.log.end


def test_a_follower_that_does_not_read_costs_a_bounded_copy():
    run = ring(1 << 20)
    wire = Wire(run)
    for _ in range(1000):
        run.output(protocol.RECORD_STDOUT, bytes(65536))
        assert len(wire.connection._output) <= 1 << 20
    assert len(run.log) <= 1 << 20
    wire.close()
