"""Group commit: few writes, nothing lost by a fault, a bound, and the last flush."""

import asyncio
from collections.abc import Sequence

import pytest

from sandboxd.kit.batch import Batch
from sandboxd.kit.tasks import TaskOwner


class Store:
    """Writes down what it is given; fails as often as it is told to."""

    def __init__(self) -> None:
        self.writes: list[list[int]] = []
        self.faults = 0
        self.dropped = 0
        self.wrote = asyncio.Event()

    async def write(self, items: Sequence[int]) -> None:
        if self.faults:
            self.faults -= 1
            raise OSError("disk full")
        self.writes.append(list(items))
        self.wrote.set()

    def drop(self, count: int) -> None:
        self.dropped += count


@pytest.fixture
async def store() -> Store:
    return Store()


async def test_what_comes_together_is_written_together(store):
    batch = Batch("test", store.write, store.drop, delay_s=0.01)
    async with TaskOwner() as tasks:
        tasks.start("batch", batch.run())
        for number in range(10):
            batch.add(number)
        await asyncio.wait_for(store.wrote.wait(), 10)
        store.wrote.clear()
        batch.add(10)
        await asyncio.wait_for(store.wrote.wait(), 10)
    assert store.writes == [list(range(10)), [10]]


async def test_one_write_has_a_bound(store):
    batch = Batch("test", store.write, store.drop, max_rows=3)
    for number in range(7):
        batch.add(number)
    await batch.flush()
    assert store.writes == [[0, 1, 2], [3, 4, 5], [6]]


async def test_a_fault_loses_nothing_and_keeps_the_order(store):
    batch = Batch("test", store.write, store.drop, max_rows=2)
    for number in range(5):
        batch.add(number)
    store.faults = 1
    with pytest.raises(OSError, match="disk full"):
        await batch.flush()
    batch.add(5)
    await batch.flush()
    assert store.writes == [[0, 1], [2, 3], [4, 5]]
    assert store.dropped == 0


async def test_a_flush_that_is_cancelled_loses_nothing(store):
    stuck = asyncio.Event()

    async def hang(_items: Sequence[int]) -> None:
        stuck.set()
        await asyncio.Event().wait()

    batch = Batch("test", hang, store.drop)
    batch.add(1)
    async with TaskOwner() as tasks:
        tasks.start("flush", batch.flush())
        await stuck.wait()
    assert len(batch) == 1


async def test_the_loop_goes_on_after_a_fault(store):
    batch = Batch("test", store.write, store.drop, delay_s=0, retry_s=0)
    store.faults = 3
    batch.add(1)
    async with TaskOwner() as tasks:
        tasks.start("batch", batch.run())
        await asyncio.wait_for(store.wrote.wait(), 10)
    assert store.writes == [[1]]


async def test_the_oldest_go_when_too_many_wait(store):
    batch = Batch("test", store.write, store.drop, max_waiting=3)
    for number in range(10):
        batch.add(number)
    assert (len(batch), store.dropped) == (3, 7)
    await batch.flush()
    assert store.writes == [[7, 8, 9]]


async def test_closing_writes_the_rest(store):
    batch = Batch("test", store.write, store.drop)
    batch.add(1)
    await batch.close()
    await batch.close()
    assert store.writes == [[1]]


async def test_closing_without_a_store_counts_what_is_lost(store):
    batch = Batch("test", store.write, store.drop)
    batch.add(1)
    batch.add(2)
    store.faults = 1
    await batch.close()
    assert (len(batch), store.dropped) == (0, 2)
