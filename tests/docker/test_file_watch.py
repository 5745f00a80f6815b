"""Watching files: events while they happen, on the sandbox's own account, for as long as somebody listens."""

import json
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress

import httpx2
import pytest

from tests.docker.scene import until
from tests.docker.test_file_names import Files, code

pytestmark = pytest.mark.docker


@pytest.fixture
def files(client, sandbox_id):
    return Files(client, sandbox_id)


class Watch:
    """Reads a stream of events in a thread of its own."""

    def __init__(self, files, response):
        self.files = files
        self.response = response
        self.events = []
        self.ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            for line in self.response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(json.loads(line[6:]))
            self.ended = True
        except httpx2.TransportError:
            return  # the test has hung up

    def until(self, *wanted):
        """Waits for the last of these (type, path below home), and gives all that came until then."""
        base = "/home/user/"
        kind, path = wanted

        def found():
            seen = [(item["type"], item.get("path", "").removeprefix(base)) for item in list(self.events)]
            return seen if (kind, path) in seen else None

        return until(found, 10)

    def join(self):
        self._thread.join(10)
        assert self.ended


@contextmanager
def watching(files, query):
    with files.client.stream("GET", f"{files.base}/files/watch?{query}") as response:
        assert response.status_code == 200, response.read()
        watch = Watch(files, response)
        until(lambda: watch.events, 10)
        assert watch.events[0]["type"] == "watch.started"
        try:
            yield watch
        finally:
            # Closed alone it would live on for as long as the other thread waits for it.
            with suppress(OSError):
                response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def test_what_happens_in_a_folder_is_told(files):
    files.run("mkdir -p d/old e; touch d/there")
    with watching(files, "path=d") as watch:
        assert watch.events[0] == {
            "type": "watch.started",
            "sequence_number": 0,
            "path": "/home/user/d",
            "path_base64": None,
        }
        files.put("path=d/put", b"x")
        watch.until("file.created", "d/put")
        files.run("echo x >> d/there")
        watch.until("file.modified", "d/there")
        files.run("chmod 600 d/there; mv d/there d/here; mv d/here e/away; mv e/away d/back")
        files.run("rm d/back; rmdir d/old")
        watch.until("file.deleted", "d/here")
        watch.until("file.created", "d/back")
        watch.until("file.deleted", "d/back")
        watch.until("file.deleted", "d/old")
        moved = [item for item in watch.events if item["type"] == "file.moved"]
        assert [(item["from"][-5:], item["path"][-4:]) for item in moved] == [("there", "here")]
        files.put("path=d/put", b"again")
        watch.until("file.modified", "d/put")
        # The names that an upload has on its way are nobody's business.
        assert not [item for item in watch.events if "#" in item["path"] or ".part" in item["path"]]
        files.run("touch $'d/\\xff'")
        watch.until("file.created", "d/\ufffd")
        assert watch.events[-1]["path_base64"] or watch.events[-2]["path_base64"]
        numbers = [item["sequence_number"] for item in watch.events]
        assert numbers == sorted(numbers)
        files.run("touch e/outside d/last")
        assert not [path for _, path in watch.until("file.created", "d/last") if path.startswith("e/")]
        # What is watched goes, and the stream has a good end.
        files.run("rm -r d")
        watch.until("file.deleted", "d")
        watch.join()


def test_folders_below_are_watched_when_asked_for_also_those_made_later(files):
    files.run("mkdir -p d/a/b out")
    with watching(files, "path=d&recursive=true") as watch:
        files.run("touch d/a/b/one")
        watch.until("file.created", "d/a/b/one")
        files.run("mkdir -p d/new/deep && touch d/new/deep/two")
        watch.until("file.created", "d/new/deep/two")
        files.run("mv d/new d/renamed && touch d/renamed/deep/three")
        watch.until("file.created", "d/renamed/deep/three")
        files.run("mv d/renamed out/gone && sleep 0.2 && touch out/gone/deep/unseen && touch d/end")
        seen = watch.until("file.created", "d/end")
        assert ("file.deleted", "d/renamed") in seen
        assert not [path for _, path in seen if "unseen" in path]
    with watching(files, "path=d/end") as watch:
        files.run("echo x > d/end; mv d/end d/other")
        watch.until("file.deleted", "d/end")
        watch.join()


def test_events_that_were_lost_are_an_event(files):
    files.run("mkdir d")
    flood = (
        "import os\nfor n in range(150_000):\n"
        "    os.close(os.open(f'd/{n % 50}', os.O_CREAT)); os.unlink(f'd/{n % 50}')"
    )
    with files.client.stream("GET", f"{files.base}/files/watch?path=d") as response:
        # Nobody reads: the helper waits, and the kernel's queue fills up.
        lines = response.iter_lines()
        next(lines)
        done = files.client.post(f"{files.base}/exec", json={"code": flood, "timeout_s": 60}).json()
        assert done["status"] == "completed"
        for line in lines:
            if '"watch.overflow"' in line:
                break
        else:
            raise AssertionError("nothing was told of lost events")


def test_a_watch_ends_with_its_client_and_leaves_no_process(files):
    # Real uid root, effective uid the sandbox's user.
    helpers = "cat /proc/[0-9]*/status | grep -cP '^Uid:\\t0\\t[1-9]' || true"
    for _ in range(2):
        with watching(files, "path=."), watching(files, "path=.&recursive=true"):
            assert int(files.run(helpers).strip()) == 2
        until(lambda: int(files.run(helpers).strip()) == 0, 10)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(watching(files, "path=."))
        assert code(files.get("/watch", "path=.")) == (429, "too_many_file_operations")
    until(lambda: files.client.get(f"{files.base}/files/stat?path=.").status_code == 200, 5)


def test_a_watch_is_on_the_account_of_the_sandbox(files):
    """The kernel counts instances by uid: with root's, one tenant could take them from all others."""
    hold = (
        "import ctypes, time\nlibc = ctypes.CDLL(None)\nwhile libc.inotify_init1(0) >= 0: pass\n"
        "open('held', 'w').close()\ntime.sleep(60)"
    )
    started = files.client.post(f"{files.base}/exec", json={"code": hold, "background": True}).json()
    until(lambda: files.get("/stat", "path=held").status_code == 200, 20)
    refused = files.get("/watch", "path=.")
    assert code(refused) == (409, "busy")
    assert "inotify" in refused.json()["error"]["message"]
    files.client.post(f"{files.base}/execs/{started['id']}/signal", json={"signal": "SIGKILL"})

    def free():
        with files.client.stream("GET", f"{files.base}/files/watch?path=.") as response:
            return response.status_code == 200

    until(free, 10)


def test_what_cannot_be_watched_says_why(files):
    files.run("mkdir -m 0 locked; mkdir many && cd many && seq 2100 | xargs mkdir")
    assert code(files.get("/watch", "path=none")) == (404, "file_not_found")
    assert code(files.get("/watch", "path=locked")) == (403, "file_forbidden")
    assert code(files.get("/watch", "path=many&recursive=true")) == (400, "unsupported")
    assert code(files.get("/watch", "path=/proc/self")) == (403, "file_forbidden")


def test_a_watch_is_told_why_it_ends(client, files):
    with watching(files, "path=.") as watch:
        client.post(f"{files.base}/pause")
        watch.join()
        assert watch.events[-1]["error"]["code"] == "sandbox_paused"
    client.post(f"{files.base}/resume")
    with watching(files, "path=.") as watch:
        client.post(f"{files.base}/stop")
        watch.join()
        assert watch.events[-1]["error"]["code"] == "sandbox_not_running"
