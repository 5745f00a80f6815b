"""`ID:PATH`: a file or folder of a sandbox in a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

_REMOTE = re.compile(r"(sbx_[A-Za-z0-9_-]+):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Remote:
    """A place in a sandbox; a relative path is below `/home/user`."""

    sandbox_id: str
    path: str


def parse_place(text: str) -> Remote | None:
    """`ID:PATH`, or None for a local path."""
    found = _REMOTE.fullmatch(text)
    return Remote(found[1], found[2]) if found else None
