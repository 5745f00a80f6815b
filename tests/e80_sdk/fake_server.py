"""A small real HTTP server that speaks the contract, to make failures happen that a healthy server does not
show.

Programs run as plain processes of this machine. It knows nothing of isolation; what the platform really
does is tested against the real daemon.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.e80_sdk.fake_execs import FakeExec, Piece, add_execs, lines
from tests.e80_sdk.fake_files import add_files, refusal
from tests.e80_sdk.fake_history import add_history, note, page

API_KEY = "8080_live_" + "a" * 43 + "_bbbbbb"


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


@dataclass
class Fault:
    """Answer matching requests so instead, `times` times. With status 0 the connection is dropped without an
    answer, `after` the work was done or before."""

    method: str
    path_end: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    times: int = 1
    after: bool = False
    raw: bytes | None = None


@dataclass
class FakeServer:
    """The server's state, to be looked at and bent by tests."""

    folder: Path
    base_url: str = ""
    api_key: str = API_KEY
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    sandboxes: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    programs: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)
    execs: dict[str, FakeExec] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    """By idempotency key: the body that came with it, and the answer."""
    started: int = 0
    """Programs that were started."""
    script: list[Piece] | None = None
    """What every exec writes, instead of running anything."""
    retry_grace_s: float = 0.3
    """How long a program that nobody follows goes on."""
    stillborn: int = 0
    """So many creates are lost to a restart: they are on their way, and then they have failed."""
    create_delay_s: float = 0.0
    cuts: list[tuple[int, str]] = field(default_factory=list)
    """Break one stream each after so many events: `drop` the connection, `end` in good order, or end with an
    error of that code."""
    event_cuts: list[int] = field(default_factory=list)
    """Drop one stream of sandbox events each, after so many events."""
    cut_stream_after: int | None = None
    """Break streams after that many events."""
    cut_cleanly: bool = False
    """... by ending the answer in good order instead of dropping the connection."""
    cut_file: bool = False
    """Drop the connection in the middle of every download."""
    file_cuts: list[int] = field(default_factory=list)
    """Drop one download or archive each, after so many bytes; `on_cut` is called then."""
    on_cut: Callable[[], object] = lambda: None
    archive: bytes = b""
    """What every folder is as an archive; and the last one that was sent."""
    changes: list[list[dict[str, Any]]] = field(default_factory=list)
    """What each watcher is told before its connection drops."""
    error_event: dict[str, Any] | None = None
    """Put this error at the end of streams instead of the result."""

    def count(self, method: str, path_end: str) -> int:
        return sum(1 for one in self.seen if one.method == method and one.path.endswith(path_end))

    def last(self, method: str, path_end: str) -> Seen:
        return [one for one in self.seen if one.method == method and one.path.endswith(path_end)][-1]

    def alive(self) -> list[str]:
        return [key for key, body in self.sandboxes.items() if body["status"] == "running"]

    def workspace(self, sandbox_id: str) -> Path:
        path = self.folder / sandbox_id
        path.mkdir(exist_ok=True)
        return path

    def file(self, sandbox_id: str, path: str) -> Path:
        return self.workspace(sandbox_id) / path.removeprefix("/home/user").lstrip("/")


def make_app(fake: FakeServer) -> ASGIApp:
    app = FastAPI()

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": "0.0.0"}

    _add_sandboxes(app, fake)
    _add_changes(app, fake)
    _add_work(app, fake)
    add_execs(app, fake)
    add_files(app, fake)
    _add_rest(app, fake)
    add_history(app, fake)
    return _gate(app, fake)


