"""The store's engine: sessions for reading and writing, and migrations. Knows no table."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any, ClassVar

import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, MetaData, event, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit.errors import UnavailableError

MIGRATIONS = "sandboxd:migrations"
READERS = 4
PING_TIMEOUT_S = 2.0
BUSY_TIMEOUT_S = 5

# Explicit names, so that a later migration can drop or change a constraint on every database.
NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


log = structlog.get_logger(__name__)


class StoreUnavailableError(UnavailableError):
    """Nothing was written; what is stored can still be read."""

    code = "store_unavailable"


class Table(SQLModel):
    """Base of every table: one metadata with the naming convention."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMING_CONVENTION)


class Database:
    """One SQLite file in WAL mode: many readers, one writer at a time. Call `migrate` first."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._reader = _engine(url, begin="BEGIN", pool_size=READERS, max_overflow=0)
        # A second writer could only wait for SQLite's lock: one connection, taken in turn.
        self._writer = _engine(url, begin="BEGIN IMMEDIATE", pool_size=1, max_overflow=0)
        self._read_session = async_sessionmaker(self._reader, class_=AsyncSession, expire_on_commit=False)
        self._write_session = async_sessionmaker(self._writer, class_=AsyncSession, expire_on_commit=False)
        # Waits as long as it takes, where the pool's own queue would give up after 30 seconds.
        self._write_lock = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session on one consistent view; what it writes is rolled back."""
        async with self._read_session() as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """The one writing session: commits on exit, rolls back on any error. Await nothing slow inside."""
        try:
            async with self._write_lock, self._write_session() as session, session.begin():
                yield session
        except OperationalError as error:
            log.error("store cannot be written", reason=str(error.orig))
            raise StoreUnavailableError(
                f"The store cannot be written: {error.orig}. Free some space if the server's disk is full, "
                "then try again."
            ) from error

    async def migrate(self) -> None:
        """Bring the schema up to date. Safe to run in two processes at once, and again."""
        await asyncio.to_thread(_migrate, self.url)

    async def ping(self) -> None:
        """Raise unless the store answers in time and has been migrated."""
        async with asyncio.timeout(PING_TIMEOUT_S), self.read() as session:
            await session.exec(text("SELECT version_num FROM alembic_version"))  # type: ignore[call-overload]  # textual SQL has no model

    async def close(self) -> None:
        await self._reader.dispose()
        await self._writer.dispose()


def _engine(url: str, *, begin: str, foreign_keys: bool = True, **options: Any) -> AsyncEngine:
    engine = create_async_engine(url, **options)

    # The driver would start transactions by itself, and only before DML: take that over, so that a read is
    # one snapshot and a write holds the lock from its first statement (no upgrade, hence no SQLITE_BUSY).
    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _migrate(url: str) -> None:
    _use_wal(make_url(url).database or "")
    asyncio.run(_upgrade(url))


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


async def _upgrade(url: str) -> None:
    # Rebuilding a table (SQLite cannot alter one) must not fire its cascades: foreign keys are off here.
    engine = _engine(url, begin="BEGIN IMMEDIATE", foreign_keys=False, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(_run_alembic)
    finally:
        await engine.dispose()


def _run_alembic(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
