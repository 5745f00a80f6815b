"""The daemon dies at each of its fail points, for real, and the next start puts everything in order."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from sandboxd.sandboxes.failpoints import FailPoint
from tests.conftest import IMAGE, Daemon, _daemon
from tests.docker.scene import Scene, create, event_types, printed, state, strangers, until

pytestmark = pytest.mark.docker

BORN = ["created", "running"]
POOL = {"SANDBOXD_POOL_SIZE": "1", "SANDBOXD_POOL_MAX": "2"}
NO_POOL = {"SANDBOXD_POOL_MAX": "0"}


@dataclass(frozen=True)
class Case:
    """What is asked of a daemon that dies over it, and what the sandbox is after the next start."""

    ask: Callable[[httpx2.Client, str], httpx2.Response]
    state: tuple[str, str | None]
    events: list[str]
    # Done before the daemon that will die is started; gives the sandbox, unless the request makes it.
    prepare: Callable[[httpx2.Client], str] | None = None
    pool: bool = False


def post(verb: str) -> Callable[[httpx2.Client, str], httpx2.Response]:
    return lambda client, sandbox_id: client.post(f"/v1/sandboxes/{sandbox_id}/{verb}")


def make(client: httpx2.Client, point: str) -> httpx2.Response:
    return client.post("/v1/sandboxes", json={"labels": {"is": "cut"}}, headers={"Idempotency-Key": point})


def grow(client: httpx2.Client, sandbox_id: str) -> httpx2.Response:
    return client.patch(f"/v1/sandboxes/{sandbox_id}", json={"memory_size_mb": 640})


def a_running_one(client: httpx2.Client) -> str:
    return str(create(client)["id"])


def a_paused_one(client: httpx2.Client) -> str:
    sandbox_id = a_running_one(client)
    client.post(f"/v1/sandboxes/{sandbox_id}/pause").raise_for_status()
    return sandbox_id


HALF_MADE = Case(make, ("failed", "lost"), ["created", "failed"])
STOPPED = Case(post("stop"), ("stopped", "user"), [*BORN, "stopped"], a_running_one)
PAUSED = Case(post("pause"), ("paused", None), [*BORN, "paused"], a_running_one)

CASES = {
    FailPoint.CREATE_INSERTED: HALF_MADE,
    FailPoint.CREATE_MADE: HALF_MADE,
    FailPoint.CREATE_ANSWERED: HALF_MADE,
    FailPoint.CREATE_RUNNING: Case(make, ("running", None), BORN),
    FailPoint.CLAIM_CLAIMED: Case(make, ("running", None), BORN, pool=True),
    # The engine has been told and the store has not: the row holds.
    FailPoint.UPDATE_APPLIED: Case(grow, ("running", None), BORN, a_running_one),
    FailPoint.PAUSE_MARKED: PAUSED,
    FailPoint.PAUSE_FROZEN: PAUSED,
    # Nobody was told that it runs again, so it does not.
    FailPoint.RESUME_THAWED: Case(post("resume"), ("paused", None), [*BORN, "paused"], a_paused_one),
    FailPoint.RESUME_RUNNING: Case(
        post("resume"), ("running", None), [*BORN, "paused", "resumed"], a_paused_one
    ),
    FailPoint.STOP_MARKED: STOPPED,
    FailPoint.STOP_DELETED: STOPPED,
    FailPoint.STOP_ENDED: STOPPED,
}


@pytest.fixture(scope="module")
def scene(engine) -> Iterator[Scene]:
    with strangers(engine, IMAGE), _daemon(engine, SANDBOXD_WARM_LIBRARIES="false") as daemon:
        yield Scene(daemon, engine)
        daemon.env.update(NO_POOL, SANDBOXD_FAIL_POINT="")


@pytest.fixture(autouse=True)
def tidy(scene: Scene) -> Iterator[None]:
    """Whatever came of a case: at its end everything can be stopped, and then nothing is left or counted
    twice."""
    yield
    daemon = scene.daemon
    if daemon.process.poll() is not None or daemon.env["SANDBOXD_POOL_MAX"] != "0":
        # What is left of the pool is nobody's use any more.
        arm(daemon, "", NO_POOL)
    with daemon.client() as client:
        while page := client.get("/v1/sandboxes").json()["data"]:
            for sandbox in page:
                client.post(f"/v1/sandboxes/{sandbox['id']}/stop").raise_for_status()
    assert not scene.containers()
    scene.settled()
    metered, told = counts(scene)
    assert metered == told


def arm(daemon: Daemon, point: str, settings: dict[str, str], *, wait: bool = True) -> None:
    daemon.stop(signal.SIGKILL)
    daemon.env.update(settings)
    daemon.start(wait=wait, SANDBOXD_FAIL_POINT=point)


def come_back(daemon: Daemon, point: FailPoint) -> None:
    """The daemon has died exactly there; starts it as it should be. Ready means that it has swept."""
    assert daemon.process.wait(20) == -signal.SIGKILL
    told = [line for line in daemon.log.splitlines() if "fail point reached" in line]
    assert f'"{point}"' in told[-1]
    daemon.start(SANDBOXD_FAIL_POINT="")


def counts(scene: Scene) -> tuple[int, int]:
    """Sandboxes that came to life for a project, as metered and as told in the events."""
    metered = scene.query("SELECT coalesce(sum(sandboxes), 0) FROM usage_hour")
    told = scene.query("SELECT count(*) FROM event WHERE type = 'sandbox.running'")
    return int(metered[0][0]), int(told[0][0])


@pytest.mark.parametrize("point", FailPoint)
def test_a_request_that_dies_half_way(scene, point):
    case, daemon = CASES[point], scene.daemon
    sandbox_id = ""
    if case.prepare:
        with daemon.client() as client:
            sandbox_id = case.prepare(client)
    arm(daemon, point, POOL if case.pool else NO_POOL)
    member = until(scene.members)[0] if case.pool else ""
    before = set(scene.rows()) - {member}
    with daemon.client() as client, pytest.raises(httpx2.TransportError):
        case.ask(client, sandbox_id or point)
    come_back(daemon, point)

    sandbox_id = sandbox_id or member or (set(scene.rows()) - before).pop()
    with daemon.client() as client:
        assert state(client, sandbox_id) == case.state
        assert event_types(client, sandbox_id) == case.events
        if case.state[0] == "paused":
            assert client.post(f"/v1/sandboxes/{sandbox_id}/resume").json()["status"] == "running"
        if case.state[0] in ("running", "paused"):
            assert printed(client, sandbox_id) == "42\n"
        if case.ask is grow:
            kept = client.get(f"/v1/sandboxes/{sandbox_id}").json()["memory_size_mb"]
            assert until(lambda: memory_limit_mb(scene, sandbox_id) == kept == 512)
        if case.ask is make:
            repeated = again(client, point)
            assert (repeated == sandbox_id) == (case.state[0] == "running")
        other = a_running_one(client)
        assert other not in (sandbox_id, repeated if case.ask is make else "")
        assert printed(client, other) == "42\n"


def again(client: httpx2.Client, point: str) -> str:
    """Sends the request that was cut off twice more: one sandbox comes of it all, and it works."""
    answers = [make(client, point) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    made = {str(answer.json()["id"]) for answer in answers}
    assert len(made) == 1
    assert answers[0].json()["status"] == "running"
    assert printed(client, *made) == "42\n"
    return made.pop()


def memory_limit_mb(scene: Scene, sandbox_id: str) -> int:
    found: dict[str, Any] = scene.engine.api.inspect_container(sandbox_id)
    return int(found["HostConfig"]["Memory"]) // 2**20


@pytest.mark.parametrize("point", [point for point in FailPoint if point.startswith("create.")])
def test_the_pools_own_start_dies_half_way(scene, point):
    daemon = scene.daemon
    # By itself: nobody asks for anything.
    arm(daemon, point, POOL, wait=False)
    assert daemon.process.wait(20) == -signal.SIGKILL
    left = {name for name, status in scene.rows().items() if status in ("creating", "ready")}
    assert len(left) == 1
    come_back(daemon, point)
    rows = scene.rows()
    if point is FailPoint.CREATE_RUNNING:
        assert rows[left.copy().pop()] == "ready"
    else:
        # It was nobody's, so nothing need tell of it.
        assert not left & rows.keys()
    member = until(scene.members)[0]
    with daemon.client() as client:
        claimed = create(client)["id"]
        assert claimed == member
        assert event_types(client, claimed) == BORN
        assert printed(client, claimed) == "42\n"
