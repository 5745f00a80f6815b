"""PostgreSQL as the store, for one daemon or several: asyncpg's deadlines and faults. Knows no table."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any, Literal

import structlog
from sqlalchemy import URL, Connection, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel.ext.asyncio.session import AsyncSession

from sandboxd.kit.errors import BadRequestError, StoreUnavailableError

READERS = 4
WRITERS = 8
CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 5.0
# Shorter than a command's time, so that the server's own words arrive.
LOCK_TIMEOUT_S = 3.0
POOL_TIMEOUT_S = 5.0
POOL_RECYCLE_S = 1800
# A daemon that died silently, or hangs in a transaction, keeps its locks no longer than this.
IDLE_TIMEOUT_S = 30
MIGRATE_TIMEOUT_S = 600.0

SCHEMES = ("postgresql", "postgresql+asyncpg")
OPTIONS = ("host", "port", "ssl", "sslmode", "target_session_attrs")
# SQLSTATE: connection, resources, intervention, system and authorization faults; deadlock, lock timeout,
# hung in a transaction, standby, no such database. None is a fault of the statement.
UNAVAILABLE_CLASSES = ("08", "28", "40", "53", "57", "58")
UNAVAILABLE_CODES = ("25006", "25P03", "55P03", "3D000")
# What no text of PostgreSQL can hold: a NUL character.
NOT_TEXT = "22021"

log = structlog.get_logger(__name__)


class Postgres:
    dialect: Literal["postgresql"] = "postgresql"

    def __init__(self, url: URL, command_timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        self._url = url
        self._timeout_s = command_timeout_s
        self._locks = _engine(url, command_timeout_s, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def reader(self) -> AsyncEngine:
        # One consistent view, as a read is in SQLite.
        return self._pooled(READERS, "REPEATABLE READ")

    def writer(self) -> AsyncEngine:
        return self._pooled(WRITERS, "READ COMMITTED")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """No waiting: write transactions run side by side."""
        yield

    def migrate(self, run: Callable[[Connection], None]) -> None:
        """Blocks: call it in a thread."""
        asyncio.run(self._migrate(run))

    async def serialize(self, session: AsyncSession, name: str) -> None:
        connection = await session.connection()
        await connection.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": f"sandboxd.{name}"}
        )

    @asynccontextmanager
    async def singleton(self, name: str) -> AsyncIterator[bool]:
        # The lock is the session's, and ends with it.
        async with self._locks.connect() as connection:
            taken = await connection.scalar(
                text("SELECT pg_try_advisory_lock(hashtextextended(:name, 1))"), {"name": f"sandboxd.{name}"}
            )
            yield bool(taken)

    def _pooled(self, size: int, isolation_level: str) -> AsyncEngine:
        return _engine(
            self._url,
            self._timeout_s,
            isolation_level=isolation_level,
            pool_size=size,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_S,
            pool_recycle=POOL_RECYCLE_S,
        )

    async def _migrate(self, run: Callable[[Connection], None]) -> None:
        engine = _engine(
            self._url, MIGRATE_TIMEOUT_S, lock_timeout_s=MIGRATE_TIMEOUT_S - 1, poolclass=NullPool
        )
        try:
            async with engine.begin() as connection:
                await connection.execute(
                    text("SELECT pg_advisory_xact_lock(hashtextextended('sandboxd.migrate', 0))")
                )
                await connection.run_sync(run)
        finally:
            await engine.dispose()


def check_url(value: str) -> str:
    """The URL with asyncpg as its driver. A ValueError says what is wrong, and repeats no part of it."""
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        raise ValueError("is no URL: postgresql://user:password@host:port/database") from None
    if url.drivername not in SCHEMES:
        raise ValueError("must begin with postgresql:// (the driver is asyncpg)")
    if not url.database:
        raise ValueError("names no database: postgresql://user:password@host:port/database")
    if not set(url.query) <= set(OPTIONS):
        raise ValueError(f"has an option that is not known; these are: {', '.join(OPTIONS)}")
    if find_spec("asyncpg") is None:
        raise ValueError("needs the extra 'postgres': pip install 'e80[server,postgres]'")
    return url.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)


def _engine(
    url: URL, command_timeout_s: float, *, lock_timeout_s: float = LOCK_TIMEOUT_S, **options: Any
) -> AsyncEngine:
    arguments: dict[str, Any] = {
        "timeout": CONNECT_TIMEOUT_S,
        "command_timeout": command_timeout_s,
        "server_settings": {
            "application_name": "sandboxd",
            # For the statement of a daemon that is gone; a living one has its own deadline, which is shorter.
            "statement_timeout": _milliseconds(command_timeout_s * 2),
            "lock_timeout": _milliseconds(lock_timeout_s),
            "idle_in_transaction_session_timeout": _milliseconds(max(IDLE_TIMEOUT_S, command_timeout_s)),
            "tcp_keepalives_idle": "15",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
            "jit": "off",
        },
    }
    if "sslmode" in url.query:
        # libpq's name for it.
        arguments["ssl"] = url.query["sslmode"]
        url = url.difference_update_query(["sslmode"])
    engine = create_async_engine(url, connect_args=arguments, hide_parameters=True, **options)

    @event.listens_for(engine.sync_engine, "do_connect")
    def on_connect(dialect: Any, _record: object, positional: Any, named: Any) -> Any:
        try:
            return dialect.connect(*positional, **named)
        except OSError as error:  # TimeoutError is one
            raise _unavailable(error) from error

    @event.listens_for(engine.sync_engine, "checkout")
    def on_checkout(connection: Any, _record: object, _proxy: object) -> None:
        # asyncpg hears at once of its socket's end: no ping before each use is needed.
        if connection.driver_connection.is_closed():
            raise DisconnectionError("the server has closed the connection")

    event.listen(engine.sync_engine, "handle_error", _on_error)
    return engine


def _on_error(context: ExceptionContext) -> BaseException | None:
    error = context.original_exception
    state = getattr(error, "sqlstate", None) or ""
    if isinstance(error, OSError | asyncio.CancelledError):
        # The connection is in the middle of something, and a server that hangs would not let it be closed
        # politely: cut it.
        context.is_disconnect = True
        if context.connection is not None and not context.connection.invalidated:
            proxied: Any = context.connection.connection
            proxied.driver_connection.terminate()
        return _unavailable(error) if isinstance(error, OSError) else None
    if state == NOT_TEXT:
        return BadRequestError("Text must not hold the character U+0000.")
    if (
        context.is_disconnect
        or context.connection is None
        or state in UNAVAILABLE_CODES
        or state[:2] in UNAVAILABLE_CLASSES
    ):
        return _unavailable(error)
    return None


def _unavailable(error: BaseException) -> StoreUnavailableError:
    # The reason can name hosts and users: it is for the log only.
    log.error("store unavailable", reason=f"{type(error).__name__}: {error}")
    return StoreUnavailableError("The store (PostgreSQL) cannot be used at the moment. Try again in a while.")


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
