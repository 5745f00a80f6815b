"""An attacker and a neighbour for all attacks; an attacker that an attack has ended is replaced."""

from collections.abc import Iterator

import docker
import httpx2
import pytest

from tests.conftest import Daemon
from tests.security.arena import Arena, Box


def new_box(client: httpx2.Client, engine: docker.DockerClient, **body: object) -> Box:
    answer = client.post("/v1/sandboxes", json={"timeout_s": 1800, **body})
    assert answer.status_code == 201, answer.text
    return Box(client, engine, answer.json()["id"])


@pytest.fixture(scope="session")
def boxes(daemon: Daemon, engine: docker.DockerClient) -> Iterator[dict[str, Box]]:
    limits = httpx2.Limits(max_connections=200)
    headers = {"Authorization": f"Bearer {daemon.api_key}"}
    with httpx2.Client(base_url=daemon.base_url, headers=headers, timeout=120, limits=limits) as client:
        made = {name: new_box(client, engine) for name in ("attacker", "neighbour")}
        yield made
        for box in made.values():
            client.post(f"/v1/sandboxes/{box.id}/stop")


@pytest.fixture
def arena(boxes: dict[str, Box]) -> Arena:
    for name, box in boxes.items():
        if box.status() != "running":
            boxes[name] = new_box(box.client, box.engine)
    return Arena(boxes["attacker"].client, boxes["attacker"], boxes["neighbour"])


@pytest.fixture
def attacker(arena: Arena) -> Box:
    return arena.attacker


@pytest.fixture
def neighbour(arena: Arena) -> Box:
    return arena.neighbour
