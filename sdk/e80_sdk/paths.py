"""Ids as parts of a URL."""

from __future__ import annotations

import re

from e80_sdk.errors import BadRequestError

_ID = re.compile(r"[A-Za-z0-9_-]+")


def sandbox_path(sandbox_id: str) -> str:
    """The path of a sandbox."""
    return f"/v1/sandboxes/{checked_id(sandbox_id, 'sandbox')}"


def checked_id(value: str, what: str) -> str:
    """The id, if it is one: an empty one, or one with a slash, would name another resource.

    Raises:
        BadRequestError: It is none.
    """
    if not _ID.fullmatch(value):
        hint = "; `8080 sandbox list` shows them" if what == "sandbox" else ""
        raise BadRequestError(f"{value!r:.100} is not a {what} id{hint}", param=f"{what}_id")
    return value
