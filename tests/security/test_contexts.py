"""Tenant code against the agent by the socket of a context's process, which they share."""

from collections.abc import Iterator

import pytest
from e80_agent import channel

from tests.security.arena import Box

pytestmark = pytest.mark.docker

# Its own end of the channel; what the process of a context reads and writes is in channel.py.
CHANNEL = f"""
import array, fcntl, os, socket, struct, termios, time
for name in os.listdir("/proc/self/fd"):
    try:
        if os.readlink("/proc/self/fd/" + name).startswith("socket:"):
            channel = socket.socket(fileno=os.dup(int(name)))
    except OSError:
        continue
def tell(kind, payload=b""):
    channel.sendall(struct.pack(">BI", kind, len(payload)) + payload)
def end(number):
    tell({channel.DONE}, struct.pack(">IIdI", number, 0, 0.0, 0))
def unread():
    size = array.array("i", [0])
    fcntl.ioctl(channel, termios.FIONREAD, size)
    return size[0]
"""


@pytest.fixture
def context(attacker: Box) -> Iterator[str]:
    url = f"/v1/sandboxes/{attacker.id}/contexts"
    made = attacker.client.post(url, json={"language": "python"})
    assert made.status_code == 201, made.text
    yield made.json()["id"]
    attacker.client.delete(f"{url}/{made.json()['id']}")


def test_descriptors_of_calls_do_not_pile_up_unread(attacker, context):
    """Descriptors on their way through a socket count for the agent's user, which is root, on the whole
    host: at the limit no agent of any sandbox could start Python any more. A context that ends calls without
    reading them may therefore hold one, and is ended at the next."""
    code = (
        CHANNEL
        + """
end(1)
told = 1
until = time.monotonic() + 20
while time.monotonic() < until:
    if 1 + unread() // 12 > told:  # 8 bytes and "pass"
        told += 1
        end(told)
    time.sleep(0.001)
"""
    )
    assert attacker.run(code, context=context)["status"] == "completed"
    assert attacker.run("pass", context=context)["status"] == "completed"
    assert attacker.run("pass", context=context)["signal"] == "SIGKILL"
    assert attacker.exec(code="pass", context=context).json()["error"]["code"] == "context_lost"


def test_results_that_hold_nothing_are_bounded_as_well(attacker, context):
    """Each costs the agent and the daemon something, however small."""
    code = (
        CHANNEL
        + f"""
empty = struct.pack(">BI", {channel.RESULT}, 0) * 200
for _ in range(150):
    channel.sendall(empty)
    answers = 0
    while answers < 200:
        answers += len(channel.recv(4096))
"""
    )
    results = attacker.run(code, context=context)["results"]
    assert len(results) < 25000
    assert "left out" in results[-1]["text/plain"]


@pytest.mark.parametrize(
    "said",
    [
        "channel.sendall(bytes([255]) * 4096)",
        f'channel.sendall(struct.pack(">BI", {channel.RESULT}, 2**32 - 1))',
        "end(7)",
        f'tell({channel.DONE}, b"")',
        f'tell({channel.DONE}, struct.pack(">IIdI", 1, 0, float("nan"), 0))',
        f'tell({channel.FAULT}, b"unknown code")',
        f"for _ in range(9000): tell({channel.RESULT})",
    ],
)
def test_what_no_process_of_ours_says_ends_the_context_and_nothing_else(attacker, context, said):
    result = attacker.run(CHANNEL + said + "\ntime.sleep(20)", context=context)
    assert (result["status"], result["signal"]) == ("failed", "SIGKILL")
    assert attacker.run("print(1)")["stdout"] == "1\n"


def test_no_process_left_is_no_want_of_bash(attacker):
    """A context that finds no process left says so, and that it may be tried again: not that there is no
    bash."""
    hog = """
import os, time
try:
    while os.fork():
        pass
except OSError:
    print("full", flush=True)
time.sleep(60)
"""
    url = f"/v1/sandboxes/{attacker.id}"
    hogging = attacker.exec(command=["python3", "-c", hog], background=True).json()["id"]
    try:
        with attacker.client.stream("GET", f"{url}/execs/{hogging}/events") as events:
            assert any("full" in line for line in events.iter_lines())
        made = attacker.client.post(f"{url}/contexts", json={"language": "bash"})
        assert made.status_code == 429, made.text
    finally:
        attacker.client.post(f"{url}/execs/{hogging}/signal", json={"signal": "SIGKILL"})
    attacker.assert_answers()
