"""What a client says of itself does not get into the trail as a fact."""

import pytest

from tests.conftest import Daemon

pytestmark = pytest.mark.docker

LIES = {
    "X-Forwarded-For": "6.6.6.6",
    "Forwarded": "for=6.6.6.6",
    "X-Real-IP": "6.6.6.6",
    "X-Sandboxd-Forwarded": "1",
    "X-Request-Id": '1","actor":"root',
}


def newest(http) -> dict:
    entry: dict = http.get("/v1/audit", params={"limit": 1}).json()["data"][0]
    return entry


def test_a_client_cannot_say_where_it_comes_from(daemon, client):
    answer = client.post("/v1/apikeys", json={"name": '","actor":"root'}, headers=LIES)
    assert answer.status_code == 201, answer.text
    entry = newest(client)
    assert (entry["resource_id"], entry["client"]) == (answer.json()["id"], "127.0.0.1")
    assert entry["actor"].startswith("key_")
    assert entry["request_id"] == answer.headers["x-request-id"]
    assert entry["request_id"].startswith("req_")


def test_a_proxy_that_the_operator_names_is_believed_for_what_it_saw(own_daemon: Daemon):
    own_daemon.stop()
    own_daemon.start(SANDBOXD_TRUSTED_PROXIES="127.0.0.1")
    with own_daemon.client() as http:
        # The client wrote the first, the proxy added the second.
        http.post("/v1/apikeys", json={"name": "a"}, headers={"X-Forwarded-For": "6.6.6.6, 10.0.0.7"})
        assert newest(http)["client"] == "10.0.0.7"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nobody_changes_the_trail(client, method):
    entry = newest(client)
    for path in ("/v1/audit", f"/v1/audit/{entry['id']}"):
        assert client.request(method, path, json={"actor": "root"}).status_code in (404, 405)
    assert newest(client) == entry
