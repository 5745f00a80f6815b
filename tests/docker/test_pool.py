"""The warm pool on the real engine: claims are quick, whole and never shared; what dies is replaced."""

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import docker
import httpx2
import pytest

from tests.conftest import Daemon

pytestmark = pytest.mark.docker
WAIT_S = 30


@pytest.fixture
def pooled(own_daemon: Daemon) -> Iterator[Daemon]:
    own_daemon.stop()
    own_daemon.env.update(SANDBOXD_POOL_SIZE="3", SANDBOXD_POOL_MAX="4", SANDBOXD_WARM_LIBRARIES="false")
    own_daemon.start()
    wait_for_ready(own_daemon, 3)
    yield own_daemon
    # Members are not in any list: the fixture's clean-up would not find them.
    own_daemon.stop()
    own_daemon.env.update(SANDBOXD_POOL_SIZE="0", SANDBOXD_POOL_MAX="1")
    own_daemon.start()
    wait_for_ready(own_daemon, 0)


def metric(daemon: Daemon, name: str) -> float:
    text = httpx2.get(f"{daemon.base_url}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def wait_for_ready(daemon: Daemon, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(members(daemon)) != count or metric(daemon, "sandboxd_pool_ready ") != count:
        assert time.monotonic() < deadline, daemon.log[-3000:]
        time.sleep(0.05)


def members(daemon: Daemon) -> list[str]:
    """Containers that no project has."""
    owner = (daemon.state_dir / "installation").read_text().strip()
    labels = [f"sandboxd.owner={owner}", "sandboxd.project=pool"]
    client = docker.from_env()
    try:
        found = {item.name for item in client.containers.list(filters={"label": labels})}
    finally:
        client.close()
    with daemon.client() as http:
        return sorted(found - {item["id"] for item in http.get("/v1/sandboxes?limit=100").json()["data"]})


def execute(http: httpx2.Client, sandbox_id: str, code: str) -> dict[str, Any]:
    answer = http.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_a_claimed_sandbox_is_one_of_the_waiting_and_has_all_that_was_asked_for(pooled):
    waiting = members(pooled)
    with pooled.client() as http:
        made = http.post(
            "/v1/sandboxes", json={"env": {"STAGE": "x"}, "labels": {"a": "b"}, "timeout_s": 2}
        ).json()
        assert made["id"] in waiting
        assert (made["labels"], made["env"]) == ({"a": "b"}, ["STAGE"])
        said = execute(http, made["id"], "import os; print(os.environ['STAGE'], os.listdir('/home/user'))")
        assert said["stdout"] == "x []\n"
        deadline = time.monotonic() + 10
        while (now := http.get(f"/v1/sandboxes/{made['id']}").json())["status"] != "stopped":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert now["termination_reason"] == "timeout"
        assert now["stopped_at"] - now["created_at"] in (2, 3)
    wait_for_ready(pooled, 3)


def test_many_at_once_get_one_each(pooled):
    made: list[dict[str, Any]] = []
    with pooled.client() as http:
        threads = [
            threading.Thread(target=lambda: made.append(http.post("/v1/sandboxes", json={}).json()))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({item["id"] for item in made}) == 8
        # Each one is a computer of its own.
        for number, item in enumerate(made):
            execute(http, item["id"], f"open('mine', 'w').write('{number}')")
        for number, item in enumerate(made):
            assert execute(http, item["id"], "print(open('mine').read())")["stdout"] == f"{number}\n"
        assert metric(pooled, 'sandboxd_pool_claims_total{result="hit"}') >= 3
        for item in made:
            http.post(f"/v1/sandboxes/{item['id']}/stop")


def test_what_dies_in_the_pool_is_replaced(pooled, engine):
    killed = members(pooled)[0]
    engine.containers.get(killed).kill()
    deadline = time.monotonic() + WAIT_S
    while killed in members(pooled) or len(members(pooled)) < 3:
        assert time.monotonic() < deadline, pooled.log[-3000:]
        time.sleep(0.05)
    with pooled.client() as http:
        made = http.post("/v1/sandboxes", json={}).json()
        assert made["id"] != killed
        assert execute(http, made["id"], "print(6*7)")["stdout"] == "42\n"


def test_the_pool_outlives_the_daemon(pooled):
    waiting = members(pooled)
    pooled.stop(signal.SIGKILL)
    pooled.start()
    wait_for_ready(pooled, 3)
    assert members(pooled) == waiting
    with pooled.client() as http:
        made = http.post("/v1/sandboxes", json={}).json()
        assert made["id"] in waiting
        assert execute(http, made["id"], "print(6*7)")["stdout"] == "42\n"
