"""Files of a sandbox over REST: bytes as they are, in one step, never outside of what the tenant may."""

import os

import pytest

pytestmark = pytest.mark.docker


def url(sandbox_id: str) -> str:
    return f"/v1/sandboxes/{sandbox_id}/files"


def test_bytes_come_back_as_they_went(client, sandbox_id):
    data = os.urandom(3_000_000)
    put = client.put(url(sandbox_id), params={"path": "deep/er/data.bin"}, content=data)
    assert put.status_code == 201
    assert put.json() == {"object": "sandbox.file", "path": "deep/er/data.bin", "size": len(data)}
    got = client.get(url(sandbox_id), params={"path": "/home/user/deep/er/data.bin"})
    assert got.status_code == 200
    assert got.content == data
    assert got.headers["content-length"] == str(len(data))
    assert got.headers["x-content-type-options"] == "nosniff"


def test_writing_again_replaces_and_keeps_the_mode(client, sandbox_id):
    client.put(url(sandbox_id), params={"path": "run.sh"}, content=b"echo one")
    client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"command": "chmod 755 run.sh"})
    assert client.put(url(sandbox_id), params={"path": "run.sh"}, content=b"echo two").status_code == 200
    result = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"command": ["./run.sh"]}).json()
    assert (result["status"], result["exit_code"]) == ("failed", 126)  # no interpreter line, but executable
    result = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"command": "./run.sh; ls -A"}).json()
    # Nothing but the file: what it was written to first has taken its name.
    assert result["stdout"].split() == ["two", "run.sh"]


def test_an_empty_file(client, sandbox_id):
    assert client.put(url(sandbox_id), params={"path": "empty"}, content=b"").json()["size"] == 0
    assert client.get(url(sandbox_id), params={"path": "empty"}).content == b""


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("nothing", 404, "file_not_found"),
        ("../../nothing", 404, "file_not_found"),
        ("/etc/shadow", 403, "file_forbidden"),
        ("/proc/1/environ", 403, "file_forbidden"),
        ("/run/e80/config.json", 403, "file_forbidden"),
        ("/run/e80/agent.sock", 403, "file_forbidden"),
        ("/home/user", 400, "is_directory"),
        ("/dev/null", 400, "not_regular"),
        ("x" * 300, 400, "bad_path"),
        ("a\u0000b", 400, "invalid_request"),
    ],
)
def test_what_cannot_be_read_says_why(client, sandbox_id, path, status, code):
    answer = client.get(url(sandbox_id), params={"path": path})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["param"] == "path"


def test_a_file_of_the_kernel_has_content_although_it_has_no_size(client, sandbox_id):
    got = client.get(url(sandbox_id), params={"path": "/proc/version"})
    assert got.content.startswith(b"Linux version")


def test_a_path_below_a_file_says_so(client, sandbox_id):
    answer = client.put(url(sandbox_id), params={"path": "/etc/hostname/x"}, content=b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_directory")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/etc/passwd", 403),
        ("/opt/e80/x", 403),
        ("/run/e80/x", 403),
        ("../../usr/bin/x", 403),
        ("/proc/x", 403),
    ],
)
def test_nothing_outside_the_workspace_can_be_written(client, sandbox_id, path, status):
    answer = client.put(url(sandbox_id), params={"path": path}, content=b"x")
    assert answer.status_code == status, answer.text
    assert repr(path)[:-1] in answer.json()["error"]["message"]


def test_a_fifo_does_not_hang_the_reader(client, sandbox_id):
    client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"command": "mkfifo pipe"})
    assert client.get(url(sandbox_id), params={"path": "pipe"}).status_code == 400


def test_a_full_disk_is_said_and_loses_nothing(client):
    sandbox_id = client.post("/v1/sandboxes", json={"disk_size_mb": 16}).json()["id"]
    try:
        client.put(url(sandbox_id), params={"path": "keep"}, content=b"old")
        refused = client.put(url(sandbox_id), params={"path": "keep"}, content=b"x" * 40_000_000)
        assert refused.status_code == 507
        assert "16 MB" in refused.json()["error"]["message"]
        assert client.get(url(sandbox_id), params={"path": "keep"}).content == b"old"
        run = {"command": "dd if=/dev/zero of=big bs=1M; ls -A; rm big; echo after > free && cat free"}
        result = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json=run).json()
        assert "No space left on device" in result["stderr"]
        assert result["stdout"].endswith("after\n")
        assert ".part" not in result["stdout"]
    finally:
        client.delete(f"/v1/sandboxes/{sandbox_id}")


def test_inodes_have_a_quota(client, sandbox_id):
    code = "import itertools\nfor i in itertools.count(): open(f'/tmp/{i}', 'w').close()"
    result = client.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code, "timeout_s": 60}).json()
    assert result["error"]["name"] == "OSError"
    assert "No space left" in result["error"]["value"]


def test_an_upload_that_breaks_off_leaves_the_old_file(client, sandbox_id):
    client.put(url(sandbox_id), params={"path": "doc"}, content=b"old")

    def half():
        yield b"x" * 100_000
        raise RuntimeError("the client dies")

    with pytest.raises(RuntimeError, match="the client dies"):
        client.put(url(sandbox_id), params={"path": "doc"}, content=half())
    assert client.get(url(sandbox_id), params={"path": "doc"}).content == b"old"
