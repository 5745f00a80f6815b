import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import httpx2
import pytest
from fastapi import FastAPI, Query, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import StreamingResponse
from structlog.testing import capture_logs

from sandboxd.kit.errors import ConflictError, UnavailableError
from sandboxd.kit.http import (
    ERROR_RESPONSES,
    Body,
    Drain,
    IdempotencyKey,
    PageQuery,
    RequestMiddleware,
    install,
)
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.origin import Origin, current_origin
from sandboxd.kit.sse import sse_event, sse_response

LIMIT = 1000


class EchoBody(Body):
    text: str
    count: int = 1
    ratio: float | None = None
    tags: dict[str, str] | None = None


def make_app(drain: Drain | None = None, metrics: Metrics | None = None) -> FastAPI:
    app = FastAPI(redirect_slashes=False, responses=ERROR_RESPONSES)
    install(app, metrics=metrics or Metrics(), drain=drain or Drain(), max_body_bytes=LIMIT)

    @app.post("/v1/echo")
    async def echo(body: EchoBody) -> dict[str, str]:
        return {"text": body.text}

    @app.get("/v1/things/{thing}")
    async def get_thing(thing: str, size: Annotated[int, Query(ge=1)] = 1) -> dict[str, str]:
        if thing == "taken":
            raise ConflictError("Thing 'taken' is taken.", param="thing", code="thing_taken")
        if thing == "busy":
            raise UnavailableError("Busy.", retry_after_s=7)
        if thing == "broken":
            raise ValueError("secret detail")
        return {"thing": thing}

    @app.delete("/v1/things/{thing}")
    async def delete_thing(thing: str) -> None: ...

    @app.get("/v1/pages")
    async def pages(page: PageQuery) -> dict[str, object]:
        return {"limit": page.limit, "after": page.after, "order": page.order}

    @app.post("/v1/origin")
    async def origin(key: IdempotencyKey = None) -> dict[str, str | None]:
        return {"key": key, **asdict(current_origin.get())}

    @app.put("/v1/boxes/{box}/files")
    async def put_file(box: str, request: Request) -> dict[str, int]:
        return {"size": sum([len(chunk) async for chunk in request.stream()])}

    add_stream(app)
    return app


def add_stream(app: FastAPI) -> None:
    @app.get("/v1/stream")
    async def stream(fault: str = "") -> StreamingResponse:
        async def events():
            yield "thing.started", {"thing": {"id": 1}}
            if fault == "known":
                raise ConflictError("It is gone.", code="gone")
            if fault == "unknown":
                raise ValueError("secret detail")
            yield "thing.completed", {"thing": {"id": 1}}

        return sse_response(events())


@pytest.fixture
def client():
    transport = httpx2.ASGITransport(app=make_app())
    return httpx2.AsyncClient(transport=transport, base_url="http://test")


FUZZED = make_app()


def error_of(response) -> dict[str, object]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return body["error"]


async def send_json(client, content: str | bytes, content_type: str | None = "application/json"):
    headers = {"content-type": content_type} if content_type else {}
    return await client.post("/v1/echo", content=content, headers=headers)


async def test_a_good_request(client):
    response = await client.post("/v1/echo", json={"text": "hi", "log": True, "project": "p"})
    assert (response.status_code, response.json()) == (200, {"text": "hi"})


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        ("{", None, "not valid JSON"),
        ('{"text": "a"} x', None, "at character 14"),
        (b"\xff{", None, "UTF-8"),
        ("[" * 100_0, None, "not valid JSON"),
        ("[]", None, "no JSON object but []"),
        ("null", None, "body"),
        ("NaN", None, "no JSON object but NaN"),
        ('"text"', None, 'no JSON object but "text"'),
        ("", None, "The body is missing"),
        ("{}", "text", "'text' is missing in the body"),
        ('{"text": 5}', "text", "not 5."),
        ('{"text": null}', "text", "not null."),
        ('{"text": "a", "count": "1"}', "count", 'not "1".'),
        ('{"text": "a", "count": 1.5}', "count", "not 1.5."),
        ('{"text": "a", "count": true}', "count", "not true."),
        ('{"text": "a", "ratio": NaN}', "ratio", "not NaN."),
        ('{"text": "a", "ratio": 1e999}', "ratio", "not Infinity."),
        ('{"text": "a", "tags": {"k": 1}}', "tags.k", "not 1."),
        ('{"text": "a", "txet": 1}', "txet", "Known fields: count, log, project, ratio, tags, text."),
        ('{"text": "a\\ud800"}', "text", "ud800"),
        ('{"text": "a", "log": 1}', "log", "boolean"),
        ('{"x": 1, "y": 2}', "text", "2 other faults"),
    ],
)
async def test_a_bad_body_is_400_and_names_field_and_value(client, content, param, words):
    response = await send_json(client, content)
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "invalid_request",
        param,
    )
    assert words in error["message"]


