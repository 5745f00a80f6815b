import pytest
from sqlmodel import col, select

from sandboxd.identity.models import Organization
from sandboxd.kit.paging import Page, PageParams, Resource, paged, split


@pytest.fixture
async def rows(db):
    async with db.write() as session:
        session.add_all(Organization(id=f"org_{n}", slug=f"s{n}", created_at=1.0) for n in range(5))
    return db


async def fetch(db, params):
    async with db.read() as session:
        found = (await session.exec(paged(select(Organization), col(Organization.id), params))).all()
    page, has_more = split(found, params)
    return [row.id for row in page], has_more


@pytest.mark.parametrize(
    ("params", "ids", "has_more"),
    [
        (PageParams(), ["org_4", "org_3", "org_2", "org_1", "org_0"], False),
        (PageParams(limit=2), ["org_4", "org_3"], True),
        (PageParams(limit=2, after="org_3"), ["org_2", "org_1"], True),
        (PageParams(limit=2, after="org_1"), ["org_0"], False),
        (PageParams(limit=5), ["org_4", "org_3", "org_2", "org_1", "org_0"], False),
        (PageParams(limit=2, order="asc"), ["org_0", "org_1"], True),
        (PageParams(limit=9, order="asc", after="org_2"), ["org_3", "org_4"], False),
        (PageParams(after="org_0"), [], False),
    ],
)
async def test_pages(rows, params, ids, has_more):
    assert await fetch(rows, params) == (ids, has_more)


def test_the_envelope():
    page = Page[Resource].of([Resource(id="a"), Resource(id="b")], has_more=True)
    assert page.model_dump() == {
        "object": "list",
        "data": [{"id": "a"}, {"id": "b"}],
        "first_id": "a",
        "last_id": "b",
        "has_more": True,
    }
    empty = Page[Resource].of([], has_more=False)
    assert (empty.first_id, empty.last_id) == (None, None)
