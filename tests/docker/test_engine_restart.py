"""The engine goes away, in order or not, and comes back: with live-restore nothing is lost, and without it
the rows say why."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import httpx2
import pytest

from tests.conftest import _daemon
from tests.docker.scene import Scene, create, event_types, printed, state, strangers, until
from tests.engines import IMAGE, OwnEngine, own_engine

pytestmark = pytest.mark.docker

SETTINGS = {
    "SANDBOXD_DEFAULT_IMAGE": IMAGE,
    "SANDBOXD_WARM_LIBRARIES": "false",
    "SANDBOXD_MEMORY_SIZE_MB": "128",
}
SANDBOXES, EXECS = 20, 5
TICKS = (
    "import time\nfor number in range(200):\n    open('ticks', 'a').write('t')\n"
    "    print(number, flush=True)\n    time.sleep(0.1)\n"
)
TICKED = "".join(f"{number}\n" for number in range(200))


@contextmanager
def served(live_restore: bool, **settings: str) -> Iterator[tuple[OwnEngine, Scene]]:
    with (
        own_engine(live_restore=live_restore) as engine,
        closing(engine.client()) as client,
        _daemon(client, SANDBOXD_DOCKER_URL=engine.url, **SETTINGS, **settings) as daemon,
    ):
        yield engine, Scene(daemon, client)
        # Members of the pool are in no list: the next start takes them away.
        daemon.stop(signal.SIGKILL)
        daemon.start(SANDBOXD_POOL_MAX="0")


def ticks(client: httpx2.Client, sandbox_id: str) -> int:
    return len(client.get(f"/v1/sandboxes/{sandbox_id}/files", params={"path": "ticks"}).text)


def created_again(client: httpx2.Client) -> str:
    """The first create that the engine, back again, lets through."""
    answer = until(
        lambda: (made := client.post("/v1/sandboxes", json={})).status_code == 201 and made,
    )
    return str(answer.json()["id"])


@pytest.mark.parametrize("end", [OwnEngine.stop, OwnEngine.kill], ids=["stopped", "killed"])
def test_sandboxes_and_execs_go_on_without_their_engine(end: Callable[[OwnEngine], None], capsys):
    with served(live_restore=True) as (engine, scene), scene.daemon.client() as client:
        sandboxes = [create(client)["id"] for _ in range(SANDBOXES)]
        busy = sandboxes[:EXECS]
        answers: dict[str, httpx2.Response] = {}

        def run(sandbox_id: str) -> None:
            answers[sandbox_id] = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": TICKS})

        running = [threading.Thread(target=run, args=(each,)) for each in busy]
        for thread in running:
            thread.start()
        until(lambda: all(ticks(client, each) > 3 for each in busy))
        end(engine)

        began = [ticks(client, each) for each in busy]
        assert max(began) < 200
        refused = client.post("/v1/sandboxes", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert client.get("/readyz").status_code == 503
        assert [printed(client, each) for each in sandboxes] == ["42\n"] * SANDBOXES
        until(lambda: all(ticks(client, each) > first + 3 for each, first in zip(busy, began, strict=True)))

        back = time.monotonic()
        engine.start()
        assert [printed(client, each) for each in sandboxes] == ["42\n"] * SANDBOXES
        answered_s = time.monotonic() - back
        third = created_again(client)
        assert printed(client, third) == "42\n"
        assert [state(client, each) for each in sandboxes] == [("running", None)] * SANDBOXES
        for thread in running:
            thread.join()
        results = [answers[each].json() for each in busy]
        whole = sum(result["stdout"] == TICKED and result["status"] == "completed" for result in results)
        once = sum(ticks(client, each) == 200 for each in busy)
        with capsys.disabled():
            print(  # noqa: T201  # the figures are what the test is for
                f"\nengine {end.__name__}: {SANDBOXES} sandboxes survived, all answered {answered_s:.2f} s "
                f"after it was started again; of {EXECS} execs {whole} whole, {once} ran once"
            )
        assert (whole, once) == (EXECS, EXECS)
        # The daemon listens again: an end is noticed at once, and told apart from the engine's own.
        scene.engine.containers.get(third).kill()
        until(lambda: state(client, third) == ("failed", "runtime_error"))
        assert event_types(client, third) == ["created", "running", "failed"]
        assert event_types(client, busy[0]) == ["created", "running"]


def test_without_live_restore_the_rows_say_that_the_engine_was_restarted(capsys):
    rounds, told = 3, 0
    pool = {"SANDBOXD_POOL_SIZE": "2", "SANDBOXD_POOL_MAX": "2"}
    with served(live_restore=False, **pool) as (engine, scene), scene.daemon.client() as client:
        members = until(lambda: len(scene.members()) == 2 and scene.members())
        with strangers(scene.engine, IMAGE):
            seconds = []
            for _ in range(rounds):
                made = [create(client)["id"] for _ in range(2)]
                engine.stop()
                began = time.monotonic()
                engine.start()
                until(lambda: all(state(client, each)[0] == "failed" for each in made))  # noqa: B023
                seconds.append(time.monotonic() - began)
                told += sum(state(client, each)[1] == "runtime_restart" for each in made)
                members = until(lambda: fresh(scene, members))  # noqa: B023
                assert event_types(client, made[0]) == ["created", "running", "failed"]
        claimed = create(client)["id"]
        assert claimed in members
        assert printed(client, claimed) == "42\n"
        scene.settled()
        with capsys.disabled():
            print(  # noqa: T201  # the figures are what the test is for
                f"\nengine restarted {rounds} times: {told} of {2 * rounds} say runtime_restart, "
                f"at most {max(seconds):.1f} s after its start"
            )
    assert told == 2 * rounds


def fresh(scene: Scene, before: list[str]) -> list[str] | None:
    """The pool, when it has been filled anew."""
    members = scene.members()
    return members if len(members) == 2 and not set(members) & set(before) else None
