"""A REST client for measuring: one kept connection, and http.client alone between us and the socket."""

import http.client
import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from scripts.benchlib.figures import BenchError

PLAIN = "print(6*7)"
PLAIN_OUTPUT = "42\n"
PANDAS = """
import numpy as np
import pandas as pd
frame = pd.DataFrame({"group": np.arange(1000) % 7, "value": np.arange(1000)})
print(int(frame.groupby("group")["value"].sum().loc[3]))
"""
PANDAS_OUTPUT = "71500\n"
# The word that has the agent choose the interpreter with the libraries is in it.
IS_WARM = "import sys; print('pandas' in sys.modules)"
WARM_TIMEOUT_S = 120.0
TIMEOUT_S = 120.0
# Less than the time after which the server closes a connection that nobody uses.
KEPT_S = 2.0

# The time in an id is above this many random bits.
ID_RANDOM_BITS = 122


def made_at_ms(sandbox_id: str) -> int:
    """When a sandbox's id was made; for one out of a pool that was before it was asked for."""
    return int(sandbox_id.partition("_")[2], 32) >> ID_RANDOM_BITS


class Api:
    """Sandboxes made here are stopped when the `with` block ends."""

    def __init__(self, base_url: str, key: str) -> None:
        self.base_url = base_url
        self.key = key
        address = urlsplit(base_url)
        self._connection = http.client.HTTPConnection(
            address.hostname or "127.0.0.1", address.port, timeout=TIMEOUT_S
        )
        self._used = 0.0
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def hang_up(self) -> None:
        """The next call connects again: for a server that was restarted."""
        self._connection.close()

    def another(self) -> "Api":
        """A client with a connection of its own, for another thread."""
        return Api(self.base_url, self.key)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if time.monotonic() > self._used + KEPT_S:
            self.hang_up()
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            answer = self._connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        self._used = time.monotonic()
        if answer.status >= 300:
            raise BenchError(f"{method} {path} answered {answer.status}: {data[:500]!r}")
        result: dict[str, Any] = json.loads(data)
        return result

    def metrics(self) -> dict[str, float]:
        """What the server says at /metrics, by name and labels as written there."""
        with urllib.request.urlopen(f"{self.base_url}/metrics", timeout=TIMEOUT_S) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def create(self, **fields: Any) -> str:
        return str(self.call("POST", "/v1/sandboxes", {"timeout_s": 3600, **fields})["id"])

    def stop(self, sandbox_id: str) -> None:
        self.call("POST", f"/v1/sandboxes/{sandbox_id}/stop", {})

    def execute(self, sandbox_id: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.call("POST", f"/v1/sandboxes/{sandbox_id}/exec", body)

    def output(self, sandbox_id: str, code: str, timeout_s: float = 60) -> str:
        result = self.execute(sandbox_id, {"code": code, "timeout_s": timeout_s})
        if result["status"] != "completed":
            raise BenchError(f"an exec ended as {result['status']}: {result['stderr'][-500:]}")
        return str(result["stdout"])

    def check(self, sandbox_id: str, code: str = PLAIN, expected: str = PLAIN_OUTPUT) -> None:
        said = self.output(sandbox_id, code)
        if said != expected:
            raise BenchError(f"wrong answer: {said!r} instead of {expected!r}")

    def timed_check(self, sandbox_id: str, code: str = PLAIN, expected: str = PLAIN_OUTPUT) -> float:
        """Milliseconds until the checked result of an exec was here."""
        start = time.perf_counter()
        self.check(sandbox_id, code, expected)
        return (time.perf_counter() - start) * 1000

    @contextmanager
    def sandboxes(self, count: int, *, warm: bool = True, **fields: Any) -> Iterator[list[str]]:
        """Sandboxes for a row, with their libraries loaded or not waited for."""
        made: list[str] = []
        try:
            made.extend(self.create(**fields) for _ in range(count))
            if warm:
                for sandbox_id in made:
                    self.wait_until_warm(sandbox_id)
            yield made
        finally:
            for sandbox_id in made:
                self.stop(sandbox_id)

    def wait_until_warm(self, sandbox_id: str) -> None:
        deadline = time.monotonic() + WARM_TIMEOUT_S
        while self.output(sandbox_id, IS_WARM) != "True\n":
            if time.monotonic() > deadline:
                raise BenchError(f"{sandbox_id} has not loaded its libraries within {WARM_TIMEOUT_S:g} s")
            time.sleep(0.2)
