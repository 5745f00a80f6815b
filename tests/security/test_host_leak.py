"""HostLeak: what a sandbox can learn of the host and of whom it shares it with."""

import json
import os

import pytest

from tests.conftest import IMAGE
from tests.security.arena import SYSCALLS

pytestmark = pytest.mark.docker

MASKED = [
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/diskstats",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/modules",
    "/proc/partitions",
    "/proc/timer_list",
]
MASKED_FOLDERS = [
    "/proc/acpi",
    "/proc/scsi",
    "/sys/block",
    "/sys/class/block",
    "/sys/dev/block",
    "/sys/devices/virtual/block",
    "/sys/firmware",
    "/sys/fs/ext4",
]


def test_files_that_speak_of_the_host_are_empty(attacker):
    found = attacker.ask(
        f"""
found = {{}}
for path in {MASKED!r}:
    try:
        found[path] = len(open(path, "rb").read(100))
    except OSError as error:
        found[path] = 0
for path in {MASKED_FOLDERS!r}:
    try:
        found[path] = len(os.listdir(path))
    except OSError as error:
        found[path] = 0
print(json.dumps(found))
"""
    )
    assert found == dict.fromkeys(MASKED + MASKED_FOLDERS, 0)


def test_they_are_not_where_nothing_hides_them(engine):
    """The test above bites: of these files most tell something in a container of the engine's own making."""
    code = f"""
found = []
for path in {MASKED + MASKED_FOLDERS!r}:
    try:
        something = os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
    except OSError:
        continue
    if something:
        found.append(path)
print(json.dumps(found))
"""
    output = engine.containers.run(IMAGE, ["python3", "-c", SYSCALLS + code], user="0:0", remove=True)
    found = json.loads(output)
    assert {"/proc/cmdline", "/proc/diskstats", "/sys/block", "/sys/devices/virtual/block"} <= set(found)


def test_no_secret_lies_around(arena, daemon):
    """The API key of the daemon and the key of the link, in all that can be read of processes and files."""
    key = (arena.attacker.link_dir / "config.json").read_bytes().split(b'"key": "')[1][:64].decode()
    # Halves, so that the search does not find itself.
    needles = [[text[: len(text) // 2], text[len(text) // 2 :]] for text in (daemon.api_key, key)]
    found = arena.attacker.ask(
        f"""
needles = [(a + b).encode() for a, b in {needles!r}]
paths = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) != os.getpid():
        paths += ["/proc/%s/%s" % (pid, name) for name in ("environ", "cmdline", "maps", "mountinfo")]
for top in ("/run", "/etc", "/opt", "/home", "/tmp", "/var"):
    for folder, _, names in os.walk(top):
        paths += [os.path.join(folder, name) for name in names]
found = []
for path in paths:
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 20)
    except OSError:
        continue
    found += [path for needle in needles if needle in data]
print(json.dumps([len(paths), found]))
""",
        timeout_s=30,
    )
    assert found[0] > 20
    assert found[1] == []


def test_processes_of_the_host_are_not_there(attacker):
    pids = attacker.ask("print(json.dumps([int(name) for name in os.listdir('/proc') if name.isdigit()]))")
    ours = len(attacker.processes())
    assert 1 in pids
    assert len(pids) <= ours + 3
    assert len([name for name in os.listdir("/proc") if name.isdigit()]) > len(pids)


def test_the_name_and_the_control_groups_tell_nothing(attacker):
    host, groups = attacker.ask(
        "import socket; print(json.dumps([socket.gethostname(), open('/proc/self/cgroup').read()]))"
    )
    assert host == "sandbox"
    assert attacker.facts["Id"] not in groups


def test_files_of_the_host_are_out_of_reach(attacker, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("host")
    canary.chmod(0o644)
    answers = attacker.ask(
        f"""
paths = [{str(canary)!r}, "/proc/1/root" + {str(canary)!r}, "/proc/1/cwd/../" + {str(canary)!r}]
print(json.dumps([attempt(open, path) for path in paths]))
"""
    )
    assert set(answers) <= {"ENOENT", "EACCES"}
