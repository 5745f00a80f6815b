"""HostDoS: using up what the host has, by memory, processes, disk or the daemon's patience."""

import json
import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import Daemon
from tests.security.arena import Box, Running, until
from tests.security.conftest import new_box

pytestmark = pytest.mark.docker

MEBI = 1024 * 1024


def limit_mb(box: Box) -> int:
    return int(box.facts["HostConfig"]["Memory"]) // MEBI


MEMORY_BOMBS = {
    "one process": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "many small ones that look harmless": """
import os
for _ in range(100):
    if os.fork() == 0:
        open("/proc/self/oom_score_adj", "w").write("500")
        x = []
        for _ in range(20): x.append(bytearray(1 << 20))
        os.pause() if hasattr(os, "pause") else __import__("signal").pause()
__import__("signal").pause()
""",
    "memory files": """
import os
while True:
    fd = os.memfd_create("x")
    for _ in range(64): os.write(fd, b"x" * (1 << 20))
""",
    "unix sockets": """
import os, socket, time
keep = []
for _ in range(200):
    if os.fork() == 0:
        while True:
            try: a, b = socket.socketpair()
            except OSError: time.sleep(1000)
            keep.append((a, b)); a.setblocking(False)
            try:
                while True: a.send(b"x" * 65536)
            except OSError: pass
time.sleep(1000)
""",
    "pipes": """
import fcntl, os, time
for _ in range(100):
    if os.fork() == 0:
        while True:
            try: reader, writer = os.pipe()
            except OSError: time.sleep(1000)
            try: fcntl.fcntl(writer, 1031, 1 << 20)
            except OSError: pass
            os.set_blocking(writer, False)
            try:
                while True: os.write(writer, b"x" * 65536)
            except OSError: pass
time.sleep(1000)
""",
}


@pytest.mark.parametrize("bomb", MEMORY_BOMBS)
def test_memory_is_bounded_and_whose_it_was_pays(arena, bomb):
    host_before = psutil.virtual_memory().available
    result = arena.attacker.run(MEMORY_BOMBS[bomb], timeout_s=4)
    assert (result["status"], result["signal"]) == ("oom", "SIGKILL"), result
    used = host_before - psutil.virtual_memory().available
    assert used < (limit_mb(arena.attacker) + 1024) * MEBI
    arena.assert_unharmed()
    assert arena.attacker.status() == "running"


def test_memory_that_outlives_its_process(arena):
    """SysV segments, queues and semaphores stay when who made them has ended; so they are few, and small."""
    facts = arena.attacker.ask(
        """
segments = queues = 0
for _ in range(10):
    if call(29, 0, 32 << 20, 0o1600) == "OK": segments += 1
while queues < 1000 and call(68, 0, 0o1600) == "OK": queues += 1
print(json.dumps([segments, queues]))
"""
    )
    assert facts[0] <= 2
    assert facts[1] <= 64
    left = arena.attacker.ask("print(json.dumps(open('/proc/sysvipc/shm').read().count('\\n') - 1))")
    assert left == 0
    arena.attacker.run(command="ipcrm -a || true")
    arena.assert_unharmed()


NETWORK_BUFFERS = """
import os, socket, time
def fill():
    listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(100)
    keep = []
    for _ in range(200):
        near = socket.socket(); near.connect(listener.getsockname())
        far, _ = listener.accept()
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); datagram.bind(("127.0.0.1", 0))
        keep += [near, far, datagram]
        for sock in (near, far):
            sock.setblocking(False)
            try:
                while True: sock.send(b"x" * 65536)
            except OSError: pass
        for _ in range(8):
            try: datagram.sendto(b"x" * 60000, datagram.getsockname())
            except OSError: pass
    time.sleep(1000)
for _ in range(8):
    if os.fork() == 0:
        fill()
time.sleep(1000)
"""


def test_buffers_of_network_sockets_are_bounded(arena):
    """They come out of what the host has for all its connections, those of the daemon among them."""
    before = _network_pages()
    running = arena.attacker.in_background(NETWORK_BUFFERS, timeout_s=5)
    peak = 0

    def watch() -> bool:
        nonlocal peak
        peak = max(peak, _network_pages() - before)
        return running.over

    assert until(watch, 30)
    assert running.result()["status"] in ("timed_out", "oom")
    assert 0 < peak * os.sysconf("SC_PAGE_SIZE") < max(limit_mb(arena.attacker), 128) * MEBI
    arena.assert_unharmed()


