"""The store: sessions for reading and writing, migrations, and locks between daemons. Knows no table.
SQLite and PostgreSQL behave the same from here up, but for what `write` says."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import ClassVar, Literal, Protocol

import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, MetaData, make_url, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit.errors import StoreUnavailableError
from sandboxd.kit.postgres import COMMAND_TIMEOUT_S, Postgres
from sandboxd.kit.sqlite import Sqlite

__all__ = ["MIGRATIONS", "Database", "StoreUnavailableError", "Table"]

MIGRATIONS = "sandboxd:migrations"
PING_TIMEOUT_S = 2.0
LOCK_NAME = re.compile(r"[a-z0-9_.-]{1,64}")

# Explicit names, so that a later migration can drop or change a constraint on every database.
NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

log = structlog.get_logger(__name__)


class Table(SQLModel):
    """Base of every table: one metadata with the naming convention."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMING_CONVENTION)


class Backend(Protocol):
    """What differs between the two kinds of store."""

    @property
    def dialect(self) -> Literal["sqlite", "postgresql"]: ...
    def reader(self) -> AsyncEngine: ...
    def writer(self) -> AsyncEngine: ...
    def turn(self) -> AbstractAsyncContextManager[None]: ...
    def migrate(self, run: Callable[[Connection], None]) -> None: ...
    async def serialize(self, session: AsyncSession, name: str) -> None: ...
    def singleton(self, name: str) -> AbstractAsyncContextManager[bool]: ...


class Database:
    """A store by its URL, `sqlite+aiosqlite:////path` or `postgresql+asyncpg://...`. Call `migrate` first.

    Every method raises StoreUnavailableError when the store cannot be reached, or does not answer in time."""

    def __init__(self, url: str, *, command_timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """`command_timeout_s` bounds each statement on PostgreSQL."""
        self.url = url
        self._backend = _backend(url, command_timeout_s)
        self.dialect = self._backend.dialect
        self._reader = self._backend.reader()
        self._writer = self._backend.writer()
        self._read_session = async_sessionmaker(self._reader, class_=AsyncSession, expire_on_commit=False)
        self._write_session = async_sessionmaker(self._writer, class_=AsyncSession, expire_on_commit=False)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session on one consistent view; what it writes is rolled back."""
        with _PoolErrors():
            async with self._read_session() as session:
                yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A writing session: commits on exit, rolls back on any error. Await nothing slow inside.

        On SQLite it is the only one. On PostgreSQL others write at the same time, also in other daemons, so
        what is read first may have changed by the time of the write: guard the write by the state it expects,
        read with `FOR UPDATE`, or call `serialize`."""
        with _PoolErrors():
            async with self._backend.turn(), self._write_session() as session, session.begin():
                yield session

    async def serialize(self, session: AsyncSession, name: str) -> None:
        """In a writing session: wait until no other one holds `name`, and hold it up to the commit."""
        await self._backend.serialize(session, _lock_name(name))

    def singleton(self, name: str) -> AbstractAsyncContextManager[bool]:
        """Gives True if nobody else, in this daemon or another on the same store, holds `name`; never waits.

        For one piece of work at a time: on PostgreSQL a lost connection ends the hold unnoticed."""
        return self._backend.singleton(_lock_name(name))

    async def migrate(self) -> None:
        """Bring the schema up to date. Safe to run in two processes at once, and again."""
        await asyncio.to_thread(self._backend.migrate, _run_alembic)

    async def ping(self) -> None:
        """Raise unless the store answers in time and has been migrated."""
        async with asyncio.timeout(PING_TIMEOUT_S), self.read() as session:
            await session.exec(text("SELECT version_num FROM alembic_version"))  # type: ignore[call-overload]  # textual SQL has no model

    async def close(self) -> None:
        await self._reader.dispose()
        await self._writer.dispose()


class _PoolErrors:
    """Turns a wait for a free connection that took too long into StoreUnavailableError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, PoolTimeoutError):
            log.error("store unavailable", reason=str(error))
            raise StoreUnavailableError("The store has too much to do. Try again in a while.") from error


def _backend(url: str, command_timeout_s: float) -> Backend:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return Postgres(parsed, command_timeout_s)
    return Sqlite(parsed)


def _lock_name(name: str) -> str:
    if LOCK_NAME.fullmatch(name) is None:
        raise ValueError(f"no name of a lock: {name!r}")
    return name


def _run_alembic(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
