"""Execs and a daemon that dies: nothing runs twice, nothing that ran is lost, nobody waits in vain."""

import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx2
import pytest

pytestmark = pytest.mark.docker

TICKS = 30
TICK_S = 0.2
ROUNDS = 3
KILLS_A_ROUND = 2
NAMES = ["keyed", "keyed-stream", "late-keyed", "plain", "plain-stream"]


def ticking(name: str) -> str:
    """Code that leaves a line in a file when it begins, and prints its name and the time for 6 s."""
    return (
        "import time\n"
        f"open('runs-{name}', 'a').write('began\\n')\n"
        f"for number in range({TICKS}):\n"
        f"    print('{name}', number)\n"
        f"    time.sleep({TICK_S})\n"
    )


def whole(name: str) -> str:
    return "".join(f"{name} {number}\n" for number in range(TICKS))


class Call(threading.Thread):
    """One exec request in a thread of its own. `answer` stays None when the daemon died over it."""

    def __init__(
        self,
        base: httpx2.Client,
        sandbox_id: str,
        name: str,
        key: str | None,
        stream: bool | None = None,
        timeout_s: float = 60,
    ) -> None:
        super().__init__()
        self.client = httpx2.Client(base_url=base.base_url, headers=dict(base.headers), timeout=60)
        self.url = f"/v1/sandboxes/{sandbox_id}/exec"
        self.key = key
        streamed = "stream" in name if stream is None else stream
        self.body: dict[str, Any] = {"code": ticking(name), "stream": streamed, "timeout_s": timeout_s}
        self.answer: httpx2.Response | None = None
        self.start()

    def run(self) -> None:
        headers = {} if self.key is None else {"Idempotency-Key": self.key}
        with self.client:
            try:
                self.answer = self.client.post(self.url, json=self.body, headers=headers)
            except httpx2.TransportError:
                return  # the daemon died over it


