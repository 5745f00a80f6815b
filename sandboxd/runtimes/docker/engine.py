"""docker-py behind a bounded executor: it blocks, so it never runs on the event loop, and every call ends."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
import docker.errors
import requests.exceptions

from sandboxd.runtimes.errors import EngineUnavailableError, RuntimeFaultError

WORKERS = 8
CALL_TIMEOUT_S = 30.0


class NotFound(Exception):
    """The engine answered, and it has no such thing."""


class Malformed(RuntimeFaultError):
    """The engine answered that it cannot read what it was asked: a name that is none, for example."""


class AlreadyExists(Exception):
    """The engine answered that the name is taken."""


class Engine:
    """One engine, reached over its unix socket."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="docker")
        self._client: docker.APIClient | None = None

    async def open(self) -> None:
        """Connects and agrees on an API version."""
        self._client = await self._run(
            lambda: docker.APIClient(
                base_url=self.url, version="auto", timeout=int(CALL_TIMEOUT_S), max_pool_size=WORKERS
            )
        )

    async def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def call(
        self, function: Callable[[docker.APIClient], Any], timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """Runs one call against the engine's client in a thread. Raises NotFound, AlreadyExists,
        EngineUnavailableError, RuntimeFaultError."""
        if self._client is None:
            await self.open()
        client = self._client
        assert client is not None
        return await self._run(lambda: function(client), timeout_s)

    async def _run(self, function: Callable[[], Any], timeout_s: float = CALL_TIMEOUT_S) -> Any:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                return await loop.run_in_executor(self._executor, function)
        except TimeoutError as error:
            raise EngineUnavailableError(
                f"the Docker Engine at {self.url} did not answer within {timeout_s:g} s; is it overloaded?"
            ) from error
        except docker.errors.NotFound as error:
            raise NotFound(str(error.explanation)) from error
        except docker.errors.APIError as error:
            if error.status_code == 400:
                raise Malformed(f"the Docker Engine answered: {error.explanation}") from error
            if error.status_code == 409:
                raise AlreadyExists(str(error.explanation)) from error
            raise RuntimeFaultError(f"the Docker Engine answered: {error.explanation}") from error
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
            raise EngineUnavailableError(
                f"no Docker Engine answers at {self.url}; start it, or set SANDBOXD_DOCKER_URL"
            ) from error
