"""Which driver serves: one line per driver."""

from sandboxd.kit.settings import Settings
from sandboxd.runtimes.docker.driver import DockerRuntime


def create_runtime(settings: Settings) -> DockerRuntime:
    """The driver for these settings; it is the store of its images, too."""
    return DockerRuntime(settings)
