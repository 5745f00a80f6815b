import asyncio

import aiosqlite
import pytest
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlmodel import select, text

from sandboxd.identity.models import ApiKey, Organization
from sandboxd.kit.db import Database, StoreUnavailableError
from sandboxd.sandboxes.models import UsageHour

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def organization(number: int) -> Organization:
    return Organization(id=f"org_{number}", slug=f"slug-{number}", created_at=1.0)


async def slugs(db: Database) -> list[str]:
    async with db.read() as session:
        return sorted((await session.exec(select(Organization.slug))).all())


async def pragma(db: Database, name: str) -> object:
    async with db.read() as session:
        return (await session.exec(text(f"PRAGMA {name}"))).scalar()


@ON_SQLITE
async def test_the_pragmas_hold_on_every_connection(db):
    assert await pragma(db, "journal_mode") == "wal"
    assert await pragma(db, "synchronous") == 1
    assert await pragma(db, "busy_timeout") == 5000
    assert await pragma(db, "foreign_keys") == 1


async def test_a_write_is_committed_on_exit(db):
    async with db.write() as session:
        session.add(organization(1))
    assert await slugs(db) == ["slug-1"]


@ON_SQLITE
async def test_a_full_disk_is_said_and_reading_goes_on(db):
    async with db.write() as session:
        session.add(organization(1))
        # Stands in for the disk's end: the file may grow no further.
        pages = (await session.exec(text("PRAGMA page_count"))).scalar()
        await session.exec(text(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(StoreUnavailableError, match="full"):
        async with db.write() as session:
            session.add_all([organization(number) for number in range(2, 2000)])
    assert await slugs(db) == ["slug-1"]


async def test_a_write_is_rolled_back_on_error_and_the_next_one_works(db):
    async def fail() -> None:
        async with db.write() as session:
            session.add(organization(1))
            await session.flush()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await fail()
    async with db.write() as session:
        session.add(organization(2))
    assert await slugs(db) == ["slug-2"]


async def test_a_cancelled_write_is_rolled_back_and_frees_the_writer(db):
    inside = asyncio.Event()

    async def write_for_ever() -> None:
        async with db.write() as session:
            session.add(organization(1))
            await session.flush()
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write_for_ever())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with db.write() as session:
        session.add(organization(2))
    assert await slugs(db) == ["slug-2"]


async def test_what_a_read_session_writes_is_lost(db):
    async with db.read() as session:
        session.add(organization(1))
        await session.flush()
    assert await slugs(db) == []


async def test_a_read_is_one_snapshot(db):
    async with db.read() as session:
        before = (await session.exec(select(Organization))).all()
        async with db.write() as writer:
            writer.add(organization(1))
        assert (await session.exec(select(Organization))).all() == before == []
    assert await slugs(db) == ["slug-1"]


async def test_many_writers_at_once_lose_nothing(db):
    async def write(number: int) -> None:
        async with db.write() as session:
            session.add(organization(number))

    await asyncio.gather(*(write(number) for number in range(100)))
    assert len(await slugs(db)) == 100


async def test_two_processes_may_write_what_they_read(db):
    """Each on an engine of its own, as `create-key` beside the daemon is."""
    other = Database(db.url)
    async with db.write() as session:
        session.add(organization(1))

    async def count_up(database: Database) -> None:
        for _ in range(20):
            async with database.write() as session:
                row = await session.get_one(Organization, "org_1", with_for_update=True)
                await asyncio.sleep(0)
                row.created_at += 1

    await asyncio.gather(count_up(db), count_up(other))
    await other.close()
    async with db.read() as session:
        assert (await session.get_one(Organization, "org_1")).created_at == 41


async def test_what_serialize_names_is_done_one_after_the_other(db):
    """Without it both would read the same number, on PostgreSQL."""
    other = Database(db.url)

    async def add(database: Database) -> None:
        for _ in range(20):
            async with database.write() as session:
                await database.serialize(session, "count")
                number = len((await session.exec(select(Organization.id))).all())
                await asyncio.sleep(0)
                session.add(organization(number))

    await asyncio.gather(add(db), add(other))
    await other.close()
    assert len(await slugs(db)) == 40


async def test_a_serialized_name_holds_up_no_other(db):
    async with db.write() as session:
        await db.serialize(session, "one")
        if db.dialect == "postgresql":  # SQLite has one writer anyway
            async with asyncio.timeout(1), db.write() as beside:
                await db.serialize(beside, "other")


async def test_a_singleton_is_one_among_all_and_free_again(db):
    other = Database(db.url)
    async with db.singleton("job") as first, other.singleton("job") as second, db.singleton("job") as third:
        assert (first, second, third) == (True, False, False)
        async with other.singleton("other-job") as beside:
            assert beside is True
    async with other.singleton("job") as again:
        assert again is True
    with pytest.raises(RuntimeError, match="fell"):
        async with other.singleton("job"):
            raise RuntimeError("fell")
    async with db.singleton("job") as after:
        assert after is True
    await other.close()


async def test_a_lock_has_a_plain_name(db):
    for name in ("", "a/b", "x" * 65, "A"):
        with pytest.raises(ValueError, match="no name"):
            db.singleton(name)


async def test_times_and_large_numbers_come_back_whole(db):
    at = 1_763_696_297.123456
    async with db.write() as session:
        session.add(Organization(id="org_1", slug="s", created_at=at))
        session.add(
            UsageHour(project_id="p", hour=489_915, bytes_in=2**53, bytes_out=2**40, cpu_s=0.1, sandbox_s=at)
        )
    async with db.read() as session:
        assert (await session.get_one(Organization, "org_1")).created_at == at
        hour = await session.get_one(UsageHour, ("p", 489_915))
        assert (hour.bytes_in, hour.cpu_s, hour.sandbox_s) == (2**53, 0.1, at)


async def test_rows_stay_readable_after_the_session(db):
    async with db.write() as session:
        row = organization(1)
        session.add(row)
    assert row.slug == "slug-1"


async def test_constraints_are_enforced(db):
    async with db.write() as session:
        session.add(organization(1))
    with pytest.raises(IntegrityError):
        async with db.write() as session:
            session.add(Organization(id="org_2", slug="slug-1", created_at=1.0))
    with pytest.raises(IntegrityError):
        async with db.write() as session:
            session.add(
                ApiKey(id="key_1", project_id="none", name="n", prefix="p", secret_sha256="s", created_at=1.0)
            )


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
async def test_migrations_may_run_again_and_at_once(tmp_path, request, dialect):
    if dialect == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path}/new.db"
    else:
        url = request.getfixturevalue("postgres").new_database()
    databases = [Database(url) for _ in range(4)]
    await asyncio.gather(*(database.migrate() for database in databases))
    for database in databases:
        await database.migrate()
        await database.ping()
        await database.close()


async def test_ping_tells_that_the_file_is_no_database(tmp_path):
    path = tmp_path / "broken.db"
    path.write_bytes(b"not a database" * 100)
    database = Database(f"sqlite+aiosqlite:///{path}")
    with pytest.raises(DatabaseError, match="not a database"):
        await database.ping()
    await database.close()


async def test_close_may_be_called_twice(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/new.db")
    await database.migrate()
    await database.close()
    await database.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_statement_is_one_trip_to_the_thread_of_its_connection(db, monkeypatch):
    trips = []
    real = aiosqlite.Connection._execute

    async def counted(self, function, *arguments, **options):
        trips.append(function)
        return await real(self, function, *arguments, **options)

    async with db.write() as session:
        await session.exec(text("SELECT 1"))
        monkeypatch.setattr(aiosqlite.Connection, "_execute", counted)
        rows = (await session.exec(text("SELECT 1 UNION SELECT 2"))).all()
    assert rows == [(1,), (2,)]
    # The statement, the commit, and the reset of a connection that goes back to its pool.
    assert len(trips) == 3
