"""Reading a container's accounts: both layouts of control groups, and groups that are not there any more."""

import os

from sandboxd.runtimes.docker import cgroups

V1 = "9:name=systemd:/docker/abc\n4:memory:/docker/abc\n2:cpuacct:/docker/abc\n1:cpu:/docker/abc\n0::/\n"
JOINED = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n"
V2 = "0::/system.slice/docker-abc.scope\n"


def test_v1(tmp_path):
    for name in ("memory", "cpuacct", "cpu"):
        (tmp_path / name / "docker" / "abc").mkdir(parents=True)
    memory = tmp_path / "memory/docker/abc"
    (tmp_path / "cpuacct/docker/abc/cpuacct.usage").write_text("2500000000\n")
    (memory / "memory.usage_in_bytes").write_text(f"{100 << 20}\n")
    (memory / "memory.limit_in_bytes").write_text(f"{512 << 20}\n")
    (memory / "memory.stat").write_text(
        f"inactive_file 1\ntotal_inactive_file {30 << 20}\ntotal_active_file {20 << 20}\n"
    )
    group = cgroups.parse(V1, tmp_path)
    assert group is not None
    assert group.usage() == cgroups.Usage(cpu_s=2.5, memory_mb=70, memory_limit_mb=512)
    assert group.pinned_bytes() == 50 << 20
    group.limit_cpu(25_000)
    assert (tmp_path / "cpu/docker/abc/cpu.cfs_quota_us").read_text() == "25000"
    group.limit_socket_memory()
    assert (memory / "memory.kmem.tcp.limit_in_bytes").exists()


def test_v1_with_controllers_in_one_tree(tmp_path):
    group = cgroups.parse(JOINED, tmp_path)
    assert group is not None
    assert group.cpu == group.accounts == tmp_path / "cpu,cpuacct/docker/abc"


def test_v2(tmp_path):
    folder = tmp_path / "system.slice/docker-abc.scope"
    folder.mkdir(parents=True)
    (folder / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    (folder / "memory.max").write_text(f"{512 << 20}\n")
    (folder / "memory.current").write_text(f"{100 << 20}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {10 << 20}\nactive_file {20 << 20}\n")
    group = cgroups.parse(V2, tmp_path)
    assert group is not None
    assert group.usage() == cgroups.Usage(cpu_s=1.5, memory_mb=90, memory_limit_mb=512)
    assert group.pinned_bytes() == 70 << 20
    (folder / "memory.max").write_text("max\n")
    assert group.usage() == cgroups.Usage(cpu_s=1.5, memory_mb=90)
    group.limit_cpu(25_000)
    assert (folder / "cpu.max").read_text() == "25000 50000"
    group.limit_socket_memory()
    assert sorted(file.name for file in folder.iterdir()) == [
        "cpu.max", "cpu.stat", "memory.current", "memory.max", "memory.stat"
    ]  # fmt: skip


def test_groups_that_are_gone(tmp_path):
    group = cgroups.parse(V1, tmp_path)
    assert group is not None
    assert group.usage() is None
    assert cgroups.of_process(2**22 + 1) is None
    assert cgroups.parse("", tmp_path) is None


def test_a_living_process_has_groups():
    assert cgroups.of_process(os.getpid()) is not None
