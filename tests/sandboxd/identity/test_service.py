import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import event

from sandboxd.identity import idempotency
from sandboxd.identity.errors import (
    IdempotencyConflictError,
    IdempotencyReplayedError,
    KeyNotFoundError,
    NoSuchProjectError,
    ProjectNotFoundError,
)
from sandboxd.identity.models import ApiKey
from sandboxd.identity.secrets import new_key
from sandboxd.identity.service import (
    ASK_AGAIN_S,
    CACHE_SIZE,
    CACHE_TTL_S,
    STALE_S,
    IdentityService,
    Principal,
    Quota,
    check_project,
)
from sandboxd.kit.db import Database
from sandboxd.kit.errors import StoreUnavailableError, UnauthorizedError
from sandboxd.kit.ids import new_id
from sandboxd.kit.paging import PageParams


@pytest.fixture
def identity(db, clock):
    return IdentityService(db, clock)


@pytest.fixture
async def project(identity):
    return await identity.ensure_project("acme", "web")


class Queries:
    def __init__(self, db: Database) -> None:
        self.count = 0
        self.statements: list[str] = []
        for engine in (db._reader, db._writer):
            event.listen(engine.sync_engine, "before_cursor_execute", self._seen)

    def _seen(self, _connection, _cursor, statement, *_args) -> None:
        self.count += 1
        self.statements.append(statement)


async def test_a_key_gives_its_principal(identity, project):
    created = await identity.create_key(project.id, "ci", actor="tests")
    principal = await identity.authenticate(created.key)
    assert principal == Principal(created.row.id, project.id, "web", project.organization_id)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_secret_is_not_stored(identity, project, db, tmp_path):
    created = await identity.create_key(project.id, "ci", actor="tests")
    await db.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert created.row.prefix.encode() in stored
    assert created.key.encode() not in stored
    assert created.key[14:40].encode() not in stored


async def test_a_cached_key_needs_no_query(identity, project, db, clock):
    key = (await identity.create_key(project.id, "ci", actor="tests")).key
    await identity.authenticate(key)
    queries = Queries(db)
    for _ in range(10):
        await identity.authenticate(key)
    assert queries.count == 0
    clock.advance(CACHE_TTL_S + 1)
    await identity.authenticate(key)
    assert queries.count > 0


async def test_a_malformed_key_needs_no_query(identity, project, db):
    key = (await identity.create_key(project.id, "ci", actor="tests")).key
    queries = Queries(db)
    for wrong in ("", "x", "\udcff", key[:-1] + ("0" if key[-1] != "0" else "1"), key + " "):
        with pytest.raises(UnauthorizedError):
            await identity.authenticate(wrong)
    assert queries.count == 0


async def test_an_unknown_key_is_asked_for_each_time(identity, db):
    key = new_key()
    queries = Queries(db)
    for round_ in (1, 2):
        with pytest.raises(UnauthorizedError, match="unknown or revoked"):
            await identity.authenticate(key)
        # BEGIN and SELECT; asyncpg begins by itself.
        assert queries.count == round_ * (2 if db.dialect == "sqlite" else 1)


async def test_a_revoked_key_is_useless_at_once(identity, project):
    created = await identity.create_key(project.id, "ci", actor="tests")
    await identity.authenticate(created.key)
    await identity.revoke_key(project.id, created.row.id, actor="tests")
    with pytest.raises(UnauthorizedError):
        await identity.authenticate(created.key)


async def test_a_revocation_made_elsewhere_is_seen_soon(identity, project, db, clock):
    created = await identity.create_key(project.id, "ci", actor="tests")
    await identity.authenticate(created.key)
    await IdentityService(db, clock).revoke_key(project.id, created.row.id, actor="tests")
    clock.advance(CACHE_TTL_S + 1)
    with pytest.raises(UnauthorizedError):
        await identity.authenticate(created.key)


