"""What the contract tests share: the document, and a project of their own on a live server."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
FIGURES = pytest.StashKey[list[str]]()


@dataclass
class Tenant:
    """A client in a project of its own, and what it has made there."""

    http: httpx2.Client
    key: str

    def make(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = self.http.post(path, json=body or {})
        assert response.status_code == 201, response.text
        made: dict[str, Any] = response.json()
        return made

    def sandbox(self) -> str:
        return str(self.make("/v1/sandboxes", {"timeout_s": 600})["id"])

    def run(self, sandbox_id: str, code: str) -> dict[str, Any]:
        response = self.http.post(f"/v1/sandboxes/{sandbox_id}/exec", json={"code": code})
        assert response.status_code == 200, response.text
        result: dict[str, Any] = response.json()
        return result

    def stop_all(self) -> None:
        while page := self.http.get("/v1/sandboxes", params={"limit": 100}).json()["data"]:
            for sandbox in page:
                self.http.post(f"/v1/sandboxes/{sandbox['id']}/stop")


@pytest.fixture(scope="module")
def make_tenant(daemon) -> Iterator[Any]:
    """Makes a Tenant; at the end nothing of theirs is alive."""
    made: list[Tenant] = []

    def make(project: str, sandboxes: int) -> Tenant:
        key = daemon.create_key("contract", project=project)
        set_quota = [sys.executable, "-m", "sandboxd", "set-quota", "--project", project]
        subprocess.run(
            [*set_quota, "--sandboxes", str(sandboxes)],
            env=daemon.env,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )
        http = daemon.client()
        http.headers["Authorization"] = f"Bearer {key}"
        made.append(Tenant(http, key))
        return made[-1]

    yield make
    for tenant in made:
        tenant.stop_all()
        tenant.http.close()


@pytest.fixture(scope="session")
def tell(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Puts a figure into the summary of the run."""
    return pytestconfig.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash.get(FIGURES, []):
        terminalreporter.section("contract")
        for figure in figures:
            terminalreporter.line(figure)


def raw_document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "docs/openapi.json").read_text(encoding="utf-8"))
    return document
