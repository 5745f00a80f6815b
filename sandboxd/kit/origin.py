"""Where the request being served came from; for records that name it without every call passing it on."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """`client` is the peer's address as the server saw it."""

    request_id: str | None = None
    client: str | None = None


_NONE = Origin()
current_origin: ContextVar[Origin] = ContextVar("current_origin", default=_NONE)
