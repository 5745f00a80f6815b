"""Signed requests: a URL that does one thing for a while, on behalf of a key that it does not show. Knows no
storage."""

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

EXPIRES = b"expires"
KEY_ID = b"key_id"
SIGNATURE = b"signature"
# Part of what is signed: another use of the same secret could otherwise be taken for this one.
_DOMAIN = "sandboxd signed request 1"

Pairs = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """What a signature stands for: one method on one path with exactly these parameters."""

    method: str
    path: str
    pairs: Pairs
    expires_at: int
    key_id: str
    signature: str


def parse_query(query: bytes) -> list[tuple[bytes, bytes]]:
    """The parameters byte by byte: as text they would lose what is no UTF-8."""
    parts = (pair.replace(b"+", b" ").partition(b"=") for pair in query.split(b"&") if pair)
    return [(unquote_to_bytes(name), unquote_to_bytes(value)) for name, _, value in parts]


def read(method: str, path: str, query: bytes) -> SignedRequest | None:
    """The signed request that a query makes it; None when a part of that is missing, doubled or no number."""
    pairs = parse_query(query)
    found = dict(pairs)
    if len(found) != len(pairs) or not {EXPIRES, KEY_ID, SIGNATURE} <= found.keys():
        return None
    expires = found[EXPIRES]
    if not expires.isdigit() or len(expires) > 12 or expires != b"%d" % int(expires):
        return None
    return SignedRequest(
        method,
        path,
        [pair for pair in pairs if pair[0] not in (EXPIRES, KEY_ID, SIGNATURE)],
        int(expires),
        found[KEY_ID].decode("latin-1"),
        found[SIGNATURE].decode("latin-1"),
    )


def signature(secret: bytes, method: str, path: str, pairs: Pairs, expires_at: int, key_id: str) -> str:
    """HMAC-SHA256 over all of it, in hex. The order of the parameters changes nothing."""
    parameters = sorted((name.hex(), value.hex()) for name, value in pairs)
    said = json.dumps([_DOMAIN, method, path, parameters, expires_at, key_id], separators=(",", ":"))
    return hmac.new(secret, said.encode("ascii"), hashlib.sha256).hexdigest()


def is_good(secret: bytes, request: SignedRequest) -> bool:
    expected = signature(
        secret, request.method, request.path, request.pairs, request.expires_at, request.key_id
    )
    return hmac.compare_digest(expected.encode(), request.signature.encode("latin-1"))


def signed_query(secret: bytes, method: str, path: str, pairs: Pairs, expires_at: int, key_id: str) -> str:
    """The query of a signed URL."""
    parts = [
        *pairs,
        (EXPIRES, b"%d" % expires_at),
        (KEY_ID, key_id.encode("ascii")),
        (SIGNATURE, signature(secret, method, path, pairs, expires_at, key_id).encode("ascii")),
    ]
    return "&".join(f"{name.decode('ascii')}={quote_from_bytes(value, safe='/')}" for name, value in parts)
