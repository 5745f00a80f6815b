"""Random lives of sandboxes through REST on the real engine, compared with a model after each step."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

QUOTA = 3
LIVES = 10
STEPS = 25
SOON_S = 15
ALIVE = {"running", "paused"}
FILTERS = {
    "alive": ALIVE,
    "running": {"running"},
    "paused": {"paused"},
    "stopped": {"stopped"},
    "failed": set(),
    "creating": set(),
    "stopping": set(),
    "all": ALIVE | {"stopped"},
}
COUNT = "open('n', 'a').write('x'); print(len(open('n').read()))"
LABELS = st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["1", "2"]), max_size=2)
TIMEOUTS = st.sampled_from([600.0, 900.5, 3600.0])


@dataclass
class Modelled:
    """What a sandbox should be by now."""

    id: str
    body: dict[str, Any]
    key: str
    labels: dict[str, str]
    timeout_s: float
    idle_timeout_s: float | None = None
    memory_size_mb: int = 128
    status: str = "running"
    runs: int = 0
    events: list[str] = field(default_factory=lambda: ["created", "running"])


class Lives(RuleBasedStateMachine):
    numbers = itertools.count()

    def __init__(self, http, foreign, steps) -> None:
        super().__init__()
        self.http = http
        self.foreign = foreign
        self.steps = steps
        self.run = str(next(self.numbers))
        self.known: list[Modelled] = []

    # What the model says.

    def alive(self) -> list[Modelled]:
        return [one for one in self.known if one.status in ALIVE]

    def pick(self, data) -> Modelled:
        """Any, the living ones more often."""
        return data.draw(st.sampled_from([*self.known, *self.alive()]), label="sandbox")

    def call(self, method: str, one: Modelled, path: str = "", **request):
        self.steps[f"{method} {path}"] = self.steps.get(f"{method} {path}", 0) + 1
        return self.http.request(method, f"/v1/sandboxes/{one.id}{path}", **request)

    def same(self, one: Modelled, sandbox: dict[str, Any]) -> None:
        assert sandbox["id"] == one.id
        assert sandbox["status"] == one.status
        assert sandbox["labels"] == {**one.labels, "life": self.run}
        assert sandbox["timeout_s"] == one.timeout_s
        assert sandbox["idle_timeout_s"] == one.idle_timeout_s
        assert sandbox["memory_size_mb"] == one.memory_size_mb
        # One that ended keeps what it had.
        if one.status != "stopped":
            assert (sandbox["expires_at"] is None) == (one.status == "paused")
        assert (sandbox["stopped_at"] is not None) == (one.status == "stopped")
        assert sandbox["termination_reason"] == ("user" if one.status == "stopped" else None)

    def refused(self, response, one: Modelled, status: int, code: str) -> None:
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text

    # What a client does.

    @rule(labels=LABELS, timeout_s=TIMEOUTS, wait=st.booleans())
    def create(self, labels, timeout_s, wait) -> None:
        body = {
            "labels": {**labels, "life": self.run},
            "timeout_s": timeout_s,
            "memory_size_mb": 128,
            "wait": wait,
        }
        key = f"life {self.run} {len(self.known)}"
        response = self.http.post("/v1/sandboxes", json=body, headers={"Idempotency-Key": key})
        if len(self.alive()) == QUOTA:
            assert (response.status_code, response.json()["error"]["code"]) == (429, "quota_exceeded")
            assert int(response.headers["Retry-After"]) > 0
            return
        assert response.status_code == 201, response.text
        one = Modelled(response.json()["id"], body, key, labels, timeout_s)
        assert one.id not in [other.id for other in self.known]
        self.known.append(one)
        if wait:
            self.same(one, response.json())
        else:
            assert response.json()["status"] in ("creating", "running")
            deadline = time.monotonic() + SOON_S
            while self.call("GET", one).json()["status"] == "creating":
                assert time.monotonic() < deadline
                time.sleep(0.05)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), other=st.booleans())
    def create_again(self, data, other) -> None:
        one = self.pick(data)
        body = {**one.body, "labels": {}} if other else one.body
        response = self.http.post("/v1/sandboxes", json=body, headers={"Idempotency-Key": one.key})
        if other:
            self.refused(response, one, 409, "idempotency_conflict")
        else:
            assert response.status_code == 201, response.text
            self.same(one, response.json())

    @precondition(lambda self: self.known)
    @rule(data=st.data(), verb=st.sampled_from(["pause", "resume"]))
    def freeze_or_thaw(self, data, verb) -> None:
        one = self.pick(data)
        response = self.call("POST", one, f"/{verb}")
        if one.status == "stopped":
            self.refused(response, one, 409, "sandbox_not_running")
            return
        assert response.status_code == 200, response.text
        becomes = {"pause": "paused", "resume": "running"}[verb]
        if one.status != becomes:
            one.status = becomes
            one.events.append({"pause": "paused", "resume": "resumed"}[verb])
        self.same(one, response.json())

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(),
        changes=st.fixed_dictionaries(
            {},
            optional={
                "labels": LABELS,
                "timeout_s": TIMEOUTS,
                "idle_timeout_s": st.sampled_from([None, 700.0]),
                "memory_size_mb": st.sampled_from([128, 192]),
            },
        ),
    )
    def patch(self, data, changes) -> None:
        one = self.pick(data)
        body = dict(changes)
        if "labels" in body:
            body["labels"] = {**body["labels"], "life": self.run}
        response = self.call("PATCH", one, json=body)
        if not changes:
            self.refused(response, one, 400, "invalid_request")
            return
        if one.status == "stopped":
            self.refused(response, one, 409, "sandbox_not_running")
            return
        assert response.status_code == 200, response.text
        for name, value in changes.items():
            setattr(one, name, value)
        one.events.append("updated")
        self.same(one, response.json())
        if "timeout_s" in changes and one.status == "running":
            assert abs(response.json()["expires_at"] - time.time() - changes["timeout_s"]) < 5

    @precondition(lambda self: self.known)
    @rule(data=st.data(), repeat=st.booleans())
    def execute(self, data, repeat) -> None:
        one = self.pick(data)
        headers = {"Idempotency-Key": f"run {one.runs}"} if repeat else {}
        response = self.call("POST", one, "/exec", json={"code": COUNT}, headers=headers)
        if one.status != "running":
            code = "sandbox_paused" if one.status == "paused" else "sandbox_not_running"
            self.refused(response, one, 409, code)
            return
        assert response.status_code == 200, response.text
        one.runs += 1
        # It counts up through pauses, and a repeated request does not count.
        assert (response.json()["status"], response.json()["stdout"]) == ("completed", f"{one.runs}\n")
        if repeat:
            again = self.call("POST", one, "/exec", json={"code": COUNT}, headers=headers)
            # The start is told from how long ago it was.
            first, second = response.json(), again.json()
            assert abs(second.pop("started_at") - first.pop("started_at")) < 1
            assert second == first
            other = self.call("POST", one, "/exec", json={"code": "1"}, headers=headers)
            self.refused(other, one, 409, "idempotency_conflict")

    @precondition(lambda self: self.known)
    @rule(data=st.data(), method=st.sampled_from(["POST", "DELETE"]))
    def stop(self, data, method) -> None:
        one = self.pick(data)
        response = self.call(method, one, "/stop" if method == "POST" else "")
        assert response.status_code == 200, response.text
        if one.status != "stopped":
            one.status = "stopped"
            one.events.append("stopped")
        self.same(one, response.json())

    @precondition(lambda self: self.alive())
    @rule(
        data=st.data(), verbs=st.lists(st.sampled_from(["pause", "resume", "stop"]), min_size=2, max_size=4)
    )
    def all_at_once(self, data, verbs) -> None:
        one = data.draw(st.sampled_from(self.alive()), label="sandbox")
        with ThreadPoolExecutor(len(verbs)) as threads:
            answers = list(threads.map(lambda verb: self.call("POST", one, f"/{verb}"), verbs))
        for verb, answer in zip(verbs, answers, strict=True):
            assert answer.status_code == 200 or (verb != "stop" and answer.status_code == 409), answer.text
        if "stop" not in verbs:
            # Whichever was last; from here on it is known again.
            assert self.call("POST", one, "/resume").status_code == 200
        one.status = "stopped" if "stop" in verbs else "running"
        self.same(one, self.call("GET", one).json())
        events = self.events(one)
        assert events[: len(one.events)] == one.events
        assert events.count("stopped") == ("stop" in verbs)
        one.events = events

    @precondition(lambda self: self.known)
    @rule(data=st.data(), path=st.sampled_from(["", "/pause", "/resume", "/stop", "/exec"]))
    def intrude(self, data, path) -> None:
        one = self.pick(data)
        body = {"code": "1"} if path == "/exec" else None
        response = self.foreign.request("POST" if path else "GET", f"/v1/sandboxes/{one.id}{path}", json=body)
        self.refused(response, one, 404, "sandbox_not_found")

    @rule(status=st.sampled_from(sorted(FILTERS)), labels=LABELS)
    def list_some(self, status, labels) -> None:
        wanted = [f"{name}={value}" for name, value in {**labels, "life": self.run}.items()]
        query = {"status": status, "label": wanted, "limit": 100, "order": "asc"}
        listed = self.http.get("/v1/sandboxes", params=query)
        assert listed.status_code == 200, listed.text
        assert {item["id"] for item in listed.json()["data"]} == {
            one.id
            for one in self.known
            if one.status in FILTERS[status] and labels.items() <= one.labels.items()
        }

    # What always holds.

    @invariant()
    def every_sandbox_is_as_modelled(self) -> None:
        query = {"status": "all", "label": f"life={self.run}", "limit": 100}
        listed = {item["id"]: item for item in self.http.get("/v1/sandboxes", params=query).json()["data"]}
        assert listed.keys() == {one.id for one in self.known}
        for one in self.known:
            self.same(one, listed[one.id])

    def events(self, one: Modelled) -> list[str]:
        listed = self.call("GET", one, "/events", params={"limit": 100, "order": "asc"}).json()["data"]
        return [item["type"].removeprefix("sandbox.") for item in listed]

    def teardown(self) -> None:
        try:
            for one in self.known:
                assert self.events(one) == one.events
        finally:
            for one in self.known:
                self.call("DELETE", one)


@pytest.mark.docker
@pytest.mark.timeout(180)
def test_lives_of_sandboxes_go_as_modelled(tell, make_tenant):
    tenant, foreign = make_tenant("lives", QUOTA), make_tenant("lives-foreign", QUOTA)
    steps: dict[str, int] = {}
    started_at = time.monotonic()
    run_state_machine_as_test(
        lambda: Lives(tenant.http, foreign.http, steps),
        settings=settings(
            max_examples=LIVES,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    tell(
        f"{LIVES} histories of up to {STEPS} steps in {time.monotonic() - started_at:.0f} s on an engine,"
        f" {sum(steps.values())} requests to single sandboxes: all as modelled"
    )
