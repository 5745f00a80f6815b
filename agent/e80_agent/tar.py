"""The tar format: headers out, members in. Names are bytes throughout.

Out: GNU headers, which hold names and sizes of any length as they are. In: ustar, GNU and pax, from anybody:
nothing of it is believed, and nothing grows with it.
"""

from __future__ import annotations

from typing import Dict, Iterator, NamedTuple, Optional

from e80_agent.helper import Refused

BLOCK = 512
FILE = b"0"
HARD_LINK = b"1"
SYMLINK = b"2"
FOLDER = b"5"
END = bytes(2 * BLOCK)

MAX_NAME = 4096
MAX_MEMBERS = 1000000
# Behind the end marker some programs fill up their last block, and that is all there may be.
_MAX_PADDING = 1024 * 1024
_MAX_EXTENSION = 64 * 1024
_LONG_NAME = b"L"
_LONG_LINK = b"K"
_PAX = b"x"
_PAX_GLOBAL = b"g"
_KINDS = {b"\0": FILE, b"7": FILE}
_DEVICES = {b"3": "a device", b"4": "a device", b"6": "a named pipe", b"S": "a sparse file"}


class Member(NamedTuple):
    kind: bytes
    name: bytes
    size: int
    mode: int
    mtime: float
    link: bytes


class BadArchive(Refused):
    def __init__(self, message: str) -> None:
        super().__init__("bad_archive", message)


def header(member: Member) -> bytes:
    """What stands before a member's content."""
    blocks = b""
    for kind, value in ((_LONG_NAME, member.name), (_LONG_LINK, member.link)):
        if len(value) > 100:
            long = Member(kind, b"././@LongLink", len(value) + 1, 0o644, 0, b"")
            blocks += _block(long) + value + b"\0" + padding(len(value) + 1)
    return blocks + _block(member)


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


class Reader:
    """The members of an archive that comes in pieces. Raises BadArchive for what is none, or is cut short."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._left = 0

    def __iter__(self) -> Iterator[Member]:
        """Each is good until the next one is asked for; its content is read in between, or passed over."""
        extensions: Dict[str, bytes] = {}
        for _ in range(MAX_MEMBERS):
            block = self._take(BLOCK)
            if not any(block):
                self._finish()
                return
            _check_sum(block)
            kind, size = block[156:157], _number(block[124:136])
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                self._extend(extensions, kind, size)
                continue
            member = _member(block, kind, size, extensions)
            extensions = {}
            self._left = member.size
            yield member
            for _piece in self.content():
                continue
            self._take(-member.size % BLOCK)
        raise BadArchive("it has more than %d members" % MAX_MEMBERS)

    def content(self) -> Iterator[memoryview]:
        """What is left of the present member's content; each piece is good until the next."""
        while self._left:
            piece = self._some(self._left)
            self._left -= len(piece)
            yield piece

    def _extend(self, extensions: Dict[str, bytes], kind: bytes, size: int) -> None:
        if size > _MAX_EXTENSION:
            raise BadArchive("a header of %d bytes is too large" % size)
        data = self._take(size)
        self._take(-size % BLOCK)
        if kind == _PAX:
            extensions.update(_pax(data))
        elif kind != _PAX_GLOBAL:
            extensions["path" if kind == _LONG_NAME else "linkpath"] = data.partition(b"\0")[0]

    def _finish(self) -> None:
        """To the very end: only there a checksum over all of it shows whether it is whole."""
        padded = 0
        while True:
            if not self._piece:
                self._piece = next(self._pieces, memoryview(b""))
            if not self._piece:
                return
            padded += len(self._piece)
            self._piece = memoryview(b"")
            if padded > _MAX_PADDING:
                raise BadArchive("it goes on behind its end")

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._some(size - len(data))
        return data

    def _some(self, size: int) -> memoryview:
        while not self._piece:
            piece: Optional[memoryview] = next(self._pieces, None)
            if piece is None:
                raise BadArchive("it is cut short, or no archive")
            self._piece = piece
        data, self._piece = self._piece[:size], self._piece[size:]
        return data


def _member(block: bytes, kind: bytes, size: int, extensions: Dict[str, bytes]) -> Member:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    name = extensions.get("path", name)
    link = extensions.get("linkpath", block[157:257].partition(b"\0")[0])
    shown = name[-200:].decode("utf-8", "replace")
    if any(key.startswith("GNU.sparse") for key in extensions):
        kind = b"S"
    if kind in _DEVICES:
        raise BadArchive("%r is %s" % (shown, _DEVICES[kind]))
    kind = _KINDS.get(kind, kind)
    if kind == FILE and name.endswith(b"/"):
        kind = FOLDER  # as archives did before there was a kind for it
    if kind not in (FILE, FOLDER, SYMLINK, HARD_LINK):
        raise BadArchive("%r is of the unknown kind %r" % (shown, kind))
    if not name or len(name) > MAX_NAME or len(link) > MAX_NAME or b"\0" in name + link:
        raise BadArchive("a name is empty, too long or holds a NUL: %r" % shown)
    if "size" in extensions:
        size = _decimal(extensions["size"])
    # Only files have content here, whatever their headers say.
    return Member(
        kind,
        name,
        size if kind == FILE else 0,
        _number(block[100:108]) & 0o777,
        _time(extensions.get("mtime"), block),
        link,
    )


def _pax(data: bytes) -> Dict[str, bytes]:
    found: Dict[str, bytes] = {}
    while data:
        digits = data.partition(b" ")[0]
        length = _decimal(digits)
        record = data[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if length > len(data) or not equals or not value.endswith(b"\n"):
            raise BadArchive("a pax header is broken")
        found[key.decode("utf-8", "replace")] = value[:-1]
        data = data[length:]
    return found


def _time(pax: Optional[bytes], block: bytes) -> float:
    try:
        time = float(_number(block[136:148]) if pax is None else pax)
    except ValueError:
        raise BadArchive("a time is broken") from None
    return min(max(time, -(2.0**33)), 2.0**33) if time == time else 0.0


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise BadArchive("a number is broken")
    return int(text)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            raise BadArchive("a number is below zero")
    else:
        text = field.strip(b" \0") or b"0"
        try:
            value = int(text, 8)
        except ValueError:
            raise BadArchive("a number is broken") from None
    if not 0 <= value < 2**60:
        raise BadArchive("a number is out of all range")
    return value


def _check_sum(block: bytes) -> None:
    text = block[148:156].strip(b" \0")
    if not text.isdigit() or int(text) != int("%o" % (sum(block) - sum(block[148:156]) + 8 * 32)):
        raise BadArchive("a header's checksum is wrong, or it is no tar archive")


def _block(member: Member) -> bytes:
    fields = [
        member.name[:100].ljust(100, b"\0"),
        _field(member.mode, 8),
        _field(0, 8),
        _field(0, 8),
        _field(member.size, 12),
        _field(max(0, int(member.mtime)), 12),
        b" " * 8,
        member.kind,
        member.link[:100].ljust(100, b"\0"),
        b"ustar  \0",
    ]
    block = b"".join(fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _field(value: int, width: int) -> bytes:
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    data = value.to_bytes(width, "big", signed=True)
    return bytes([data[0] | 0x80]) + data[1:]
