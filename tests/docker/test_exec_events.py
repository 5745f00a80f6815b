"""Execs that are followed, left alone, and come back to: over the death of the daemon, by many at once."""

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytestmark = pytest.mark.docker

FOLLOWERS = 200
MAX_FOLLOWER_KIB = 64


def start(client: httpx2.Client, sandbox_id: str, **body: Any) -> str:
    """The path of an exec in the background."""
    answer = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"background": True, **body})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"], answer.json()["duration_ms"]) == ("running", None)
    return f"/v1/sandboxes/{sandbox_id}/execs/{answer.json()['id']}"


def events(stream: httpx2.Response) -> Iterator[dict[str, Any]]:
    assert stream.status_code == 200, stream.read()
    for line in stream.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def follow(client: httpx2.Client, path: str, after: int | None = None) -> list[dict[str, Any]]:
    params = {} if after is None else {"after": after}
    with client.stream("GET", f"{path}/events", params=params) as stream:
        return list(events(stream))


def wait_for(client: httpx2.Client, path: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while (found := client.get(path).json())["status"] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    result: dict[str, Any] = found
    return result


def text(told: list[dict[str, Any]]) -> str:
    return "".join(event.get("delta", "") for event in told)


def test_a_background_exec_outlives_the_daemon_and_its_followers_miss_nothing(own_daemon, capsys):
    """What users of peers miss: output that streams, and goes on after a broken connection
    (kubernetes-sigs/agent-sandbox#1603, mitos-run/mitos#100)."""
    code = "import time\nfor i in range(80):\n    print('é', i)\n    time.sleep(0.05)\n"
    with own_daemon.client() as client:
        sandbox_id = client.post("/v1/sandboxes", json={}).json()["id"]
        path = start(client, sandbox_id, code=code)
        told: list[dict[str, Any]] = []
        for _ in range(2):
            with client.stream(
                "GET",
                f"{path}/events",
                headers={"Last-Event-ID": str(told[-1]["sequence_number"])} if told else {},
            ) as stream:
                for event in events(stream):
                    told.append(event)
                    if len(told) % 15 == 14:
                        break
            own_daemon.stop(signal.SIGKILL)
            own_daemon.start()
        told += follow(client, path, told[-1]["sequence_number"])
        assert text(told) == "".join(f"é {number}\n" for number in range(80))
        assert told[-1]["exec"]["status"] == "completed"
        again = follow(client, path)
        numbers = [event["sequence_number"] for event in told]
        assert numbers == sorted(set(numbers))
        assert [event["sequence_number"] for event in again] == numbers
        assert [event.get("delta") for event in again] == [event.get("delta") for event in told]
        listed = client.get(f"/v1/sandboxes/{sandbox_id}/execs").json()["data"]
        assert [(item["status"], item["background"]) for item in listed] == [("completed", True)]
        assert listed[0]["title"] == code[:200]
    with capsys.disabled():
        sys.stdout.write(f"\n{len(told)} events over 2 kills of the daemon: 0 lost, 0 doubled\n")


def test_an_id_is_known_before_its_exec_starts(own_daemon):
    with own_daemon.client() as client:
        sandbox_id = client.post("/v1/sandboxes", json={}).json()["id"]
        began = threading.Thread(target=quietly(lambda: start(client, sandbox_id, command=["sleep", "600"])))
        began.start()
        time.sleep(0.02)
        own_daemon.stop(signal.SIGKILL)
        began.join()
        own_daemon.start()
        deadline = time.monotonic() + 20
        while True:
            listed = client.get(f"/v1/sandboxes/{sandbox_id}/execs?status=running").json()["data"]
            ran = client.post(
                f"/v1/sandboxes/{sandbox_id}/exec", json={"command": "pgrep -cx sleep || true"}
            ).json()["stdout"]
            # One that runs is known; one that is known runs, or is soon said to be lost.
            if len(listed) == int(ran):
                break
            assert time.monotonic() < deadline, (listed, ran)
            time.sleep(0.2)
        client.post(f"/v1/sandboxes/{sandbox_id}/stop")


def quietly(what: Any) -> Any:
    def run() -> None:
        try:
            what()
        except httpx2.TransportError:
            return  # the daemon died over it

    return run


def rss_kib(state_dir: Path) -> int:
    pid = int((state_dir / "sandboxd.pid").read_text())
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def test_followers_that_do_not_read_cost_little_and_slow_nobody(own_daemon, capsys):
    """A reader that is slow must not freeze all others (SWE-agent/SWE-ReX#301)."""
    code = (
        "import sys, time\nsys.stdin.readline()\n"
        "for i in range(60):\n    sys.stdout.write(('x' * 99 + '\\n') * 100)\n    sys.stdout.flush()\n"
        "    time.sleep(0.002)\ntime.sleep(60)\n"
    )
    with own_daemon.client() as client:
        sandbox_id = client.post("/v1/sandboxes", json={}).json()["id"]
        # What one feed takes, with all that is needed only the first time.
        take_all(client, start(client, sandbox_id, code=code, stdin="go\n"))
        path = start(client, sandbox_id, code=code, stdin_open=True)
        before = rss_kib(own_daemon.state_dir)
        idle = [open_without_reading(own_daemon, path) for _ in range(FOLLOWERS)]
        wait_until_followed(client, FOLLOWERS)
        client.post(f"{path}/stdin", json={"data": "go\n"})
        began = time.monotonic()
        take_all(client, path)
        took_s = time.monotonic() - began
        after = rss_kib(own_daemon.state_dir)
        for sock in idle:
            sock.close()
        client.post(f"/v1/sandboxes/{sandbox_id}/stop")
    each = (after - before) / FOLLOWERS
    with capsys.disabled():
        sys.stdout.write(
            f"\n{FOLLOWERS} followers that do not read: {each:.0f} KiB each;"
            f" one that reads had 600 KB in {took_s:.1f} s\n"
        )
    assert each <= MAX_FOLLOWER_KIB


def take_all(client: httpx2.Client, path: str) -> None:
    size = 0
    with client.stream("GET", f"{path}/events") as stream:
        for event in events(stream):
            size += len(event.get("delta", ""))
            if size >= 600_000:
                break
    assert size == 600_000


def open_without_reading(daemon: Any, path: str) -> socket.socket:
    sock = socket.socket()
    # So that little of it waits in the kernel, and as much as there can be in the daemon.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = daemon.base_url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    head = f"GET {path}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.api_key}\r\n\r\n"
    sock.sendall(head.encode())
    return sock


def wait_until_followed(client: httpx2.Client, count: int) -> None:
    deadline = time.monotonic() + 20
    while f"sandboxd_exec_followers {count}.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_followers_all_get_everything(client, sandbox_id):
    path = start(client, sandbox_id, code="for i in range(3000): print(i, flush=True)")
    got: list[str] = []

    def read() -> None:
        with httpx2.Client(base_url=client.base_url, headers=dict(client.headers), timeout=60) as own:
            got.append(text(follow(own, path)))

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["".join(f"{number}\n" for number in range(3000))] * 20


def test_a_plain_exec_ends_when_its_client_leaves(client, sandbox_id):
    with pytest.raises(httpx2.ReadTimeout):
        client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"command": ["sleep", "60"]}, timeout=1)
    (left,) = client.get(f"/v1/sandboxes/{sandbox_id}/execs").json()["data"]
    wait_for(client, f"/v1/sandboxes/{sandbox_id}/execs/{left['id']}", "killed")


