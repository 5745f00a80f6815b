"""What the self-check makes of the engine's account, where a wrong word would mislead an operator."""

from pathlib import Path
from typing import Any

import pytest

from sandboxd.kit.settings import Settings
from sandboxd.runtimes.base import Check
from sandboxd.runtimes.docker import selfcheck


def checked(tmp_path: Path, name: str, runtime: str, info: dict[str, Any]) -> Check:
    settings = Settings(state_dir=tmp_path, run_dir=tmp_path / "run", runtime=runtime)
    found = selfcheck.inspect(info, settings)
    assert (found.pause, found.update) == (True, runtime == "runc")
    return next(check for check in found.checks if check.name == name)


def fake_runsc(tmp_path: Path, version: str) -> str:
    program = tmp_path / "runsc"
    program.write_text(f"#!/bin/sh\necho 'runsc version {version}'\n")
    program.chmod(0o755)
    return str(program)


def gvisor(path: str, *arguments: str) -> dict[str, Any]:
    return {"Runtimes": {"runsc": {"path": path, "runtimeArgs": list(arguments)}}}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], "fail"),
        (["--network=none"], "fail"),
        (["--host-uds=none"], "fail"),
        (["--host-uds=create"], "fail"),
        (["--network=none", "--host-uds=open"], "ok"),
        (["-host-uds=all"], "ok"),
        (["--fsgofer-host-uds"], "ok"),
    ],
)
def test_gvisor_has_to_let_the_agent_reach_its_socket(tmp_path, arguments, status):
    path = fake_runsc(tmp_path, "release-20260105.0")
    assert checked(tmp_path, "runtime", "runsc", gvisor(path, *arguments)).status == status


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.0~20221219.0", "warn"), ("release-20260105.0", "ok"), ("unknown", "warn")],
)
def test_an_old_gvisor_is_told(tmp_path, version, status):
    check = checked(tmp_path, "runtime", "runsc", gvisor(fake_runsc(tmp_path, version), "--host-uds=open"))
    assert check.status == status
    assert (status == "ok") is ("EINVAL" not in check.message)


def test_a_runtime_that_the_engine_does_not_know(tmp_path):
    assert checked(tmp_path, "runtime", "runsc", {"Runtimes": {"runc": {}}}).status == "fail"


def test_live_restore_is_told(tmp_path):
    info = {"Runtimes": {"runc": {}}}
    assert checked(tmp_path, "live_restore", "runc", info | {"LiveRestoreEnabled": True}).status == "ok"
    assert checked(tmp_path, "live_restore", "runc", info).status == "warn"


def test_inotify_counts_where_shims_use_it(tmp_path):
    info = {"Runtimes": {"runc": {}}}
    assert checked(tmp_path, "inotify", "runc", info | {"CgroupVersion": "1"}).status == "ok"
    most = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    expected = "warn" if most < 1024 else "ok"
    assert checked(tmp_path, "inotify", "runc", info | {"CgroupVersion": "2"}).status == expected
