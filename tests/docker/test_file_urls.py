"""Signed URLs on a live server: one file, one direction, for a while, without a key."""

from urllib.parse import urlsplit

import httpx2
import pytest

from tests.docker.test_file_names import Files, code, untouched

pytestmark = pytest.mark.docker
assert untouched  # a fixture


@pytest.fixture
def files(client, sandbox_id):
    return Files(client, sandbox_id)


@pytest.fixture
def anybody():
    """A client without a key."""
    with httpx2.Client(timeout=60) as http:
        yield http


def make(files, method="download", **body):
    answer = files.post("urls", method=method, **body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_a_url_downloads_and_another_uploads(daemon, files, anybody):
    data = bytes(range(256)) * 1000
    up = make(files, "upload", path="dir/a b&c.bin", expires_in_s=60)
    assert (up["object"], up["method"], up["path"]) == ("sandbox.file_url", "upload", "dir/a b&c.bin")
    assert up["url"].startswith(f"{daemon.base_url}/v1/sandboxes/")
    assert anybody.put(up["url"], content=data).status_code == 201
    down = make(files, path="dir/a b&c.bin")
    got = anybody.get(down["url"])
    assert (got.status_code, got.content) == (200, data)
    assert anybody.get(down["url"], headers={"Range": "bytes=5-6"}).content == data[5:7]
    # Each for its own direction, its own path, and nothing besides.
    assert anybody.get(up["url"]).status_code == 401
    assert anybody.put(down["url"], content=b"x").status_code == 401
    assert anybody.delete(down["url"]).status_code == 401
    assert anybody.put(up["url"] + "&mode=777", content=b"x").status_code == 401
    assert anybody.get(down["url"].replace("/files?", "/files/stat?")).status_code == 401
    assert anybody.get(down["url"].replace("a%20b", "a%20c")).status_code == 401
    assert code(anybody.get(down["url"][:-1])) == (401, "invalid_signature")
    bare = down["url"].partition("&expires")[0]
    assert code(anybody.get(bare)) == (401, "missing_api_key")
    assert files.get("/stat", "path=dir/a b%26c.bin").json()["size"] == len(data)
    raw = make(files, "upload", path_base64="/w==")
    assert anybody.put(raw["url"], content=b"1").status_code == 201
    assert files.run("ls -b $'\\xff'").strip() == r"\377"


def test_a_url_dies_with_its_key_and_with_its_sandbox(daemon, files, anybody):
    key = files.client.post("/v1/apikeys", json={"name": "short"}).json()
    files.put("path=a", b"1")
    with daemon.client() as other:
        other.headers["Authorization"] = f"Bearer {key['key']}"
        theirs = other.post(f"{files.base}/files/urls", json={"path": "a", "method": "download"}).json()[
            "url"
        ]
    mine = make(files, path="a")["url"]
    assert anybody.get(theirs).content == anybody.get(mine).content == b"1"
    files.client.post(f"/v1/apikeys/{key['id']}/revoke")
    assert code(anybody.get(theirs)) == (401, "invalid_signature")
    assert anybody.get(mine).status_code == 200
    files.client.post(f"{files.base}/stop")
    assert code(anybody.get(mine)) == (409, "sandbox_not_running")
    assert code(files.post("urls", path="a", method="download")) == (409, "sandbox_not_running")


def test_its_signature_is_in_no_log_and_no_audit(daemon, files, anybody):
    files.put("path=a", b"1")
    url = make(files, path="a")["url"]
    signature = url.rpartition("signature=")[2]
    assert anybody.get(url).status_code == 200
    assert anybody.get(url + "x").status_code == 401
    [entry] = files.client.get("/v1/audit", params={"action": "file_url.create", "limit": 1}).json()["data"]
    assert entry["resource_id"] == files.base.rpartition("/")[2]
    assert (entry["details"]["method"], entry["details"]["path"]) == ("download", "a")
    assert len(signature) == 64
    assert signature not in str(entry)
    assert signature not in daemon.log
    assert urlsplit(url).path in daemon.log


@pytest.mark.parametrize("host", ["evil/x", "a b", "user@host", "", "[::1]:99999999"])
def test_a_host_that_is_none_makes_no_url(untouched, host):
    answer = untouched.client.post(
        f"{untouched.base}/files/urls", json={"path": "a", "method": "download"}, headers={"Host": host}
    )
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"path": "a"},
        {"path": "a", "method": "delete"},
        {"path": "a", "method": "download", "expires_in_s": 0},
        {"path": "a", "method": "download", "expires_in_s": 604801},
        {"method": "download"},
    ],
)
def test_what_cannot_be_signed(untouched, body):
    assert code(untouched.client.post(f"{untouched.base}/files/urls", json=body)) == (400, "invalid_request")


def test_a_public_url_is_the_base_when_there_is_one(own_daemon, anybody):
    own_daemon.stop()
    own_daemon.start(SANDBOXD_PUBLIC_URL="https://files.example.org/api/")
    with own_daemon.client() as http:
        sandbox = http.post("/v1/sandboxes", json={}).json()["id"]
        answer = http.post(
            f"/v1/sandboxes/{sandbox}/files/urls", json={"path": "a", "method": "upload"}
        ).json()
        prefix = f"https://files.example.org/api/v1/sandboxes/{sandbox}/files?path=a&"
        assert answer["url"].startswith(prefix)
        # A proxy hands it on to where the API is.
        url = answer["url"].replace("https://files.example.org/api", own_daemon.base_url)
        assert anybody.put(url, content=b"1").status_code == 201
        # The secret lives in the store, and outlasts the process.
        own_daemon.stop()
        own_daemon.start()
        assert anybody.put(url, content=b"2").status_code == 200