async def test_a_body_of_another_content_type_is_400(client):
    for content_type in ("text/plain", None):
        response = await send_json(client, '{"text": "a"}', content_type)
        assert response.status_code == 400
        assert "Content-Type: application/json" in error_of(response)["message"]


async def test_a_long_value_is_cut_in_the_message(client):
    message = error_of(await client.post("/v1/echo", json={"text": "a", "count": "x" * 900}))["message"]
    assert len(message) < 250
    assert "xxx..." in message


async def test_control_characters_do_not_come_back(client):
    response = await client.post("/v1/echo", json={"text": "a", "\x1b[31m": "\x1b\n"})
    error = error_of(response)
    assert "\x1b" not in error["message"] + error["param"]


@pytest.mark.parametrize(
    ("query", "param"), [("size=0", "size"), ("size=x", "size"), ("size=" + "9" * 5000, "size")]
)
async def test_a_bad_query_is_400(client, query, param):
    response = await client.get(f"/v1/things/a?{query}")
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "order=up", "after=x", "after=sbx_", "limit="])
async def test_a_bad_page_is_400(client, query):
    response = await client.get(f"/v1/pages?{query}")
    assert response.status_code == 400
    assert error_of(response)["param"] == query.partition("=")[0]


async def test_page_defaults(client):
    assert (await client.get("/v1/pages")).json() == {"limit": 20, "after": None, "order": "desc"}


@pytest.mark.parametrize("key", ["a", "order 17", "~" * 255, "{}|!"])
async def test_an_idempotency_key_arrives(client, key):
    response = await client.post("/v1/origin", headers={"Idempotency-Key": key})
    assert response.json()["key"] == key


@pytest.mark.parametrize("key", ["", "x" * 256, "\xe9", "a\tb"])
async def test_a_bad_idempotency_key_is_400(client, key):
    response = await client.post("/v1/origin", headers={"Idempotency-Key": key.encode("latin-1")})
    assert response.status_code == 400
    assert error_of(response)["param"] == "Idempotency-Key"


async def test_a_request_knows_where_it_came_from(client):
    response = await client.post("/v1/origin", headers={"X-Request-Id": "r-1"})
    assert response.json() == {"key": None, "request_id": "r-1", "client": "127.0.0.1"}
    assert current_origin.get() == Origin()


async def test_an_unknown_path_is_404(client):
    for path in ("/nope", "/v1/echo/", "/v1", "/%00%1b"):
        response = await client.get(path)
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"


async def test_a_wrong_method_is_405_and_names_all_methods(client):
    response = await client.patch("/v1/things/a")
    assert response.status_code == 405
    assert response.headers["allow"] == "DELETE, GET"
    assert error_of(response)["code"] == "method_not_allowed"


async def test_an_error_of_a_service_keeps_its_fields(client):
    response = await client.get("/v1/things/taken")
    assert response.status_code == 409
    assert error_of(response) == {
        "message": "Thing 'taken' is taken.",
        "type": "invalid_request_error",
        "param": "thing",
        "code": "thing_taken",
    }


async def test_unavailable_says_when_to_come_back(client):
    response = await client.get("/v1/things/busy")
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


async def test_an_internal_fault_tells_the_request_id_and_nothing_else(client):
    with capture_logs() as logs:
        response = await client.get("/v1/things/broken", headers={"X-Request-Id": "mine.1"})
    error = error_of(response)
    assert response.status_code == 500
    assert "mine.1" in error["message"]
    assert "secret" not in response.text
    failure = next(entry for entry in logs if entry["event"] == "request failed")
    assert failure["exc_info"]


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-1.2_x", True), ("a b", False), ("x" * 65, False), ("", False), ("a\tb", False)]
)
async def test_a_sane_request_id_is_kept(client, sent, kept):
    response = await client.get("/v1/pages", headers={"X-Request-Id": sent})
    answered = response.headers["x-request-id"]
    assert (answered == sent) is kept
    assert kept or answered.startswith("req_")


async def chunks(total: int):
    for _ in range(0, total, 100):
        yield b"x" * 100


async def test_a_body_over_the_limit_is_413(client):
    head = {"content-type": "application/json"}
    declared = await client.post("/v1/echo", content=b"x" * (LIMIT + 1), headers=head)
    chunked = await client.post("/v1/echo", content=chunks(LIMIT * 2), headers=head)
    for response in (declared, chunked):
        assert response.status_code == 413
        assert error_of(response)["code"] == "too_large"
        assert str(LIMIT) in error_of(response)["message"]


