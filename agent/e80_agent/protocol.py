"""The wire between sandboxd and the agent; the one module of the agent that the daemon imports.

The agent dials a unix socket on which the daemon listens. On every connection the daemon sends a nonce of
NONCE_SIZE bytes and the agent answers with one role byte and HMAC-SHA256(key, role + nonce). A control
connection then carries single bytes from the daemon, each asking for that many more stream connections.
A stream connection carries one request at a time:

    request  = u32 length, JSON header, then header["body"] raw bytes if that is present
    reply    = u32 length, JSON header: {"ok": true, ...} or {"ok": false, "code": ..., "message": ...}
    records  = (u8 kind, u32 length, payload) repeated, ended by one RECORD_END; only for streaming operations

After the last byte of a reply (or RECORD_END) the connection may carry the next request, except for the
file operations, which close it. Integers are big-endian.
"""

from __future__ import annotations

import hmac
import json
import struct
from typing import Any, Dict

PROTOCOL_VERSION = 3

NONCE_SIZE = 32
PROOF_SIZE = 33
ROLE_CONTROL = b"C"
ROLE_STREAM = b"S"

MAX_HEADER = 512 * 1024
MAX_BODY = 16 * 1024 * 1024
MAX_RECORD = 1024 * 1024
MAX_RESULT = 4 * 1024 * 1024  # of a RECORD_RESULT; every other record is within MAX_RECORD
MAX_ERROR = 256 * 1024
MAX_CONNECTIONS = 128

LENGTH = struct.Struct(">I")
RECORD = struct.Struct(">BI")

RECORD_STDOUT = 1
RECORD_STDERR = 2
RECORD_ERROR = 3  # the tenant's own exception as JSON; hostile, only its size was checked
RECORD_END = 4
RECORD_DATA = 5
RECORD_RESULT = 6  # one rich result of a context: a MIME bundle as JSON; as hostile as RECORD_ERROR
RECORD_GAP = 7  # not in the log: what follows begins at `base` of it, as JSON {"base", "missed"}

# The closed list of codes a reply may carry.
ERROR_CODES = frozenset(
    [
        "bad_request",
        "busy",
        "unknown_operation",
        "unknown_exec",
        "exec_exists",
        "exec_differs",
        "exec_gone",
        "cwd_not_found",
        "command_not_found",
        "command_not_executable",
        "file_not_found",
        "permission_denied",
        "is_directory",
        "not_regular",
        "not_directory",
        "disk_full",
        "read_only",
        "bad_path",
        "io_error",
        "start_failed",
        "stdin_closed",
        "no_terminal",
        "unknown_context",
        "context_exists",
        "context_lost",
        "context_busy",
        "unknown_language",
        "not_empty",
        "file_exists",
        "bad_archive",
        "unsupported",
    ]
)


class ProtocolError(Exception):
    """The peer sent something outside the protocol; the connection is of no more use."""


def proof(key: bytes, role: bytes, nonce: bytes) -> bytes:
    """The answer to a nonce: the role byte and its HMAC, PROOF_SIZE bytes."""
    return role + hmac.new(key, role + nonce, "sha256").digest()


def pack_header(header: Dict[str, Any]) -> bytes:
    """One length-prefixed JSON header. Raises ProtocolError when it is larger than MAX_HEADER."""
    data = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    if len(data) > MAX_HEADER:
        raise ProtocolError("header of %d bytes is over the cap of %d" % (len(data), MAX_HEADER))
    return LENGTH.pack(len(data)) + data


def parse_header(data: bytes) -> Dict[str, Any]:
    """The JSON object in `data`. Raises ProtocolError for anything that is not one."""
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("header is not JSON") from error
    if not isinstance(header, dict):
        raise ProtocolError("header is not an object")
    return header


def header_length(prefix: bytes) -> int:
    """The length in a 4-byte prefix. Raises ProtocolError when it is over MAX_HEADER."""
    (length,) = LENGTH.unpack(prefix)
    if length > MAX_HEADER:
        raise ProtocolError("header of %d bytes is over the cap of %d" % (length, MAX_HEADER))
    return int(length)


def pack_record(kind: int, payload: bytes) -> bytes:
    """One record; the caller keeps payloads within MAX_RECORD."""
    return RECORD.pack(kind, len(payload)) + payload