def result_of(answer: httpx2.Response) -> dict[str, Any]:
    """The result in a plain answer or at the end of a stream, whose pieces must make up the same."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        plain: dict[str, Any] = answer.json()
        return plain
    told = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: ")
    ]
    assert [event["type"] for event in (told[0], told[-1])] == ["exec.started", "exec.completed"], told[-1]
    result: dict[str, Any] = told[-1]["exec"]
    assert "".join(event.get("delta", "") for event in told) == result["stdout"]
    return result


def create(client: httpx2.Client, **body: Any) -> str:
    answer = client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def run(client: httpx2.Client, sandbox_id: str, key: str | None = None, **body: Any) -> httpx2.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post(f"/v1/sandboxes/{sandbox_id}/exec", json=body, headers=headers)


def history(client: httpx2.Client, sandbox_id: str) -> list[dict[str, Any]]:
    listed = client.get(f"/v1/sandboxes/{sandbox_id}/execs", params={"limit": 100}).json()
    items: list[dict[str, Any]] = listed["data"]
    return items


def began(client: httpx2.Client, sandbox_id: str, name: str) -> int:
    answer = client.get(f"/v1/sandboxes/{sandbox_id}/files", params={"path": f"runs-{name}"})
    return answer.text.count("began") if answer.status_code == 200 else 0


def wait_until(what: Any, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_execs_outlive_a_daemon_that_is_killed(own_daemon, capsys):
    """Kills the daemon at random moments of five execs at once. Those with a key are asked for again, the
    others found in the history."""
    chance = random.Random(time.time_ns())
    tally: Counter[str] = Counter(injected=0, survived=0, lost=0, twice=0, unbegun=0)
    moments = []
    for _ in range(ROUNDS):
        with own_daemon.client() as client:
            sandbox_id = create(client)
            calls = {
                name: Call(client, sandbox_id, name, f"key of {name}" if "key" in name else None)
                for name in NAMES
            }
        tally["injected"] += len(calls)
        for _ in range(KILLS_A_ROUND):
            moments.append(round(chance.uniform(0.02, 1.5), 2))
            time.sleep(moments[-1])
            own_daemon.stop(signal.SIGKILL)
            own_daemon.start()
            with own_daemon.client() as client:
                for name in ("keyed", "keyed-stream"):
                    # Back at once, to be cut off again by the next kill.
                    calls[name] = Call(client, sandbox_id, name, f"key of {name}")
        with own_daemon.client() as client:
            settle(client, sandbox_id, calls, tally)
    with capsys.disabled():
        sys.stdout.write(f"\nexec recovery: killed after {moments} s: {dict(tally)}\n")
    assert len(moments) >= 6
    assert (tally["lost"], tally["twice"]) == (0, 0)
    assert tally["survived"] + tally["unbegun"] == tally["injected"]


def settle(client: httpx2.Client, sandbox_id: str, calls: dict[str, Call], tally: Counter[str]) -> None:
    """Counts what became of each exec: the answer to the repeated request, or what the history has."""
    for call in calls.values():
        call.join()
    results = {
        name: result_of(run(client, sandbox_id, call.key, **call.body))
        for name, call in calls.items()
        if call.key is not None
    }
    wait_until(lambda: all(item["status"] != "running" for item in history(client, sandbox_id)))
    listed = {item["id"]: item["status"] for item in history(client, sandbox_id)}
    for exec_id in listed:
        result = client.get(f"/v1/sandboxes/{sandbox_id}/execs/{exec_id}").json()
        results.setdefault((result["stdout"] or "").partition(" ")[0], result)
    for name in NAMES:
        times = began(client, sandbox_id, name)
        if not times:
            # The daemon died before the request got anywhere, and nobody asked again.
            tally["unbegun"] += 1
            continue
        tally["twice"] += times - 1
        result = results.get(name, {})
        good = (result.get("status"), result.get("stdout")) == ("completed", whole(name))
        tally["survived" if good and listed.get(result["id"]) == "completed" else "lost"] += 1


def test_requests_with_one_key_at_once_follow_one_exec(client, sandbox_id):
    calls = [Call(client, sandbox_id, "keyed", "one key", stream) for stream in (False, True, False, True)]
    for call in calls:
        call.join()
    results = [result_of(call.answer) for call in calls if call.answer is not None]
    assert [result["stdout"] for result in results] == [whole("keyed")] * 4
    assert len({result["id"] for result in results}) == 1
    assert began(client, sandbox_id, "keyed") == 1


def test_a_key_stands_for_one_body_in_one_sandbox(client, sandbox_id):
    other = create(client)
    first = run(client, sandbox_id, "key", code="print(1)")
    again = run(client, sandbox_id, "key", code="print(1)")
    assert first.json() | {"started_at": 0} == again.json() | {"started_at": 0}
    assert abs(first.json()["started_at"] - again.json()["started_at"]) < 0.1
    differs = run(client, sandbox_id, "key", code="print(2)")
    assert (differs.status_code, differs.json()["error"]["code"]) == (409, "idempotency_conflict")
    elsewhere = run(client, other, "key", code="print(2)")
    assert elsewhere.json()["stdout"] == "2\n"
    assert [item["id"] for item in history(client, sandbox_id)] == [first.json()["id"]]
    client.post(f"/v1/sandboxes/{other}/stop")


def test_a_result_that_is_no_longer_kept_is_not_made_again(client, sandbox_id):
    first = run(client, sandbox_id, "old", code="open('ran', 'a').write('x')")
    assert first.json()["status"] == "completed"
    for _ in range(70):
        run(client, sandbox_id, command=["true"])
    again = run(client, sandbox_id, "old", code="open('ran', 'a').write('x')")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "exec_result_gone")
    assert "completed" in again.json()["error"]["message"]
    assert run(client, sandbox_id, code="print(open('ran').read())").json()["stdout"] == "x\n"
    kept = client.get(f"/v1/sandboxes/{sandbox_id}/execs/{first.json()['id']}").json()
    assert (kept["status"], kept["output_kept"], kept["stdout"]) == ("completed", False, None)


def test_what_could_not_be_started_may_be_tried_again_with_its_key(client, sandbox_id):
    refused = run(client, sandbox_id, "key", code="print(1)", cwd="later")
    assert refused.json()["error"]["code"] == "cwd_not_found"
    run(client, sandbox_id, command="mkdir later")
    assert run(client, sandbox_id, "key", code="print(1)", cwd="later").json()["stdout"] == "1\n"


def test_the_history_tells_of_what_runs_and_of_what_ran(client):
    sandbox_id = create(client)
    failed = run(client, sandbox_id, code="print('out')\n1/0").json()
    call = Call(client, sandbox_id, "keyed", "key", stream=True)
    wait_until(lambda: len(history(client, sandbox_id)) == 2)
    running, ended = history(client, sandbox_id)
    assert (running["status"], running["kind"], running["duration_ms"]) == ("running", "code", None)
    assert (ended["id"], ended["status"], ended["error_name"]) == (
        failed["id"],
        "failed",
        "ZeroDivisionError",
    )
    path = f"/v1/sandboxes/{sandbox_id}/execs/{running['id']}"
    wait_until(lambda: "keyed 1\n" in client.get(path).json()["stdout"])
    so_far = client.get(path).json()
    assert so_far["status"] == "running"
    assert whole("keyed").startswith(so_far["stdout"])
    kept = client.get(f"/v1/sandboxes/{sandbox_id}/execs/{failed['id']}").json()
    assert kept["error"] == failed["error"]
    assert (kept["stdout"], kept["output_kept"]) == ("out\n", True)
    client.post(f"/v1/sandboxes/{sandbox_id}/stop")
    call.join()
    assert [item["status"] for item in history(client, sandbox_id)] == ["killed", "failed"]
    gone = client.get(f"/v1/sandboxes/{sandbox_id}/execs/{failed['id']}").json()
    assert (gone["status"], gone["output_kept"], gone["stdout"]) == ("failed", False, None)
    assert gone["error"] == {"name": "ZeroDivisionError", "value": None, "traceback": None}


@pytest.mark.parametrize("path", ["/execs", "/execs/exec_" + "0" * 34])
def test_another_projects_history_does_not_exist(daemon, client, sandbox_id, path):
    headers = {"Authorization": f"Bearer {daemon.create_key('intruder', project='other')}"}
    answer = client.get(f"/v1/sandboxes/{sandbox_id}{path}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "sandbox_not_found")


def test_an_exec_of_another_sandbox_does_not_exist(client, sandbox_id):
    other = create(client)
    ran = run(client, other, code="1").json()["id"]
    answer = client.get(f"/v1/sandboxes/{sandbox_id}/execs/{ran}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "exec_not_found")
    client.post(f"/v1/sandboxes/{other}/stop")


def test_a_drain_ends_no_exec_with_a_key(own_daemon):
    own_daemon.stop()
    own_daemon.env["SANDBOXD_DRAIN_TIMEOUT_S"] = "0.3"
    own_daemon.start()
    with own_daemon.client() as client:
        sandbox_id = create(client)
        calls = {name: Call(client, sandbox_id, name, f"key of {name}") for name in NAMES if "keyed" in name}
        calls["plain"] = Call(client, sandbox_id, "plain", None)
        wait_until(lambda: all(began(client, sandbox_id, name) for name in calls))
    own_daemon.stop()
    for call in calls.values():
        call.join()
    keyed, plain = calls["keyed"].answer, calls["plain"].answer
    assert keyed is not None
    assert plain is not None
    assert (keyed.status_code, keyed.json()["error"]["code"]) == (503, "interrupted")
    assert keyed.headers["Retry-After"] == "1"
    assert (plain.status_code, "Retry-After" in plain.headers) == (503, False)
    own_daemon.start()
    with own_daemon.client() as client:
        for name, call in calls.items():
            if call.key is not None:
                result = result_of(run(client, sandbox_id, call.key, **call.body))
                assert (result["status"], result["stdout"]) == ("completed", whole(name))
                assert began(client, sandbox_id, name) == 1


def test_deadlines_stand_still_while_a_sandbox_is_paused(client, sandbox_id):
    call = Call(client, sandbox_id, "keyed", "key", timeout_s=8)
    wait_until(lambda: began(client, sandbox_id, "keyed"))
    assert client.post(f"/v1/sandboxes/{sandbox_id}/pause").status_code == 200
    call.join()
    assert call.answer is not None
    assert (call.answer.status_code, call.answer.json()["error"]["code"]) == (409, "sandbox_paused")
    time.sleep(4)
    assert client.post(f"/v1/sandboxes/{sandbox_id}/resume").status_code == 200
    # Some 6 s of ticks and 4 s of standing still are more than its 8 s.
    result = result_of(run(client, sandbox_id, "key", **call.body))
    assert (result["status"], result["stdout"]) == ("completed", whole("keyed"))
    assert result["duration_ms"] < 8000
    wait_until(lambda: history(client, sandbox_id)[0]["status"] == "completed")
