"""The life of a sandbox on the real engine: states and reasons, deadlines, tenancy, crashes."""

import signal
import threading
import time
from typing import Any

import httpx2
import pytest

pytestmark = pytest.mark.docker


def create(client: httpx2.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def wait_for(client: httpx2.Client, sandbox_id: str, status: str, timeout_s: float = 20) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        sandbox: dict[str, Any] = client.get(f"/v1/sandboxes/{sandbox_id}").json()
        if sandbox["status"] == status:
            return sandbox
        assert time.monotonic() < deadline, sandbox
        time.sleep(0.02)


def stdout(client: httpx2.Client, sandbox_id: str, code: str) -> str:
    return str(client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code}).json()["stdout"])


def test_fields_of_a_new_sandbox(client):
    sandbox = create(client, labels={"team": "a"}, memory_size_mb=128, cpu_mhz=1250, disk_size_mb=64)
    assert sandbox["object"] == "sandbox"
    assert sandbox["id"].startswith("sbx_")
    assert (sandbox["status"], sandbox["termination_reason"]) == ("running", None)
    assert (sandbox["memory_size_mb"], sandbox["cpu_mhz"], sandbox["disk_size_mb"]) == (128, 1250, 64)
    assert sandbox["labels"] == {"team": "a"}
    assert sandbox["network"] == {"mode": "none"}
    assert sandbox["expires_at"] - sandbox["started_at"] == 300
    assert client.get(f"/v1/sandboxes/{sandbox['id']}").json()["id"] == sandbox["id"]
    limit = stdout(client, sandbox["id"], "print(open('/sys/fs/cgroup/memory/memory.limit_in_bytes').read())")
    assert int(limit) == 128 * 1024 * 1024
    client.delete(f"/v1/sandboxes/{sandbox['id']}")


def test_without_waiting_it_is_on_its_way(client):
    sandbox = create(client, wait=False)
    assert sandbox["status"] == "creating"
    wait_for(client, sandbox["id"], "running")
    client.delete(f"/v1/sandboxes/{sandbox['id']}")


def test_stopping_one_on_its_way_leaves_nothing(client, engine):
    sandbox = create(client, wait=False)
    stopped = client.post(f"/v1/sandboxes/{sandbox['id']}/stop").json()
    assert (stopped["status"], stopped["termination_reason"]) == ("stopped", "user")
    assert not engine.containers.list(all=True, filters={"name": sandbox["id"]})


def test_stop_is_idempotent_also_at_once(client):
    sandbox_id = create(client)["id"]
    answers: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post(f"/v1/sandboxes/{sandbox_id}/stop")))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 5
    assert {answer.json()["status"] for answer in answers} == {"stopped"}
    assert client.delete(f"/v1/sandboxes/{sandbox_id}").json()["termination_reason"] == "user"


def test_the_time_of_a_sandbox_runs_out(client):
    sandbox_id = create(client, timeout_s=1)["id"]
    ended = wait_for(client, sandbox_id, "stopped")
    assert ended["termination_reason"] == "timeout"
    refused = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": "1"})
    assert refused.status_code == 409
    assert "timeout" in refused.json()["error"]["message"]


def test_a_container_that_dies_is_noticed(client, engine):
    sandbox_id = create(client)["id"]
    engine.containers.get(sandbox_id).kill()
    ended = wait_for(client, sandbox_id, "failed")
    assert ended["termination_reason"] == "runtime_error"
    assert not engine.containers.list(all=True, filters={"name": sandbox_id})


@pytest.mark.parametrize("path", ["/v1/sandboxes?labels=a=b", "/v1/sandboxes?stauts=all", "/v1/apikeys?x=1"])
def test_a_parameter_nobody_reads_is_an_error(client, path):
    answer = client.get(path)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in path
    assert "Known ones: " in answer.json()["error"]["message"]


def test_listing_by_page_and_status(client):
    ids = [create(client, wait=False)["id"] for _ in range(3)]
    for sandbox_id in ids:
        wait_for(client, sandbox_id, "running")
    first = client.get("/v1/sandboxes", params={"limit": 2, "order": "asc", "after": min(ids)}).json()
    assert [item["id"] for item in first["data"]] == sorted(ids)[1:]
    assert first["has_more"] is False
    client.delete(f"/v1/sandboxes/{ids[0]}")
    alive = [item["id"] for item in client.get("/v1/sandboxes").json()["data"]]
    assert ids[0] not in alive
    assert ids[1] in alive
    dead = client.get("/v1/sandboxes", params={"status": "stopped", "limit": 100}).json()["data"]
    assert [item["termination_reason"] for item in dead if item["id"] == ids[0]] == ["user"]
    everything = client.get("/v1/sandboxes", params={"status": "all", "limit": 100}).json()["data"]
    assert set(ids) <= {item["id"] for item in everything}
    for sandbox_id in ids[1:]:
        client.delete(f"/v1/sandboxes/{sandbox_id}")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("POST", "/stop"),
        ("DELETE", ""),
        ("POST", "/exec"),
        ("GET", "/files?path=x"),
        ("PUT", "/files?path=x"),
    ],
)
def test_another_projects_sandbox_does_not_exist(daemon, client, sandbox_id, method, path):
    key = daemon.create_key("intruder", project="other")
    headers = {"Authorization": f"Bearer {key}"}
    body = {"code": "print(1)"} if path == "/exec" else None
    foreign = client.request(method, f"/v1/sandboxes/{sandbox_id}{path}", headers=headers, json=body)
    unknown_id = "sbx_" + "0" * len(sandbox_id.removeprefix("sbx_"))
    unknown = client.request(method, f"/v1/sandboxes/{unknown_id}{path}", headers=headers, json=body)
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.text.replace(sandbox_id, unknown_id) == unknown.text
    assert stdout(client, sandbox_id, "print('mine')") == "mine\n"


