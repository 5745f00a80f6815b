"""aiosqlite with one trip to its thread for each statement, where its own cursor takes four.

A trip costs little on an idle machine and a scheduling delay on a busy one; a claim out of the pool made 18.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Self

import aiosqlite

# Statements whose results wait for the thread of their connection.
_QUEUE_SIZE = 64


class _Cursor:
    """What SQLAlchemy needs of a cursor. All rows are fetched at once, as it would do anyway."""

    arraysize = 1

    def __init__(self, connection: "_Connection") -> None:
        self._connection = connection
        self._rows: Sequence[Any] = ()
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, sql: str, parameters: Iterable[Any] = ()) -> None:
        await self._run(sqlite3.Cursor.execute, sql, parameters)

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> None:
        await self._run(sqlite3.Cursor.executemany, sql, parameters)

    async def fetchall(self) -> Sequence[Any]:
        rows, self._rows = self._rows, ()
        return rows

    async def close(self) -> None:
        self._rows = ()

    async def _run(self, method: Any, sql: str, parameters: Any) -> None:
        def trip() -> None:
            cursor = self._connection._conn.cursor()
            try:
                method(cursor, sql, parameters)
                self._rows = cursor.fetchall() if cursor.description else ()
                self.description = cursor.description
                self.rowcount, self.lastrowid = cursor.rowcount, cursor.lastrowid
            finally:
                cursor.close()

        await self._connection._execute(trip)  # type: ignore[no-untyped-call]  # untyped in aiosqlite


class _Connection(aiosqlite.Connection):
    def cursor(self) -> Any:
        return _Cursor(self)


def connect(path: str, **options: Any) -> aiosqlite.Connection:
    """For SQLAlchemy's `async_creator_fn`: a connection that has yet to be awaited."""
    connection = _Connection(lambda: sqlite3.connect(path, **options), _QUEUE_SIZE)
    # As SQLAlchemy sets it: a connection that was lost sight of must not keep the process from ending.
    connection._thread.daemon = True
    return connection
