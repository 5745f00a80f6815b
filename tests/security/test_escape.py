"""Escape: out of the container, by the kernel, by its files, or by what the daemon does for a tenant."""

import json
import signal

import pytest

from tests.conftest import IMAGE
from tests.security import system_calls
from tests.security.arena import SYSCALLS

pytestmark = pytest.mark.docker

WRITABLE = {"/tmp", "/home/user", "/dev/shm", "/dev/mqueue"}
READ_ONLY = {"/", "/opt/e80", "/run/e80", "/etc/passwd", "/etc/group", "/sys", "/proc/sys"}
DEVICES = {"full", "null", "ptmx", "random", "tty", "urandom", "zero"}
DEVICE_LINKS = {"core", "fd", "stderr", "stdin", "stdout"}

needs_numbers = pytest.mark.skipif(not system_calls.SUPPORTED, reason="the table has x86-64's numbers")


@needs_numbers
def test_system_calls_are_refused(arena):
    results = arena.attacker.ask(system_calls.probe(system_calls.FORBIDDEN), timeout_s=30)
    assert results == dict.fromkeys(system_calls.FORBIDDEN, "EPERM")
    arena.assert_unharmed()


@needs_numbers
def test_system_calls_that_do_not_exist_here(attacker):
    results = attacker.ask(system_calls.probe(system_calls.UNKNOWN))
    assert results == dict.fromkeys(system_calls.UNKNOWN, "ENOSYS")


@needs_numbers
def test_system_calls_of_another_architecture_end_the_process(attacker):
    """The filter is made for one architecture; numbers of 32-bit programs would mean other calls."""
    code = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    result = attacker.run("import ctypes\n" + code)
    assert (result["status"], result["signal"]) == ("failed", signal.SIGSYS.name)


@needs_numbers
def test_the_same_system_calls_get_through_without_our_walls(engine):
    """The probes bite: where nothing holds them, next to none is refused."""
    output = engine.containers.run(
        IMAGE,
        ["python3", "-c", SYSCALLS + system_calls.probe(system_calls.FORBIDDEN)],
        user="0:0",
        cap_add=["SYS_ADMIN", "SYS_PTRACE"],
        security_opt=["seccomp=unconfined"],
        remove=True,
    )
    refused = {name for name, answer in json.loads(output).items() if answer == "EPERM"}
    assert refused <= system_calls.NEED_MORE


