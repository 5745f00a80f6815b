import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest
import structlog

from sandboxd.app import create_app
from sandboxd.kit.db import Database
from sandboxd.kit.settings import Settings
from sandboxd.kit.sse import sse_response
from sandboxd.main import EXIT_FAILED, EXIT_USAGE, main, serve

COMMAND = [sys.executable, "-W", "error", "-m", "sandboxd"]
DEADLINE_S = 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
    return {
        **kept,
        "SANDBOXD_STATE_DIR": str(tmp_path / "state"),
        "SANDBOXD_RUN_DIR": str(tmp_path / "run"),
        "SANDBOXD_DOCKER_URL": "tcp://127.0.0.1:1",
        "SANDBOXD_PORT": str(free_port()),
    }


@pytest.fixture
def daemon(environment):
    process = subprocess.Popen(COMMAND, env=environment, stderr=subprocess.PIPE, text=True)
    base_url = f"http://127.0.0.1:{environment['SANDBOXD_PORT']}"
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            httpx2.get(f"{base_url}/healthz")
            break
        except httpx2.TransportError:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    process.base_url = base_url
    yield process
    process.kill()
    process.communicate()


def run(environment, *arguments):
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_daemon_serves_takes_a_new_key_and_stops_on_sigterm(daemon, environment, tmp_path):
    made = run(environment, "create-key", "--name", "first")
    key = made.stdout.strip()
    assert made.returncode == 0
    assert made.stdout == f"{key}\n"
    response = httpx2.get(f"{daemon.base_url}/v1/apikeys", headers={"Authorization": f"Bearer {key}"})
    assert [entry["name"] for entry in response.json()["data"]] == ["first"]
    state = tmp_path / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "sandboxd.pid").read_text() == f"{daemon.pid}\n"

    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(DEADLINE_S) == 0
    assert not (state / "sandboxd.pid").exists()
    lines = [json.loads(line) for line in daemon.stderr.read().splitlines()]
    events = [line["event"] for line in lines]
    assert "listening" in events
    assert events[-1] == "stopped"
    assert "draining" in events


def test_a_second_daemon_on_the_same_state_is_refused(daemon, environment):
    second = run({**environment, "SANDBOXD_PORT": str(free_port())}, "serve")
    assert second.returncode == EXIT_FAILED
    assert "stop it first" in second.stderr


def test_a_taken_port_is_a_clear_error(daemon, environment, tmp_path):
    second = run({**environment, "SANDBOXD_STATE_DIR": str(tmp_path / "other")})
    assert second.returncode == EXIT_FAILED
    assert "address already in use" in second.stderr.lower()
    assert "Traceback" not in second.stderr


def test_a_wrong_setting_is_named(environment):
    failed = run({**environment, "SANDBOXD_PORT": "http"})
    assert failed.returncode == EXIT_USAGE
    assert failed.stderr.startswith("sandboxd: SANDBOXD_PORT: ")
    assert len(failed.stderr.splitlines()) == 1


def test_an_unusable_state_folder_is_named(environment, tmp_path):
    (tmp_path / "file").write_text("")
    failed = run({**environment, "SANDBOXD_STATE_DIR": f"{tmp_path}/file/state"})
    assert failed.returncode == EXIT_FAILED
    assert failed.stderr.startswith("sandboxd: SANDBOXD_STATE_DIR: ")


@pytest.mark.parametrize("command", [["serve"], ["create-key", "--name", "a"]])
def test_a_store_that_is_away_is_said_in_plain_words(environment, command):
    away = "postgresql://e80:hunter2@127.0.0.1:1/e80"
    failed = run({**environment, "SANDBOXD_DATABASE_URL": away}, *command)
    assert failed.returncode == EXIT_FAILED
    assert "The store (PostgreSQL) cannot be used at the moment" in failed.stderr
    assert "ConnectionRefusedError" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "hunter2" not in failed.stderr


def test_keys_of_one_project_share_it(environment, tmp_path):
    for name in ("a", "b"):
        assert run(environment, "create-key", "--project", "web", "--name", name).returncode == 0

    async def count() -> int:
        db = Database(f"sqlite+aiosqlite:///{tmp_path}/state/sandboxd.db")
        async with db.read() as session:
            found = (await session.connection()).exec_driver_sql("SELECT count(*) FROM project")
            number = (await found).scalar_one()
        await db.close()
        return number

    assert asyncio.run(count()) == 1


