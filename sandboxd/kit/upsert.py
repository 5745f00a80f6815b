"""INSERT ... ON CONFLICT, which SQLAlchemy has for each database apart and not in general."""

from typing import Any

from sqlalchemy.dialects import postgresql, sqlite


def insert(dialect: str, table: Any) -> Any:
    """The insert statement of "sqlite" or "postgresql": both know `on_conflict_do_update`, `excluded`."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