def test_identity_and_privileges(attacker):
    facts = attacker.ask(
        """
facts = {}
for line in open("/proc/self/status"):
    key, _, value = line.partition(":")
    facts[key] = value.strip()
print(json.dumps(facts))
"""
    )
    uid = str(attacker.uid)
    assert facts["Uid"].split() == [uid] * 4
    assert facts["Gid"].split() == [uid] * 4
    assert [facts[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == ["0" * 16] * 4
    # KILL, SETGID, SETUID: what the agent has. No program of a tenant can gain them.
    assert int(facts["CapBnd"], 16) == 1 << 5 | 1 << 6 | 1 << 7
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    assert len(facts["Groups"].split()) == 1


def test_what_the_engine_was_told(attacker):
    config = attacker.facts["HostConfig"]
    assert config["CapDrop"] == ["ALL"]
    assert {item.removeprefix("CAP_") for item in config["CapAdd"]} == {"SETUID", "SETGID", "KILL"}
    assert "no-new-privileges" in config["SecurityOpt"]
    assert any(item.startswith("seccomp={") for item in config["SecurityOpt"])
    assert not config["Privileged"]
    assert config["NetworkMode"] == "none"
    assert config["ReadonlyRootfs"]
    assert (config["IpcMode"], config["PidMode"], config["UTSMode"]) == ("private", "", "")
    assert not config["Devices"]
    assert not config["DeviceRequests"]
    assert not config["VolumesFrom"]
    assert not config["PortBindings"]
    assert config["LogConfig"]["Type"] == "none"
    assert config["RestartPolicy"]["Name"] in ("", "no")
    assert config["Memory"] == config["MemorySwap"] > 0
    assert config["PidsLimit"] > 0
    assert config["CpuQuota"] > 0
    assert config["OomScoreAdj"] > 0


def test_only_the_workspace_is_writable_of_what_is_mounted(attacker):
    mounts = {item["Destination"]: item for item in attacker.facts["Mounts"]}
    assert set(mounts) == {"/opt/e80", "/run/e80", "/etc/passwd", "/etc/group", "/home/user", "/tmp"}
    assert {name for name, item in mounts.items() if item["RW"]} == {"/home/user", "/tmp"}
    assert all(item["Propagation"] == "rprivate" for item in mounts.values())
    inside = attacker.ask(
        """
mounts = {}
for line in open("/proc/self/mounts"):
    _, target, kind, options, *_ = line.split()
    mounts[target] = options.split(",")
print(json.dumps(mounts))
"""
    )
    for target in READ_ONLY:
        assert "ro" in inside[target], target
    for target in WRITABLE:
        assert {"nosuid", "nodev"} <= set(inside[target]), target
    assert not [target for target in inside if "docker" in target or target.endswith(".sock")]


def test_devices(attacker):
    found = attacker.ask(
        """
import stat
kinds = {}
for name in os.listdir("/dev"):
    kinds[name] = stat.S_IFMT(os.lstat("/dev/" + name).st_mode)
devices = [name for name, kind in kinds.items() if kind in (stat.S_IFCHR, stat.S_IFBLK)]
links = [name for name, kind in kinds.items() if kind == stat.S_IFLNK]
print(json.dumps([devices, links, attempt(os.mknod, "/tmp/disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0))]))
"""
    )
    assert set(found[0]) <= DEVICES
    assert set(found[1]) <= DEVICE_LINKS | {"ptmx"}
    assert found[2] == "EPERM"


@pytest.mark.parametrize(
    "path",
    [
        "/escape",
        "/usr/bin/escape",
        "/etc/escape",
        "/opt/e80/escape",
        "/run/e80/escape",
        "/etc/passwd",
        "/opt/e80/e80_agent/main.py",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
        "/sys/fs/cgroup/escape",
        "/sys/fs/cgroup/memory/release_agent",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/cgroup.procs",
        "/dev/escape",
        "/dev/mem",
        "/dev/kmsg",
        "/proc/1/root/escape",
    ],
)
def test_nothing_else_can_be_written(arena, path):
    """Neither by code, nor by the file API when the tenant asks it to."""
    answer = arena.attacker.ask(f"print(json.dumps(attempt(os.open, {path!r}, os.O_WRONLY | os.O_CREAT)))")
    assert answer in ("EROFS", "EACCES", "EPERM", "ENOENT")
    assert arena.put(path, b"escape").status_code in (400, 403, 404)


@pytest.mark.parametrize(
    "target", ["/run/e80/config.json", "/proc/1/environ", "/proc/1/mem", "/proc/1/root/etc/shadow"]
)
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_links_do_not_lead_the_file_api_further_than_the_tenant(arena, target, kind):
    folder, name = target.rsplit("/", 1)
    path = "bait" if kind == "link" else f"bait/{name}"
    points_at = target if kind == "link" else folder
    arena.attacker.ask(
        f"""
attempt(os.unlink, "bait")
os.symlink({points_at!r}, "bait")
print(json.dumps(attempt(open, {target!r})))
"""
    )
    assert arena.get(path).status_code in (403, 404)
    assert arena.put(path, b"mine").status_code in (400, 403, 404)
    arena.attacker.run(command=["rm", "-f", "bait"])


def test_a_link_that_changes_while_the_file_api_follows_it(arena):
    """The classic race: a harmless file when it is looked at, another when it is opened."""
    swap = """
import os, time
open("plain", "w").write("harmless")
end = time.monotonic() + 3
while time.monotonic() < end:
    for target in ("/run/e80/config.json", "/home/user/plain"):
        os.symlink(target, "swap.new")
        os.rename("swap.new", "swap")
"""
    key = (arena.attacker.link_dir / "config.json").read_bytes()
    running = arena.attacker.in_background(swap, timeout_s=10)
    seen = set()
    while not running.over:
        answer = arena.get("swap")
        seen.add(answer.status_code)
        assert key not in answer.content
        seen.add(arena.put("swap", b"harmless").status_code)
    assert running.result()["status"] == "completed"
    assert seen <= {200, 201, 400, 403, 404}, seen
    assert (arena.attacker.link_dir / "config.json").read_bytes() == key
    arena.assert_unharmed()