def test_a_quota_is_set_in_parts_and_told(environment):
    assert run(environment, "create-key", "--project", "web", "--name", "a").returncode == 0
    environment = {**environment, "SANDBOXD_QUOTA_MEMORY_SIZE_MB": "4096"}
    first = run(environment, "set-quota", "--project", "web", "--sandboxes", "3", "--cpu-mhz", "5000")
    assert (
        first.stdout == "sandboxes: 3\ncpu_mhz: 5000\nmemory_size_mb: 4096 (SANDBOXD_QUOTA_MEMORY_SIZE_MB)\n"
    )
    second = run(
        environment, "set-quota", "--project", "web", "--sandboxes", "none", "--memory-size-mb", "99"
    )
    assert second.stdout == "sandboxes: none\ncpu_mhz: 5000\nmemory_size_mb: 99\n"
    assert run(environment, "set-quota", "--project", "web").stdout == second.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--project", "nope"], "There is no project 'nope' in organization 'default'"),
        (["--project", "a b"], "'a b' is not a name"),
        (["--project", "web", "--sandboxes", "0"], "'0' is neither 'none' nor a whole number from 1"),
        (["--project", "web", "--cpu-mhz", "1.5"], "'1.5' is neither"),
        (["--project", "web", "--memory-size-mb", "99999999999"], "to 2147483647"),
        ([], "--project"),
    ],
)
def test_a_bad_quota_is_refused_with_a_reason(environment, arguments, words):
    refused = run(environment, "set-quota", *arguments)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_bad_name_of_a_key_is_refused_with_a_reason(environment):
    for arguments in (["--name", ""], ["--name", "x" * 101], ["--name", "a", "--organization", "x" * 64]):
        refused = run(environment, "create-key", *arguments)
        assert refused.returncode != 0
        assert "error: argument --" in refused.stderr


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("sandboxd ")
    with pytest.raises(SystemExit) as stopped:
        main(["create-key"])
    assert stopped.value.code != 0
    assert "--name" in capsys.readouterr().err


class Served:
    """The application on a real server in this loop, with routes that hang."""

    def __init__(self, settings: Settings) -> None:
        settings.state_dir.mkdir()
        self.stop = asyncio.Event()
        self.entered = asyncio.Event()
        self.app = create_app(settings)
        self.client = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{settings.port}", timeout=DEADLINE_S)
        release = self.release = asyncio.Event()

        @self.app.get("/hang")
        async def hang() -> dict[str, str]:
            self.entered.set()
            await release.wait()
            return {"ended": "well"}

        @self.app.get("/stream")
        async def stream():
            async def events():
                yield "thing.started", {}
                self.entered.set()
                await release.wait()
                yield "thing.completed", {}

            return sse_response(events())

    async def __aenter__(self):
        self.serving = asyncio.create_task(serve(self.app, self.stop))
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await self.client.get("/healthz")
                    return self
                except httpx2.TransportError:
                    await asyncio.sleep(0.01)

    async def __aexit__(self, *error) -> None:
        self.stop.set()
        self.release.set()
        await self.client.aclose()
        await self.serving


def settings_with(settings: Settings, drain_timeout_s: float) -> Settings:
    return settings.model_copy(update={"port": free_port(), "drain_timeout_s": drain_timeout_s})


async def test_drain_lets_a_running_request_end(settings):
    async with Served(settings_with(settings, DEADLINE_S)) as served:
        running = asyncio.create_task(served.client.get("/hang"))
        await served.entered.wait()
        served.stop.set()
        async with asyncio.timeout(DEADLINE_S):
            while (ready := await served.client.get("/readyz")).status_code != 503:
                pass
        assert "drain" in ready.json()["reasons"]
        assert (await served.client.get("/v1/apikeys")).status_code == 503
        assert not served.serving.done()
        served.release.set()
        assert (await running).json() == {"ended": "well"}
        assert await served.serving == 0


async def test_what_outlives_the_drain_is_told_so(settings):
    async with Served(settings_with(settings, 0.05)) as served:
        running = asyncio.create_task(served.client.get("/hang"))
        await served.entered.wait()
        served.stop.set()
        response = await running
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "interrupted"
        assert await served.serving == 0


async def test_a_stream_that_outlives_the_drain_ends_in_an_error_event(settings):
    async with Served(settings_with(settings, 0.05)) as served:
        text = await read_until_cut(served)
        events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
        assert [event["type"] for event in events] == ["thing.started", "error"]
        assert events[-1]["error"]["code"] == "interrupted"
        assert await served.serving == 0


async def test_log_context_does_not_reach_the_next_request_of_a_connection(settings):
    settings = settings_with(settings, DEADLINE_S)
    async with Served(settings) as served:

        @served.app.get("/bind")
        async def bind() -> dict[str, object]:
            structlog.contextvars.bind_contextvars(sandbox_id="sbx_1")
            return dict(structlog.contextvars.get_contextvars())

        @served.app.get("/read")
        async def read() -> dict[str, object]:
            return dict(structlog.contextvars.get_contextvars())

        reader, writer = await asyncio.open_connection("127.0.0.1", settings.port)
        ask = "GET {} HTTP/1.1\r\nHost: x\r\nConnection: {}\r\n\r\n"

        # Pipelined: the server starts the second request from within the first one's task.
        writer.write((ask.format("/bind", "keep-alive") + ask.format("/read", "close")).encode())
        async with asyncio.timeout(DEADLINE_S):
            answers = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
    assert answers.count("HTTP/1.1 200") == 2
    assert answers.count("sbx_1") == 1


async def read_until_cut(served: Served) -> str:
    text = ""
    try:
        async with served.client.stream("GET", "/stream") as response:
            await served.entered.wait()
            served.stop.set()
            async for part in response.aiter_text():
                text += part
    except httpx2.RemoteProtocolError:
        return text
    raise AssertionError(f"the stream ended as if all were well: {text!r}")


async def test_cutting_the_drain_short_ends_it_at_once(settings):
    async with Served(settings_with(settings, 3600)) as served:
        running = asyncio.create_task(served.client.get("/hang"))
        await served.entered.wait()
        served.stop.set()
        served.app.state.services.drain.cancel()
        assert (await running).status_code == 503
        async with asyncio.timeout(DEADLINE_S):
            assert await served.serving == 0
