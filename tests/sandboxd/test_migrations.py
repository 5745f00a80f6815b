"""The migrations and the tables say the same."""

from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlmodel import SQLModel

from sandboxd.kit.db import MIGRATIONS
from sandboxd.tables import metadata


async def test_migrated_schema_is_the_tables_schema(db):
    engine = create_engine(db.url.replace("+aiosqlite", ""))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_history_is_one_line():
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    scripts = ScriptDirectory.from_config(config)
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
