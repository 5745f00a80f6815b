import json
import logging as standard_logging

import pytest
import structlog

from sandboxd.identity.secrets import new_key
from sandboxd.kit import logging


@pytest.fixture
def logged(capsys):
    """Call with a level and format; gives what was logged since, line by line."""
    root = standard_logging.getLogger()
    before = root.handlers[:], root.level

    def configure(log_format="json", level="info"):
        logging.configure(log_format, level)
        return lambda: capsys.readouterr().err.splitlines()

    yield configure
    root.handlers[:], root.level = before
    structlog.reset_defaults()


def test_lines_are_json_with_time_level_and_context(logged):
    lines = logged()
    with structlog.contextvars.bound_contextvars(request_id="req_1", sandbox_id="sbx_1"):
        structlog.get_logger("x").info("started", size=3)
    (line,) = lines()
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "event": "started",
        "level": "info",
        "size": 3,
        "request_id": "req_1",
        "sandbox_id": "sbx_1",
    }


def test_a_library_logs_in_the_same_form(logged):
    lines = logged()
    standard_logging.getLogger("some.library").warning("careful: %s", "hot")
    (line,) = lines()
    assert json.loads(line)["event"] == "careful: hot"


def test_levels_are_kept(logged):
    lines = logged(level="warning")
    structlog.get_logger("x").info("hidden")
    standard_logging.getLogger("y").info("hidden")
    structlog.get_logger("x").error("shown")
    assert [json.loads(line)["event"] for line in lines()] == ["shown"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_key_reaches_the_log(logged, log_format):
    lines = logged(log_format)
    key = new_key()
    log = structlog.get_logger("x")
    log.info(f"in text {key}", field=key, authorization="Basic abc", header=f"Bearer {key}")
    log.info("nested", headers={"Authorization": key, "list": [key, {"x": key.encode()}]}, blob=key.encode())
    log.info("a foreign token", value="Authorization: Bearer sk-somebody-elses")
    try:
        raise ValueError(f"cannot use {key}")
    except ValueError:
        log.exception("failed")
        standard_logging.getLogger("library").exception("failed %s", key)
    text = "\n".join(lines())
    assert key not in text
    assert key[14:40] not in text
    assert "sk-somebody" not in text
    assert "abc" not in text
    assert "8080_live_" in text


def test_a_line_break_cannot_forge_a_line(logged):
    lines = logged()
    structlog.get_logger("x").info("first\n{}", path="a\nb")
    assert len(lines()) == 1