def test_a_revoked_key_is_out_at_once(daemon, client):
    key = daemon.create_key("short-lived")
    headers = {"Authorization": f"Bearer {key}"}
    key_id = client.get("/v1/apikeys/current", headers=headers).json()["id"]
    assert client.get("/v1/sandboxes", headers=headers).status_code == 200
    assert client.post(f"/v1/apikeys/{key_id}/revoke").status_code == 200
    assert client.get("/v1/sandboxes", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"image": "no/such:image"}, "image", "image_not_found"),
        ({"memory_size_mb": 10**9}, "memory_size_mb", "limit_out_of_range"),
        ({"memory_size_mb": 1}, "memory_size_mb", "limit_out_of_range"),
        ({"cpu_mhz": 0}, "cpu_mhz", "limit_out_of_range"),
        ({"disk_size_mb": -5}, "disk_size_mb", "limit_out_of_range"),
        ({"timeout_s": None}, "timeout_s", "limit_out_of_range"),
        ({"timeout_s": 10**9}, "timeout_s", "limit_out_of_range"),
        ({"gpu_count": 1}, "gpu_count", "limit_out_of_range"),
        ({"network": {"mode": "internet"}}, "network.mode", "invalid_request"),
        ({"labels": {"a b": "c"}}, "labels", "invalid_request"),
        ({"colour": "red"}, "colour", "invalid_request"),
        ({"memory_size_mb": "512"}, "memory_size_mb", "invalid_request"),
        ({"project": "someone-elses"}, "project", "not_found"),
    ],
)
def test_what_cannot_be_created_names_the_field(client, body, param, code):
    before = client.get("/v1/sandboxes", params={"status": "all", "limit": 1}).json()["first_id"]
    answer = client.post("/v1/sandboxes", json=body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)
    assert client.get("/v1/sandboxes", params={"status": "all", "limit": 1}).json()["first_id"] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_sandboxes_outlive_the_daemon(own_daemon, number):
    with own_daemon.client() as client:
        sandbox_id = create(client)["id"]
        assert stdout(client, sandbox_id, "open('kept', 'w').write('here'); print(1)") == "1\n"
    own_daemon.stop(number)
    own_daemon.start()
    with own_daemon.client() as client:
        assert client.get(f"/v1/sandboxes/{sandbox_id}").json()["status"] == "running"
        assert stdout(client, sandbox_id, "print(open('kept').read())") == "here\n"


def test_the_deadline_holds_over_a_restart(own_daemon):
    with own_daemon.client() as client:
        sandbox_id = create(client, timeout_s=2)["id"]
    own_daemon.stop(signal.SIGKILL)
    own_daemon.start()
    with own_daemon.client() as client:
        assert wait_for(client, sandbox_id, "stopped")["termination_reason"] == "timeout"


def test_a_crash_in_the_middle_of_a_create_is_mended(own_daemon, engine):
    with own_daemon.client() as client:
        made = [create(client, wait=False)["id"] for _ in range(4)]
    own_daemon.stop(signal.SIGKILL)
    own_daemon.start()
    with own_daemon.client() as client:
        for sandbox_id in made:
            sandbox = client.get(f"/v1/sandboxes/{sandbox_id}").json()
            # Those that already ran are kept; the half-made ones are gone, and say so.
            assert sandbox["status"] in ("running", "failed")
            there = bool(engine.containers.list(all=True, filters={"name": sandbox_id}))
            assert there == (sandbox["status"] == "running")
            if sandbox["status"] == "failed":
                assert sandbox["termination_reason"] == "lost"


def test_foreign_containers_are_never_touched(own_daemon, engine):
    canary = engine.containers.create("e80/default:latest", ["true"], name="e80-test-canary")
    try:
        own_daemon.stop(signal.SIGKILL)
        own_daemon.start()
        canary.reload()
        assert canary.status == "created"
    finally:
        canary.remove(force=True)


def test_draining_lets_running_execs_end(own_daemon):
    with own_daemon.client() as client:
        sandbox_id = create(client)["id"]
        answers: list[httpx2.Response] = []
        code = "import time; open('started', 'w').close(); time.sleep(1.5); print('done')"
        thread = threading.Thread(
            target=lambda: answers.append(
                client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code})
            )
        )
        thread.start()
        while client.get(f"/v1/sandboxes/{sandbox_id}/files", params={"path": "started"}).status_code != 200:
            continue
        own_daemon.stop(signal.SIGTERM)
        thread.join()
    assert answers[0].json()["stdout"] == "done\n"
    assert own_daemon.process.returncode == 0


def test_doctor_and_readiness(client):
    found = client.get("/v1/doctor").json()
    assert found["isolation"]["level"] in (0, 2)
    checks = {check["name"]: check for check in found["data"]}
    assert {"isolation", "engine", "runtime", "seccomp", "live_restore", "cgroup", "disk"} <= set(checks)
    assert all(check["fix"] for check in checks.values() if check["status"] != "ok")
    assert client.get("/readyz").json() == {"status": "ok"}
    text = client.get("/metrics").text
    assert "sandboxd_sandbox_creates_total" in text
    assert 'sandboxd_execs_total{status="completed"}' in text
