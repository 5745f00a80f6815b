"""What a stream tells of an exec: numbered events, the same at every replay.

The number of an event is where its last byte ends in the exec's log. The agent keeps that log and never
changes what it has sent of it, so the number needs no memory: it is the same in every stream, whoever asks
and whenever, also after a restart of the daemon.
"""

import base64
import codecs
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sandboxd.agentlink.exec_log import Event, Gap, Outcome, Output, Result
from sandboxd.kit.http import dump
from sandboxd.kit.sse import sse_event, with_id

# Of one delta, in bytes of output: an event is then at most about 24 KiB, however it has to be escaped.
PIECE = 4096
STARTED, GAP, RESULT, COMPLETED = "exec.started", "exec.gap", "exec.result", "exec.completed"
# Room between the end of one record and the end of the next, for what is no record of its own.
_REFUSAL, _HELD, _NO_END = 1, 2, 4
_CONTINUATION = range(0x80, 0xC0)


class Told(NamedTuple):
    """One event. `size` is how many bytes of output it stands for."""

    number: int
    type: str
    data: Mapping[str, Any]
    size: int = 0

    def encoded(self) -> bytes:
        return with_id(self.number, sse_event(self.type, self.number, **self.data))


class Decoder:
    """Bytes as they come to text; what is not UTF-8 goes as base64, byte for byte. Yields the fields of
    deltas, each with the number of bytes that it stands for."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.after_gap = False

    def feed(self, data: bytes) -> tuple[dict[str, Any], int] | None:
        held = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data)
        except UnicodeDecodeError:
            self._decoder.reset()
            return _binary(held + data)
        if not text:
            return None
        return {"delta": text}, len(held) + len(data) - len(self._decoder.getstate()[0])

    def end(self) -> tuple[dict[str, Any], int] | None:
        held = self._decoder.getstate()[0]
        self._decoder.reset()
        return _binary(held) if held else None


class Teller:
    """Turns the log of one exec, from its start or a gap on, into events."""

    def __init__(self) -> None:
        self.offset = 0
        self._decoders = {False: Decoder(), True: Decoder()}

    def tell(self, event: Event, end: int) -> Iterator[Told]:
        """What there is to tell of an event whose record ends at `end` in the log."""
        if isinstance(event, Output):
            yield from self._output(event.is_stderr, event.data, end)
        elif isinstance(event, Result):
            yield Told(end, RESULT, {"result": event.bundle}, len(dump(event.bundle)))
        elif isinstance(event, Gap):
            yield from self._rest()
            for decoder in self._decoders.values():
                decoder.after_gap = True
            yield Told(end, GAP, {"missed_bytes": event.missed_bytes}, event.missed_bytes)
        elif isinstance(event, Outcome):
            yield from self._rest()
        self.offset = max(self.offset, end)

    def refuse(self, said: Output) -> Iterator[Told]:
        """Of a program that could not be started: there is no such record in the log."""
        text = said.data.decode("utf-8", "replace")
        yield Told(self.offset + _REFUSAL, _type(said.is_stderr), {"delta": text}, len(said.data))

    def complete(self, result: Mapping[str, Any], *, has_end: bool) -> Iterator[Told]:
        """The last event; without an end in the log, what is left to tell before it, too."""
        if not has_end:
            yield from self._rest()
        yield Told(self.offset if has_end else self.offset + _NO_END, COMPLETED, {"exec": result})

    def _output(self, is_stderr: bool, data: bytes, end: int) -> Iterator[Told]:
        decoder, type_ = self._decoders[is_stderr], _type(is_stderr)
        first = 0
        if decoder.after_gap:
            # The rest of a character whose beginning is gone: apart, so that all after it is text again, and
            # the same as for those who have its beginning.
            decoder.after_gap = False
            while first < min(3, len(data)) and data[first] in _CONTINUATION:
                first += 1
            if first:
                fields, size = _binary(data[:first])
                yield Told(end - len(data) + first, type_, fields, size)
        for start in range(first, len(data), PIECE):
            piece = data[start : start + PIECE] if len(data) > PIECE or first else data
            told = decoder.feed(piece)
            if told is not None:
                yield Told(end - len(data) + start + len(piece), type_, *told)

    def _rest(self) -> Iterator[Told]:
        for is_stderr, decoder in self._decoders.items():
            told = decoder.end()
            if told is not None:
                yield Told(self.offset + _HELD + is_stderr, _type(is_stderr), *told)


def _type(is_stderr: bool) -> str:
    return "exec.stderr.delta" if is_stderr else "exec.stdout.delta"


def _binary(data: bytes) -> tuple[dict[str, Any], int]:
    return {"delta": base64.b64encode(data).decode(), "encoding": "base64"}, len(data)
