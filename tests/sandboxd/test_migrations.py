"""The migrations and the tables say the same, on each kind of store, there and back."""

from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel, select

from sandboxd.identity import audit
from sandboxd.identity.models import AuditEntry, Organization, Project
from sandboxd.kit.db import MIGRATIONS, Database
from sandboxd.sandboxes.models import Event, Sandbox
from sandboxd.tables import metadata


def config(connection: Connection | None = None) -> Config:
    made = Config()
    made.set_main_option("script_location", MIGRATIONS)
    made.attributes["connection"] = connection
    return made


def differences(connection: Connection) -> list[Any]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return list(compare_metadata(context, metadata))


def sandbox(number: int, **fields: Any) -> Sandbox:
    return Sandbox(
        id=f"sb_{number}",
        **{"project_id": "proj_1", "status": "running", **fields},
        slot=number,
        runtime="runc",
        isolation=1,
        image="image",
        image_digest="sha256:0",
        cpu_mhz=100,
        memory_size_mb=64,
        disk_size_mb=16,
        labels={"a": "b"},
        created_at=1_763_696_297.123456,
        last_active_at=1.5,
        boot_id="boot",
    )


async def fill(db: Database) -> None:
    async with db.write() as session:
        session.add(Organization(id="org_1", slug="org", created_at=1.0))
        await session.flush()
        session.add(Project(id="proj_1", organization_id="org_1", slug="proj", created_at=1.0))
        await session.flush()
        session.add(sandbox(1))
        session.add(sandbox(2, project_id=None, status="ready"))
        session.add(sandbox(3, status="paused"))
        audit.record(session, project_id="proj_1", actor="key_1", action="test", resource_id="sb_1", at=1.0)


async def run(db: Database, work) -> Any:
    """Alembic's own verbs, on a connection that enforces no foreign keys while SQLite rebuilds tables."""
    async with db._writer.connect() as connection:
        if db.dialect == "sqlite":
            raw: Any = (await connection.get_raw_connection()).driver_connection
            await raw.rollback()
            await raw.execute("PRAGMA foreign_keys = OFF")
        async with connection.begin():
            return await connection.run_sync(work)


async def test_migrated_schema_is_the_tables_schema(db):
    assert await run(db, differences) == []


async def test_there_and_back_and_there_again_with_rows(db):
    await fill(db)
    await run(db, lambda connection: command.downgrade(config(connection), "0002"))
    async with db.read() as session:
        # The members of the pool and what is paused are unknown to the older version.
        assert (await session.exec(text("SELECT id, status FROM sandbox"))).all() == [("sb_1", "running")]
    await run(db, lambda connection: command.upgrade(config(connection), "head"))
    assert await run(db, differences) == []
    async with db.read() as session:
        row = (await session.exec(select(Sandbox))).one()
    assert (row.id, row.slot, row.labels, row.node_id, row.cpu_read_s) == ("sb_1", 1, {"a": "b"}, "", 0)
    assert row.created_at == 1_763_696_297.123456


async def test_down_to_nothing_and_up_again(db):
    await fill(db)
    await run(db, lambda connection: command.downgrade(config(connection), "base"))
    await run(db, lambda connection: command.upgrade(config(connection), "head"))
    assert await run(db, differences) == []


async def test_two_live_sandboxes_never_have_one_slot(db):
    await fill(db)
    for status in ("creating", "ready", "running", "paused", "stopping"):
        row = sandbox(1, status=status)
        row.id = "sb_other"
        with pytest.raises(IntegrityError):
            async with db.write() as session:
                session.add(row)


async def test_events_are_counted_up(db):
    for number in (1, 2):
        async with db.write() as session:
            session.add(
                Event(
                    id=f"evt_{number}", project_id="p", sandbox_id="s", type="sandbox.created", created_at=1.0
                )
            )
    async with db.read() as session:
        found = (await session.exec(select(Event.sequence).order_by(Event.id))).all()
    assert found == [1, 2]


@pytest.mark.parametrize("change", ["UPDATE audit_entry SET actor = 'me'", "DELETE FROM audit_entry"])
async def test_the_audit_trail_can_only_grow(db, change):
    await fill(db)
    with pytest.raises(IntegrityError, match="never"):
        async with db.write() as session:
            await session.exec(text(change))
    async with db.read() as session:
        assert (await session.exec(select(AuditEntry.actor))).all() == ["key_1"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_the_audit_trail_cannot_be_emptied_at_once(db):
    await fill(db)
    with pytest.raises(IntegrityError, match="never"):
        async with db.write() as session:
            await session.exec(text("TRUNCATE audit_entry"))


def test_history_is_one_line():
    scripts = ScriptDirectory.from_config(config())
    assert len(scripts.get_heads()) == 1
    assert len(scripts.get_bases()) == 1


def test_every_table_is_in_the_metadata_with_the_naming_convention():
    # A table that subclasses SQLModel itself would be left out of the migrations.
    assert list(SQLModel.metadata.tables) == []
    unnamed = [
        f"{table.name}: {constraint}"
        for table in metadata.tables.values()
        for constraint in (*table.constraints, *table.indexes)
        if constraint.name is None
    ]
    assert unnamed == []
