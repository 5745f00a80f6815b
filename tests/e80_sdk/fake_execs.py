"""Programs of the fake server: plain processes of this machine, or a script of output. One with an
idempotency key runs once, and is told again to whoever comes back. The number of an event is its place in the
program's log."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tests.e80_sdk.fake_history import page

if TYPE_CHECKING:
    from tests.e80_sdk.fake_server import FakeServer

Piece = tuple[str, bytes]
_ids = iter(range(10**9))


class FakeExec:
    """A program that runs, or ran: its output so far, and its result."""

    def __init__(self, fake: FakeServer, sandbox_id: str, body: dict[str, Any], key: str | None) -> None:
        name = f"{sandbox_id} {key}" if key else str(next(_ids))
        self.id = f"exec_{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        self.body = body
        self.sandbox_id = sandbox_id
        self.started_at = time.time()
        self.result: dict[str, Any] | None = None
        self.followers = 0
        self.stdin = bytearray()
        self.stdin_open = bool(body.get("stdin_open"))
        self.signals: list[str] = []
        self._fake = fake
        self._log: list[tuple[int, str, bytes]] = []
        self._size = 0
        self._changed = asyncio.Condition()
        self.spawned = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    async def events(self, after: int = -1) -> AsyncGenerator[dict[str, Any]]:
        """What comes after the event with that number."""
        self.followers += 1
        position = 0
        try:
            if after < 0:
                started = {"id": self.id, "status": "running"}
                yield {"type": "exec.started", "sequence_number": 0, "exec": started}
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: len(self._log) > position or self.result)  # noqa: B023
                pieces, position = self._log[position:], len(self._log)
                for number, name, data in pieces:
                    if number > after:
                        yield {"sequence_number": number, **_event(name, data)}
                if self.result is not None and position == len(self._log):
                    break
            yield {"type": "exec.completed", "sequence_number": self._size + 8, "exec": self.result}
        finally:
            self.followers -= 1
            if self.result is None and not self.followers and not self.body.get("background"):
                self._grace = asyncio.ensure_future(self._abandoned())

    async def write(self, data: bytes, offset: int | None, close: bool) -> None:
        """Takes what was not taken before."""
        new = data if offset is None else data[max(0, len(self.stdin) - offset) :]
        self.stdin += new
        self.stdin_open = not close
        await self.spawned.wait()
        assert self.process.stdin is not None
        self.process.stdin.write(new)
        if close:
            self.process.stdin.close()

    def signal(self, name: str) -> bool:
        self.signals.append(name)
        if self.result is not None or not self.spawned.is_set():
            return False
        os.killpg(self.process.pid, getattr(signal, name))
        return True

    def shown(self) -> dict[str, Any]:
        return self.result or _result(self, 0, False, dict.fromkeys(_NAMES, b"")) | {"status": "running"}

    async def _abandoned(self) -> None:
        await asyncio.sleep(self._fake.retry_grace_s)
        if not self.followers:
            self._task.cancel()

    async def _run(self) -> None:
        if self._fake.script is not None:
            for piece in self._fake.script:
                await self._put(*piece)
            await self._end(0, False)
            return
        self._fake.started += 1
        process = await asyncio.create_subprocess_exec(
            *_argv(self.body, self._fake.workspace(self.sandbox_id)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self._fake.workspace(self.sandbox_id),
            start_new_session=True,
            env={"PATH": os.environ["PATH"], **(self.body.get("env") or {})},
        )
        self._fake.programs[process.pid] = self.process = process
        self.spawned.set()
        timed_out = False
        try:
            assert process.stdin is not None
            process.stdin.write((self.body.get("stdin") or "").encode())
            if not self.stdin_open:
                process.stdin.close()
            pumps = asyncio.gather(self._pump("stdout", process.stdout), self._pump("stderr", process.stderr))
            try:
                async with asyncio.timeout(self.body.get("timeout_s") or 60):
                    await asyncio.shield(pumps)
            except TimeoutError:
                timed_out = True
                os.killpg(process.pid, signal.SIGKILL)
                await pumps
            code = await process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with anyio.CancelScope(shield=True):  # the exec is being cancelled
                await process.wait()
            del self._fake.programs[process.pid]
        await self._end(code, timed_out)

    async def _pump(self, name: str, reader: asyncio.StreamReader | None) -> None:
        assert reader is not None
        while data := await reader.read(65536):
            await self._put(name, data)

    async def _put(self, name: str, data: bytes) -> None:
        async with self._changed:
            self._size += 8 + len(data)
            self._log.append((self._size, name, data))
            self._changed.notify_all()

    async def _end(self, code: int, timed_out: bool) -> None:
        output = {
            wanted: b"".join(data for _, name, data in self._log if name == wanted) for wanted in _NAMES
        }
        async with self._changed:
            self.result = _result(self, code, timed_out, output)
            self._changed.notify_all()


async def lines(fake: FakeServer, run: FakeExec, after: int = -1) -> AsyncGenerator[bytes]:
    """The events of an exec as a stream that may be cut."""
    cut = fake.cuts.pop(0) if fake.cuts else None
    number = 0
    async with aclosing(run.events(after)) as events:
        async for event in events:
            if fake.cut_stream_after is not None and number >= fake.cut_stream_after:
                if fake.cut_cleanly:
                    return
                raise ConnectionError("cut by the test")
            if cut is not None and number >= cut[0]:
                if cut[1] == "drop":
                    raise ConnectionError("cut by the test")
                if cut[1] != "end":
                    yield _line({"type": "error", "error": {"message": "cut by the test", "code": cut[1]}})
                return
            if fake.error_event is not None and event["type"] == "exec.completed":
                event = {"type": "error", "error": fake.error_event}
            yield _line(event)
            number += 1


def add_execs(app: FastAPI, fake: FakeServer) -> None:
    def found(exec_id: str) -> FakeExec:
        return next(run for run in fake.execs.values() if run.id == exec_id)

    @app.get("/v1/sandboxes/{sandbox_id}/execs")
    async def listing(
        sandbox_id: str, limit: int = 20, after: str | None = None, status: str | None = None
    ) -> Any:
        runs = [run for run in fake.execs.values() if run.sandbox_id == sandbox_id]
        shown = [run.shown() for run in runs][::-1]
        bare = [{name: value for name, value in one.items() if name not in _NAMES} for one in shown]
        return page([one for one in bare if status in (None, one["status"])], limit, after)

    @app.get("/v1/sandboxes/{sandbox_id}/execs/{exec_id}")
    async def one_exec(sandbox_id: str, exec_id: str) -> Any:
        return found(exec_id).shown()

    @app.get("/v1/sandboxes/{sandbox_id}/execs/{exec_id}/events")
    async def events(sandbox_id: str, exec_id: str, after: int = -1) -> Any:
        return StreamingResponse(lines(fake, found(exec_id), after), media_type="text/event-stream")

    @app.post("/v1/sandboxes/{sandbox_id}/execs/{exec_id}/signal")
    async def send_signal(sandbox_id: str, exec_id: str, request: Request) -> Any:
        name = (await request.json())["signal"]
        return {"object": "sandbox.exec.signal", "signal": name, "delivered": found(exec_id).signal(name)}

    @app.delete("/v1/sandboxes/{sandbox_id}/contexts/{context_id}")
    async def delete_context(sandbox_id: str, context_id: str) -> Any:
        return {"id": context_id, "object": "sandbox.context", "deleted": True}

    @app.post("/v1/sandboxes/{sandbox_id}/execs/{exec_id}/stdin")
    async def stdin(sandbox_id: str, exec_id: str, request: Request) -> Any:
        body, run = await request.json(), found(exec_id)
        await run.write(base64.b64decode(body["data"]), body.get("offset"), body["close"])
        return {"object": "sandbox.exec.stdin", "size": len(run.stdin), "open": run.stdin_open}


_NAMES = ("stdout", "stderr")


def _line(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def _event(name: str, data: bytes) -> dict[str, Any]:
    if name == "result":
        return {"type": "exec.result", "result": json.loads(data)}
    if name == "gap":
        return {"type": "exec.gap", "missed_bytes": int(data)}
    return {"type": f"exec.{name}.delta", **_delta(data)}


def _argv(body: dict[str, Any], workspace: Path) -> list[str]:
    if "code" in body:
        return [sys.executable, "-I", "-S", "-u", "-c", body["code"]]
    command = body["command"]
    argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
    words = [sys.executable if word == "python3" else word for word in argv]
    return [word.replace("/home/user", str(workspace)) for word in words]


def _result(run: FakeExec, code: int, timed_out: bool, output: dict[str, bytes]) -> dict[str, Any]:
    status = "timed_out" if timed_out else "killed" if code < 0 else "completed" if code == 0 else "failed"
    stdout, stderr = (output[name].decode("utf-8", "replace") for name in _NAMES)
    error = None
    if "Traceback" in stderr:
        name, _, value = stderr.strip().splitlines()[-1].partition(": ")
        error = {"name": name, "value": value, "traceback": stderr}
    return {
        "id": run.id,
        "object": "sandbox.exec",
        "sandbox_id": run.sandbox_id,
        "status": status,
        "exit_code": None if code < 0 else code,
        "signal": {-9: "SIGKILL", -15: "SIGTERM"}.get(code) if code < 0 else None,
        "stdout": stdout,
        "stderr": stderr,
        "truncated": False,
        "error": error,
        "results": [],
        "started_at": run.started_at,
        "duration_ms": (time.time() - run.started_at) * 1000,
        "usage": {"cpu_ms": 1, "max_rss_mb": 1},
    }


def _delta(data: bytes) -> dict[str, str]:
    try:
        return {"delta": data.decode()}
    except UnicodeDecodeError:
        return {"delta": base64.b64encode(data).decode(), "encoding": "base64"}
