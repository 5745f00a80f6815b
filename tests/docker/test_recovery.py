"""The daemon is killed with twenty sandboxes and work in progress: all are there again, as they were."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.conftest import IMAGE, Daemon, _daemon
from tests.docker.scene import Scene, create, printed, strangers, until

pytestmark = pytest.mark.docker

COUNT = 20
# The first of them come out of the pool.
POOLED = 3
EXECS = 5
TICKS = 60
LIMIT_S = 3.0


@pytest.fixture
def scene(engine) -> Iterator[Scene]:
    settings = {
        "SANDBOXD_WARM_LIBRARIES": "false",
        "SANDBOXD_MEMORY_SIZE_MB": "128",
        "SANDBOXD_POOL_SIZE": str(POOLED),
    }
    with strangers(engine, IMAGE), _daemon(engine, SANDBOXD_POOL_MAX=str(POOLED), **settings) as daemon:
        yield Scene(daemon, engine)
        # Members of the pool are in no list: the next start takes them away.
        daemon.stop(signal.SIGKILL)
        daemon.start(SANDBOXD_POOL_MAX="0")


class Ticking(threading.Thread):
    """An exec whose client gets no answer, because the daemon dies over it."""

    def __init__(self, daemon: Daemon, sandbox_id: str) -> None:
        super().__init__()
        self.daemon_under_test = daemon
        self.sandbox_id = sandbox_id
        self.start()

    def run(self) -> None:
        code = (
            "import time\nopen('begun', 'a').write('x')\n"
            f"for _ in range({TICKS}):\n    open('ticks', 'a').write('t')\n    time.sleep(0.1)\n"
        )
        with self.daemon_under_test.client() as client, pytest.raises(httpx2.TransportError):
            client.post(f"/v1/sandboxes/{self.sandbox_id}/exec", json={"code": code})


def fleet(client: httpx2.Client) -> list[dict[str, Any]]:
    """All of what a sandbox can be, each with a file that only it has."""
    made = []
    for number in range(COUNT):
        body: dict[str, Any] = {"labels": {"number": str(number)}, "timeout_s": 600 + number}
        if number % 4 == 1:
            body["idle_timeout_s"] = 300 + number
        sandbox = create(client, f"create {number}", **body)
        assert printed(client, sandbox["id"], f"print(open('own', 'w').write('{number:3}'))") == "3\n"
        made.append(sandbox)
    return made


def facts(client: httpx2.Client, sandbox_id: str) -> dict[str, Any]:
    """All that must be the same afterwards."""
    found: dict[str, Any] = client.get(f"/v1/sandboxes/{sandbox_id}").json()
    del found["last_active_at"]
    return found


def long_execs(client: httpx2.Client, sandbox_id: str) -> list[str]:
    """How those ended that took as long as the ticking one, as the history has it."""
    history = client.get(f"/v1/sandboxes/{sandbox_id}/execs").json()["data"]
    return [item["status"] for item in history if (item["duration_ms"] or 0) > TICKS * 90]


def file(client: httpx2.Client, sandbox_id: str, path: str) -> str:
    return client.get(f"/v1/sandboxes/{sandbox_id}/files", params={"path": path}).text


def test_twenty_sandboxes_outlive_the_daemon(scene, capsys):
    daemon = scene.daemon
    pooled = until(lambda: len(scene.members()) == POOLED and scene.members())
    with daemon.client() as client:
        made = [sandbox["id"] for sandbox in fleet(client)]
        assert set(made[:POOLED]) == set(pooled)
        paused, busy = made[4], made[5 : 5 + EXECS]
        client.post(f"/v1/sandboxes/{paused}/pause").raise_for_status()
        members = until(lambda: len(scene.members()) == POOLED and scene.members())
        execs = [Ticking(daemon, sandbox_id) for sandbox_id in busy]
        until(lambda: all(len(file(client, each, "ticks")) in range(3, TICKS) for each in busy))
        before = {sandbox_id: facts(client, sandbox_id) for sandbox_id in made}

    daemon.stop(signal.SIGKILL)
    for each in execs:
        each.join()
    started = time.monotonic()
    daemon.start()
    ready_s = time.monotonic() - started
    tally: Counter[str] = Counter(injected=COUNT, survived=0, lost=0, twice=0)
    with daemon.client() as client:
        for number, sandbox_id in enumerate(made):
            if sandbox_id == paused:
                refused = client.post(f"/v1/sandboxes/{paused}/exec", json={"code": "1"})
                assert refused.status_code == 409
                continue
            survived = printed(client, sandbox_id, "print(open('own').read())") == f"{number:3}\n"
            tally["survived" if survived else "lost"] += 1
        answering_s = time.monotonic() - started
        after = {sandbox_id: facts(client, sandbox_id) for sandbox_id in made}
        assert after == before
        assert client.post(f"/v1/sandboxes/{paused}/resume").json()["status"] == "running"
        assert printed(client, paused, "print(open('own').read())") == "  4\n"
        tally["survived"] += 1
        listed = client.get("/v1/sandboxes", params={"limit": 100}).json()["data"]
        assert sorted(sandbox["id"] for sandbox in listed) == sorted(made)
        # The members are still there, and one request gets one of them.
        assert set(members) <= set(scene.members())
        claimed = create(client)["id"]
        assert claimed in members
        assert printed(client, claimed) == "42\n"
        # The same requests once more make nothing new; and what ran goes on, once.
        assert [sandbox["id"] for sandbox in fleet(client)] == made
        until(lambda: all(len(file(client, each, "ticks")) >= TICKS for each in busy))
        tally["twice"] = sum(len(file(client, each, "begun")) - 1 for each in busy)
        for each in busy:
            assert until(lambda: long_execs(client, each)) == ["completed"]  # noqa: B023
    with capsys.disabled():
        print(  # noqa: T201  # the figures are what the test is for
            f"\nrecovery: {dict(tally)}, {EXECS} execs went on; "
            f"ready after {ready_s:.2f} s, all answering after {answering_s:.2f} s"
        )
    assert (tally["survived"], tally["lost"], tally["twice"]) == (COUNT, 0, 0)
    assert answering_s < LIMIT_S
    assert not [fault for fault in scene.faults() if "creating" not in fault]
