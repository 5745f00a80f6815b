"""A small real HTTP server that speaks the contract, to make failures happen that a healthy server does not
show.

Programs run as plain processes of this machine. It knows nothing of isolation; what the platform really
does is tested against the real daemon.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """Answer matching requests so instead, `times` times."""

    method: str
    path_end: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    times: int = 1


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
    create_delay_s: float = 0.0
    cut_stream_after: int | None = None
    """Break streams after that many events."""
    cut_cleanly: bool = False
    """... by ending the answer in good order instead of dropping the connection."""
    cut_file: bool = False
    """Drop the connection in the middle of a download."""
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


def _error(status: int, code: str, message: str, **more: Any) -> JSONResponse:
    body = {"error": {"message": message, "type": "fake", "param": None, "code": code, **more}}
    return JSONResponse(body, status, headers={"X-Request-Id": "req_fake"})


def make_app(fake: FakeServer) -> ASGIApp:
    app = FastAPI()

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": "0.0.0"}

    _add_sandboxes(app, fake)
    _add_work(app, fake)
    _add_rest(app, fake)
    return _gate(app, fake)


def _gate(app: ASGIApp, fake: FakeServer) -> ASGIApp:
    """Note each request, answer with a fault if one matches, and check the key. Streams pass untouched."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path = request.url.path
        raw = b"" if path.endswith("/files") else await request.body()
        body = json.loads(raw) if raw else None
        fake.seen.append(Seen(request.method, path, request.url.query, dict(request.headers), body))
        answer = _fault_for(fake, request.method, path)
        if answer is None and path.startswith("/v1"):
            known = request.headers.get("authorization") == f"Bearer {fake.api_key}"
            answer = None if known else _error(401, "unauthorized", "unknown API key")
        if answer is not None:
            await answer(scope, receive, send)
            return
        replay = [{"type": "http.request", "body": raw}] if raw else []
        await app(scope, lambda: _next_message(replay, receive), send)

    return gate


async def _next_message(replay: list[Message], receive: Receive) -> Message:
    return replay.pop() if replay else await receive()


def _fault_for(fake: FakeServer, method: str, path: str) -> Response | None:
    for fault in fake.faults:
        if fault.times and fault.method == method and path.endswith(fault.path_end):
            fault.times -= 1
            if fault.body is None:
                return Response("gateway", fault.status, headers=fault.headers)
            return JSONResponse(fault.body, fault.status, headers=fault.headers)
    return None


def _add_sandboxes(app: FastAPI, fake: FakeServer) -> None:
    @app.post("/v1/sandboxes", status_code=201)
    async def create(request: Request) -> Any:
        body = await request.json()
        if "image" in body and body["image"] == "missing":
            return _error(400, "invalid_request", "there is no image 'missing'", param="image")
        sandbox_id = f"sbx_{len(fake.sandboxes):026d}"
        now = time.time()
        made = {"id": sandbox_id, "object": "sandbox", "status": "running", "termination_reason": None}
        made |= {"image": body.get("image", "e80/default:latest"), "labels": body.get("labels", {})}
        made |= {
            "created_at": now,
            "expires_at": now + 300,
            "timeout_s": body.get("timeout_s", 300),
            "new_field": 1,
        }
        fake.sandboxes[sandbox_id] = made
        await asyncio.sleep(fake.create_delay_s)
        return made

    @app.get("/v1/sandboxes")
    async def listing(status: str = "alive", limit: int = 20, after: str | None = None) -> dict[str, Any]:
        found = [one for one in fake.sandboxes.values() if status == "all" or one["status"] == "running"][
            ::-1
        ]
        ids = [one["id"] for one in found]
        start = ids.index(after) + 1 if after else 0
        page = found[start : start + limit]
        more = start + limit < len(found)
        return {"object": "list", "data": page, "last_id": page[-1]["id"] if page else None, "has_more": more}

    @app.get("/v1/sandboxes/{sandbox_id}")
    async def get(sandbox_id: str) -> Any:
        found = fake.sandboxes.get(sandbox_id)
        return found or _error(404, "not_found", f"no sandbox {sandbox_id!r}")

    @app.post("/v1/sandboxes/{sandbox_id}/stop")
    async def stop(sandbox_id: str) -> Any:
        found = fake.sandboxes.get(sandbox_id)
        if found is None:
            return _error(404, "not_found", f"no sandbox {sandbox_id!r}")
        found |= {"status": "stopped", "termination_reason": "user"}
        return found


