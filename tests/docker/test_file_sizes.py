"""Big files, big folders, and transfers that do not come to their end: flat memory, and no false success."""

import os
import socket
import threading
import time

import docker
import httpx2
import psutil
import pytest

from tests.docker.scene import until
from tests.docker.test_file_names import Files, code

pytestmark = pytest.mark.docker

BIG = 160 * 1024 * 1024
# What a buffered file of that size would exceed many times over.
GROWTH = 32 * 1024 * 1024


@pytest.fixture
def files(client, sandbox_id):
    return Files(client, sandbox_id)


class Memory:
    """The most that a daemon and the helpers in a sandbox hold while something goes on."""

    def __init__(self, daemon, sandbox_id):
        self.daemon = psutil.Process(daemon.process.pid)
        first = docker.from_env().api.inspect_container(sandbox_id)["State"]["Pid"]
        self.agent = psutil.Process(first)
        self.growth = 0
        self.helper = 0
        self.helpers = set()

    def __enter__(self):
        self.before = self.daemon.memory_info().rss
        self.running = True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    def _sample(self):
        while self.running:
            self.growth = max(self.growth, self.daemon.memory_info().rss - self.before)
            for child in self.agent.children():
                try:
                    uids = child.uids()
                    if uids.real == 0 and uids.effective:
                        # Its own pages: the others are the agent's.
                        self.helper = max(self.helper, child.memory_full_info().uss)
                        self.helpers.add(child.pid)
                except psutil.Error:
                    continue
            time.sleep(0.01)


def stream(size):
    piece = os.urandom(1024 * 1024)
    for start in range(0, size, len(piece)):
        yield piece[: size - start]


def test_a_big_file_goes_both_ways_in_flat_memory(daemon, files, sandbox_id):
    """What goes through is never held: `deer-flow#4811` and `E2B#1433` tell of limits in memory and time."""
    files.put("path=warm", bytes(8_000_000))
    files.get("", "path=warm")
    with Memory(daemon, sandbox_id) as memory:
        answer = files.client.put(f"{files.base}/files?path=big", content=stream(BIG))
        assert (answer.status_code, answer.json()["size"]) == (201, BIG)
        with files.client.stream("GET", f"{files.base}/files?path=big") as got:
            assert sum(len(piece) for piece in got.iter_raw()) == BIG
        with files.client.stream("GET", f"{files.base}/files/archive?path=.") as got:
            assert sum(len(piece) for piece in got.iter_raw()) > BIG
    assert memory.helpers
    assert memory.growth < GROWTH
    assert memory.helper < GROWTH


def test_files_around_every_buffer_come_back_whole(files):
    """`OpenSandbox#1016`: uploads over 18 KB failed without a word."""
    for size in (0, 1, 18 * 1024 - 1, 18 * 1024, 18 * 1024 + 1, 65536, 262144, 262145, 1_048_577):
        data = os.urandom(size)
        answer = files.client.put(f"{files.base}/files?path=f", content=data)
        assert (answer.status_code, answer.json()["size"]) == (200 if size else 201, size)
        assert files.get("", "path=f").content == data
        assert files.run("stat -c %s f").strip() == str(size)


def raw(daemon, head, body):
    """Sends bytes and hangs up in the middle; what the server says to that is nobody's to read."""
    host, port = daemon.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head.encode() + body)
        time.sleep(0.2)


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("what", ["files?path=doc", "files/archive?path=."])
def test_a_request_cut_off_changes_nothing(daemon, files, framing, what):
    files.put("path=doc", b"old")
    key = f"Authorization: Bearer {daemon.api_key}"
    head = f"PUT {files.base}/{what} HTTP/1.1\r\nHost: x\r\n{key}\r\n{framing}\r\n\r\n"
    body = b"x" * 100_000
    if "chunked" in framing:
        body = b"186a0\r\n" + body + b"\r\n"
    raw(daemon, head, body)
    assert files.get("", "path=doc").content == b"old"
    assert until(lambda: files.run("ls -A") == "doc\n", 10)


