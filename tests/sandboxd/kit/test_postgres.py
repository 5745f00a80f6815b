"""What goes wrong between the daemon and PostgreSQL: each fault has an end, and leaves nothing broken."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import make_url
from sqlmodel import select, text
from structlog.testing import capture_logs

from sandboxd.identity.models import Organization
from sandboxd.kit.db import Database, StoreUnavailableError
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.postgres import Postgres, check_url


class Proxy:
    """A network that can be frozen (nothing arrives any more) and cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    def freeze(self) -> None:
        self._open.clear()

    def thaw(self) -> None:
        self._open.set()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def close(self) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, there_writer}
        for pair in ((reader, there_writer), (there_reader, writer)):
            self._tasks.add(asyncio.get_running_loop().create_task(self._copy(*pair)))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def db(postgres_url) -> AsyncIterator[Database]:
    async with opened(Database(postgres_url)) as database:
        yield database


@pytest.fixture
async def proxy(postgres) -> AsyncIterator[Proxy]:
    proxy = Proxy(postgres.port)
    await proxy.start()
    yield proxy
    await proxy.close()


@pytest.fixture
async def behind(proxy, postgres, postgres_url) -> AsyncIterator[Database]:
    """The database by way of the proxy, with short deadlines."""
    url = make_url(check_url(postgres.tcp_url(postgres_url))).set(port=proxy.port)
    async with opened(Database(url.render_as_string(hide_password=False), command_timeout_s=0.3)) as database:
        yield database


@asynccontextmanager
async def opened(database: Database) -> AsyncIterator[Database]:
    try:
        yield database
    finally:
        await database.close()


async def add(db: Database, number: int) -> None:
    async with db.write() as session:
        session.add(Organization(id=f"org_{number}", slug=f"slug-{number}", created_at=1.0))


async def slugs(db: Database) -> list[str]:
    async with db.read() as session:
        return sorted((await session.exec(select(Organization.slug))).all())


async def test_a_password_with_every_kind_of_character_works(behind):
    await add(behind, 1)
    await behind.ping()
    assert await slugs(behind) == ["slug-1"]


async def test_a_network_that_says_nothing_has_a_deadline(behind, proxy):
    await asyncio.gather(*(add(behind, number) for number in range(4)))
    await slugs(behind)
    proxy.freeze()
    began = time.monotonic()
    results = await asyncio.gather(add(behind, 5), slugs(behind), return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailableError] * 2
    assert time.monotonic() - began < 1
    proxy.thaw()
    await add(behind, 6)
    assert set(await slugs(behind)) >= {"slug-0", "slug-1", "slug-2", "slug-3", "slug-6"}


async def test_a_request_that_is_cancelled_while_the_network_is_silent_ends_at_once(behind, proxy):
    await add(behind, 1)
    proxy.freeze()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await add(behind, 2)
    assert time.monotonic() - began < 0.25
    proxy.thaw()
    await add(behind, 3)
    assert "slug-3" in await slugs(behind)


async def test_a_broken_connection_costs_one_request_at_most(behind, proxy):
    await asyncio.gather(*(add(behind, number) for number in range(8)))
    proxy.cut()
    await asyncio.sleep(0.05)  # until the ends of the sockets arrive
    await add(behind, 8)
    assert len(await slugs(behind)) == 9


async def test_a_connection_that_breaks_in_a_transaction_writes_nothing(behind, proxy):
    async def broken() -> None:
        async with behind.write() as session:
            session.add(Organization(id="org_1", slug="lost", created_at=1.0))
            await session.flush()
            proxy.cut()
            session.add(Organization(id="org_2", slug="lost-too", created_at=1.0))

    with pytest.raises(StoreUnavailableError):
        await broken()
    assert await slugs(behind) == []


async def test_nobody_there_is_said_without_naming_the_place(proxy, behind):
    await proxy.close()
    with capture_logs() as logs, pytest.raises(StoreUnavailableError) as caught:
        await slugs(behind)
    assert str(proxy._target) not in caught.value.message
    assert logs[0]["event"] == "store unavailable"
    for work in (behind.ping(), behind.migrate()):
        with pytest.raises(StoreUnavailableError):
            await work
    with pytest.raises(StoreUnavailableError):
        async with behind.singleton("job"):
            pass


@pytest.mark.parametrize("change", [{"password": "wrong"}, {"database": "nowhere"}])
async def test_a_server_that_lets_nobody_in_is_unavailable(postgres, postgres_url, change):
    url = make_url(check_url(postgres.tcp_url(postgres_url))).set(**change)
    async with opened(Database(url.render_as_string(hide_password=False))) as database:
        with pytest.raises(StoreUnavailableError):
            await slugs(database)


async def test_a_lock_that_another_holds_is_waited_for_not_for_ever(db, behind):
    async with db.write() as session:
        await db.serialize(session, "one")
        with pytest.raises(StoreUnavailableError):
            async with behind.write() as beside:
                await behind.serialize(beside, "one")
    async with behind.write() as session:
        await behind.serialize(session, "one")


async def test_a_statement_that_takes_too_long_is_ended(behind):
    with pytest.raises(StoreUnavailableError):
        async with behind.write() as session:
            await session.exec(text("SELECT pg_sleep(30)"))
    await add(behind, 1)


async def test_a_lost_singleton_is_free_for_others(db, behind, proxy):
    async with behind.singleton("job") as mine:
        assert mine
        proxy.cut()
        for _ in range(100):
            async with db.singleton("job") as taken:
                if taken:
                    break
            await asyncio.sleep(0.01)
        assert taken


async def test_text_that_cannot_be_stored_is_the_callers_fault(db):
    with pytest.raises(BadRequestError, match="U\\+0000"):
        async with db.read() as session:
            await session.exec(select(Organization).where(Organization.slug == "a\0b"))


async def test_many_more_requests_than_connections(db):
    await asyncio.gather(*(add(db, number) for number in range(300)))
    found = await asyncio.gather(*(slugs(db) for _ in range(50)))
    assert {len(names) for names in found} == {300}


async def test_a_statement_of_ours_that_is_wrong_is_no_fault_of_the_store(db):
    with pytest.raises(Exception, match="nonsense") as caught:
        async with db.read() as session:
            await session.exec(text("SELECT nonsense"))
    assert not isinstance(caught.value, StoreUnavailableError)


async def test_times_are_kept_with_double_precision(db):
    async with db.read() as session:
        found = await session.exec(
            text("SELECT DISTINCT data_type FROM information_schema.columns WHERE column_name = 'created_at'")
        )
        assert [row[0] for row in found] == ["double precision"]


def test_ssl_is_asked_for_in_the_usual_words():
    url = make_url("postgresql+asyncpg://h/d?sslmode=require")
    engine = Postgres(url).writer()
    assert "sslmode" not in engine.url.query
