"""Alembic versions, append-only: a released one is never edited."""
