"""Runs functions of scripts/lib/*.sh, and the scripts themselves, with settings of their own."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).parents[2]
# The engine that the tests of the images and of scripts/up use.
ENGINE_URL = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
LIBRARIES = ("common", "venv", "engine", "image", "daemon")


def clean_env(settings: Mapping[str, str]) -> dict[str, str]:
    """This environment without what would lead a script to another engine, server or key."""
    ours = ("SANDBOXD_", "E80_", "_8080_", "DOCKER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | dict(settings)


def bash(
    code: str, *, timeout_s: float = 120, libraries: tuple[str, ...] = LIBRARIES, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Bash code with the shared functions at hand."""
    sources = "".join(f"source '{REPO}/scripts/lib/{name}.sh'\n" for name in libraries)
    return _run(["bash", "-c", sources + code], settings, timeout_s)


def script(*command: str, timeout_s: float = 120, **settings: str) -> subprocess.CompletedProcess[str]:
    """One of the scripts, by its name."""
    return _run([str(REPO / "scripts" / command[0]), *command[1:]], settings, timeout_s)


def _run(
    command: list[str], settings: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=clean_env(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