def test_memory_file_systems_are_bounded(arena):
    answers = arena.attacker.ask(
        """
def fill(path):
    with open(path, "wb", buffering=0) as file:
        while True:
            if not file.write(b"x" * (1 << 20)): break
def many(folder):
    for number in range(1_000_000):
        os.close(os.open("%s/n%d" % (folder, number), os.O_CREAT | os.O_WRONLY))
answers = [attempt(fill, "/dev/shm/big"), os.stat("/dev/shm/big").st_size >> 20]
os.unlink("/dev/shm/big")
answers += [attempt(many, "/dev/shm"), len(os.listdir("/dev/shm"))]
for name in os.listdir("/dev/shm"): os.unlink("/dev/shm/" + name)
print(json.dumps(answers))
""",
        timeout_s=30,
    )
    assert answers[0] == answers[2] == "ENOSPC"
    assert answers[1] <= 64
    assert answers[3] <= 4096
    arena.assert_unharmed()


def test_disk_is_bounded_and_a_full_one_hinders_nothing(arena, engine):
    box = new_box(arena.client, engine, disk_size_mb=32)
    workspace = _workspace(box)
    fill = """
import os
def fill(path, size):
    try:
        with open(path, "ab", buffering=0) as file:
            while True: file.write(b"x" * size)
    except OSError as error:
        print(error.errno)
for size in (1 << 20, 4096, 1):
    fill("/tmp/big", size); fill("big", size)
sparse = open("sparse", "wb")
sparse.truncate(1 << 40)
"""
    result = box.run(fill, timeout_s=30)
    assert (result["status"], set(result["stdout"].split())) == ("completed", {"28"})
    assert workspace.stat().st_blocks * 512 <= 33 * MEBI
    box.assert_answers()
    # Output beyond the cap has nowhere to go; the exec ends as it would have.
    result = box.run("print('x' * 6_000_000)", timeout_s=20)
    assert (result["status"], result["truncated"]) == ("completed", True)
    box.assert_answers()
    arena.client.post(f"/v1/sandboxes/{box.id}/stop")
    arena.neighbour.assert_answers()


def test_files_and_folders_are_bounded(arena, engine):
    box = new_box(arena.client, engine, disk_size_mb=32)
    code = """
made = 0
def many():
    global made
    for number in range(1_000_000):
        os.mkdir("d%d" % number) if number % 2 else os.symlink("x", "l%d" % number)
        made += 1
print(json.dumps([attempt(many), made]))
"""
    answer, made = box.ask(code, timeout_s=30)
    assert answer == "ENOSPC"
    assert made < 70_000
    box.assert_answers()
    arena.client.post(f"/v1/sandboxes/{box.id}/stop")
    arena.neighbour.assert_answers()


def test_a_flood_of_output_is_cut(arena, daemon):
    before = _daemon_rss(daemon)
    flood = "import os\nwhile True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)"
    result = arena.attacker.run(flood, timeout_s=2)
    assert (result["status"], result["truncated"]) == ("timed_out", True)
    assert len(result["stdout"]) + len(result["stderr"]) <= 4 * MEBI
    assert _daemon_rss(daemon) - before < 128 * MEBI
    assert arena.attacker.facts["LogPath"] == ""
    arena.attacker.run(command="rm -rf ~/.8080")
    arena.assert_unharmed()


@pytest.mark.parametrize("stream", [False, True])
def test_a_flood_of_tiny_writes_keeps_nobody_waiting(arena, stream):
    """Each write a record of its own is what a pipe in packet mode gives."""
    flood = """
import fcntl, os
fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_DIRECT)
while True: os.write(1, b'x')
"""
    body = {"code": flood, "timeout_s": 1.5, "stream": stream}
    running = [
        arena.attacker.in_background(**body) if not stream else _background_stream(arena.attacker, body)
        for _ in range(2)
    ]
    assert _slowest_exec(arena.neighbour, lambda: all(item.over for item in running)) < 1.5
    arena.assert_unharmed()


