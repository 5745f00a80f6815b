import pytest

from sandboxd.identity import idempotency
from sandboxd.identity.errors import IdempotencyConflictError
from sandboxd.identity.service import IdentityService
from sandboxd.kit.http import Body


class Wanted(Body):
    name: str = "x"
    size: float = 1
    labels: dict[str, str] = {}


def digest_of(text: str) -> str:
    return idempotency.request_digest(Wanted.model_validate_json(text))


def test_the_digest_is_of_what_a_body_says():
    plain = digest_of('{"name": "a", "size": 2}')
    assert digest_of('{"size": 2.0,   "name": "a"}') == plain
    assert digest_of('{"size": 2, "name": "a", "labels": {}, "log": null}') == plain
    assert digest_of('{"size": 3, "name": "a"}') != plain
    assert digest_of('{"labels": {"b": "1", "a": "2"}}') == digest_of('{"labels": {"a": "2", "b": "1"}}')
    assert digest_of('{"labels": {"a": "\\u00e9"}}') != digest_of('{"labels": {"a": "e"}}')


@pytest.fixture
async def project_id(db, clock):
    return (await IdentityService(db, clock).ensure_project("acme", "web")).id


@pytest.fixture
def row(project_id, clock):
    return {
        "project_id": project_id,
        "scope": "thing",
        "key": "k1",
        "digest": "d1",
        "resource_id": "thing_1",
        "at": clock.now(),
    }


async def test_the_first_request_claims_the_key(db, project_id, row):
    async with db.write() as session:
        assert await idempotency.find(session, project_id, "thing", "k1") is None
        assert await idempotency.insert(session, **row) is None
    async with db.write() as session:
        first = await idempotency.insert(session, **{**row, "resource_id": "thing_2"})
        assert first is not None
        assert first.resource_id == "thing_1"
        # The transaction goes on after a key that was taken.
        assert await idempotency.insert(session, **{**row, "key": "k2"}) is None
    async with db.read() as session:
        assert (await idempotency.find(session, project_id, "thing", "k1")).resource_id == "thing_1"
        assert await idempotency.find(session, project_id, "thing", "k2") is not None


async def test_another_kind_or_project_has_keys_of_its_own(db, clock, project_id, row):
    other = await IdentityService(db, clock).ensure_project("acme", "other")
    async with db.write() as session:
        assert await idempotency.insert(session, **row) is None
        assert await idempotency.insert(session, **{**row, "scope": "else"}) is None
        assert await idempotency.insert(session, **{**row, "project_id": other.id}) is None


async def test_another_body_is_refused(db, project_id, row):
    async with db.write() as session:
        await idempotency.insert(session, **row)
        first = await idempotency.find(session, project_id, "thing", "k1")
    idempotency.check_same(first, "d1")
    with pytest.raises(IdempotencyConflictError, match="'k1'"):
        idempotency.check_same(first, "d2")


async def test_old_keys_are_forgotten(db, clock, project_id, row):
    async with db.write() as session:
        await idempotency.insert(session, **row)
        await idempotency.insert(session, **{**row, "key": "k2", "at": clock.now() + 10})
        await idempotency.forget(session, clock.now() + 5)
        assert await idempotency.find(session, project_id, "thing", "k1") is None
        assert await idempotency.find(session, project_id, "thing", "k2") is not None
