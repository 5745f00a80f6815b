from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e80_sdk.fake_server import FakeServer, Switch, fresh_fake, serving


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
