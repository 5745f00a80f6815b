"""Ids that sort by time: prefix, underscore, 34 characters of lower-case base32hex."""

import base64
import hashlib
import json
import re
import secrets
import time

TIME_BITS = 48
RANDOM_BITS = 122
ID_PATTERN = r"^[a-z]{2,12}_[0-9a-v]{34}$"
_ID = re.compile(ID_PATTERN)


def new_id(prefix: str, *, now_ms: int | None = None) -> str:
    """A new id. Text order is time order to the millisecond; 122 bits cannot be guessed."""
    ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    value = (ms & ((1 << TIME_BITS) - 1)) << RANDOM_BITS | secrets.randbits(RANDOM_BITS)
    # 170 bits fill 34 characters of 5 bits; the 6 zero bits below make whole bytes and are cut off.
    text = base64.b32hexencode((value << 6).to_bytes(22, "big"))[:34]
    return f"{prefix}_{text.decode('ascii').lower()}"


def derived_id(prefix: str, *parts: str | None) -> str:
    """The id that these parts always give. It looks like every other, but tells nothing of the time."""
    digest = hashlib.sha256(json.dumps(parts).encode("ascii")).digest()
    return f"{prefix}_{base64.b32hexencode(digest[:22])[:34].decode('ascii').lower()}"


def is_id(text: str) -> bool:
    """Whether the text can be an id at all. What cannot is in no table, and need not reach the store, which
    takes no NUL characters."""
    return _ID.fullmatch(text) is not None
