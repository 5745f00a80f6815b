"""The history of execs: written in groups, never changed once it has ended, read by the time of the start."""

import asyncio
from typing import Any

import pytest

from sandboxd.kit.db import Database, StoreUnavailableError
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.paging import PageParams
from sandboxd.sandboxes.history import History

SANDBOX = "sbx_" + "0" * 34


def exec_id(number: int) -> str:
    return f"exec_{number:034d}"


def row(number: int, status: str = "completed", **changes: Any) -> dict[str, Any]:
    made = {
        "id": exec_id(number),
        "project_id": "proj_1",
        "sandbox_id": SANDBOX,
        "kind": "code",
        "status": status,
        "exit_code": 0,
        "signal": None,
        "error_name": None,
        "truncated": False,
        "started_at": 1000.0 + number,
        "duration_ms": 1.5,
        "cpu_ms": 0.5,
        "title": "print(1)",
        "context_id": None,
        "background": False,
        "max_rss_mb": 2.0,
    }
    return {**made, **changes}


@pytest.fixture
async def history(db: Database) -> History:
    return History(db, Metrics())


async def test_a_reader_finds_what_ended_just_now(history):
    history.add(row(1))
    found = await history.find(SANDBOX, exec_id(1))
    assert found is not None
    assert found.model_dump() == row(1)
    assert await history.find("sbx_other", exec_id(1)) is None


async def test_a_reader_finds_what_is_being_written_just_now(history, monkeypatch):
    """An exec that had just ended was not there, one time in a hundred: its row had left the queue and had
    not come to the table."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    upsert = history._upsert

    async def slow(rows: list[dict[str, Any]]) -> None:
        begun.set()
        await go_on.wait()
        await upsert(rows)

    monkeypatch.setattr(history, "_upsert", slow)
    history.add(row(1))
    async with asyncio.TaskGroup() as group:
        group.create_task(history.batch.flush())
        await begun.wait()
        reader = group.create_task(history.find(SANDBOX, exec_id(1)))
        await asyncio.wait([reader], timeout=0.3)  # in which it must not have read
        go_on.set()
    assert reader.result() is not None


async def test_the_end_replaces_the_start_also_within_one_group(history):
    history.add(row(1, "running", exit_code=None, duration_ms=None))
    history.add(row(1, "failed", exit_code=3))
    history.add(row(2, "running", exit_code=None))
    await history.batch.flush()
    history.add(row(2, "lost"))
    await history.batch.flush()
    history.add(row(2, "oom"))
    rows, _ = await history.page(SANDBOX, PageParams())
    assert [(item.id, item.status) for item in rows] == [(exec_id(2), "oom"), (exec_id(1), "failed")]


async def test_an_id_of_another_sandbox_changes_nothing(history):
    history.add(row(1, "running"))
    await history.batch.flush()
    history.add(row(1, "failed", sandbox_id="sbx_" + "1" * 34, project_id="proj_2"))
    found = await history.find(SANDBOX, exec_id(1))
    assert found is not None
    assert found.model_dump() == row(1, "running")


async def test_no_sandbox_tells_the_end_of_anothers_exec(history):
    history.add(row(1, "running", exit_code=None))
    await history.batch.flush()
    history.add(row(1, "completed", sandbox_id="sbx_hostile", project_id="proj_hostile"))
    await history.batch.flush()
    found = await history.find(SANDBOX, exec_id(1))
    assert found is not None
    assert (found.status, found.project_id) == ("running", "proj_1")
    assert await history.find("sbx_hostile", exec_id(1)) is None


async def test_what_has_ended_is_never_changed(history):
    history.add(row(1, "failed", exit_code=3))
    await history.batch.flush()
    history.add(row(1, "running"))
    history.add(row(1, "completed", started_at=5.0))
    found = await history.find(SANDBOX, exec_id(1))
    assert found is not None
    assert (found.status, found.exit_code, found.started_at) == ("failed", 3, 1001.0)


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_go_by_the_start_and_miss_nothing_at_equal_times(history, order):
    # Ids that say nothing of the time, and three execs that started together.
    times = {7: 10.0, 3: 20.0, 9: 20.0, 1: 20.0, 5: 30.0}
    for number, started_at in times.items():
        history.add(row(number, started_at=started_at))
    history.add(row(8, sandbox_id="sbx_other"))
    seen: list[str] = []
    after, more = None, True
    while more:
        rows, more = await history.page(SANDBOX, PageParams(limit=2, after=after, order=order))
        seen += [item.id for item in rows]
        after = seen[-1]
    expected = [exec_id(number) for number in (7, 1, 3, 9, 5)]
    assert seen == (expected if order == "asc" else expected[::-1])


async def test_a_page_behind_an_unknown_exec_is_refused(history):
    with pytest.raises(BadRequestError) as caught:
        await history.page(SANDBOX, PageParams(after=exec_id(1)))
    assert caught.value.param == "after"


async def test_which_ends_are_known(history):
    for number, status in enumerate(["running", "completed", "lost", "killed"]):
        history.add(row(number, status))
    await history.batch.flush()
    assert await history.ended(exec_id(number) for number in range(9)) == {exec_id(1), exec_id(3)}
    assert [item.id for item in await history.running(SANDBOX)] == [exec_id(0)]


async def test_many_rows_are_written_in_groups(history):
    for number in range(1200):
        history.add(row(number))
    await history.close()
    rows, more = await history.page(SANDBOX, PageParams(limit=100))
    assert (rows[0].id, len(rows), more) == (exec_id(1199), 100, True)


async def test_a_row_that_the_store_refuses_holds_up_no_other(history):
    history.add(row(1, "x" * 9, started_at=None))
    history.add(row(2))
    await history.batch.flush()
    rows, _ = await history.page(SANDBOX, PageParams())
    assert [item.id for item in rows] == [exec_id(2)]


class Broken:
    """A store that can be read and not written."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.dialect = db.dialect
        self.read = db.read

    def write(self) -> Any:
        raise StoreUnavailableError("full")


async def test_without_a_store_reading_goes_on(db):
    history = History(Broken(db), Metrics())  # type: ignore[arg-type]  # a fake
    history.add(row(1))
    assert await history.find(SANDBOX, exec_id(1)) is None
    assert len(history.batch) == 1
