from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from e80_sdk import Eighty80, Sandbox

from tests.e80_sdk.fake_server import FakeServer, Switch, fresh_fake, serving

if TYPE_CHECKING:
    from tests.conftest import Daemon


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, Switch]]:
    with serving() as running:
        yield running


@pytest.fixture
def fake(server: tuple[str, Switch]) -> Iterator[FakeServer]:
    with fresh_fake(*server) as made:
        yield made


@pytest.fixture
def login(fake: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeServer:
    """The fake server is the one that the environment names."""
    monkeypatch.setenv("_8080_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("_8080_BASE_URL", fake.base_url)
    monkeypatch.setenv("_8080_API_KEY", fake.api_key)
    return fake


@pytest.fixture
def real_client(daemon: "Daemon", monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Eighty80]:
    """A client of the daemon of this run."""
    monkeypatch.setenv("_8080_CONFIG_DIR", str(tmp_path / "config"))
    with Eighty80(daemon.api_key, daemon.base_url) as made:
        yield made


@pytest.fixture
def real_sandbox(real_client: Eighty80) -> Iterator[Sandbox]:
    """A sandbox of the daemon of this run."""
    with real_client.sandbox() as sandbox:
        yield sandbox
