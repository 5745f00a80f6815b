"""An engine that cannot freeze a sandbox, whose programs fork faster than the kernel stops them."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sandboxd.kit.settings import Settings
from sandboxd.runtimes.base import Handle
from sandboxd.runtimes.docker.driver import DockerRuntime
from sandboxd.runtimes.docker.link import write_config
from sandboxd.runtimes.errors import FreezeFailedError, RuntimeFaultError
from tests.sandboxd.runtimes.test_link import spec


class Engine(BaseHTTPRequestHandler):
    """Says that it cannot freeze, and what has become of the container."""

    becomes = "running"
    state = "running"

    def do_GET(self) -> None:
        if self.path.endswith("/version"):
            self._answer(200, {"ApiVersion": "1.41"})
        else:
            state = {"Status": type(self).state, "Pid": os.getpid()}
            self._answer(200, {"State": state, "HostConfig": {"Runtime": "runc"}})

    def do_POST(self) -> None:
        type(self).state = self.becomes
        self._answer(500, {"message": "OCI runtime pause failed: unable to freeze"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def engine(request) -> Iterator[str]:
    handler = type("Engine", (Engine,), {"becomes": request.param})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"tcp://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("engine", "fault"),
    [("running", FreezeFailedError), ("exited", RuntimeFaultError), ("paused", None)],
    indirect=["engine"],
)
async def test_a_freeze_that_fails_says_what_became_of_the_sandbox(engine, fault, tmp_path: Path):
    runtime = DockerRuntime(Settings(state_dir=tmp_path / "s", run_dir=tmp_path / "r", docker_url=engine))
    await runtime.start()
    try:
        folder = runtime._links_dir / "sbx_test"
        folder.mkdir()
        write_config(folder, spec(200_000))
        await runtime.adopt("sbx_test", Handle("container"))
        if fault is None:
            await runtime.pause("sbx_test")
            return
        with pytest.raises(fault, match="unable to freeze") as failed:
            await runtime.pause("sbx_test")
        # It runs on, so it can be asked again; else it is not known what to do next.
        assert failed.value.status == (503 if fault is FreezeFailedError else 500)
    finally:
        await runtime.close()
