"""The place of the fights: an attacker, a neighbour that must not notice, and the host's view of both."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import httpx2

# A sweep has ended before the result is out; this is for the host to bury what it has killed.
BURIAL_S = 3.0
FIRST_UID = 200000

# For code that runs inside: raw system calls, with the name of the error or "OK".
SYSCALLS = """
import ctypes, errno, json, os, sys
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    ctypes.set_errno(0)
    result = _libc.syscall(ctypes.c_long(number), *[ctypes.c_long(item) for item in arguments])
    return "OK" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(function, *arguments):
    try:
        result = function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "OK"
"""


@dataclass(frozen=True)
class Process:
    """A process of a sandbox, as the host sees it. `inside` is its pid in the sandbox."""

    pid: int
    inside: int
    uid: int
    name: str
    state: str


@dataclass
class Box:
    """One sandbox, through the API and from the host."""

    client: httpx2.Client
    engine: docker.DockerClient
    id: str
    _facts: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What the engine says of the container."""
        if not self._facts:
            self._facts.update(self.engine.api.inspect_container(self.id))
        return self._facts

    @property
    def uid(self) -> int:
        """The tenant's uid on the host, from what the container was given as /etc/passwd."""
        mounts = {item["Destination"]: item["Source"] for item in self.facts["Mounts"]}
        user = Path(mounts["/etc/passwd"]).read_text().splitlines()[-1]
        return int(user.split(":")[2])

    @property
    def link_dir(self) -> Path:
        mounts = {item["Destination"]: item["Source"] for item in self.facts["Mounts"]}
        return Path(mounts["/run/e80"])

    @property
    def cgroup(self) -> dict[str, Path]:
        """The container's folders in the host's cgroup tree, by controller; cgroup v2 has one for all."""
        found = {}
        for line in Path(f"/proc/{self.facts['State']['Pid']}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for name in controllers.split(","):
                found[name] = Path(f"/sys/fs/cgroup/{controllers}{path}")
        return found

    def exec(self, **body: Any) -> httpx2.Response:
        return self.client.post(f"/v1/sandboxes/{self.id}/exec", json=body)

    def run(self, code: str | None = None, **body: Any) -> dict[str, Any]:
        if code is not None:
            body["code"] = code
        answer = self.exec(**body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def ask(self, code: str, **body: Any) -> Any:
        """What the code printed as JSON."""
        result = self.run(SYSCALLS + code, **body)
        assert result["status"] == "completed", result["stderr"]
        return json.loads(result["stdout"])

    def in_background(self, code: str | None = None, **body: Any) -> "Running":
        return Running(lambda: self.run(code, **body))

    def status(self) -> str:
        status: str = self.client.get(f"/v1/sandboxes/{self.id}").json()["status"]
        return status

    def processes(self) -> list[Process]:
        """All processes in the sandbox: those in the process namespace of its first one."""
        namespace = os.stat(f"/proc/{self.facts['State']['Pid']}/ns/pid").st_ino
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                if os.stat(f"/proc/{name}/ns/pid").st_ino != namespace:
                    continue
                found.append(_process(int(name)))
            except OSError:
                continue  # it has ended; a zombie has no namespaces, either
        return found

    def tenants(self) -> list[Process]:
        """Processes that are not the agent's: whatever is left of them after an exec is a survivor."""
        return [process for process in self.processes() if process.uid >= FIRST_UID]

    def assert_nothing_survived(self) -> None:
        assert until(lambda: not self.tenants(), BURIAL_S), self.tenants()

    def assert_answers(self) -> None:
        result = self.run("print(6*7)", timeout_s=20)
        assert (result["status"], result["stdout"]) == ("completed", "42\n"), result
        result = self.run(command=["echo", "here"], timeout_s=20)
        assert (result["status"], result["stdout"]) == ("completed", "here\n"), result


class Running:
    """A call in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._result: list[Any] = []
        self._fault: list[BaseException] = []
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except Exception as error:  # noqa: BLE001  # handed to the thread that asks for the result
            self._fault.append(error)

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout_s: float = 60) -> Any:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still running after {timeout_s} s"
        if self._fault:
            raise self._fault[0]
        return self._result[0]


@dataclass
class Arena:
    client: httpx2.Client
    attacker: Box
    neighbour: Box

    def assert_unharmed(self) -> None:
        """After any attack: nothing of it runs any more, and both sandboxes work as before."""
        self.attacker.assert_nothing_survived()
        self.attacker.assert_answers()
        self.neighbour.assert_answers()

    def put(self, path: str, data: bytes) -> httpx2.Response:
        return self.client.put(f"/v1/sandboxes/{self.attacker.id}/files", params={"path": path}, content=data)

    def get(self, path: str) -> httpx2.Response:
        return self.client.get(f"/v1/sandboxes/{self.attacker.id}/files", params={"path": path})


def until(condition: Callable[[], Any], deadline_s: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _process(pid: int) -> Process:
    facts = {}
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        facts[key] = value.strip()
    return Process(
        pid, int(facts["NSpid"].split()[-1]), int(facts["Uid"].split()[0]), facts["Name"], facts["State"][0]
    )
