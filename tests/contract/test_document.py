"""docs/openapi.json is what the server serves, and says all that a client needs. Needs no engine."""

import json
import re
from pathlib import Path

import pytest

from scripts.lib.openapi import document

ROOT = Path(__file__).parents[2]
OPEN_PATHS = {"/healthz", "/readyz", "/metrics"}
# What makes something each time it is sent, and can therefore be repeated with a key only.
MAKES_SOMETHING = {"create_sandbox", "create_context", "exec_in_sandbox", "create_key"}
STREAMS = {"exec_in_sandbox", "follow_exec", "list_events", "list_sandbox_events", "watch_files"}


@pytest.fixture(scope="module")
def text() -> str:
    return document()


@pytest.fixture(scope="module")
def operations(text) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for path, methods in json.loads(text)["paths"].items():
        for method, operation in methods.items():
            name = operation["operationId"]
            assert name not in found, f"two operations are called {name}"
            found[name] = {**operation, "path": path, "method": method}
    return found


def test_the_committed_document_is_up_to_date(text):
    committed = (ROOT / "docs/openapi.json").read_text(encoding="utf-8")
    assert committed == text, (
        "docs/openapi.json is out of date: run scripts/openapi and commit what it writes"
    )


def test_nothing_of_this_machine_is_in_it(text, monkeypatch):
    monkeypatch.setenv("SANDBOXD_MAX_EXECS", "7")
    monkeypatch.setenv("SANDBOXD_PORT", "1234")
    assert document() == text


def test_every_operation_has_a_stable_id_and_a_summary(operations):
    for name, operation in operations.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert operation["summary"]
        assert operation["tags"]


def test_every_operation_documents_its_errors(operations):
    for name, operation in operations.items():
        error = operation["responses"]["default"]
        assert error["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody"), name
        assert error["headers"]["X-Request-Id"]["required"] is True, name
        assert "422" not in operation["responses"], name


def test_every_answer_says_what_it_holds(operations):
    for name, operation in operations.items():
        for status, response in operation["responses"].items():
            assert response.get("content"), f"{status} of {name} has no content type"
            for media_type, content in response["content"].items():
                assert media_type != "application/json" or content.get("schema"), f"{status} of {name}"


def test_every_operation_below_v1_needs_a_key(operations):
    for name, operation in operations.items():
        needed = [] if operation["path"] in OPEN_PATHS else [{"ApiKey": []}]
        assert operation.get("security", []) == needed, name


def test_what_makes_something_takes_an_idempotency_key(operations):
    takers = {
        name
        for name, operation in operations.items()
        if any(
            parameter["name"] == "Idempotency-Key" and parameter["in"] == "header"
            for parameter in operation.get("parameters", [])
        )
    }
    assert takers == MAKES_SOMETHING


def test_streams_are_documented_as_server_sent_events(operations):
    streams = {
        name
        for name, operation in operations.items()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    }
    assert streams == STREAMS


def test_what_is_tested_by_hand_says_why(operations):
    for name, operation in operations.items():
        if "x-test-by-hand" in operation:
            assert len(operation["x-test-by-hand"]) > 10, name
