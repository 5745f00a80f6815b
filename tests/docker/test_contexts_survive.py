"""Contexts and what happens around them: a daemon that dies, a pause, a second daemon."""

import signal
from collections.abc import Iterator

import pytest

from tests.conftest import _daemon
from tests.docker.scene_contexts import Call, Contexts, wait_for

pytestmark = pytest.mark.docker


def test_contexts_and_their_calls_outlive_the_daemon(own_daemon):
    """Sessions that are lost with the server: litellm#31688."""
    with own_daemon.client() as http:
        contexts = Contexts(http, http.post("/v1/sandboxes", json={}).json()["id"])
        context_id = contexts.make()
        contexts.run(context_id, "x = 1; import os, time")
        code = (
            "print('before')\nwhile not os.path.exists('/tmp/go'): time.sleep(0.05)\n"
            "display('shown')\nprint('after')"
        )
        call = Call(contexts, context_id, code, key="one")
        queued = Call(contexts, context_id, "x += 1; x", key="two")
        contexts.wait_busy(context_id)
        own_daemon.stop(signal.SIGKILL)
        own_daemon.start()
        assert (call.answer, queued.answer) == (None, None)
        assert contexts.get(context_id)["status"] == "busy"
        again = Call(contexts, context_id, code, key="one")
        contexts.run(None, "open('/tmp/go', 'w')")
        result = again.result()
        assert result["stdout"] == "before\nafter\n"
        assert result["results"] == [{"text/plain": "'shown'"}]
        assert Call(contexts, context_id, "x += 1; x", key="two").result()["results"] == [{"text/plain": "2"}]
        assert contexts.value(context_id, "x") == "2"
        listed = http.get(f"{contexts.url}/execs").json()["data"]
        assert {item["status"] for item in listed} == {"completed"}
        assert [item["context"] for item in listed].count(context_id) == 4, listed


def test_a_pause_keeps_the_state_and_holds_the_deadline(client, sandbox_id):
    contexts = Contexts(client, sandbox_id)
    context_id = contexts.make()
    contexts.run(context_id, "x = 1; import time")
    code = "ends = time.time() + 1.5\nwhile time.time() < ends: time.sleep(0.1)\n'done'"
    call = Call(contexts, context_id, code, key="over-a-pause", timeout_s=3)
    contexts.wait_busy(context_id)
    assert client.post(f"{contexts.url}/pause").json()["status"] == "paused"
    refused = client.get(f"{contexts.url}/contexts")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "sandbox_paused")
    call.join(20)
    assert call.answer is not None
    assert call.answer.json()["error"]["code"] == "sandbox_paused"
    wait_for(lambda: client.post(f"{contexts.url}/resume").json()["status"] == "running")
    again = Call(contexts, context_id, code, key="over-a-pause", timeout_s=3).result()
    assert (again["status"], again["results"]) == ("completed", [{"text/plain": "'done'"}])
    assert contexts.value(context_id, "x") == "1"


@pytest.fixture
def pair(engine, tmp_path) -> Iterator[tuple[Contexts, Contexts]]:
    url = f"sqlite+aiosqlite:///{tmp_path}/shared.db"
    with _daemon(engine, SANDBOXD_DATABASE_URL=url) as first:
        first.stop()
        first.start(SANDBOXD_NODE_URL=first.base_url)
        second_daemon = _daemon(engine, SANDBOXD_DATABASE_URL=url)
        with second_daemon as second, first.client() as one, second.client() as two:
            two.headers["Authorization"] = one.headers["Authorization"]
            sandbox_id = one.post("/v1/sandboxes", json={}).json()["id"]
            yield Contexts(one, sandbox_id), Contexts(two, sandbox_id)


def test_another_daemon_hands_contexts_on(pair):
    here, there = pair
    wait_for(lambda: there.http.get(f"{there.url}/contexts").status_code == 200)
    context_id = there.make()
    there.run(context_id, "x = 1")
    assert here.value(context_id, "x") == there.value(context_id, "x") == "1"
    assert here.get(context_id)["executions"] == 3
    call = Call(there, context_id, "while True: pass")
    here.wait_busy(context_id)
    wait_for(lambda: there.act(context_id, "interrupt")["status"] == "idle")
    assert call.result()["error"]["name"] == "KeyboardInterrupt"
    assert there.act(context_id, "restart")["status"] == "idle"
    assert there.http.delete(f"{there.url}/contexts/{context_id}").status_code == 200
    assert here.http.get(f"{here.url}/contexts").json()["data"] == []
