"""A daemon whose store is PostgreSQL: the main path, and what goes on while the server is away."""

import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.conftest import Daemon, _daemon
from tests.postgres import PostgresServer

pytestmark = pytest.mark.docker


@pytest.fixture
def daemon_on_postgres(engine, own_postgres: PostgresServer) -> Iterator[Daemon]:
    url = own_postgres.tcp_url(own_postgres.new_database())
    with _daemon(engine, SANDBOXD_DATABASE_URL=url) as daemon:
        yield daemon


def run(http: httpx2.Client, sandbox_id: str, code: str) -> dict[str, Any]:
    answer = http.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def create(http: httpx2.Client) -> str:
    answer = http.post("/v1/sandboxes", json={"labels": {"a": "ä"}})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def stop(http: httpx2.Client, sandbox_id: str) -> None:
    answer = http.post(f"/v1/sandboxes/{sandbox_id}/stop", json={})
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "stopped"


def until_created(http: httpx2.Client) -> str:
    deadline = time.monotonic() + 20
    while (answer := http.post("/v1/sandboxes", json={})).status_code != 201:
        assert answer.json()["error"]["code"] == "store_unavailable", answer.text
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return str(answer.json()["id"])


def test_sandboxes_live_and_end_on_postgresql(daemon_on_postgres, own_postgres):
    with daemon_on_postgres.client() as http:
        sandbox_id = create(http)
        assert run(http, sandbox_id, "print(6*7)")["stdout"] == "42\n"
        kept = create(http)
        # The next process takes up what the rows say.
        daemon_on_postgres.stop()
        daemon_on_postgres.start()
        assert run(http, kept, "print(1)")["stdout"] == "1\n"
        for each in (sandbox_id, kept):
            stop(http, each)
        assert http.get(f"/v1/sandboxes/{kept}").json()["labels"] == {"a": "ä"}
        assert http.get("/v1/sandboxes/%00").status_code in (400, 404)
        assert "p@ss" not in daemon_on_postgres.log
        assert "p%40ss" not in daemon_on_postgres.log
    assert not (daemon_on_postgres.state_dir / "sandboxd.db").exists()


def test_execs_go_on_while_the_server_is_away_and_all_works_when_it_is_back(daemon_on_postgres, own_postgres):
    with daemon_on_postgres.client() as http:
        sandbox_id = create(http)
        own_postgres.kill()
        began = time.monotonic()
        refused = http.post("/v1/sandboxes", json={})
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "store_unavailable"
        assert refused.headers["Retry-After"] == "1"
        assert str(own_postgres.port) not in refused.text
        assert time.monotonic() - began < 5
        assert run(http, sandbox_id, "print(6*7)")["stdout"] == "42\n"
        not_ready = http.get("/readyz")
        assert (not_ready.status_code, list(not_ready.json()["reasons"])) == (503, ["database"])
        # Long enough for jobs to fail a few times.
        time.sleep(2)
        own_postgres.start()
        second = until_created(http)
        for each in (sandbox_id, second):
            assert run(http, each, "print(6*7)")["stdout"] == "42\n"
            stop(http, each)
        assert http.get("/readyz").status_code == 200


def test_a_daemon_whose_server_is_away_says_so_and_ends(daemon_on_postgres, own_postgres):
    daemon_on_postgres.stop()
    own_postgres.kill()
    with pytest.raises(AssertionError):
        daemon_on_postgres.start()
    assert daemon_on_postgres.process.wait(10) == 1
    assert "cannot start" in daemon_on_postgres.log
    own_postgres.start()
    daemon_on_postgres.start()
