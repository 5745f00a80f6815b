import httpx2
import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware

from sandboxd.identity.auth import AuthMiddleware
from sandboxd.identity.routes import make_router
from sandboxd.identity.secrets import new_key
from sandboxd.identity.service import IdentityService
from sandboxd.identity.urls import SignedUrls
from sandboxd.kit.db import Database
from sandboxd.kit.http import Drain, install
from sandboxd.kit.metrics import Metrics


@pytest.fixture
def identity(db, clock):
    return IdentityService(db, clock)


@pytest.fixture
async def make_client(identity, db, clock):
    app = FastAPI(middleware=[Middleware(AuthMiddleware, identity=identity, urls=SignedUrls(db, clock))])
    install(app, metrics=Metrics(), drain=Drain(), max_body_bytes=1000)
    app.include_router(make_router(identity))
    transport = httpx2.ASGITransport(app=app)

    async def make(project: str) -> httpx2.AsyncClient:
        owner = await identity.ensure_project("acme", project)
        key = (await identity.create_key(owner.id, "first", actor="tests")).key
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    return make


@pytest.fixture
async def client(make_client):
    return await make_client("web")


async def test_a_key_is_made_shown_once_and_works(client):
    response = await client.post("/v1/apikeys", json={"name": "ci"})
    assert response.status_code == 201
    created = response.json()
    assert set(created) == {
        "id",
        "object",
        "name",
        "prefix",
        "key",
        "created_at",
        "last_used_at",
        "revoked_at",
    }
    assert (created["object"], created["name"]) == ("apikey", "ci")
    assert created["key"].startswith(created["prefix"])
    current = await client.get("/v1/apikeys/current", headers={"Authorization": f"bearer  {created['key']} "})
    assert current.status_code == 200
    assert current.json()["id"] == created["id"]
    assert "key" not in current.json()


async def test_keys_are_listed_newest_first_without_secrets(client, identity):
    names = [(await client.post("/v1/apikeys", json={"name": f"k{n}"})).json()["name"] for n in range(3)]
    page = (await client.get("/v1/apikeys")).json()
    assert sorted(key["name"] for key in page["data"]) == sorted(["first", *names])
    assert page["first_id"] == page["data"][0]["id"]
    assert page["has_more"] is False
    assert all("key" not in key for key in page["data"])
    first = (await client.get("/v1/apikeys?limit=3")).json()
    rest = (await client.get(f"/v1/apikeys?limit=3&after={first['last_id']}")).json()
    assert first["has_more"] is True
    assert [key["id"] for key in first["data"] + rest["data"]] == [key["id"] for key in page["data"]]


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_revoking_acts_at_once_and_may_be_repeated(client, method):
    created = (await client.post("/v1/apikeys", json={"name": "ci"})).json()
    path = f"/v1/apikeys/{created['id']}" + ("/revoke" if method == "POST" else "")
    first = await client.request(method, path)
    second = await client.request(method, path)
    assert first.status_code == second.status_code == 200
    assert first.json()["revoked_at"] == second.json()["revoked_at"] is not None
    refused = await client.get("/v1/apikeys", headers={"Authorization": f"Bearer {created['key']}"})
    assert refused.status_code == 401
    assert created["id"] in [key["id"] for key in (await client.get("/v1/apikeys")).json()["data"]]


async def test_a_key_may_revoke_itself(client):
    own = (await client.get("/v1/apikeys/current")).json()["id"]
    assert (await client.delete(f"/v1/apikeys/{own}")).status_code == 200
    assert (await client.get("/v1/apikeys/current")).status_code == 401


