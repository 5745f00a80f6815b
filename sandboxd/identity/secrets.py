"""The text form of an API key: prefix, 256 random bits, checksum. Knows no storage."""

import hashlib
import re
import secrets
import zlib

PREFIX = "8080_live_"
DISPLAY_LENGTH = 14
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_BYTES = 32
RANDOM_LENGTH = 43
CHECKSUM_LENGTH = 6
KEY_PATTERN = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{RANDOM_LENGTH}}}_[0-9A-Za-z]{{{CHECKSUM_LENGTH}}}")


def new_key() -> str:
    body = PREFIX + _base62(int.from_bytes(secrets.token_bytes(RANDOM_BYTES), "big"), RANDOM_LENGTH)
    return f"{body}_{_checksum(body)}"


def is_well_formed(key: str) -> bool:
    """Whether the text can be a key at all: tells a typing error from an unknown key without a look-up."""
    if KEY_PATTERN.fullmatch(key) is None:
        return False
    body, _, checksum = key.rpartition("_")
    return checksum == _checksum(body)


def digest(key: str) -> str:
    # Plain SHA-256 is enough for 256 random bits, and cheap enough for every request.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def display_prefix(key: str) -> str:
    return key[:DISPLAY_LENGTH]


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")), CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))