def test_readers_that_do_not_read_cost_nothing(arena, daemon):
    """Streams of a flood, opened and left: the daemon keeps a bounded piece of each."""
    before = _daemon_rss(daemon)
    flood = json.dumps(
        {"code": "import os\nwhile True: os.write(1, b'x' * 65536)", "timeout_s": 4, "stream": True}
    )
    host, port = daemon.base_url.removeprefix("http://").split(":")
    connections = []
    for _ in range(16):
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            f"POST /v1/sandboxes/{arena.attacker.id}/exec HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {daemon.api_key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(flood)}\r\n\r\n{flood}".encode()
        )
        connections.append(connection)
    assert until(lambda: len(arena.attacker.tenants()) >= 16, 10)
    deadline = time.monotonic() + 3
    assert _slowest_exec(arena.neighbour, lambda: time.monotonic() > deadline) < 2
    assert _daemon_rss(daemon) - before < 128 * MEBI
    for connection in connections:
        connection.close()
    assert until(lambda: not arena.attacker.tenants(), 10)
    arena.attacker.run(command="rm -rf ~/.8080")
    arena.assert_unharmed()


def test_more_execs_at_once_than_there_is_room_for(arena):
    sleep = {"code": "import time; time.sleep(0.5)", "timeout_s": 30}
    running = [Running(lambda: arena.attacker.exec(**sleep)) for _ in range(64)]
    outcomes = []
    for item in running:
        answer = item.result()
        body = answer.json()
        outcomes.append(body["status"] if answer.status_code == 200 else body["error"]["code"])
    assert set(outcomes) <= {"completed", "too_many_execs"}
    assert outcomes.count("completed") >= 32
    arena.assert_unharmed()


def test_execs_start_while_a_bomb_has_taken_all_room(arena):
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass\n"
    running = arena.attacker.in_background(bomb, timeout_s=4)
    assert until(lambda: len(arena.attacker.tenants()) >= 250, 5)
    started = [arena.attacker.in_background("print(1)", timeout_s=20) for _ in range(40)]
    assert running.result()["status"] == "timed_out"
    statuses = [item.result()["status"] for item in started]
    assert set(statuses) == {"completed"}, statuses
    arena.assert_unharmed()


def test_a_request_too_large_for_the_link_is_refused(arena):
    answer = arena.attacker.exec(command=["echo"] + ["x" * 100_000] * 8)
    assert answer.status_code == 400
    assert "too large" in answer.json()["error"]["message"]
    answer = arena.attacker.exec(command=["echo", "x" * 200_000])
    assert answer.status_code == 400
    arena.assert_unharmed()


def test_stopping_is_quick_whatever_runs(arena, engine):
    box = new_box(arena.client, engine)
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass\n"
    running = box.in_background(bomb, timeout_s=60)
    assert until(lambda: len(box.tenants()) > 200, 10)
    started = time.monotonic()
    assert arena.client.post(f"/v1/sandboxes/{box.id}/stop").status_code == 200
    assert time.monotonic() - started < 5
    assert running.result()["status"] == "killed"
    assert not Path(f"/proc/{box.facts['State']['Pid']}").exists()
    arena.assert_unharmed()


def _network_pages() -> int:
    total = 0
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        words = line.split()
        if words[0] in ("TCP:", "UDP:"):
            total += int(words[words.index("mem") + 1])
    return total


def _workspace(box: Box) -> Path:
    home = next(item["Source"] for item in box.facts["Mounts"] if item["Destination"] == "/home/user")
    return Path(home).parent.parent / "workspace.ext4"


def _daemon_rss(daemon: Daemon) -> int:
    return int(psutil.Process(daemon.process.pid).memory_info().rss)


def _background_stream(box: Box, body: dict):
    def read() -> None:
        with box.client.stream("POST", f"/v1/sandboxes/{box.id}/exec", json=body) as response:
            for _ in response.iter_raw():
                pass

    return Running(read)


def _slowest_exec(box: Box, over) -> float:
    slowest = 0.0
    while not over():
        started = time.monotonic()
        assert box.run("print(1)", timeout_s=20)["status"] == "completed"
        slowest = max(slowest, time.monotonic() - started)
    return slowest
