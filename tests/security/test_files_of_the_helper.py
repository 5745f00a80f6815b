"""The helper that handles files is a copy of the agent, whose memory holds the link's key: no path leads into
it."""

import base64
import json
from contextlib import suppress

import httpx2
import pytest

pytestmark = pytest.mark.docker

LINKS = {
    "mem": "/proc/self/mem",
    "maps": "/proc/thread-self/maps",
    "status": "/proc/self/task/../status",
    "self": "/proc/self",
    "fd": "/dev/fd",
    "twice": "self/maps",
    "up": "../../proc/self/smaps",
}
READ = [
    *LINKS.values(),
    *LINKS,
    "self/environ",
    "self/auxv",
    "self/stat",
    "self/cmdline",
    "self/net/unix/../../maps",
    "/proc/self/root/proc/self/maps",
    "/proc/self/cwd/../../proc/self/maps",
    "/proc//self/./maps",
    "/dev/fd/../maps",
    "/dev/fd/3",
    "/dev/stdin",
    "/dev/stdout",
    "/dev/stderr",
    "/proc/self/fd/0",
    "/proc/self/fd/3",
    "/proc/self/map_files",
    "/proc/self/ns/user",
    "/proc/self/syscall",
]


@pytest.fixture
def links(attacker):
    names = json.dumps(LINKS)
    attacker.run(
        f"import os\nfor name, target in {names}.items():\n"
        "    os.path.lexists(name) or os.symlink(target, name)"
    )


def test_nothing_of_the_helper_can_be_read(arena, attacker, links):
    base = f"/v1/sandboxes/{attacker.id}/files"
    key = bytes.fromhex(json.loads((attacker.link_dir / "config.json").read_bytes())["key"])
    for path in READ:
        for query in ({"path": path}, {"path": path, "limit": 1000}):
            route = base + ("/list" if "limit" in query else "")
            for part in ({}, {"Range": "bytes=0-"}, {"Range": "bytes=4194304-8388608"}):
                answer = arena.client.get(route, params=query, headers=part)
                assert answer.status_code in (400, 403, 404), (path, query, answer.text)
                assert key not in answer.content
                assert key.hex().encode() not in answer.content
    for path in ("/proc/self", "/proc/thread-self", "/dev/fd", "self", "fd"):
        for route in (f"{base}/archive", f"{base}/watch"):
            answer = arena.client.get(route, params={"path": path})
            assert answer.status_code in (400, 403), (path, answer.text)
    arena.assert_unharmed()


def test_nothing_of_the_helper_can_be_written(arena, attacker, links):
    base = f"/v1/sandboxes/{attacker.id}/files"
    for path in READ:
        for answer in (
            arena.client.put(base, params={"path": path + "/x"}, content=b"x"),
            arena.client.put(f"{base}/archive", params={"path": path}, content=b"x"),
            arena.client.post(f"{base}/mkdir", json={"path": path + "/x"}),
            arena.client.post(f"{base}/move", json={"from": path + "/mem", "to": "taken"}),
        ):
            assert answer.status_code in (400, 403, 404, 409), (path, answer.text)
    for path in ("/proc/self/mem", "/proc/self/oom_score_adj", "/proc/self/comm", "/proc/1/mem", "/dev/null"):
        for answer in (
            arena.client.put(base, params={"path": path}, content=b"1"),
            arena.client.post(f"{base}/chmod", json={"path": path, "mode": "777"}),
            arena.client.delete(base, params={"path": path}),
        ):
            assert answer.status_code in (400, 403, 404, 409), (path, answer.text)
    arena.assert_unharmed()


def test_what_belongs_to_the_agent_alone_stays_with_it(arena, attacker):
    base = f"/v1/sandboxes/{attacker.id}/files"
    for path in (
        "/run/e80/config.json",
        "/run/e80/agent.sock",
        "/proc/1/mem",
        "/proc/1/environ",
        "/etc/shadow",
    ):
        assert arena.get(path).status_code == 403, path
    assert arena.client.get(f"{base}/archive", params={"path": "/run/e80"}).status_code == 403
    attacker.run("import os\nos.path.lexists('run') or os.symlink('/run/e80', 'run')")
    assert arena.client.get(f"{base}/archive", params={"path": "run"}).status_code == 403
    assert arena.get("run/config.json").status_code == 403
    assert arena.client.put(base, params={"path": "run/config.json"}, content=b"x").status_code == 403
    moved = arena.client.post(f"{base}/move", json={"from": "run/agent.sock", "to": "/tmp/sock"})
    assert moved.status_code in (400, 403)


def test_nothing_that_is_opened_can_hold_a_request_up(arena, attacker):
    attacker.run(
        "import os\nos.makedirs('d', exist_ok=True)\nfor name in ('pipe', 'd/pipe'):\n"
        "    os.path.lexists(name) or os.mkfifo(name)"
    )
    base = f"/v1/sandboxes/{attacker.id}/files"
    for path in ("pipe", "/dev/tty", "/dev/ptmx", "/dev/random", "/dev/zero", "/dev/full", "/proc/kmsg"):
        answer = arena.get(path)
        assert answer.status_code in (400, 403, 404), path
        assert arena.client.get(f"{base}/list", params={"path": path}).status_code in (400, 403, 404)
    assert arena.put("pipe", b"x").status_code == 400
    got = arena.client.get(f"{base}/archive", params={"path": "d"})
    assert (got.status_code, b"pipe" in got.content) == (200, False)
    named = base64.b64encode(b"pipe").decode()
    assert arena.client.post(f"{base}/chmod", json={"path_base64": named, "mode": "600"}).status_code == 200
    # Whoever looks through the home after this must not wait for a writer.
    attacker.run("import os\nos.remove('pipe')\nos.remove('d/pipe')")
    arena.assert_unharmed()


def test_a_folder_that_is_swapped_for_a_link_leads_nowhere_new(arena, attacker):
    """While a tree is deleted, packed and written to, the tenant swaps a folder for a link to elsewhere. All
    is done with the tenant's own rights, so there is nothing to win: what only root may is untouched."""
    swap = (
        "import os, time\nos.makedirs('race/a', exist_ok=True)\nend = time.time() + 2\n"
        "while time.time() < end:\n"
        "    for make in (lambda: os.rename('race/a', 'race/b'), lambda: os.symlink('/run/e80', 'race/a'),\n"
        "                 lambda: os.unlink('race/a'), lambda: os.rename('race/b', 'race/a'),\n"
        "                 lambda: os.makedirs('race/a')):\n"
        "        try: make()\n        except OSError: pass\n"
    )
    base = f"/v1/sandboxes/{attacker.id}/files"
    before = sorted(item.name for item in attacker.link_dir.iterdir())
    running = attacker.in_background(swap, timeout_s=30)
    key = json.loads((attacker.link_dir / "config.json").read_bytes())["key"].encode()
    while not running.over:
        with suppress(httpx2.RemoteProtocolError):  # what changes while it is packed may break it off
            assert key not in arena.client.get(f"{base}/archive", params={"path": "race"}).content
        for answer in (
            arena.put("race/a/config.json", b"x"),
            arena.get("race/a/config.json"),
            arena.client.delete(base, params={"path": "race/a", "recursive": "true"}),
        ):
            assert answer.status_code < 500, answer.text
            assert key not in answer.content
    assert sorted(item.name for item in attacker.link_dir.iterdir()) == before
    arena.assert_unharmed()
