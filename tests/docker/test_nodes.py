"""Two daemons on one store: either takes requests for all sandboxes, and neither touches the other's."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.conftest import Daemon, _daemon

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def pair(engine, request, tmp_path_factory) -> Iterator[tuple[Daemon, Daemon]]:
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('store')}/shared.db"
    else:
        server = request.getfixturevalue("postgres")
        url = server.tcp_url(server.new_database())
    with _daemon(engine, SANDBOXD_DATABASE_URL=url) as first:
        restart(first, SANDBOXD_NODE_URL=first.base_url)
        with _daemon(engine, SANDBOXD_DATABASE_URL=url) as second:
            restart(second, SANDBOXD_NODE_URL=second.base_url)
            wait_for_each_other(first, second)
            yield first, second


@pytest.fixture(autouse=True)
def stop_all(pair) -> Iterator[None]:
    yield
    with pair[0].client() as http:
        for item in http.get("/v1/sandboxes?limit=100").json()["data"]:
            assert http.post(f"/v1/sandboxes/{item['id']}/stop").status_code == 200


def restart(daemon: Daemon, **settings: str) -> None:
    daemon.stop()
    daemon.start(**settings)


def wait_for_each_other(first: Daemon, second: Daemon) -> None:
    """Until each sees what the other holds: they look for one another every few seconds."""
    for here, there in ((first, second), (second, first)):
        with there.client() as http:
            made = http.post("/v1/sandboxes", json={}).json()
        deadline = time.monotonic() + 20
        with here.client() as http:
            http.headers["Authorization"] = f"Bearer {there.api_key}"
            path = f"/v1/sandboxes/{made['id']}"
            while http.post(f"{path}/exec", json={"code": "1"}).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert http.post(f"{path}/stop").json()["status"] == "stopped"


def execute(http: httpx2.Client, sandbox_id: str, **body: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/sandboxes/{sandbox_id}/exec", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_either_daemon_serves_every_sandbox(pair):
    first, second = pair
    with first.client() as one, second.client() as two:
        two.headers["Authorization"] = one.headers["Authorization"]
        sandbox = one.post("/v1/sandboxes", json={}).json()
        path = f"/v1/sandboxes/{sandbox['id']}"
        assert two.get(path).json()["status"] == "running"
        assert execute(two, sandbox["id"], code="print(6*7)")["stdout"] == "42\n"
        data = bytes(range(256)) * 4096
        assert two.put(f"{path}/files?path=a b.bin", content=data).status_code == 201
        assert one.get(f"{path}/files?path=a b.bin").content == data
        assert two.get(f"{path}/files?path=a b.bin").content == data
        with two.stream("POST", f"{path}/exec", json={"code": "print('x')", "stream": True}) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert [event["type"] for event in events][-1] == "exec.completed"
        missing = two.get(f"{path}/files?path=nowhere")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "file_not_found")
        assert two.patch(path, json={"labels": {"by": "two"}}).json()["labels"] == {"by": "two"}
        assert two.post(f"{path}/pause").json()["status"] == "paused"
        assert two.post(f"{path}/resume").json()["status"] == "running"
        assert two.post(f"{path}/stop").json()["status"] == "stopped"
        assert one.get(path).json()["termination_reason"] == "user"


def test_files_of_every_kind_go_through_either_daemon(pair):
    first, second = pair
    with first.client() as one, second.client() as two, httpx2.Client(timeout=60) as anybody:
        two.headers["Authorization"] = one.headers["Authorization"]
        path = f"/v1/sandboxes/{one.post('/v1/sandboxes', json={}).json()['id']}"
        # Bytes that are no text, on their way from query to query.
        name = "d%2F%FF%20%2B%26%25"
        assert two.put(f"{path}/files?path={name}", content=b"0123456789").status_code == 201
        part = two.get(f"{path}/files?path={name}", headers={"Range": "bytes=2-3"})
        assert (part.status_code, part.content) == (206, b"23")
        [entry] = two.get(f"{path}/files/list?path=d").json()["data"]
        assert entry["path_base64"] == one.get(f"{path}/files/list?path=d").json()["data"][0]["path_base64"]
        packed = two.get(f"{path}/files/archive?path=d&compression=gzip").content
        unpacked = two.put(f"{path}/files/archive?path=e", content=packed)
        assert (unpacked.status_code, unpacked.json()["entries"]) == (200, 1)
        assert two.put(f"{path}/files/archive?path=e", content=packed[:-9]).status_code == 400
        # What one has signed the other checks, and each URL names the host that was used.
        for http, daemon in ((one, first), (two, second)):
            body = {"path_base64": entry["path_base64"], "method": "download"}
            url = http.post(f"{path}/files/urls", json=body).json()["url"]
            assert url.startswith(daemon.base_url)
            for there in pair:
                got = anybody.get(url.replace(daemon.base_url, there.base_url))
                assert (got.status_code, got.content) == (200, b"0123456789")
            assert anybody.get(url + "0").status_code == 401
        with two.stream("GET", f"{path}/files/watch?path=d") as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            assert json.loads(next(lines)[6:])["type"] == "watch.started"
            assert one.post(f"{path}/files/mkdir", json={"path": "d/new"}).status_code == 201
            assert json.loads(next(lines)[6:])["path"] == "/home/user/d/new"
        one.post(f"{path}/stop")


def test_a_client_cannot_reach_around_the_door_between_the_daemons(pair):
    first, second = pair
    with first.client() as one, second.client() as two:
        two.headers["Authorization"] = one.headers["Authorization"]
        sandbox_id = one.post("/v1/sandboxes", json={}).json()["id"]
        path = f"/v1/sandboxes/{sandbox_id}"
        # Said to be handed on already: the daemon that does not hold it must not answer for it.
        forged = {"X-Sandboxd-Forwarded": "1"}
        for method, what in (("POST", "stop"), ("POST", "pause"), ("POST", "exec"), ("DELETE", "")):
            body = {"code": "1"} if what == "exec" else None
            answer = two.request(method, f"{path}/{what}".rstrip("/"), json=body, headers=forged)
            assert answer.status_code == 503, answer.text
        assert execute(one, sandbox_id, code="print(1)")["stdout"] == "1\n"
        # Dots would be resolved on the way: this must not become the other daemon's own page.
        host, port = second.base_url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            head = f"GET {path}/../../../metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            raw.sendall(f"{head}Authorization: {one.headers['Authorization']}\r\n\r\n".encode())
            assert raw.makefile("rb").readline().split()[1] == b"404"
        # What the client says of its address does not pass for what the first daemon saw.
        two.patch(path, json={"labels": {}}, headers={"X-Forwarded-For": "6.6.6.6"})
        assert one.get("/v1/audit", params={"limit": 1}).json()["data"][0]["client"] == "127.0.0.1"


def test_a_client_that_leaves_is_passed_on(pair):
    first, second = pair
    with first.client() as one, second.client() as two:
        two.headers["Authorization"] = one.headers["Authorization"]
        sandbox_id = one.post("/v1/sandboxes", json={}).json()["id"]
        code = "import time\nfor i in range(600): print(i, flush=True); time.sleep(0.1)"
        with two.stream(
            "POST", f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code, "stream": True, "timeout_s": 90}
        ) as stream:
            next(stream.iter_lines())
        deadline = time.monotonic() + 10
        while not (ran := one.get(f"/v1/sandboxes/{sandbox_id}/execs").json()["data"]) or (
            ran[0]["status"] == "running"
        ):
            assert time.monotonic() < deadline, ran
            time.sleep(0.1)
        assert ran[0]["status"] == "killed"
        one.post(f"/v1/sandboxes/{sandbox_id}/stop")


def test_a_client_that_does_not_wait_for_a_plain_exec_is_passed_on(pair):
    first, second = pair
    with first.client() as one, second.client() as two:
        two.headers["Authorization"] = one.headers["Authorization"]
        sandbox_id = one.post("/v1/sandboxes", json={}).json()["id"]
        path = f"/v1/sandboxes/{sandbox_id}"
        with pytest.raises(httpx2.ReadTimeout):
            two.post(f"{path}/exec", json={"command": ["sleep", "60"]}, timeout=1)
        deadline = time.monotonic() + 10
        while one.get(f"{path}/execs").json()["data"][0]["status"] != "killed":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        one.post(f"{path}/stop")


def test_execs_are_followed_and_written_to_through_the_other_daemon(pair):
    first, second = pair
    with first.client() as one, second.client() as two:
        two.headers["Authorization"] = one.headers["Authorization"]
        path = f"/v1/sandboxes/{one.post('/v1/sandboxes', json={}).json()['id']}"
        begun = two.post(f"{path}/exec", json={"command": "cat", "background": True, "stdin_open": True})
        exec_path = f"{path}/execs/{begun.json()['id']}"
        assert two.get(f"{path}/execs?status=running").json()["data"][0]["title"] == "cat"
        assert two.post(f"{exec_path}/stdin", json={"data": "over there\n"}).json()["size"] == 11
        with two.stream("GET", f"{exec_path}/events") as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            told = [json.loads(next(lines)[6:]) for _ in range(2)]
            assert told[1]["delta"] == "over there\n"
            assert two.post(f"{exec_path}/signal", json={"signal": "KILL"}).json()["delivered"] is True
            last = json.loads(list(lines)[-1][6:])
        assert (last["type"], last["exec"]["status"]) == ("exec.completed", "killed")
        after = two.get(f"{exec_path}/events", params={"after": told[1]["sequence_number"]})
        assert after.text.count("data: ") == 1
        one.post(f"{path}/stop")


def test_creates_at_both_are_all_different_and_share_one_quota(pair):
    first = pair[0]
    made: list[httpx2.Response] = []

    def create(daemon: Daemon) -> None:
        with daemon.client() as http:
            http.headers["Authorization"] = f"Bearer {first.api_key}"
            made.append(http.post("/v1/sandboxes", json={}))

    for daemon in pair:
        restart(daemon, SANDBOXD_QUOTA_SANDBOXES="5")
    threads = [threading.Thread(target=create, args=(pair[number % 2],)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in made) == [201] * 5 + [429] * 7
    assert len({answer.json()["id"] for answer in made if answer.status_code == 201}) == 5
    for daemon in pair:
        restart(daemon, SANDBOXD_QUOTA_SANDBOXES="0")


def test_a_key_that_is_sent_to_both_makes_one_sandbox(pair):
    answers: list[httpx2.Response] = []

    def create(daemon: Daemon) -> None:
        with daemon.client() as http:
            http.headers["Authorization"] = f"Bearer {pair[0].api_key}"
            answers.append(http.post("/v1/sandboxes", json={}, headers={"Idempotency-Key": "both"}))

    threads = [threading.Thread(target=create, args=(pair[number % 2],)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert {answer.json()["status"] for answer in answers} == {"running"}


def test_a_daemon_that_is_away_is_said_to_be_and_its_sandboxes_are_left_alone(pair):
    first, second = pair
    with first.client() as one, second.client() as two:
        two.headers["Authorization"] = one.headers["Authorization"]
        sandbox_id = one.post("/v1/sandboxes", json={}).json()["id"]
        first.stop(signal.SIGKILL)
        away = two.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": "1"})
        assert (away.status_code, away.json()["error"]["code"]) == (503, "node_unavailable")
        assert away.headers["retry-after"]
        assert two.get(f"/v1/sandboxes/{sandbox_id}").json()["status"] == "running"
        mine = two.post("/v1/sandboxes", json={}).json()["id"]
        assert execute(two, mine, code="print(1)")["stdout"] == "1\n"
        first.start()
        assert execute(one, sandbox_id, code="print(2)")["stdout"] == "2\n"
        assert execute(two, sandbox_id, code="print(3)")["stdout"] == "3\n"
        assert execute(one, mine, code="print(4)")["stdout"] == "4\n"