class SlowReads(Database):
    """A store whose read sessions end late, so that what they saw is old when the reader goes on."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go_on = asyncio.Event()
        self.waiting = asyncio.Event()

    @asynccontextmanager
    async def read(self):
        async with super().read() as session:
            yield session
            self.waiting.set()
            await self.go_on.wait()


async def test_a_look_up_under_way_does_not_undo_a_revocation(project, db, clock):
    slow = SlowReads(db.url)
    identity = IdentityService(slow, clock)
    created = await identity.create_key(project.id, "ci", actor="tests")
    looking = asyncio.create_task(identity.authenticate(created.key))
    await slow.waiting.wait()
    await identity.revoke_key(project.id, created.row.id, actor="tests")
    slow.go_on.set()
    await looking
    with pytest.raises(UnauthorizedError):
        await identity.authenticate(created.key)
    await slow.close()


class AwayDatabase(Database):
    """A store that can be away."""

    away = False
    asked = 0

    @asynccontextmanager
    async def read(self):
        self.asked += 1
        if self.away:
            raise StoreUnavailableError("away")
        async with super().read() as session:
            yield session


@pytest.fixture
async def fickle(db) -> AsyncIterator[AwayDatabase]:
    database = AwayDatabase(db.url)
    yield database
    await database.close()


async def test_a_known_key_outlives_a_store_that_is_away_for_a_while(project, fickle, clock):
    identity = IdentityService(fickle, clock)
    known = (await identity.create_key(project.id, "ci", actor="tests")).key
    principal = await identity.authenticate(known)
    fickle.away = True
    clock.advance(CACHE_TTL_S + 1)
    fickle.asked = 0
    for _ in range(3):
        assert await identity.authenticate(known) == principal
    assert fickle.asked == 1
    clock.advance(ASK_AGAIN_S + 1)
    assert await identity.authenticate(known) == principal
    assert fickle.asked == 2
    with pytest.raises(StoreUnavailableError):
        await identity.authenticate(new_key())
    clock.advance(STALE_S)
    with pytest.raises(StoreUnavailableError):
        await identity.authenticate(known)
    fickle.away = False
    clock.advance(ASK_AGAIN_S + 1)
    assert await identity.authenticate(known) == principal


async def test_a_key_revoked_elsewhere_is_useless_when_the_store_is_back(project, db, fickle, clock):
    identity = IdentityService(fickle, clock)
    created = await identity.create_key(project.id, "ci", actor="tests")
    await identity.authenticate(created.key)
    fickle.away = True
    clock.advance(CACHE_TTL_S + 1)
    await identity.authenticate(created.key)
    await IdentityService(db, clock).revoke_key(project.id, created.row.id, actor="tests")
    fickle.away = False
    clock.advance(ASK_AGAIN_S + 1)
    for _ in range(2):
        with pytest.raises(UnauthorizedError):
            await identity.authenticate(created.key)


async def test_revoking_is_idempotent(identity, project, clock):
    created = await identity.create_key(project.id, "ci", actor="tests")
    first = (await identity.revoke_key(project.id, created.row.id, actor="tests")).revoked_at
    clock.advance(10)
    second = (await identity.revoke_key(project.id, created.row.id, actor="tests")).revoked_at
    assert first == second is not None


async def test_another_project_sees_nothing(identity, project):
    other = await identity.ensure_project("acme", "other")
    created = await identity.create_key(project.id, "ci", actor="tests")
    assert await identity.list_keys(other.id, PageParams()) == ([], False)
    with pytest.raises(KeyNotFoundError):
        await identity.get_key(other.id, created.row.id)
    with pytest.raises(KeyNotFoundError):
        await identity.revoke_key(other.id, created.row.id, actor="tests")
    await identity.authenticate(created.key)


async def test_a_project_is_made_once(identity):
    made = await asyncio.gather(*(identity.ensure_project("acme", "web") for _ in range(5)))
    assert len({project.id for project in made}) == 1
    elsewhere = await identity.ensure_project("rival", "web")
    assert elsewhere.id != made[0].id


async def actions(identity, project_id, **filters) -> list[tuple[str, str, str]]:
    rows, _ = await identity.list_audit(project_id, PageParams(), **filters)
    # Entries of one millisecond have no order.
    return sorted((row.actor, row.action, row.resource_id) for row in rows)


async def test_what_is_done_to_keys_is_in_the_audit_trail(identity, project):
    created = await identity.create_key(project.id, "ci", actor="sandboxd create-key")
    for _ in range(2):
        await identity.revoke_key(project.id, created.row.id, actor="key_1")
    assert await actions(identity, project.id) == [
        ("key_1", "apikey.revoke", created.row.id),
        ("sandboxd create-key", "apikey.create", created.row.id),
    ]
    assert await actions(identity, project.id, action="apikey.revoke", resource_id=created.row.id) == [
        ("key_1", "apikey.revoke", created.row.id)
    ]
    assert await actions(identity, project.id, resource_id="key_2") == []
    other = await identity.ensure_project("acme", "other")
    assert await actions(identity, other.id) == []


async def test_what_failed_leaves_no_audit_entry(identity, project):
    with pytest.raises(KeyNotFoundError):
        await identity.revoke_key(project.id, new_id("key"), actor="key_1")
    await identity.create_key(project.id, "ci", actor="t", idempotency_key="k", request_digest="d")
    with pytest.raises(IdempotencyReplayedError):
        await identity.create_key(project.id, "ci", actor="t", idempotency_key="k", request_digest="d")
    assert [action for _, action, _ in await actions(identity, project.id)] == ["apikey.create"]
    assert len((await identity.list_keys(project.id, PageParams()))[0]) == 1


async def test_an_idempotency_key_makes_one_key_whoever_comes_first(identity, project):
    made = await asyncio.gather(
        *(
            identity.create_key(project.id, "ci", actor="t", idempotency_key="k", request_digest="d")
            for _ in range(10)
        ),
        return_exceptions=True,
    )
    keys = [result for result in made if not isinstance(result, Exception)]
    assert len(keys) == 1
    refused = [result for result in made if isinstance(result, IdempotencyReplayedError)]
    assert len(refused) == 9
    assert all(keys[0].row.id in error.message for error in refused)
    with pytest.raises(IdempotencyConflictError):
        await identity.create_key(project.id, "x", actor="t", idempotency_key="k", request_digest="e")


async def test_an_idempotency_key_is_forgotten_after_a_day(identity, project, clock, db):
    async def forget() -> None:
        async with db.write() as session:
            await idempotency.forget(session, clock.now() - idempotency.KEPT_S)

    again = {"actor": "t", "idempotency_key": "k", "request_digest": "d"}
    await identity.create_key(project.id, "ci", **again)
    clock.advance(23 * 3600)
    await forget()
    with pytest.raises(IdempotencyReplayedError):
        await identity.create_key(project.id, "ci", **again)
    clock.advance(3601)
    await forget()
    await identity.create_key(project.id, "ci", **again)


async def test_a_quota_is_set_in_parts_and_reaches_the_principal(identity, project, clock):
    key = (await identity.create_key(project.id, "ci", actor="tests")).key
    assert (await identity.authenticate(key)).quota == Quota()
    quota = await identity.set_quota("acme", "web", {"sandboxes": 3, "cpu_mhz": 5000}, actor="t")
    assert quota == Quota(sandboxes=3, cpu_mhz=5000)
    clock.advance(CACHE_TTL_S + 1)
    assert (await identity.authenticate(key)).quota == quota
    assert await identity.set_quota("acme", "web", {"sandboxes": None}, actor="t") == Quota(cpu_mhz=5000)
    assert await identity.set_quota("acme", "web", {}, actor="t") == Quota(cpu_mhz=5000)
    rows, _ = await identity.list_audit(project.id, PageParams(), action="project.set_quota")
    details = [row.details for row in rows]
    assert len(details) == 2
    assert {"sandboxes": 3, "cpu_mhz": 5000} in details
    assert {"sandboxes": None} in details
    for names in (("acme", "nope"), ("nope", "web")):
        with pytest.raises(NoSuchProjectError):
            await identity.set_quota(*names, {}, actor="t")


@pytest.mark.parametrize("key_id", ["", "x", "key_\0", "key_" + "\ud800" * 34, "x" * 100_000])
async def test_what_cannot_be_an_id_never_reaches_the_store(identity, project, db, key_id):
    queries = Queries(db)
    with pytest.raises(KeyNotFoundError):
        await identity.get_key(project.id, key_id)
    with pytest.raises(KeyNotFoundError):
        await identity.revoke_key(project.id, key_id, actor="t")
    assert [statement for statement in queries.statements if not statement.startswith("BEGIN")] == []


async def stored_last_used(db, key_id) -> float | None:
    async with db.read() as session:
        row = await session.get(ApiKey, key_id)
    return row.last_used_at


async def test_last_use_is_written_by_the_job_and_seen_before(identity, project, db, clock):
    created = await identity.create_key(project.id, "ci", actor="tests")
    await identity.authenticate(created.key)
    used_at = clock.now()
    assert await stored_last_used(db, created.row.id) is None
    assert (await identity.get_key(project.id, created.row.id)).last_used_at == used_at
    await identity.flush_last_used()
    assert await stored_last_used(db, created.row.id) == used_at
    queries = Queries(db)
    await identity.flush_last_used()
    assert queries.count == 0


async def test_the_cache_is_bounded(identity, project, monkeypatch):
    monkeypatch.setattr("sandboxd.identity.service.CACHE_SIZE", 3)
    keys = [(await identity.create_key(project.id, str(n), actor="tests")).key for n in range(5)]
    for key in keys * 2:
        await identity.authenticate(key)
    assert len(identity._cache) == 3 < CACHE_SIZE


def test_the_project_of_a_body_must_be_the_keys_own():
    principal = Principal("key_1", "proj_1", "web", "org_1")
    for own in (None, "web", "proj_1"):
        check_project(principal, own)
    with pytest.raises(ProjectNotFoundError, match="'other'"):
        check_project(principal, "other")