def test_an_upload_leaves_nothing_when_its_helper_is_killed(files, sandbox_id):
    """The kernel may choose the helper when a sandbox is out of memory."""
    files.put("path=doc", b"old")
    agent = psutil.Process(docker.from_env().api.inspect_container(sandbox_id)["State"]["Pid"])

    def kill():
        for child in agent.children():
            uids = child.uids()
            if uids.real == 0 and uids.effective:
                child.kill()

    def body():
        yield b"x" * 300_000
        until(lambda: any(child.uids().real == 0 and child.uids().effective for child in agent.children()))
        kill()
        for _ in range(100):
            yield b"x" * 300_000

    answer = files.client.put(f"{files.base}/files?path=doc", content=body())
    assert answer.status_code == 502
    assert files.get("", "path=doc").content == b"old"
    assert files.run("ls -A") == "doc\n"


@pytest.mark.parametrize("verb", ["pause", "stop"])
def test_a_transfer_that_a_pause_or_stop_cuts_off_never_ends_well(client, files, verb):
    files.put("path=big", bytes(30_000_000))

    def body():
        yield b"x" * 300_000
        assert client.post(f"{files.base}/{verb}").status_code == 200
        for _ in range(100):
            yield b"x" * 300_000

    with (
        httpx2.Client(base_url=client.base_url, headers=client.headers, timeout=60) as other,
        other.stream("GET", f"{files.base}/files?path=big") as download,
    ):
        pieces = download.iter_raw()
        next(pieces)
        answer = files.client.put(f"{files.base}/files?path=new", content=body())
        with pytest.raises(httpx2.TransportError):
            for _ in pieces:
                pass
    expected = "sandbox_paused" if verb == "pause" else "sandbox_not_running"
    assert code(answer) == (409, expected)
    if verb == "pause":
        client.post(f"{files.base}/resume")
        assert files.names() == ["big"]


def test_a_file_that_changes_while_it_is_read_is_not_taken_for_whole(files):
    files.put("path=big", os.urandom(30_000_000))
    for change, spoilt in (
        ("truncate -s 1000000 big", True),
        ("truncate -s 30000000 big; echo x | dd of=big conv=notrunc status=none", True),
        ("echo more >> big", False),
        ("mv big was; cp was big", False),
    ):
        files.run("truncate -s 30000000 big; sync big")
        with files.client.stream("GET", f"{files.base}/files?path=big") as got:
            pieces = got.iter_raw()
            size = len(next(pieces))
            with httpx2.Client(base_url=files.client.base_url, headers=files.client.headers) as other:
                assert Files(other, files.base.rpartition("/")[2]).run(change) == ""
            try:
                size += sum(len(piece) for piece in pieces)
                whole = size == 30_000_000
            except httpx2.TransportError:
                whole = False
        assert whole is not spoilt, change


def test_a_full_quota_of_files_is_told_and_loses_nothing(client):
    sandbox_id = client.post("/v1/sandboxes", json={"disk_size_mb": 16}).json()["id"]
    files = Files(client, sandbox_id)
    try:
        files.put("path=keep", b"old")
        files.run("i=0; while : > /tmp/$i; do i=$((i+1)); done 2>/dev/null; true")
        for answer in (
            client.put(f"{files.base}/files?path=new", content=b"x"),
            client.put(f"{files.base}/files?path=keep", content=b"x"),
            files.post("mkdir", path="folder"),
        ):
            assert code(answer) == (507, "disk_full")
        assert files.get("", "path=keep").content == b"old"
        assert files.names() == ["keep"]
    finally:
        client.delete(f"/v1/sandboxes/{sandbox_id}")


def test_a_folder_of_many_names_is_listed_in_flat_memory(daemon, files, sandbox_id):
    count = 20_000
    made = f"import os\nos.mkdir('d')\nfor n in range({count}): os.mknod(f'd/{{n * 7919 % {count}:06d}}')"
    files.client.post(f"{files.base}/exec", json={"code": made, "timeout_s": 60})
    expected = [f"{number:06d}" for number in range(count)]
    with Memory(daemon, sandbox_id) as memory:
        assert files.names("path=d&limit=1000") == expected[:1000]
        assert files.names("path=d&limit=1000&after=019500") == expected[19501:]
        assert files.names("path=d&limit=3&after=0099995") == expected[10000:10003]
        assert files.get("/archive", "path=d").status_code == 200
        assert files.delete("path=d&recursive=true").status_code == 200
    assert memory.helper < GROWTH
    assert memory.growth < 2 * GROWTH
