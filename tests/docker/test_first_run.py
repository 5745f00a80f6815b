"""The main path, end to end: a sandbox is made, Python runs in it, it is gone."""

import httpx2
import pytest

pytestmark = pytest.mark.docker


def test_code_runs_and_the_sandbox_ends(client: httpx2.Client) -> None:
    created = client.post("/v1/sandboxes", json={})
    assert created.status_code == 201
    sandbox_id = created.json()["id"]
    result = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": "print(6*7)"}).json()
    assert (result["status"], result["exit_code"], result["stdout"]) == ("completed", 0, "42\n")
    stopped = client.post(f"/v1/sandboxes/{sandbox_id}/stop", json={}).json()
    assert (stopped["status"], stopped["termination_reason"]) == ("stopped", "user")
    refused = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": "print(1)"})
    assert refused.status_code == 409
    assert "user" in refused.json()["error"]["message"]
