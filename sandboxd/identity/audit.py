"""The audit trail: who did what to which thing. Entries are written with the change they tell of, in its own
transaction, and never changed."""

from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.identity.models import AuditEntry
from sandboxd.kit.ids import new_id
from sandboxd.kit.origin import current_origin


def record(
    session: AsyncSession,
    *,
    project_id: str,
    actor: str,
    action: str,
    resource_id: str,
    at: float,
    **details: Any,
) -> None:
    """Adds an entry to the transaction. `actor` is an API key's id, or the part of the daemon that acted by
    itself; `action` is like `sandbox.stop`."""
    origin = current_origin.get()
    session.add(
        AuditEntry(
            id=new_id("aud"),
            created_at=at,
            project_id=project_id,
            actor=actor,
            action=action,
            resource_id=resource_id,
            request_id=origin.request_id,
            client=origin.client,
            details=details,
        )
    )
