"""The default image as the engine has it."""

import docker
import pytest

from tests.scripts.shell import ENGINE_URL, bash

pytestmark = pytest.mark.docker
NAME = "e80/default"


def test_image_is_the_one_of_this_recipe(engine: docker.DockerClient) -> None:
    content_hash = bash("image_hash").stdout.strip()
    image = engine.images.get(f"{NAME}:{content_hash[:12]}")
    assert image.id == engine.images.get(f"{NAME}:latest").id
    assert image.labels["e80.content-hash"] == content_hash
    assert image.attrs["Config"]["WorkingDir"] == "/home/user"
    assert "HOME=/home/user" in image.attrs["Config"]["Env"]


def test_image_is_not_too_large(engine: docker.DockerClient) -> None:
    assert engine.images.get(f"{NAME}:latest").attrs["Size"] < 1.2e9


def test_smoke_test_passes_inside(engine: docker.DockerClient) -> None:
    done = bash(f"smoke_test {NAME}:latest", SANDBOXD_DOCKER_URL=ENGINE_URL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" ok: ") == 9


def test_smoke_test_sees_a_bad_image(engine: docker.DockerClient) -> None:
    """The same check on an image with a setuid file and pip's fence."""
    bad = engine.containers.create(
        f"{NAME}:latest",
        ["sh", "-c", "touch /usr/lib/python3.11/EXTERNALLY-MANAGED && chmod u+s /usr/bin/jq"],
        user="0",
        network_mode="none",
        log_config={"type": "none"},
    )
    try:
        bad.start()
        assert bad.wait(timeout=60)["StatusCode"] == 0
        image = bad.commit("e80/bad", "test")
        done = bash("smoke_test e80/bad:test", SANDBOXD_DOCKER_URL=ENGINE_URL)
        assert done.returncode == 1
        assert "setuid or setgid: /usr/bin/jq" in done.stderr
        engine.images.remove(image.id, force=True)
    finally:
        bad.remove(force=True)
