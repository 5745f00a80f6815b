"""Every path and method of docs/openapi.json, sent by those who have no right to: another project's key finds
nothing, and a revoked key, or none, gets in nowhere."""

import itertools
import re

import pytest

from tests.contract.conftest import raw_document

PARAMETER = re.compile(r"\{(\w+)\}")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
OPEN_PATHS = {"/healthz", "/readyz", "/metrics"}
SECRET = "canary-5f1d"
# Good requests: what is refused is refused for whose key it is. None: a body is not taken.
BODIES = {
    "create_sandbox": {"labels": {"by": "intruder"}},
    "update_sandbox": {"labels": {"by": "intruder"}},
    "exec_in_sandbox": {"code": "print(1)"},
    "write_stdin": {"data": "canary"},
    "signal_exec": {"signal": "SIGTERM"},
    "resize_exec": {"rows": 24, "cols": 80},
    "create_context": {"language": "bash"},
    "create_key": {"name": "intruder"},
    "make_folder": {"path": "intruder"},
    "move_file": {"from": "secret.txt", "to": "taken.txt"},
    "chmod_file": {"path": "secret.txt", "mode": "777"},
    "create_file_url": {"path": "secret.txt", "method": "download"},
}
QUERIES = {
    name: {"path": "secret.txt"}
    for name in (
        "read_file",
        "write_file",
        "delete_file",
        "list_files",
        "stat_file",
        "read_archive",
        "write_archive",
        "watch_files",
    )
}
DOCUMENT = raw_document()


def operations(*, with_ids):
    for path, methods in DOCUMENT["paths"].items():
        if path not in OPEN_PATHS and (bool(PARAMETER.search(path)) or not with_ids):
            for method, operation in methods.items():
                yield method.upper(), path, operation["operationId"]


@pytest.fixture(scope="module")
def owner(make_tenant):
    return make_tenant("owner", 3)


@pytest.fixture(scope="module")
def intruder(make_tenant):
    return make_tenant("intruder", 3)


@pytest.fixture(scope="module")
def belongings(owner):
    """A sandbox of the owner that runs and one that has ended, by the name of each path parameter."""
    found = []
    for ended in (False, True):
        made = owner.make(
            "/v1/sandboxes", {"labels": {"name": SECRET}, "env": {"TOKEN": SECRET}, "timeout_s": 600}
        )
        sandbox_id = made["id"]
        owner.http.put(f"/v1/sandboxes/{sandbox_id}/files", params={"path": "secret.txt"}, content=SECRET)
        exec_id = owner.run(sandbox_id, f"print({SECRET!r})")["id"]
        context_id = owner.make(f"/v1/sandboxes/{sandbox_id}/contexts", {"cwd": "/tmp"})["id"]
        key_id = owner.make("/v1/apikeys", {"name": SECRET})["id"]
        if ended:
            owner.http.post(f"/v1/sandboxes/{sandbox_id}/stop")
        ids = {"sandbox_id": sandbox_id, "exec_id": exec_id, "context_id": context_id, "key_id": key_id}
        found.append(ids)
    return found


def state_of(owner, belongings):
    """What an intruder must neither see nor change."""
    state = []
    for ids in belongings:
        sandbox = owner.http.get(f"/v1/sandboxes/{ids['sandbox_id']}").json()
        sandbox.pop("last_active_at")
        execs = owner.http.get(f"/v1/sandboxes/{ids['sandbox_id']}/execs").json()["data"]
        contexts = owner.http.get(f"/v1/sandboxes/{ids['sandbox_id']}/contexts").json()
        state.append((sandbox, [item["id"] for item in execs], contexts))
    keys = owner.http.get("/v1/apikeys", params={"limit": 100}).json()["data"]
    return state, [(key["id"], key["revoked_at"]) for key in keys]


def unknown(ids):
    return {name: value.partition("_")[0] + "_" + "0" * 34 for name, value in ids.items()}


