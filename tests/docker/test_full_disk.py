"""The disk of the store is full: what runs goes on and can be stopped, and nothing half made stays behind."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.conftest import _daemon
from tests.docker.scene import Scene, create, event_types, printed, state, until

pytestmark = pytest.mark.docker

SIZE_MB = 4


@pytest.fixture
def disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="e80-disk-", dir="/tmp"))
    options = f"size={SIZE_MB}m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


@pytest.fixture
def scene(engine, disk: Path) -> Iterator[Scene]:
    url = f"sqlite+aiosqlite:///{disk}/store.db"
    with _daemon(engine, SANDBOXD_DATABASE_URL=url, SANDBOXD_WARM_LIBRARIES="false") as daemon:
        yield Scene(daemon, engine, disk / "store.db")
        (disk / "filling").unlink(missing_ok=True)


def fill(disk: Path) -> Path:
    """Takes the last byte. What the store has reserved for its log already it may still use."""
    filling = disk / "filling"
    with filling.open("ab", buffering=0) as file:
        size = 2**20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    assert os.statvfs(disk).f_bavail == 0
    return filling


def refused_create(client: httpx2.Client) -> httpx2.Response:
    """The first create that the store has no room for."""
    while (answer := client.post("/v1/sandboxes", json={"labels": {"long": "x" * 200}})).status_code == 201:
        continue
    return answer


def test_what_runs_goes_on_and_can_be_stopped_without_room_for_a_row(scene, disk):
    with scene.daemon.client() as client:
        stopped, kept = create(client)["id"], create(client)["id"]
        filling = fill(disk)
        refused = refused_create(client)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert "disk is full" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        alive = {sandbox["id"] for sandbox in client.get("/v1/sandboxes").json()["data"]}
        assert alive >= {stopped, kept}
        # No container of the one that was refused.
        until(lambda: scene.containers() == alive)

        assert state(client, kept) == ("running", None)
        assert printed(client, kept) == "42\n"
        assert client.get("/readyz").status_code == 200
        answer = client.post(f"/v1/sandboxes/{stopped}/stop")
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "stopped"
        assert stopped not in scene.containers()
        # It says so ever after, although its row cannot.
        assert state(client, stopped) == ("stopped", "user")
        assert scene.rows()[stopped] == "running"
        assert client.post(f"/v1/sandboxes/{stopped}/stop").json()["status"] == "stopped"
        assert client.post(f"/v1/sandboxes/{stopped}/exec", json={"code": "1"}).status_code == 409

        filling.unlink()
        until(lambda: scene.rows()[stopped] == "stopped")
        assert event_types(client, stopped) == ["created", "running", "stopped"]
        trail = client.get("/v1/audit", params={"resource_id": stopped}).json()["data"]
        assert sorted(entry["action"] for entry in trail) == ["sandbox.create", "sandbox.stop"]
        assert printed(client, create(client)["id"]) == "42\n"
        scene.settled()


def test_a_daemon_that_ends_without_room_ends_well(scene, disk):
    with scene.daemon.client() as client:
        kept = create(client)["id"]
        filling = fill(disk)
        refused_create(client)
        assert printed(client, kept) == "42\n"
        scene.daemon.stop(signal.SIGTERM)
        assert scene.daemon.process.returncode == 0
        filling.unlink()
        scene.daemon.start()
        assert printed(client, kept) == "42\n"
        scene.settled()