async def test_a_false_content_length_does_not_hide_a_chunked_body():
    parts = [b"x" * 600] * 3

    async def receive():
        return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

    sent = []

    async def send(message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/echo",
        "raw_path": b"/v1/echo",
        "query_string": b"",
        "headers": [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")],
    }
    await make_app()(scope, receive, send)
    assert sent[0]["status"] == 413


FIELDS = st.sampled_from(["text", "count", "ratio", "tags", "log"]) | st.text()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "count", "ratio", "tags", "log"]) | st.text(), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(JSON_VALUES.map(json.dumps) | st.binary(max_size=40))
def test_no_body_whatsoever_is_our_fault(content):
    async def post() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=FUZZED)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await send_json(client, content)

    response = asyncio.run(post())
    assert response.status_code in (200, 400, 413)
    assert response.status_code == 200 or error_of(response)["message"].isprintable()


async def test_files_stream_past_the_limit(client):
    declared = await client.put("/v1/boxes/1/files", content=b"x" * 5000)
    chunked = await client.put("/v1/boxes/1/files", content=chunks(5000))
    assert declared.json() == chunked.json() == {"size": 5000}


def events_of(text: str) -> list[dict[str, object]]:
    parts = text.split("\n\n")
    assert parts.pop() == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


async def test_a_stream_is_numbered(client):
    response = await client.get("/v1/stream")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert [(event["type"], event["sequence_number"]) for event in events_of(response.text)] == [
        ("thing.started", 0),
        ("thing.completed", 1),
    ]


@pytest.mark.parametrize(
    ("fault", "code", "status"), [("known", "gone", 409), ("unknown", "internal_error", 500)]
)
async def test_a_broken_stream_ends_in_an_error_event(client, fault, code, status):
    with capture_logs():
        response = await client.get(f"/v1/stream?fault={fault}")
    last = events_of(response.text)[-1]
    assert (last["type"], last["sequence_number"], last["error"]["code"]) == ("error", 1, code)
    assert last["error"]["status"] == status
    assert "secret" not in response.text


def test_an_event_survives_what_json_may_hold():
    event = sse_event("x", 3, delta="a\n\ud800\u2028", sequence=1)
    assert event.count(b"\n") == 2
    assert json.loads(event.removeprefix(b"data: ")) == {
        "type": "x",
        "sequence_number": 3,
        "delta": "a\n\ud800\u2028",
        "sequence": 1,
    }


async def test_requests_are_counted_by_route_template():
    metrics = Metrics()
    transport = httpx2.ASGITransport(app=make_app(metrics=metrics))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/v1/things/a", "/v1/things/b", "/v1/things/taken", "/no/such/path"):
            await client.get(path)
        await client.request("BREW", "/v1/things/a")
    text = metrics.render().decode()
    assert 'requests_total{method="GET",route="/v1/things/{thing}",status="200"} 2.0' in text
    assert 'requests_total{method="GET",route="/v1/things/{thing}",status="409"} 1.0' in text
    assert 'requests_total{method="GET",route="unmatched",status="404"} 1.0' in text
    assert 'requests_total{method="OTHER",route="/v1/things/{thing}",status="405"} 1.0' in text
    assert "sandboxd_http_requests_in_flight 0.0" in text


async def test_every_request_is_logged_once(client):
    with capture_logs() as logs:
        await client.get("/v1/things/a?token=hidden")
    (entry,) = [entry for entry in logs if entry["event"] == "request"]
    assert (entry["method"], entry["path"], entry["route"], entry["status"]) == (
        "GET",
        "/v1/things/a",
        "/v1/things/{thing}",
        200,
    )
    assert "hidden" not in str(logs)


async def test_drain_refuses_new_work_and_cancels_what_hangs():
    drain = Drain()
    app = make_app(drain)
    hanging = asyncio.Event()

    @app.get("/v1/hang")
    async def hang() -> None:
        hanging.set()
        await asyncio.Event().wait()

    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        assert await drain.wait_idle(0)
        running = asyncio.create_task(client.get("/v1/hang"))
        await hanging.wait()
        drain.start()
        refused = await client.get("/v1/things/a")
        assert refused.status_code == 503
        assert error_of(refused)["code"] == "unavailable"
        assert refused.headers["retry-after"]
        assert not await drain.wait_idle(0)
        assert drain.in_flight == 1
        drain.cancel()
        response = await running
    assert response.status_code == 503
    assert error_of(response)["code"] == "interrupted"
    # It had begun: nothing may suggest to do it again.
    assert "retry-after" not in response.headers
    assert await drain.wait_idle(1)


async def test_a_cancelled_request_is_not_swallowed_without_a_drain():
    hanging = asyncio.Event()

    async def hang(scope, receive, send) -> None:
        hanging.set()
        await asyncio.Event().wait()

    drain = Drain()
    middleware = RequestMiddleware(hang, metrics=Metrics(), drain=drain, max_body_bytes=LIMIT)
    scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": [], "client": None}
    task = asyncio.create_task(middleware(scope, None, None))
    await hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert drain.in_flight == 0


async def test_openapi_documents_the_error_we_send(client):
    document = (await client.get("/openapi.json")).json()
    responses = document["paths"]["/v1/echo"]["post"]["responses"]
    assert set(responses) == {"200", "default"}
