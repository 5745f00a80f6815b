"""What the tests of contexts share: one sandbox's contexts over REST, and calls in a thread."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2


class Contexts:
    """The contexts of one sandbox."""

    def __init__(self, http: httpx2.Client, sandbox_id: str) -> None:
        self.http = http
        self.url = f"/v1/sandboxes/{sandbox_id}"

    def make(self, language: str = "python", **body: Any) -> str:
        answer = self.http.post(f"{self.url}/contexts", json={"language": language, **body})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def get(self, context_id: str) -> dict[str, Any]:
        answer = self.http.get(f"{self.url}/contexts/{context_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def act(self, context_id: str, action: str) -> dict[str, Any]:
        answer = self.http.post(f"{self.url}/contexts/{context_id}/{action}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def ask(self, context_id: str | None, code: str, **body: Any) -> httpx2.Response:
        if context_id is not None:
            body["context"] = context_id
        return self.http.post(f"{self.url}/exec", json={"code": code, **body})

    def run(self, context_id: str | None, code: str, **body: Any) -> dict[str, Any]:
        answer = self.ask(context_id, code, **body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def value(self, context_id: str, expression: str) -> Any:
        """What the last expression shows as text."""
        results = self.run(context_id, expression)["results"]
        return results[-1]["text/plain"] if results else None

    def stream(self, context_id: str, code: str) -> Iterator[dict[str, Any]]:
        body = {"code": code, "context": context_id, "stream": True}
        with self.http.stream("POST", f"{self.url}/exec", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def wait_busy(self, context_id: str) -> None:
        wait_for(lambda: self.get(context_id)["status"] == "busy")


class Call(threading.Thread):
    """One call in a thread of its own, with a connection of its own."""

    def __init__(self, contexts: Contexts, context_id: str, code: str, key: str | None = None, **body: Any):
        super().__init__()
        headers = dict(contexts.http.headers) | ({"Idempotency-Key": key} if key else {})
        self.http = httpx2.Client(base_url=contexts.http.base_url, headers=headers, timeout=60)
        self.url = f"{contexts.url}/exec"
        self.body = {"code": code, "context": context_id, **body}
        self.answer: httpx2.Response | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self.http.post(self.url, json=self.body)
        except httpx2.TransportError:
            return  # the daemon died over it: the answer stays None
        finally:
            self.http.close()

    def result(self) -> dict[str, Any]:
        self.join(60)
        assert self.answer is not None
        assert self.answer.status_code == 200, self.answer.text
        result: dict[str, Any] = self.answer.json()
        return result


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
