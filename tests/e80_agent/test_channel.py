"""What comes from the process of a context is tenant code's word: bounded, and read from any pieces."""

import math
import struct

import pytest
from e80_agent import channel, protocol
from hypothesis import given
from hypothesis import strategies as st

SAID = [
    (channel.READY, b""),
    (channel.RESULT, b'{"text/plain": "1"}' * 100),
    (channel.ERROR, b"{}"),
    (channel.ENDING, b""),
]


@given(st.lists(st.integers(1, 700), max_size=30))
def test_records_are_the_same_in_any_pieces(sizes):
    data = b"".join(protocol.pack_record(kind, payload) for kind, payload in SAID)
    records, found = channel.Records(), []
    for size in [*sizes, len(data)]:
        piece, data = data[:size], data[size:]
        found += records.feed(piece)
    assert found == SAID


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (channel.READY, 1),
        (channel.FAULT, 4097),
        (channel.RESULT, protocol.MAX_RESULT + 1),
        (channel.RESULT, 2**32 - 1),
        (channel.ERROR, protocol.MAX_ERROR + 1),
        (channel.DONE, 21),
        (protocol.RECORD_STDOUT, 1),
        (protocol.RECORD_GAP, 0),
        (255, 0),
    ],
)
def test_a_head_that_promises_too_much_is_refused_before_anything_is_kept(kind, size):
    with pytest.raises(protocol.ProtocolError):
        channel.Records().feed(protocol.RECORD.pack(kind, size))


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waited_for(data):
    try:
        for kind, payload in channel.Records().feed(data):
            assert kind in (
                channel.READY,
                channel.FAULT,
                channel.ENDING,
                channel.RESULT,
                channel.ERROR,
                channel.DONE,
            )
            assert len(payload) <= protocol.MAX_RESULT
    except protocol.ProtocolError:
        pass


def test_the_end_of_a_call_comes_through():
    done = channel.Done(3, 130, 1.5, 2048)
    ((kind, payload),) = channel.Records().feed(channel.pack_done(done))
    assert (kind, channel.parse_done(payload)) == (channel.DONE, done)


@pytest.mark.parametrize("cpu_ms", [math.nan, math.inf, -math.inf, -1.0, 2.0**60])
def test_an_end_with_a_time_that_is_none_is_refused(cpu_ms):
    with pytest.raises(protocol.ProtocolError):
        channel.parse_done(struct.pack(">IIdI", 1, 0, cpu_ms, 0))
    with pytest.raises(protocol.ProtocolError):
        channel.parse_done(b"short")
