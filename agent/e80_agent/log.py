"""The log of an exec: its record stream, bounded. Offsets count from the first byte there ever was.

A plain log keeps the beginning and cuts what comes after its limit. A ring keeps the newest: whole records
leave at the front, and what stays keeps its offsets.
"""

from __future__ import annotations

from typing import Callable

from e80_agent import protocol

MAX_RECORD = 65536

# Called with the offsets of a record's start and end, while it is still there.
OnDrop = Callable[[int, int], None]


class Log:
    """`base` is the offset of the first byte that is here, `dropped` the payload that was before it."""

    def __init__(self, limit: int, ring: bool, on_drop: OnDrop) -> None:
        self.ring = ring
        self.base = 0
        self.dropped = 0
        self.sent = 0  # up to here somebody has been sent the log, and it must not change
        self._data = bytearray()
        self._limit = limit
        # So that a ring does not lose all it has to make room for one record.
        self._max_record = min(MAX_RECORD, max(1, limit // 4)) if ring else MAX_RECORD
        self._full = False
        self._last = 0
        self._last_kind = 0
        self._on_drop = on_drop

    def __len__(self) -> int:
        """The bytes that are here."""
        return len(self._data)

    @property
    def end(self) -> int:
        return self.base + len(self._data)

    @property
    def last(self) -> int:
        """Where the last record begins."""
        return self._last

    def read(self, offset: int, size: int) -> bytes:
        start = offset - self.base
        return bytes(self._data[start : start + size])

    def has_room(self, size: int) -> bool:
        """Whether all of the next `size` bytes of output will be here, beside all that is."""
        return size <= self._limit - len(self._data)

    def append(self, kind: int, payload: bytes) -> None:
        """Adds a record of its own, beside what the limit is for."""
        self._last, self._last_kind = self.end, kind
        self._data += protocol.pack_record(kind, payload)
        self._limit += protocol.RECORD.size + len(payload)

    def output(self, kind: int, data: bytes) -> None:
        """Adds output, as much as the limit allows, or at the cost of what is oldest."""
        if not self.ring:
            room = self._limit - len(self._data)
            if room > 0 and not self._full:
                self._add(kind, data[:room])
            self._full = self._full or len(data) > room
            return
        for start in range(0, len(data), self._max_record):
            self._add(kind, data[start : start + self._max_record])
            self._make_room()

    def _add(self, kind: int, data: bytes) -> None:
        """Adds a record, or to the last one while nobody was sent any of it: a flood of tiny writes must
        not become a flood of records."""
        size = self.end - self._last - protocol.RECORD.size + len(data)
        if kind == self._last_kind and self.sent <= self._last and size <= self._max_record:
            self._data += data
            protocol.RECORD.pack_into(self._data, self._last - self.base, kind, size)
        else:
            self._last, self._last_kind = self.end, kind
            self._data += protocol.pack_record(kind, data)

    def _make_room(self) -> None:
        while len(self._data) > self._limit and self.base < self._last:
            _kind, payload = protocol.RECORD.unpack_from(self._data)
            size = protocol.RECORD.size + payload
            self._on_drop(self.base, self.base + size)
            del self._data[:size]
            self.base += size
            self.dropped += payload