def test_a_stream_that_broke_goes_on_where_it_stopped(client, sandbox_id):
    code = "import time\nfor i in range(20): print(i, flush=True); time.sleep(0.05)"
    told: list[dict[str, Any]] = []
    with client.stream(
        "POST",
        f"/v1/sandboxes/{sandbox_id}/exec",
        json={"code": code, "stream": True},
        headers={"Idempotency-Key": "once"},
    ) as stream:
        for event in events(stream):
            told.append(event)
            if len(told) == 5:
                break
    path = f"/v1/sandboxes/{sandbox_id}/execs/{told[0]['exec']['id']}"
    told += follow(client, path, told[-1]["sequence_number"])
    assert text(told) == "".join(f"{number}\n" for number in range(20))
    assert (told[-1]["type"], told[-1]["exec"]["stdout"]) == ("exec.completed", text(told))


def test_a_pause_is_waited_out_and_a_stop_ends_it(client):
    """A sandbox that ends says so to who follows, and later, too (e2b-dev/E2B#1381: it was "not found")."""
    sandbox_id = client.post("/v1/sandboxes", json={}).json()["id"]
    path = start(client, sandbox_id, command="for i in $(seq 1000); do echo $i; sleep 0.1; done")
    with client.stream("GET", f"{path}/events") as stream:
        found = events(stream)
        told = [next(found) for _ in range(3)]
        assert client.post(f"/v1/sandboxes/{sandbox_id}/pause").json()["status"] == "paused"
        assert client.post(f"/v1/sandboxes/{sandbox_id}/resume").json()["status"] == "running"
        told += [next(found) for _ in range(5)]
        client.post(f"/v1/sandboxes/{sandbox_id}/stop")
        told += found
    lines = text(told).splitlines()
    assert lines == [str(number + 1) for number in range(len(lines))]
    assert len(lines) >= 7
    assert (told[-1]["type"], told[-1]["exec"]["status"]) == ("exec.completed", "killed")
    assert told[-1]["exec"]["stdout"] == text(told)
    ended = client.get(f"/v1/sandboxes/{sandbox_id}").json()
    assert (ended["status"], ended["termination_reason"]) == ("stopped", "user")
    gone = client.get(f"{path}/events")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "exec_output_gone")


