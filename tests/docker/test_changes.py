"""What can be done to a sandbox while it lives, on the real engine: limits, time, pause; and its record."""

import json
import threading
import time

import httpx2
import pytest

from tests.docker.test_lifecycle import create, stdout, wait_for

pytestmark = pytest.mark.docker
LIMIT = "print(open('/sys/fs/cgroup/memory/memory.limit_in_bytes').read())"


def test_limits_can_be_changed_while_it_runs(client):
    sandbox = create(client, memory_size_mb=256)
    path = f"/v1/sandboxes/{sandbox['id']}"
    changed = client.patch(path, json={"memory_size_mb": 400, "cpu_mhz": 1250, "timeout_s": 1000}).json()
    assert (changed["memory_size_mb"], changed["cpu_mhz"], changed["timeout_s"]) == (400, 1250, 1000)
    assert changed["expires_at"] - time.time() == pytest.approx(1000, abs=5)
    assert int(stdout(client, sandbox["id"], LIMIT)) == 400 * 1024 * 1024
    hog = "import os, time; x = os.urandom(1) * (150 << 20); time.sleep(4)"
    running = threading.Thread(target=lambda: client.post(f"{path}/exec", json={"code": hog}))
    running.start()
    time.sleep(1.5)
    refused = client.patch(path, json={"memory_size_mb": 64, "labels": {"never": "set"}})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "limit_below_use")
    assert client.get(path).json()["labels"] == {}
    assert int(stdout(client, sandbox["id"], LIMIT)) == 400 * 1024 * 1024
    running.join()
    client.delete(path)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"labels": None}, "labels"),
        ({"cpu_mhz": None}, "cpu_mhz"),
        ({"memory_size_mb": 1}, "memory_size_mb"),
        ({"timeout_s": None}, "timeout_s"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"image": "x"}, "image"),
        ({"network": {"mode": "internet"}}, "network.mode"),
    ],
)
def test_a_wrong_patch_names_its_fault(client, sandbox_id, body, param):
    answer = client.patch(f"/v1/sandboxes/{sandbox_id}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_pause_keeps_memory_and_time_and_a_running_exec(client):
    sandbox = create(client, timeout_s=60)
    path = f"/v1/sandboxes/{sandbox['id']}"
    code = "import time\nfor i in range(30): print(i, flush=True); time.sleep(0.1)"
    key = {"Idempotency-Key": "the run"}
    first: list[httpx2.Response] = []
    running = threading.Thread(
        target=lambda: first.append(
            client.post(f"{path}/exec", json={"code": code, "timeout_s": 5}, headers=key)
        )
    )
    running.start()
    time.sleep(0.5)
    paused = client.post(f"{path}/pause").json()
    assert (paused["status"], paused["expires_at"]) == ("paused", None)
    running.join()
    assert first[0].json()["error"]["code"] == "sandbox_paused"
    refused = client.post(f"{path}/exec", json={"code": "1"})
    assert (refused.status_code, "paused" in refused.json()["error"]["message"]) == (409, True)
    assert client.get("/v1/sandboxes?status=paused").json()["data"][0]["id"] == sandbox["id"]
    time.sleep(5)  # longer than the exec has; its time stands still
    resumed = client.post(f"{path}/resume").json()
    assert resumed["status"] == "running"
    assert resumed["expires_at"] - time.time() == pytest.approx(59, abs=4)
    again = client.post(f"{path}/exec", json={"code": code, "timeout_s": 5}, headers=key).json()
    assert (again["status"], again["stdout"]) == ("completed", "".join(f"{i}\n" for i in range(30)))
    assert client.post(f"{path}/resume").json()["status"] == "running"
    client.post(f"{path}/pause")
    assert client.post(f"{path}/stop").json()["status"] == "stopped"


def test_a_sandbox_that_nobody_uses_is_stopped(client):
    idle, used = create(client, idle_timeout_s=2), create(client, idle_timeout_s=2)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        stdout(client, used["id"], "print(1)")
        time.sleep(0.2)
    ended = wait_for(client, idle["id"], "stopped")
    assert ended["termination_reason"] == "idle_timeout"
    assert client.get(f"/v1/sandboxes/{used['id']}").json()["status"] == "running"
    # A long run is use, however quiet it is.
    assert stdout(client, used["id"], "import time; time.sleep(4); print('done')") == "done\n"
    client.delete(f"/v1/sandboxes/{used['id']}")


def test_a_create_with_a_key_is_one_sandbox(client):
    key = {"Idempotency-Key": "create once"}
    answers = [client.post("/v1/sandboxes", json={"labels": {"k": "1"}}, headers=key) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = client.post("/v1/sandboxes", json={"labels": {"k": "2"}}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    client.delete(f"/v1/sandboxes/{answers[0].json()['id']}")


def test_lists_filter_by_label(client):
    made = [create(client, labels={"job": "filter", "n": str(n)}) for n in range(2)]
    found = client.get("/v1/sandboxes", params={"label": ["job=filter", "n=1"]}).json()["data"]
    assert [item["id"] for item in found] == [made[1]["id"]]
    bad = client.get("/v1/sandboxes", params={"label": "job"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "label")
    for item in made:
        client.delete(f"/v1/sandboxes/{item['id']}")


def test_events_can_be_followed_and_tell_a_whole_life(client):
    seen: list[dict] = []
    ready, done = threading.Event(), threading.Event()

    def follow() -> None:
        with client.stream("GET", "/v1/events?follow=true") as stream:
            ready.set()
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line[6:]))
                    if [item["event"]["sandbox_id"] for item in seen].count(wanted.get("id")) == 5:
                        done.set()
                        return

    wanted: dict[str, str] = {}
    follower = threading.Thread(target=follow)
    follower.start()
    assert ready.wait(10)
    wanted["id"] = create(client)["id"]
    path = f"/v1/sandboxes/{wanted['id']}"
    for verb in ("pause", "resume", "stop"):
        client.post(f"{path}/{verb}")
    assert done.wait(10)
    follower.join()
    told = [item["event"]["type"] for item in seen if item["event"]["sandbox_id"] == wanted["id"]]
    assert told == [f"sandbox.{step}" for step in ("created", "running", "paused", "resumed", "stopped")]
    assert [item["sequence_number"] for item in seen] == list(range(len(seen)))
    listed = client.get(f"{path}/events", params={"order": "asc"}).json()["data"]
    assert [item["type"] for item in listed] == told
    # Who saw the second can ask for the rest.
    rest = client.get(f"{path}/events", params={"order": "asc", "after": listed[1]["id"]}).json()["data"]
    assert [item["type"] for item in rest] == told[2:]


def test_use_is_accounted_for(own_daemon):
    with own_daemon.client() as http:
        sandbox = create(http)
        burn = "import time\nwhile time.process_time() < 1: pass\nprint('x' * 1000)"
        assert http.post(f"/v1/sandboxes/{sandbox['id']}/exec", json={"code": burn}).status_code == 200
        http.put(f"/v1/sandboxes/{sandbox['id']}/files?path=f", content=b"y" * 5000)
        live = http.get("/v1/usage").json()["total"]
        assert live["sandboxes"] == 1
        assert live["execs"] == 1
        assert 1 <= live["sandbox_seconds"] < 60
        assert 1 <= live["cpu_seconds"] < 20
        assert 5000 <= live["bytes_in"] < 7000
        assert 1001 <= live["bytes_out"] < 2000
        http.post(f"/v1/sandboxes/{sandbox['id']}/stop")
        ended = http.get("/v1/usage", params={"bucket": "hour"}).json()
        assert ended["total"]["sandbox_seconds"] >= live["sandbox_seconds"]
        assert ended["data"][0]["start"] % 3600 == 0
        again = http.get("/v1/usage").json()["total"]
        assert again == ended["total"]


def test_a_quota_is_a_429_that_says_when_to_come_back(own_daemon):
    own_daemon.stop()
    own_daemon.env["SANDBOXD_QUOTA_SANDBOXES"] = "1"
    own_daemon.start()
    with own_daemon.client() as http:
        create(http)
        refused = http.post("/v1/sandboxes", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["x-ratelimit-remaining-sandboxes"] == "0"


def test_a_stream_of_events_ends_with_its_key(daemon, client):
    other = httpx2.Client(
        base_url=daemon.base_url,
        headers={"Authorization": f"Bearer {daemon.create_key('short')}"},
        timeout=60,
    )
    told: list[dict] = []
    ready = threading.Event()

    def follow() -> None:
        with other.stream("GET", "/v1/events?follow=true") as stream:
            ready.set()
            told.extend(json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))

    follower = threading.Thread(target=follow)
    follower.start()
    assert ready.wait(10)
    key_id = other.get("/v1/apikeys/current").json()["id"]
    assert client.post(f"/v1/apikeys/{key_id}/revoke").status_code == 200
    sandbox_id = create(client)["id"]
    follower.join(20)
    assert not follower.is_alive()
    other.close()
    assert [event["type"] for event in told] == ["error"]
    assert told[0]["error"]["code"] == "invalid_api_key"
    client.delete(f"/v1/sandboxes/{sandbox_id}")