async def test_another_projects_key_is_404(client, make_client):
    other = await make_client("other")
    foreign = (await other.get("/v1/apikeys/current")).json()["id"]
    for method, path in (("POST", f"{foreign}/revoke"), ("DELETE", foreign)):
        response = await client.request(method, f"/v1/apikeys/{path}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"
    assert (await other.get("/v1/apikeys/current")).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic abc",
        "8080_live_x",
        "Bearer nope",
        "Bearer \xff\xfe",
        f"Bearer {new_key()}",
    ],
)
async def test_without_a_good_key_it_is_401(client, header):
    client.headers.pop("Authorization")
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    # The body is broken: who has no key learns nothing about it, and it is not read.
    response = await client.post("/v1/apikeys", content="{", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
    assert response.headers["x-request-id"]


async def test_unknown_routes_below_v1_need_a_key_too(client):
    assert (await client.get("/v1/nope")).status_code == 404
    client.headers.pop("Authorization")
    assert (await client.get("/v1/nope")).status_code == 401


@pytest.mark.parametrize("name", ["", " a", "a ", "a\nb", "a\x00b", "\x1b[31m", "x" * 101, 5, None, ["a"]])
async def test_a_bad_name_is_400(client, name):
    response = await client.post("/v1/apikeys", json={"name": name})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "name"


async def test_a_foreign_project_in_the_body_is_404(client):
    response = await client.post("/v1/apikeys", json={"project": "other"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "project"
    assert (await client.post("/v1/apikeys", json={"project": "web"})).status_code == 201


async def test_a_repeated_create_names_the_key_made_before(client):
    send = {"json": {"name": "ci"}, "headers": {"Idempotency-Key": "build 17"}}
    made = await client.post("/v1/apikeys", **send)
    assert made.status_code == 201
    again = await client.post("/v1/apikeys", **send)
    assert again.status_code == 409
    assert again.json()["error"]["code"] == "idempotency_replayed"
    assert made.json()["id"] in again.json()["error"]["message"]
    assert made.json()["key"] not in again.text
    other = await client.post("/v1/apikeys", json={"name": "else"}, headers=send["headers"])
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "idempotency_conflict"
    assert len((await client.get("/v1/apikeys")).json()["data"]) == 2


async def test_projects_do_not_share_idempotency_keys(client, make_client):
    send = {"json": {}, "headers": {"Idempotency-Key": "k"}}
    for someone in (client, await make_client("other")):
        assert (await someone.post("/v1/apikeys", **send)).status_code == 201


async def test_the_audit_trail_tells_who_from_where(client, make_client):
    own = (await client.get("/v1/apikeys/current")).json()["id"]
    made = (await client.post("/v1/apikeys", json={"name": "ci"}, headers={"X-Request-Id": "r-1"})).json()[
        "id"
    ]
    await client.delete(f"/v1/apikeys/{made}")
    page = (await client.get("/v1/audit?limit=2")).json()
    assert page["has_more"] is True
    assert len(page["data"]) == 2
    (revoked,) = (await client.get("/v1/audit?action=apikey.revoke")).json()["data"]
    (created,) = (await client.get(f"/v1/audit?action=apikey.create&resource_id={made}")).json()["data"]
    assert (revoked["action"], revoked["resource_id"], revoked["actor"]) == ("apikey.revoke", made, own)
    assert created == {
        "id": created["id"],
        "object": "audit_entry",
        "created_at": 1_700_000_000,
        "actor": own,
        "action": "apikey.create",
        "resource_id": made,
        "request_id": "r-1",
        "client": "127.0.0.1",
        "details": {"name": "ci"},
    }
    elsewhere = (await (await make_client("other")).get(f"/v1/audit?resource_id={made}")).json()
    assert elsewhere["data"] == []


@pytest.mark.parametrize("query", ["action=A", "action=%00", "resource_id=", "resource_id=%00", "actor=x"])
async def test_a_bad_filter_of_the_audit_trail_is_400(client, query):
    assert (await client.get(f"/v1/audit?{query}")).status_code == 400


async def test_a_store_that_is_away_is_503_at_the_door(identity, make_client, tmp_path):
    client = await make_client("web")
    identity._db = Database(f"sqlite+aiosqlite:///{tmp_path}/nowhere/test.db")
    answer = await client.get("/v1/apikeys", headers={"Authorization": f"Bearer {new_key()}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert answer.headers["Retry-After"] == "1"
    await identity._db.close()