def send(http, method, path, operation_id, ids, headers=None):
    return http.request(
        method,
        PARAMETER.sub(lambda match: ids[match[1]], path),
        params=QUERIES.get(operation_id),
        json=BODIES.get(operation_id),
        headers=headers,
    )


@pytest.mark.docker
def test_every_parameter_of_a_path_is_tried(belongings):
    known = set(belongings[0])
    assert {name for _, path, _ in operations(with_ids=True) for name in PARAMETER.findall(path)} <= known


@pytest.mark.docker
def test_another_projects_ids_are_404_everywhere(tell, owner, intruder, belongings):
    before = state_of(owner, belongings)
    mine = {"sandbox_id": intruder.sandbox()}
    tried = 0
    for (method, path, name), ids in itertools.product(operations(with_ids=True), belongings):
        response = send(intruder.http, method, path, name, ids)
        assert response.status_code == 404, (
            f"{method} {path} answered {response.status_code}: {response.text}"
        )
        # Word for word the answer to an id that nobody has, so that it does not even tell that there is one.
        nobodys = unknown(ids)
        made_up = send(intruder.http, method, path, name, nobodys)
        text = response.text
        for parameter, value in ids.items():
            text = text.replace(value, nobodys[parameter])
        assert text == made_up.text, f"{method} {path}"
        assert response.headers.keys() == made_up.headers.keys(), f"{method} {path}"
        assert SECRET not in response.text
        tried += 1
        if len(PARAMETER.findall(path)) > 1:
            # Of two ids the first may well be the intruder's own.
            mixed = send(intruder.http, method, path, name, {**ids, **mine})
            assert mixed.status_code == 404, f"{method} {path}: {mixed.status_code} {mixed.text}"
            tried += 1
    tell(f"{tried} requests with foreign ids over every path and method, all 404")
    assert state_of(owner, belongings) == before


@pytest.mark.docker
def test_filters_show_nothing_of_another_project(tell, intruder, belongings):
    tried = 0
    for ids in belongings:
        for path, name, value in (
            ("/v1/events", "sandbox_id", ids["sandbox_id"]),
            ("/v1/audit", "resource_id", ids["sandbox_id"]),
            ("/v1/audit", "resource_id", ids["key_id"]),
            ("/v1/sandboxes", "label", f"name={SECRET}"),
            ("/v1/sandboxes", "after", ids["sandbox_id"]),
        ):
            query = {name: value, **({"status": "all"} if path == "/v1/sandboxes" else {})}
            response = intruder.http.get(path, params=query)
            assert response.status_code == 200, response.text
            assert SECRET not in response.text
            assert all(known not in response.text for known in ids.values()), path
            tried += 1
    tell(f"{tried} lists filtered by foreign ids, nothing of them shown")


@pytest.mark.docker
@pytest.mark.parametrize("credential", ["revoked", "none", "wrong scheme"])
def test_without_a_good_key_it_is_401_everywhere(tell, owner, belongings, credential):
    before = state_of(owner, belongings)
    made = owner.make("/v1/apikeys", {"name": "short-lived"})
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert owner.http.get("/v1/apikeys/current", headers=headers).status_code == 200
    assert owner.http.delete(f"/v1/apikeys/{made['id']}").status_code == 200
    headers = {
        "revoked": headers,
        "none": {"Authorization": ""},
        "wrong scheme": {"Authorization": f"Basic {owner.key}"},
    }[credential]
    tried = 0
    paths = sorted({path for _, path, _ in operations(with_ids=False)})
    names = {(method, path): name for method, path, name in operations(with_ids=False)}
    for method, path in itertools.product(METHODS, paths):
        response = send(owner.http, method, path, names.get((method, path)), belongings[0], headers)
        assert response.status_code == 401, f"{method} {path}: {response.status_code}"
        assert SECRET not in response.text
        tried += 1
    tell(f"{tried} requests over every path and method, all 401 ({credential} key)")
    after_state, after_keys = state_of(owner, belongings)
    assert after_state == before[0]
    assert [key for key in after_keys if key[0] != made["id"]] == before[1]