def _gate(app: ASGIApp, fake: FakeServer) -> ASGIApp:
    """Note each request, answer with a fault if one matches, and check the key. Streams pass untouched."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path = request.url.path
        raw = b"" if path.endswith(("/files", "/archive")) else await request.body()
        body = json.loads(raw) if raw else None
        fake.seen.append(Seen(request.method, path, request.url.query, dict(request.headers), body))
        fault = _fault_for(fake, request.method, path)
        if fault is not None and fault.status == 0:
            if fault.after:
                replay = [{"type": "http.request", "body": raw}] if raw else []
                with suppress(ConnectionError):
                    await app(scope, lambda: _next_message(replay, receive), _swallow)
            send.__self__.transport.abort()  # type: ignore[attr-defined]  # what uvicorn passes
            return
        answer = None if fault is None else _answer_of(fault)
        if answer is None and path.startswith("/v1"):
            known = request.headers.get("authorization") == f"Bearer {fake.api_key}"
            answer = None if known else refusal(401, "unauthorized", "unknown API key")
        if answer is not None:
            await answer(scope, receive, send)
            return
        replay = [{"type": "http.request", "body": raw}] if raw else []
        await app(scope, lambda: _next_message(replay, receive), send)

    return gate


async def _next_message(replay: list[Message], receive: Receive) -> Message:
    return replay.pop() if replay else await receive()


async def _swallow(message: Message) -> None:
    """An answer that gets lost."""


def _fault_for(fake: FakeServer, method: str, path: str) -> Fault | None:
    for fault in fake.faults:
        if fault.times and fault.method == method and path.endswith(fault.path_end):
            fault.times -= 1
            return fault
    return None


def _answer_of(fault: Fault) -> Response:
    if fault.raw is not None:
        return Response(fault.raw, fault.status, headers=fault.headers)
    if fault.body is None:
        return Response("gateway", fault.status, headers=fault.headers)
    return JSONResponse(fault.body, fault.status, headers=fault.headers)


def _add_sandboxes(app: FastAPI, fake: FakeServer) -> None:
    @app.post("/v1/sandboxes", status_code=201)
    async def create(request: Request) -> Any:
        body = await request.json()
        if "image" in body and body["image"] == "missing":
            return refusal(400, "invalid_request", "there is no image 'missing'", param="image")
        key = request.headers.get("idempotency-key", "")
        if key in fake.answers:
            known, answer = fake.answers[key]
            return answer if known == body else refusal(409, "idempotency_conflict", f"key {key!r} was used")
        sandbox_id = f"sbx_{len(fake.sandboxes):026d}"
        now = time.time()
        made = {"id": sandbox_id, "object": "sandbox", "status": "running", "termination_reason": None}
        made |= {"image": body.get("image", "e80/default:latest"), "labels": body.get("labels", {})}
        made |= {
            "created_at": now,
            "expires_at": now + 300,
            "timeout_s": body.get("timeout_s", 300),
            "idle_timeout_s": body.get("idle_timeout_s"),
            "new_field": 1,
        }
        fake.sandboxes[sandbox_id] = made
        if fake.stillborn:
            fake.stillborn -= 1
            made["status"] = "creating"
        if key:
            fake.answers[key] = (body, made)
        note(fake, "created", sandbox_id)
        await asyncio.sleep(fake.create_delay_s)
        return made

    @app.get("/v1/sandboxes")
    async def listing(
        request: Request, status: str = "alive", limit: int = 20, after: str | None = None
    ) -> Any:
        wanted = [label.partition("=")[::2] for label in request.query_params.getlist("label")]
        statuses = {"alive": ("running", "paused"), "all": ("running", "paused", "stopped")}.get(
            status, (status,)
        )
        found = [
            one
            for one in fake.sandboxes.values()
            if one["status"] in statuses and all(one["labels"].get(name) == value for name, value in wanted)
        ]
        return page(found[::-1], limit, after)

    @app.get("/v1/sandboxes/{sandbox_id}")
    async def get(sandbox_id: str) -> Any:
        found = fake.sandboxes.get(sandbox_id)
        if found and found["status"] == "creating":
            found |= {"status": "failed", "termination_reason": "lost"}
        return found or refusal(404, "not_found", f"no sandbox {sandbox_id!r}")

    @app.post("/v1/sandboxes/{sandbox_id}/stop")
    async def stop(sandbox_id: str) -> Any:
        found = fake.sandboxes.get(sandbox_id)
        if found is None:
            return refusal(404, "not_found", f"no sandbox {sandbox_id!r}")
        if found["status"] != "stopped":
            found |= {"status": "stopped", "termination_reason": "user"}
            note(fake, "stopped", sandbox_id, reason="user")
        return found


def _add_changes(app: FastAPI, fake: FakeServer) -> None:
    def alive(sandbox_id: str) -> Any:
        found = fake.sandboxes.get(sandbox_id)
        if found is None:
            return refusal(404, "not_found", f"no sandbox {sandbox_id!r}")
        if found["status"] == "stopped":
            return refusal(409, "sandbox_not_running", "the sandbox has ended (user)")
        return found

    def turn(sandbox_id: str, status: str, kind: str) -> Any:
        found = alive(sandbox_id)
        if isinstance(found, dict) and found["status"] != status:
            found["status"] = status
            note(fake, kind, sandbox_id)
        return found

    @app.post("/v1/sandboxes/{sandbox_id}/pause")
    async def pause(sandbox_id: str) -> Any:
        return turn(sandbox_id, "paused", "paused")

    @app.post("/v1/sandboxes/{sandbox_id}/resume")
    async def resume(sandbox_id: str) -> Any:
        return turn(sandbox_id, "running", "resumed")

    @app.patch("/v1/sandboxes/{sandbox_id}")
    async def update(sandbox_id: str, request: Request) -> Any:
        found = alive(sandbox_id)
        if isinstance(found, dict):
            found |= await request.json()
            note(fake, "updated", sandbox_id)
        return found


def _add_work(app: FastAPI, fake: FakeServer) -> None:
    @app.post("/v1/sandboxes/{sandbox_id}/exec")
    async def execute(sandbox_id: str, request: Request) -> Any:
        body = await request.json()
        found = fake.sandboxes.get(sandbox_id)
        if found is None:
            return refusal(404, "not_found", f"no sandbox {sandbox_id!r}")
        if found["status"] == "paused":
            return refusal(409, "sandbox_paused", "the sandbox is paused; it goes on when it is resumed")
        if found["status"] != "running":
            return refusal(
                409, "sandbox_not_running", f"the sandbox has ended ({found['termination_reason']})"
            )
        key = request.headers.get("idempotency-key")
        run = fake.execs.get(f"{sandbox_id} {key}") if key else None
        # However it wants to be told of it: the same program.
        if run is not None and run.body | {"stream": None} != body | {"stream": None}:
            return refusal(409, "idempotency_conflict", f"key {key!r} was used for another exec")
        if run is None:
            run = FakeExec(fake, sandbox_id, body, key)
            fake.execs[f"{sandbox_id} {key or run.id}"] = run
        if body.get("background"):
            return run.shown()
        if body.get("stream"):
            return StreamingResponse(lines(fake, run), media_type="text/event-stream")
        return [event async for event in run.events()][-1]["exec"]


def _add_rest(app: FastAPI, fake: FakeServer) -> None:
    @app.post("/v1/apikeys", status_code=201)
    async def create(request: Request) -> Any:
        body = await request.json()
        key = {
            "id": f"key_{len(fake.keys)}",
            "object": "apikey",
            "name": body["name"],
            "prefix": "8080_live_aaaa",
        }
        key |= {"created_at": time.time(), "last_used_at": None, "revoked_at": None}
        fake.keys.append(key)
        return {**key, "key": "8080_live_new"}

    @app.get("/v1/apikeys")
    async def listing() -> Any:
        return {"object": "list", "data": fake.keys, "has_more": False}

    @app.get("/v1/apikeys/current")
    async def current() -> Any:
        return {"id": "key_current", "object": "apikey", "name": "tests", "prefix": "8080_live_aaaa"}

    @app.post("/v1/apikeys/{key_id}/revoke")
    async def revoke(key_id: str) -> Any:
        for key in fake.keys:
            if key["id"] == key_id:
                key["revoked_at"] = time.time()
                return key
        return refusal(404, "not_found", f"no key {key_id!r}")

    @app.get("/v1/doctor")
    async def doctor() -> Any:
        return {"object": "list", "data": fake.checks, "isolation": {"level": 0, "runtime": "runc"}}


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """Serve an ASGI app on a free loopback port from a thread; gives its URL."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", loop="asyncio", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(timeout=10)


class Switch:
    """One server for many tests: passes requests to the application of the moment."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@contextmanager
def serving() -> Iterator[tuple[str, Switch]]:
    switch = Switch()
    with serve(switch) as url:
        yield url, switch


@contextmanager
def fresh_fake(url: str, switch: Switch) -> Iterator[FakeServer]:
    """A fake server that knows nothing yet, behind a server that runs already."""
    with tempfile.TemporaryDirectory(prefix="e80-fake-") as folder:
        fake = FakeServer(Path(folder), base_url=url)
        switch.app = make_app(fake)
        try:
            yield fake
        finally:
            _end_programs(fake)


def _end_programs(fake: FakeServer) -> None:
    deadline = time.monotonic() + 10
    while fake.programs and time.monotonic() < deadline:
        for pid in list(fake.programs):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
