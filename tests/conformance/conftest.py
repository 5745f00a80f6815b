"""The drivers that the contract is checked on. A new driver adds its name to RUNTIMES in sandbox.py."""

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandboxd.kit.settings import Settings
from sandboxd.runtimes.docker.driver import DockerRuntime
from sandboxd.runtimes.registry import create_runtime
from tests import engines
from tests.conformance.sandbox import RUNTIMES


@pytest.fixture(scope="session")
def runsc_engine(engine) -> Iterator[engines.OwnEngine]:
    """An engine that knows gVisor; the host's own need not."""
    if not Path(engines.RUNSC).exists():
        problem = f"{engines.RUNSC} is missing: apt-get install runsc"
        if os.environ.get("E80_REQUIRE_DOCKER") == "1":
            pytest.fail(problem)
        pytest.skip(problem)
    with engines.own_engine(runsc=True) as own:
        yield own


@pytest.fixture(params=RUNTIMES)
def settings(engine, request, tmp_path_factory) -> Iterator[Settings]:
    """One installation on an engine with the driver's runtime."""
    extra = {}
    if request.param == "runsc":
        own = request.getfixturevalue("runsc_engine")
        extra = {"docker_url": own.url, "runtime": "runsc", "default_image": engines.IMAGE}
    # Short: the path of a unix socket has room for 107 bytes.
    root = Path(f"/tmp/e80-c{os.getpid()}{tmp_path_factory.mktemp('c').name[-3:]}")
    (root / "state").mkdir(parents=True)
    yield Settings(state_dir=root / "state", run_dir=root / "run", **extra)
    shutil.rmtree(root)


@pytest.fixture
async def runtime(settings: Settings) -> AsyncIterator[DockerRuntime]:
    driver = create_runtime(settings)
    await driver.start()
    yield driver
    for owned in await driver.list():
        await driver.delete(owned.sandbox_id)
    assert driver.leftovers() == set()
    await driver.close()
