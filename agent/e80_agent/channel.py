"""The wire between the agent and the process of a context, over a socket pair.

To the process: REQUEST (number of the call, size of its code) with two descriptors, stdout and stderr, then
the code. From it: records, as on the link to the daemon. Tenant code shares that process and can write
whatever it likes: everything is bounded before it is kept, and a lie concerns only the context that tells it.

While a call runs, each RESULT is answered by one byte, ACK: until then who shows it prints nothing more, so
that the agent knows what was printed before.
"""

from __future__ import annotations

import math
import struct
from typing import List, NamedTuple, Tuple

from e80_agent import protocol
from e80_agent.protocol import ProtocolError

REQUEST = struct.Struct(">II")
ACK = b"."

READY = 16  # it takes calls
FAULT = 17  # it cannot: a code of protocol.ERROR_CODES, a space, a message
ENDING = 18  # there will be no call after this one
RESULT = protocol.RECORD_RESULT
ERROR = protocol.RECORD_ERROR
DONE = protocol.RECORD_END  # the call has ended

_DONE = struct.Struct(">IIdI")
_MAX_SIZES = {
    READY: 0,
    FAULT: 4096,
    ENDING: 0,
    RESULT: protocol.MAX_RESULT,
    ERROR: protocol.MAX_ERROR,
    DONE: _DONE.size,
}


class Done(NamedTuple):
    """The end of a call, as its process tells it: `cpu_ms` since its start, growth of memory in KiB."""

    number: int
    exit_code: int
    cpu_ms: float
    grown_kb: int


def pack_done(done: Done) -> bytes:
    return protocol.pack_record(DONE, _DONE.pack(*done))


def parse_done(payload: bytes) -> Done:
    """Raises ProtocolError for what can be no end of a call."""
    if len(payload) != _DONE.size:
        raise ProtocolError("end of a call in %d bytes" % len(payload))
    done = Done(*_DONE.unpack(payload))
    if not (math.isfinite(done.cpu_ms) and 0 <= done.cpu_ms < 2**53):
        raise ProtocolError("end of a call with a CPU time that is none")
    return done


class Records:
    """Puts records together from the bytes that come in; holds less than one record."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> List[Tuple[int, bytes]]:
        """The records that are complete. Raises ProtocolError for a kind or a size that none has."""
        self._data += data
        found: List[Tuple[int, bytes]] = []
        at = 0
        while len(self._data) - at >= protocol.RECORD.size:
            kind, size = protocol.RECORD.unpack_from(self._data, at)
            if size > _MAX_SIZES.get(kind, -1):
                raise ProtocolError("a record of kind %d with %d bytes" % (kind, size))
            end = at + protocol.RECORD.size + size
            if len(self._data) < end:
                break
            found.append((kind, bytes(self._data[at + protocol.RECORD.size : end])))
            at = end
        del self._data[:at]
        return found
