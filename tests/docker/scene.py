"""What a daemon and its engine hold, looked at from outside: rows, containers, workspaces, link folders."""

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import httpx2

from sandboxd.sandboxes.states import ALIVE
from tests.conftest import Daemon

# A lazy unmount and an engine that is busy may take a moment; what is wrong stays wrong.
SETTLE_S = 10.0


class Scene:
    """One daemon on one engine."""

    def __init__(self, daemon: Daemon, engine: docker.DockerClient, store: Path | None = None) -> None:
        self.daemon = daemon
        self.engine = engine
        self._store = store or daemon.state_dir / "sandboxd.db"

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Straight from the file, also while no daemon runs."""
        with closing(sqlite3.connect(f"file:{self._store}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchall()

    def rows(self) -> dict[str, str]:
        return dict(self.query("SELECT id, status FROM sandbox"))

    def members(self) -> list[str]:
        """Of the pool, those that are ready."""
        return [row[0] for row in self.query("SELECT id FROM sandbox WHERE status = 'ready'")]

    def containers(self) -> set[str]:
        found = self.engine.api.containers(all=True, filters={"label": f"sandboxd.owner={self.owner}"})
        return {str(item["Labels"]["sandboxd.sandbox"]) for item in found}

    def folders(self) -> set[str]:
        run_dir = Path(self.daemon.env["SANDBOXD_RUN_DIR"]) / self.owner
        return {*os.listdir(self.daemon.state_dir / "workspaces"), *os.listdir(run_dir)}

    @property
    def owner(self) -> str:
        return (self.daemon.state_dir / "installation").read_text().strip()

    def faults(self) -> list[str]:
        """What does not fit together."""
        rows = self.rows()
        alive = {sandbox_id for sandbox_id, status in rows.items() if status in ALIVE}
        found = [f"{name} is {status}" for name, status in rows.items() if status in ("creating", "stopping")]
        found += [f"{name}: row or container is missing" for name in alive ^ self.containers()]
        found += [f"{name}: row or folder is missing" for name in alive ^ self.folders()]
        found += [f"{count} times {what}" for what, count in self._doubles().items()]
        return found

    def settled(self) -> None:
        """Waits until everything fits together, and fails when it does not come to that."""
        deadline = time.monotonic() + SETTLE_S
        while faults := self.faults():
            assert time.monotonic() < deadline, faults
            time.sleep(0.05)

    def _doubles(self) -> dict[tuple[Any, ...], int]:
        """What happens once in a life and was written twice."""
        once = "('sandbox.created', 'sandbox.running', 'sandbox.stopped', 'sandbox.failed')"
        told = self.query(f"SELECT sandbox_id, type FROM event WHERE type IN {once}")  # constant
        actions = "('sandbox.create', 'sandbox.stop')"
        told += self.query(f"SELECT resource_id, action FROM audit_entry WHERE action IN {actions}")
        return {what: count for what, count in Counter(told).items() if count > 1}


def create(client: httpx2.Client, key: str | None = None, **body: Any) -> dict[str, Any]:
    headers = {} if key is None else {"Idempotency-Key": key}
    answer = client.post("/v1/sandboxes", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def printed(client: httpx2.Client, sandbox_id: str, code: str = "print(6*7)") -> str:
    """What plain Python in the sandbox prints."""
    answer = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code, "timeout_s": 20})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


def state(client: httpx2.Client, sandbox_id: str) -> tuple[str, str | None]:
    """Status and reason."""
    sandbox = client.get(f"/v1/sandboxes/{sandbox_id}").json()
    return sandbox["status"], sandbox["termination_reason"]


def event_types(client: httpx2.Client, sandbox_id: str) -> list[str]:
    events = client.get(f"/v1/sandboxes/{sandbox_id}/events", params={"order": "asc"}).json()["data"]
    return [event["type"].removeprefix("sandbox.") for event in events]


def until(what: Callable[[], Any], timeout_s: float = 20) -> Any:
    """What `what` gives as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


@contextmanager
def strangers(engine: docker.DockerClient, image: str) -> Iterator[None]:
    """Containers of nobody's and of another installation's: they must be there at the end as they were."""
    labels = {"sandboxd.owner": "somebody else", "sandboxd.sandbox": "sbx_theirs"}
    made = [
        engine.containers.create(image, ["true"], name=f"e80-stranger-{os.getpid()}-{number}", labels=each)
        for number, each in enumerate([{}, labels])
    ]
    try:
        yield
        for container in made:
            container.reload()
            assert container.status == "created"
    finally:
        for container in made:
            container.remove(force=True)
