"""Fixtures for tests of the daemon: a turned clock, a database, settings in a temporary folder."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandboxd.kit.db import Database
from sandboxd.kit.settings import Settings

# By TCP, because docker-py leaks the socket when a unix address refuses it, and warnings are errors here.
NO_ENGINE = "tcp://127.0.0.1:1"


class FakeClock:
    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time - 1_000_000_000

    def advance(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """No engine answers these: a test that needs one brings its own settings."""
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run", port=0, docker_url=NO_ENGINE)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A test that uses it, or `db`, runs on both kinds of store; on one of them with
    `@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)`."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/test.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    if database.dialect == "sqlite":  # the other is a copy that has been migrated
        await database.migrate()
    yield database
    await database.close()
