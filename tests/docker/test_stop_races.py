"""A sandbox that ends, or is paused, in the middle of calls to its agent: each says so."""

import threading
import time

import httpx2
import pytest

pytestmark = pytest.mark.docker


@pytest.fixture
def sandbox(client):
    made = client.post("/v1/sandboxes", json={}).json()
    yield f"/v1/sandboxes/{made['id']}"
    client.post(f"/v1/sandboxes/{made['id']}/stop")


class Call(threading.Thread):
    def __init__(self, client, url, body):
        super().__init__()
        self.http = httpx2.Client(base_url=client.base_url, headers=client.headers, timeout=60)
        self.url, self.body = url, body
        self.start()

    def run(self):
        self.answer = self.http.post(self.url, json=self.body)
        self.http.close()

    def code(self):
        self.join(60)
        return self.answer.status_code, self.answer.json()["error"]["code"]


@pytest.mark.parametrize(("action", "code"), [("stop", "sandbox_not_running"), ("pause", "sandbox_paused")])
def test_calls_that_wait_for_the_agent_say_why_it_is_gone(client, sandbox, action, code):
    """They answered 502, as if the server had failed."""
    body = {"command": ["sleep", "60"], "background": True, "stdin_open": True}
    exec_id = client.post(f"{sandbox}/exec", json=body).json()["id"]
    stdin = Call(client, f"{sandbox}/execs/{exec_id}/stdin", {"data": "x" * 600_000})
    time.sleep(1)
    assert client.post(f"{sandbox}/{action}").status_code == 200
    assert stdin.code() == (409, code)


def test_many_short_execs_can_be_followed_one_after_another(client, sandbox):
    """What is told of an exec is kept a while for who comes back; that must not count against others."""
    for _ in range(80):
        exec_id = client.post(f"{sandbox}/exec", json={"command": ["true"]}).json()["id"]
        answer = client.get(f"{sandbox}/execs/{exec_id}/events")
        assert answer.status_code == 200, answer.text
        assert "exec.completed" in answer.text
