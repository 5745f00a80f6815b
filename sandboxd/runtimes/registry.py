"""Which driver serves: one line per driver."""

from sandboxd.kit.settings import Settings
from sandboxd.runtimes.docker.driver import DockerRuntime


def create_runtime(settings: Settings, owner: str) -> DockerRuntime:
    """The driver for these settings; `owner` names this installation in the engine."""
    return DockerRuntime(settings, owner)