def test_a_revoked_key_follows_no_longer(daemon, client, sandbox_id):
    path = start(client, sandbox_id, command="while true; do echo x; sleep 0.2; done")
    made = client.post("/v1/apikeys", json={"name": "short-lived"}).json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    with client.stream("GET", f"{path}/events", headers=headers) as stream:
        found = events(stream)
        next(found)
        client.post(f"/v1/apikeys/{made['id']}/revoke")
        last = list(found)[-1]
    assert (last["type"], last["error"]["code"]) == ("error", "invalid_api_key")


def test_a_server_that_writes_for_ever_keeps_the_newest_and_costs_nothing(client, sandbox_id):
    path = start(client, sandbox_id, command="yes 0123456789abcdef | head -c 40000000; sleep 60")
    deadline = time.monotonic() + 60
    while True:
        told = []
        with client.stream("GET", f"{path}/events") as stream:
            for event in events(stream):
                told.append(event)
                if sum(len(item.get("delta", "")) + item.get("missed_bytes", 0) for item in told) == 40000000:
                    break
                if event["type"] == "error":
                    break
        if told[-1]["type"] != "error":
            break
        assert time.monotonic() < deadline
    assert sum(item.get("missed_bytes", 0) for item in told) + len(text(told)) == 40_000_000
    client.post(f"{path}/signal", json={"signal": "SIGKILL"})
    assert wait_for(client, path, "killed")["truncated"] is True


def test_a_background_exec_that_is_sent_again_runs_once(client, sandbox_id):
    body = {"command": "echo ran >> /tmp/runs; cat /tmp/runs", "background": True}
    ids = set()
    for _ in range(3):
        answer = client.post(
            f"/v1/sandboxes/{sandbox_id}/exec", json=body, headers={"Idempotency-Key": "server"}
        )
        assert answer.status_code == 200, answer.text
        ids.add(answer.json()["id"])
        wait_for(client, f"/v1/sandboxes/{sandbox_id}/execs/{answer.json()['id']}", "completed")
    assert len(ids) == 1
    assert (answer.json()["status"], answer.json()["stdout"]) == ("completed", "ran\n")
