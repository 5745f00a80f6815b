import httpx2
import pytest

from sandboxd.app import VERSION, create_app

OUR_METRIC = "sandboxd_http_requests_total"


@pytest.fixture
async def app(settings):
    settings.state_dir.mkdir()
    application = create_app(settings)
    async with application.router.lifespan_context(application):
        yield application


def client_of(app, peer: str = "127.0.0.1") -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=app, client=(peer, 5000))
    return httpx2.AsyncClient(transport=transport, base_url="http://test")


async def test_health_needs_no_key(app):
    response = await client_of(app).get("/healthz")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "version": VERSION}


async def test_ready_runs_every_check(app):
    services = app.state.services
    services.readiness.clear()
    services.readiness["database"] = services.db.ping
    client = client_of(app)
    assert (await client.get("/readyz")).json() == {"status": "ok"}

    async def fail() -> None:
        raise OSError("engine is down")

    services.readiness["engine"] = fail
    response = await client.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reasons": {"engine": "OSError: engine is down"}}
    services.drain.start()
    assert "drain" in (await client.get("/readyz")).json()["reasons"]
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/v1/apikeys")).status_code == 503


@pytest.mark.parametrize(("peer", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 403), ("", 403)])
async def test_metrics_are_for_loopback_peers(app, peer, status):
    response = await client_of(app, peer).get("/metrics")
    assert response.status_code == status
    assert (OUR_METRIC in response.text) == (status == 200)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded"])
async def test_metrics_are_not_for_whom_a_proxy_on_this_host_speaks(app, header):
    response = await client_of(app, "127.0.0.1").get("/metrics", headers={header: "127.0.0.1"})
    assert response.status_code == 403


async def test_metrics_can_be_opened(settings):
    app = create_app(settings.model_copy(update={"metrics_public": True}))
    response = await client_of(app, "10.0.0.7").get("/metrics")
    assert OUR_METRIC in response.text


async def test_the_openapi_document_names_scheme_and_errors(app):
    document = (await client_of(app).get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("security" in operation) == path.startswith("/v1"), f"{method} {path}"
            assert "422" not in operation["responses"]
    ids = [op["operationId"] for operations in document["paths"].values() for op in operations.values()]
    assert len(ids) == len(set(ids))


async def test_every_v1_route_refuses_a_request_without_a_key(app):
    client = client_of(app)
    document = (await client.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        if not path.startswith("/v1"):
            continue
        for method in operations:
            response = await client.request(method, path, content=b"{")
            assert response.status_code == 401, f"{method} {path}"


async def test_docs_are_there(app):
    assert (await client_of(app).get("/docs")).status_code == 200
