"""Lateral: from one sandbox to another, or to anything else that listens on this host."""

import pytest

from tests.security.arena import until

pytestmark = pytest.mark.docker

# Lives in the neighbour for as long as the attacker tries; each line is something to be found.
BAIT = """
import ctypes, os, socket, time
listener = socket.socket(); listener.bind(("127.0.0.1", 31337)); listener.listen()
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0e80-bait"); abstract.listen()
libc = ctypes.CDLL(None)
segment = libc.shmget(0x0E80, 4096, 0o1666)
queue = libc.mq_open(b"/e80-bait", 0o102, 0o666, None)
open("/dev/shm/e80-bait", "w").close()
open("/tmp/e80-bait", "w").close()
open("/home/user/e80-bait", "w").close()
assert segment >= 0 and queue >= 0
while os.path.exists("/home/user/e80-bait"): time.sleep(0.05)
"""


@pytest.fixture
def bait(neighbour):
    running = neighbour.in_background(BAIT, timeout_s=30)
    assert until(
        lambda: (
            neighbour.client.get(
                f"/v1/sandboxes/{neighbour.id}/files", params={"path": "e80-bait"}
            ).status_code
            == 200
        ),
        5,
    )
    yield
    neighbour.run(command="rm -f e80-bait /tmp/e80-bait /dev/shm/e80-bait /dev/mqueue/e80-bait")
    assert running.result()["status"] == "completed"


FIND = """
import socket
def connect(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(1)
        return attempt(sock.connect, address)
print(json.dumps({
    "loopback": connect(socket.AF_INET, ("127.0.0.1", 31337)),
    "abstract socket": connect(socket.AF_UNIX, "\\0e80-bait"),
    "shared memory": attempt(lambda: call(29, 0x0E80, 0, 0) == "OK" or os.stat("/none")),
    "message queue": attempt(os.stat, "/dev/mqueue/e80-bait"),
    "memory file": attempt(os.stat, "/dev/shm/e80-bait"),
    "temporary file": attempt(os.stat, "/tmp/e80-bait"),
    "file": attempt(os.stat, "/home/user/e80-bait"),
}))
"""
EVERYTHING = [
    "loopback",
    "abstract socket",
    "shared memory",
    "message queue",
    "memory file",
    "temporary file",
    "file",
]


def test_nothing_of_the_neighbour_can_be_found(arena, bait):
    own = arena.neighbour.ask(FIND)
    assert own == dict.fromkeys(EVERYTHING, "OK"), "the bait is not there, so not finding it means nothing"
    found = arena.attacker.ask(FIND)
    assert found["loopback"] == found["abstract socket"] == "ECONNREFUSED"
    assert {found[name] for name in EVERYTHING[2:]} == {"ENOENT"}


def test_there_is_no_network(attacker):
    facts = attacker.ask(
        """
import socket
def connect(host, port):
    with socket.socket() as sock:
        sock.settimeout(2)
        return attempt(sock.connect, (host, port))
print(json.dumps({
    "interfaces": [name for _, name in socket.if_nameindex()],
    "routes": open("/proc/net/route").read().splitlines()[1:],
    "answers": [connect(host, 80) for host in (
        "1.1.1.1", "169.254.169.254", "172.17.0.1", "10.0.0.1", "100.64.0.1")],
    "datagram": attempt(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, b"x", ("8.8.8.8", 53)),
}))
"""
    )
    assert facts["interfaces"] == ["lo"]
    assert facts["routes"] == []
    assert set(facts["answers"]) == {"ENETUNREACH"}
    assert facts["datagram"] == "ENETUNREACH"


def test_the_daemon_cannot_be_reached(attacker, daemon):
    port = int(daemon.base_url.rsplit(":", 1)[1])
    answer = attacker.ask(
        f"import socket; print(json.dumps(attempt(socket.create_connection, ('127.0.0.1', {port}), 2)))"
    )
    assert answer == "ECONNREFUSED"


def test_each_sandbox_has_a_uid_of_its_own(arena):
    """Limits that the kernel counts per user (inotify, pipes, processes) are then not shared."""
    assert arena.attacker.uid != arena.neighbour.uid
    assert arena.attacker.ask("print(os.getuid())") == arena.attacker.uid
    assert arena.neighbour.ask("print(os.getuid())") == arena.neighbour.uid


def test_host_process_ids_mean_nothing_inside(arena):
    """Signals to the neighbour's processes by their ids on the host."""
    pids = [process.pid for process in arena.neighbour.processes()]
    answers = arena.attacker.ask(f"print(json.dumps([attempt(os.kill, pid, 9) for pid in {pids!r}]))")
    # EPERM: the number is one of the attacker's own agent, by chance.
    assert set(answers) <= {"ESRCH", "EPERM"}
    arena.assert_unharmed()
