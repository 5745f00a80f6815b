"""What tests share: a real daemon on a real engine, a real PostgreSQL, and the rule when a test that needs
them may be skipped."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import docker
import httpx2
import pytest

from tests.postgres import PostgresServer, find_binaries

REQUIRED = os.environ.get("E80_REQUIRE_DOCKER") == "1"
IMAGE = "e80/default:latest"
START_S = 30
_daemons = itertools.count()


@dataclass
class Daemon:
    """A sandboxd process of its own, with its own state folder, port and API key."""

    base_url: str
    api_key: str
    state_dir: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes]
    other_keys: list[str] = field(default_factory=list)

    def client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx2.Client(base_url=self.base_url, headers=headers, timeout=120)

    def create_key(self, name: str, project: str = "default") -> str:
        """Another API key, in another project when one is named."""
        key = _run(self.env, "create-key", "--name", name, "--project", project)
        self.other_keys.append(key)
        return key

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(30)

    def start(self, *, wait: bool = True, **settings: str) -> None:
        """Starts the process again on the same state, with these settings changed from now on."""
        self.env.update(settings)
        self.process = _serve(self.env)
        if wait:
            _wait_ready(self)

    @property
    def log(self) -> str:
        return (self.state_dir / "sandboxd.log").read_text()


def engine_problem() -> str | None:
    """Why Docker tests cannot run here, or None."""
    if os.geteuid() != 0:
        return "not root"
    try:
        client = docker.from_env(timeout=10)
        client.ping()
        client.images.get(IMAGE)
    except docker.errors.ImageNotFound:
        return f"image {IMAGE} is not built: run scripts/build-images"
    except (docker.errors.DockerException, OSError) as error:
        return f"no Docker Engine: {error}"
    client.close()
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = [item for item in items if item.get_closest_marker("docker")]
    if not wanted or REQUIRED:
        return
    problem = engine_problem()
    if problem:
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """The engine that Docker tests run on. With E80_REQUIRE_DOCKER=1 its absence is a failure."""
    problem = engine_problem()
    if problem:
        pytest.fail(problem)
    client = docker.from_env(timeout=60)
    yield client
    client.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The PostgreSQL server of this run. With E80_REQUIRE_DOCKER=1 its absence is a failure."""
    with _postgres() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server for one test, which may kill it."""
    with _postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """A database of its own with all tables, on the server of this run."""
    url = postgres.migrated_database()
    yield url
    postgres.drop(url)


@pytest.fixture(scope="session")
def daemon(engine: docker.DockerClient) -> Iterator[Daemon]:
    """A daemon for the whole run. At its end nothing of it may be left on the host."""
    with _daemon(engine) as running:
        yield running


@pytest.fixture
def own_daemon(engine: docker.DockerClient) -> Iterator[Daemon]:
    """A daemon for one test, which may kill it."""
    with _daemon(engine) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[httpx2.Client]:
    with daemon.client() as http:
        yield http


@pytest.fixture
def sandbox_id(client: httpx2.Client) -> Iterator[str]:
    """A running sandbox of the shared daemon."""
    answer = client.post("/v1/sandboxes", json={})
    assert answer.status_code == 201, answer.text
    yield answer.json()["id"]
    client.post(f"/v1/sandboxes/{answer.json()['id']}/stop")


@contextmanager
def _postgres() -> Iterator[PostgresServer]:
    binaries = find_binaries()
    if binaries is None:
        (pytest.fail if REQUIRED else pytest.skip)("PostgreSQL is not installed: apt-get install postgresql")
    server = PostgresServer(binaries)
    try:
        server.start()
        yield server
    finally:
        server.close()


class _daemon:
    def __init__(self, engine: docker.DockerClient, **settings: str) -> None:
        self.engine = engine
        self.settings = settings

    def __enter__(self) -> Daemon:
        # Short: the path of a unix socket has room for 107 bytes.
        root = Path(tempfile.mkdtemp(prefix="e80-", dir="/tmp"))
        self.root = root
        env = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
        env.update(
            SANDBOXD_STATE_DIR=str(root / "state"),
            SANDBOXD_RUN_DIR=str(root / "run"),
            SANDBOXD_PORT=str(_free_port()),
            # A pool would start containers that most tests have no use for.
            SANDBOXD_POOL_MAX="0",
            # Limits count per uid of the host: another installation's sandboxes must not share ours.
            SANDBOXD_FIRST_UID=str(1_000_000 + os.getpid() % 32768 * 100_000 + next(_daemons) % 10 * 1000),
            SANDBOXD_DOCKER_URL=os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"),
        )
        env.update(self.settings)
        key = _run(env, "create-key", "--name", "tests")
        self.daemon = Daemon(
            base_url=f"http://127.0.0.1:{env['SANDBOXD_PORT']}",
            api_key=key,
            state_dir=root / "state",
            env=env,
            process=_serve(env),
        )
        _wait_ready(self.daemon)
        return self.daemon

    def __exit__(self, *_: object) -> None:
        daemon = self.daemon
        if daemon.process.poll() is not None:
            daemon.start()
        with daemon.client() as http:
            for project_key in {daemon.api_key, *daemon.other_keys}:
                http.headers["Authorization"] = f"Bearer {project_key}"
                while page := http.get("/v1/sandboxes", params={"limit": 100}).json().get("data"):
                    for sandbox in page:
                        http.post(f"/v1/sandboxes/{sandbox['id']}/stop")
        daemon.stop()
        owner = (daemon.state_dir / "installation").read_text().strip()
        left = self.engine.containers.list(all=True, filters={"label": f"sandboxd.owner={owner}"})
        for container in left:
            container.remove(force=True)
        mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.root) in line]
        for line in mounts:
            subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
        log = daemon.log
        shutil.rmtree(self.root)
        assert not left, f"containers left behind: {left}"
        assert not mounts, f"mounts left behind: {mounts}"
        faults = [line for line in log.splitlines() if "Traceback" in line]
        assert not faults, "\n".join(faults)[:8000].replace("\\n", "\n")


def _serve(env: dict[str, str]) -> subprocess.Popen[bytes]:
    state_dir = Path(env["SANDBOXD_STATE_DIR"])
    with (state_dir / "sandboxd.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "sandboxd", "serve"],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _run(env: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sandboxd", *arguments], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _wait_ready(daemon: Daemon) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert daemon.process.poll() is None, daemon.log
        try:
            if httpx2.get(f"{daemon.base_url}/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"the daemon is not ready after {START_S} s:\n{daemon.log}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
