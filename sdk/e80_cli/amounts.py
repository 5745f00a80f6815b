"""Times and sizes as a person reads them."""

from __future__ import annotations

import time


def span(seconds: float) -> str:
    """How long, in the largest unit that fits: `90s` is `1m`."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def hours(seconds: float) -> str:
    """How much time was used: `3h05m`, `5m09s`, `12.5s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def size(count: float) -> str:
    """A number of bytes: `512 B`, `1.4 MB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def moment(seconds: float | None) -> str:
    """A time of this machine's clock and zone."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def pairs(values: dict[str, object]) -> str:
    """`name=value` of each."""
    return " ".join(f"{name}={value}" for name, value in values.items())
