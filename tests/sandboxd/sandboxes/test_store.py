"""Queries that every create makes do not read through the sandboxes of weeks."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event, text
from sqlmodel import select

from sandboxd.kit.paging import PageParams
from sandboxd.sandboxes import store
from sandboxd.sandboxes.models import Sandbox
from sandboxd.sandboxes.states import ALIVE, Status

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@contextmanager
def statements(db) -> Iterator[list[tuple[str, tuple]]]:
    seen: list[tuple[str, tuple]] = []

    def note(_connection, _cursor, statement, parameters, _context, _many) -> None:
        seen.append((statement, parameters))

    engines = [db._reader.sync_engine, db._writer.sync_engine]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    yield seen
    for engine in engines:
        event.remove(engine, "before_cursor_execute", note)


async def plans(db, seen: list[tuple[str, tuple]]) -> list[str]:
    found = []
    async with db.read() as session:
        connection = await session.connection()
        for statement, parameters in seen:
            if "sandbox" in statement:
                rows = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                found += [row[3] for row in rows]
    return found


async def test_no_query_on_the_way_of_a_create_scans_the_table(world, db):
    size = world.node.limits.default_size()
    with statements(db) as seen:
        async with db.write() as session:
            await store.claim(session, "node", size, [], {"status": Status.RUNNING})
            await store.count_held(session, "node")
            await store.taken_slots(session)
            await store.held_by(session, "proj")
            await store.change(session, "sbx", ALIVE, {"status": Status.STOPPING})
            await store.list_alive(session, "node")
            await store.count_alive(session, "node")
            await store.list_page(session, "proj", ALIVE, {}, PageParams())
            await store.list_page(session, "proj", None, {}, PageParams())
            await store.prune(session, 0.0, 10)
    told = await plans(db, seen)
    assert len(told) >= 10
    assert [line for line in told if line.startswith("SCAN sandbox")] == []


async def test_the_test_itself_sees_a_scan(world, db):
    with statements(db) as seen:
        async with db.read() as session:
            await session.exec(select(Sandbox).where(text("image = 'x'")))
    assert any(line.startswith("SCAN sandbox") for line in await plans(db, seen))
