"""SQLite as the store: one file in WAL mode, many readers, one writer at a time. Knows no table."""

import asyncio
import fcntl
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any, Literal

import structlog
from sqlalchemy import URL, Connection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit import sqlite_driver
from sandboxd.kit.errors import StoreUnavailableError

READERS = 4
BUSY_TIMEOUT_S = 5
# Of each connection, instead of 2 MB: the kernel caches the file, too.
CACHE_KB = 256

log = structlog.get_logger(__name__)


class Sqlite:
    dialect: Literal["sqlite"] = "sqlite"

    def __init__(self, url: URL) -> None:
        self._url = url
        self._path = url.database or ""
        # Waits as long as it takes, where the pool's own queue would give up after 30 seconds.
        self._turn = asyncio.Lock()

    def reader(self) -> AsyncEngine:
        return _engine(self._url, begin="BEGIN", pool_size=READERS, max_overflow=0)

    def writer(self) -> AsyncEngine:
        # A second writer could only wait for SQLite's lock: one connection, taken in turn.
        return _engine(self._url, begin="BEGIN IMMEDIATE", pool_size=1, max_overflow=0)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self._turn:
            yield

    def migrate(self, run: Callable[[Connection], None]) -> None:
        """Blocks: call it in a thread."""
        _use_wal(self._path)
        asyncio.run(self._migrate(run))

    async def serialize(self, session: AsyncSession, name: str) -> None:
        """Nothing to do: there is one write transaction at a time."""

    @asynccontextmanager
    async def singleton(self, name: str) -> AsyncIterator[bool]:
        file = os.open(f"{self._path}.{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(file)

    async def _migrate(self, run: Callable[[Connection], None]) -> None:
        # Rebuilding a table (SQLite cannot alter one) must not fire its cascades: foreign keys are off here.
        engine = _engine(self._url, begin="BEGIN IMMEDIATE", foreign_keys=False, poolclass=NullPool)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(run)
        finally:
            await engine.dispose()


def _engine(url: URL, *, begin: str, foreign_keys: bool = True, **options: Any) -> AsyncEngine:
    creator = {"async_creator_fn": sqlite_driver.connect}
    engine = create_async_engine(url, hide_parameters=True, connect_args=creator, **options)

    # The driver would start transactions by itself, and only before DML: take that over, so that a read is
    # one snapshot and a write holds the lock from its first statement (no upgrade, hence no SQLITE_BUSY).
    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute(f"PRAGMA cache_size = -{CACHE_KB}")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    @event.listens_for(engine.sync_engine, "handle_error")
    def on_error(context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        if not isinstance(error, sqlite3.OperationalError) or error.sqlite_errorcode == sqlite3.SQLITE_ERROR:
            return None  # the latter is a statement that SQLite does not understand: a fault of ours
        log.error("store unavailable", reason=str(error))
        return StoreUnavailableError(
            f"The store cannot be {'read' if begin == 'BEGIN' else 'written'}: {error}. Free some space if "
            "the server's disk is full, then try again."
        )

    return engine


def _use_wal(path: str) -> None:
    # The mode stays in the file. Two processes that change it at once get SQLITE_BUSY without any waiting.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.01)
