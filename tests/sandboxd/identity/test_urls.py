"""Signed URLs: what was signed works, and nothing else does."""

import asyncio
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sandboxd.identity import signing
from sandboxd.identity.service import IdentityService
from sandboxd.identity.signing import SIGNATURE, parse_query, read, signed_query
from sandboxd.identity.urls import SignedUrls
from sandboxd.kit.db import Database
from sandboxd.kit.errors import UnauthorizedError
from sandboxd.kit.paging import PageParams

SECRET = b"s" * 32
PATH = "/v1/sandboxes/sbx_1/files"


def good(method: str, path: str, query: bytes) -> bool:
    request = read(method, path, query)
    return request is not None and signing.is_good(SECRET, request)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=50))
def test_a_path_of_any_bytes_is_signed_and_read_back(path):
    query = signed_query(SECRET, "GET", PATH, [(b"path", path)], 1_800_000_000, "key_1").encode("ascii")
    assert good("GET", PATH, query)
    request = read("GET", PATH, query)
    assert request is not None
    assert list(request.pairs) == [(b"path", path)]
    assert (request.expires_at, request.key_id) == (1_800_000_000, "key_1")
    # However it is spelt, and in whatever order, it is the same request.
    respelt = b"&".join(
        name + b"=" + b"".join(b"%%%02x" % byte for byte in value)
        for name, value in reversed(parse_query(query))
    )
    assert good("GET", PATH, respelt)


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_no_changed_byte_passes(data):
    query = signed_query(SECRET, "PUT", PATH, [(b"path", b"a/b\xff c")], 1_800_000_000, "key_1").encode(
        "ascii"
    )
    at = data.draw(st.integers(0, len(query)))
    kind = data.draw(st.sampled_from(["replace", "insert", "delete"]))
    byte = data.draw(st.binary(min_size=1, max_size=1))
    changed = {
        "replace": query[:at] + byte + query[at + 1 :],
        "insert": query[:at] + byte + query[at:],
        "delete": query[:at] + query[at + 1 :],
    }[kind]
    # What differs in its spelling alone is the same request.
    assume(sorted(parse_query(changed)) != sorted(parse_query(query)))
    assert not good("PUT", PATH, changed)


def test_it_is_for_one_method_path_and_set_of_parameters():
    query = signed_query(SECRET, "GET", PATH, [(b"path", b"a")], 1_800_000_000, "key_1").encode("ascii")
    assert good("GET", PATH, query)
    assert not good("PUT", PATH, query)
    assert not good("DELETE", PATH, query)
    assert not good("GET", PATH + "/list", query)
    assert not good("GET", "/v1/sandboxes/sbx_2/files", query)
    for extra in (b"&mode=777", b"&path=b", b"&recursive=true", b"&expires=1800000001", b"&signature=x"):
        assert not good("GET", PATH, query + extra)
    for name in (b"expires", b"key_id", b"signature", b"path"):
        kept = [pair for pair in parse_query(query) if pair[0] != name]
        less = b"&".join(key + b"=" + quote_from_bytes(value).encode() for key, value in kept)
        assert not good("GET", PATH, less)
    assert not signing.is_good(b"t" * 32, read("GET", PATH, query))  # type: ignore[arg-type]  # it is one
    assert b"&" + SIGNATURE + b"=" in query


@pytest.fixture
async def owner(db, clock):
    identity = IdentityService(db, clock)
    project = await identity.ensure_project("acme", "web")
    created = await identity.create_key(project.id, "ci", actor="tests")
    return identity, await identity.authenticate(created.key)


async def create(urls: SignedUrls, principal, **more) -> bytes:
    query, _ = await urls.create(
        principal,
        "GET",
        PATH,
        [(b"path", b"a")],
        expires_in_s=60,
        action="file_url.create",
        resource_id="sbx_1",
        details={"path": "a"},
        **more,
    )
    return query.encode("ascii")


def signed(query: bytes):
    request = read("GET", PATH, query)
    assert request is not None
    return request


async def test_it_is_good_until_it_expires(db, clock, owner):
    _, principal = owner
    urls = SignedUrls(db, clock)
    request = signed(await create(urls, principal))
    assert await urls.authenticate(request) == principal
    clock.advance(59.9)
    await urls.authenticate(request)
    clock.advance(0.2)
    with pytest.raises(UnauthorizedError) as raised:
        await urls.authenticate(request)
    assert raised.value.code == "url_expired"


async def test_it_ends_with_its_key_at_once(db, clock, owner):
    identity, principal = owner
    urls = SignedUrls(db, clock)
    request = signed(await create(urls, principal))
    await urls.authenticate(request)
    await identity.revoke_key(principal.project_id, principal.key_id, actor="tests")
    with pytest.raises(UnauthorizedError, match="revoked"):
        await urls.authenticate(request)


async def test_daemons_on_one_store_share_the_secret_also_when_both_need_it_first(
    database_url, db, clock, owner
):
    _, principal = owner
    other_db = Database(database_url)
    try:
        daemons = [SignedUrls(db, clock), SignedUrls(other_db, clock)]
        queries = await asyncio.gather(*(create(urls, principal) for urls in daemons * 4))
        assert len(set(queries)) == 1
        for urls in [*daemons, SignedUrls(other_db, clock)]:
            await urls.authenticate(signed(queries[0]))
    finally:
        await other_db.close()


async def test_the_audit_trail_tells_of_it_without_its_signature(db, clock, owner):
    identity, principal = owner
    query = await create(SignedUrls(db, clock), principal)
    rows, _ = await identity.list_audit(principal.project_id, PageParams(), action="file_url.create")
    assert [(row.actor, row.resource_id) for row in rows] == [(principal.key_id, "sbx_1")]
    assert rows[0].details == {"path": "a", "expires_at": int(clock.now()) + 60}
    assert signed(query).signature not in str(rows[0])