def _add_work(app: FastAPI, fake: FakeServer) -> None:
    @app.post("/v1/sandboxes/{sandbox_id}/exec")
    async def execute(sandbox_id: str, request: Request) -> Any:
        body = await request.json()
        found = fake.sandboxes.get(sandbox_id)
        if found is None:
            return _error(404, "not_found", f"no sandbox {sandbox_id!r}")
        if found["status"] != "running":
            return _error(
                409, "sandbox_not_running", f"the sandbox has ended ({found['termination_reason']})"
            )
        events = _execute(fake, sandbox_id, body)
        if body.get("stream"):
            return StreamingResponse(_lines(fake, events), media_type="text/event-stream")
        final = [event async for event in events][-1]
        return final["exec"]

    @app.put("/v1/sandboxes/{sandbox_id}/files", status_code=201)
    async def put(sandbox_id: str, path: str, request: Request) -> Any:
        if sandbox_id not in fake.sandboxes:
            return _error(404, "not_found", f"no sandbox {sandbox_id!r}")
        target = fake.file(sandbox_id, path)
        if target.is_dir():
            return _error(400, "is_a_directory", f"{path!r} is a directory")
        size = 0
        with target.open("wb") as file:
            async for chunk in request.stream():
                size += file.write(chunk)
        return {"object": "sandbox.file", "path": path, "size": size}

    @app.get("/v1/sandboxes/{sandbox_id}/files")
    async def read(sandbox_id: str, path: str) -> Any:
        target = fake.file(sandbox_id, path)
        if not target.is_file():
            return _error(404, "not_found", f"no file {path!r}")
        if fake.cut_file:
            return StreamingResponse(
                _half(target.read_bytes()), headers={"content-length": str(target.stat().st_size)}
            )
        return FileResponse(target)


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
        return _error(404, "not_found", f"no key {key_id!r}")

    @app.get("/v1/doctor")
    async def doctor() -> Any:
        return {"object": "list", "data": fake.checks, "isolation": {"level": 0, "runtime": "runc"}}


async def _execute(fake: FakeServer, sandbox_id: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    argv = _argv(body, fake.workspace(sandbox_id))
    started = time.time()
    exec_id = f"exec_{len(fake.seen)}"
    yield {"type": "exec.started", "exec": {"id": exec_id, "status": "running"}}
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=fake.workspace(sandbox_id),
        start_new_session=True,
        env={"PATH": os.environ["PATH"], **(body.get("env") or {})},
    )
    fake.programs[process.pid] = process
    output: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
    timed_out = False
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write((body.get("stdin") or "").encode())
        process.stdin.close()
        readers = [
            asyncio.ensure_future(_pump("stdout", process.stdout, queue)),
            asyncio.ensure_future(_pump("stderr", process.stderr, queue)),
        ]
        deadline = time.monotonic() + body.get("timeout_s", 60)
        open_streams = 2
        while open_streams:
            try:
                name, data = await asyncio.wait_for(queue.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                timed_out, deadline = True, time.monotonic() + 60
                continue
            output[name] += data
            open_streams -= not data
            if data:
                yield {"type": f"exec.{name}.delta", **_delta(data)}
        await asyncio.gather(*readers)
        code = await process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True):  # the client has gone and the request is being cancelled
            await process.wait()
        del fake.programs[process.pid]
    yield {"type": "exec.completed", "exec": _result(exec_id, sandbox_id, code, timed_out, output, started)}


def _argv(body: dict[str, Any], workspace: Path) -> list[str]:
    if "code" in body:
        return [sys.executable, "-I", "-S", "-u", "-c", body["code"]]
    command = body["command"]
    argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
    words = [sys.executable if word == "python3" else word for word in argv]
    return [word.replace("/home/user", str(workspace)) for word in words]


def _result(
    exec_id: str, sandbox_id: str, code: int, timed_out: bool, output: dict[str, bytes], started: float
) -> dict[str, Any]:
    status = "timed_out" if timed_out else "killed" if code < 0 else "completed" if code == 0 else "failed"
    stdout, stderr = (output[name].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    error = None
    if "Traceback" in stderr:
        name, _, value = stderr.strip().splitlines()[-1].partition(": ")
        error = {"name": name, "value": value, "traceback": stderr}
    return {
        "id": exec_id,
        "object": "sandbox.exec",
        "sandbox_id": sandbox_id,
        "status": status,
        "exit_code": None if code < 0 else code,
        "signal": {-9: "SIGKILL", -15: "SIGTERM"}.get(code) if code < 0 else None,
        "stdout": stdout,
        "stderr": stderr,
        "truncated": False,
        "error": error,
        "started_at": started,
        "duration_ms": (time.time() - started) * 1000,
        "usage": {"cpu_ms": 1, "max_rss_mb": 1},
    }


def _delta(data: bytes) -> dict[str, str]:
    try:
        return {"delta": data.decode()}
    except UnicodeDecodeError:
        return {"delta": base64.b64encode(data).decode(), "encoding": "base64"}


async def _pump(name: str, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[str, bytes]]) -> None:
    while True:
        data = await reader.read(65536)
        await queue.put((name, data))
        if not data:
            return


async def _lines(fake: FakeServer, events: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    number = 0
    async with aclosing(events):
        async for event in events:
            if fake.cut_stream_after is not None and number >= fake.cut_stream_after:
                if fake.cut_cleanly:
                    return
                raise ConnectionError("cut by the test")
            if fake.error_event is not None and event["type"] == "exec.completed":
                event = {"type": "error", "error": fake.error_event}
            yield f"data: {json.dumps({**event, 'sequence_number': number})}\n\n".encode()
            number += 1


async def _half(content: bytes) -> AsyncGenerator[bytes]:
    yield content[: len(content) // 2]
    await asyncio.sleep(0.05)  # lets the first half leave before the connection drops
    raise ConnectionError("cut by the test")


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
