"""Lists of the API, page after page."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from e80_sdk.transport import Params, Request, Transport

PAGE_SIZE = 100


async def pages(
    transport: Transport, path: str, params: Params, *, limit: int | None = None, size: int = PAGE_SIZE
) -> AsyncGenerator[dict[str, Any]]:
    """Every item of a list, at most `limit`; so many are asked for at once."""
    left, after = limit, ""
    while left is None or left > 0:
        query = {**params, "limit": size if left is None else min(left, size)} | (
            {"after": after} if after else {}
        )
        page = await transport.send(Request("GET", path, params=query, idempotent=True))
        items = [item for item in page.get("data", []) if isinstance(item, dict)]
        for item in items:
            yield item
        after = str(page.get("last_id") or "")
        left = None if left is None else left - len(items)
        if not page.get("has_more") or not after or not items:
            return
