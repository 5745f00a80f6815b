"""The plugin that fails a run without Docker tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.shell import REPO

RAN = "@pytest.mark.docker\ndef test_ran(): pass\n"
SKIPPED = "@pytest.mark.docker\n@pytest.mark.skip(reason='no engine')\ndef test_skipped(): pass\n"
OTHER = "def test_other(): pass\n"
FAILED = "def test_failed(): assert False\n"


@pytest.mark.parametrize(
    ("tests", "exit_code", "said"),
    [
        (OTHER + RAN, 0, ""),
        (OTHER, 1, "0 ran, 0 were skipped: this run has failed"),
        (RAN + SKIPPED, 1, "1 ran, 1 were skipped: this run has failed"),
        (RAN + FAILED, 1, ""),
    ],
)
def test_run_without_docker_tests_fails(tmp_path: Path, tests: str, exit_code: int, said: str) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = docker\n")
    (tmp_path / "test_it.py").write_text(f"import pytest\n{tests}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "scripts.lib.require_docker", "--rootdir", tmp_path, tmp_path],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == exit_code, done.stdout
    assert said in done.stdout
    assert ("this run has failed" in done.stdout) == bool(said)
