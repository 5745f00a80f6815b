"""The world in which the life cycle is tested, on both kinds of store."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandboxd.identity.service import IdentityService
from sandboxd.kit.db import Database
from tests.sandboxd.sandboxes.world import World


@pytest.fixture
async def world(tmp_path: Path, db: Database) -> AsyncIterator[World]:
    world = World(tmp_path, db)
    identity = IdentityService(db, world.clock)
    project = await identity.ensure_project("org", "proj")
    key = await identity.create_key(project.id, "k", actor="tests")
    world.principal = await identity.authenticate(key.key)
    yield world
    await world.tasks.close()
