import copy
import json
import pickle
from typing import Any

import pytest
from e80_sdk import ExecChunk, ExecResult, SandboxInfo, UnexpectedResponseError

BODY: dict[str, Any] = {
    "id": "exec_1",
    "status": "completed",
    "exit_code": 0,
    "signal": None,
    "stdout": "out\n",
    "stderr": "noise\n",
    "truncated": False,
    "error": None,
    "duration_ms": 1.5,
    "usage": {"cpu_ms": 1},
}
ERROR = {"name": "ValueError", "value": "no", "traceback": "Traceback...\nValueError: no\n"}


def result(**changes: Any) -> ExecResult:
    return ExecResult.from_body({**BODY, **changes})


def test_success_reads_as_stdout() -> None:
    made = result()
    assert made == "out\n"
    assert made.ok
    assert (made.id, made.exit_code, made.stderr, made.duration_ms) == ("exec_1", 0, "noise\n", 1.5)
    assert json.loads(json.dumps({"result": made})) == {"result": "out\n"}


def test_failure_reads_as_stdout_and_traceback() -> None:
    made = result(status="failed", exit_code=1, error=ERROR, stderr=ERROR["traceback"])
    assert made == "out\nTraceback...\nValueError: no\n"
    assert made.error is not None
    assert (made.error.name, made.error.value) == ("ValueError", "no")
    assert not made.ok


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"status": "failed", "exit_code": 2, "stderr": "usage\n"}, "out\nusage\n"),
        ({"status": "failed", "exit_code": 2, "stdout": "cut", "stderr": "usage"}, "cut\nusage"),
        ({"status": "timed_out", "exit_code": None, "signal": "SIGKILL", "stderr": ""}, "out\n[timed_out]"),
        ({"status": "oom", "exit_code": None, "stdout": "", "stderr": ""}, "[oom]"),
    ],
)
def test_how_other_ends_read(changes: dict[str, Any], text: str) -> None:
    assert result(**changes) == text


def test_it_survives_copy_and_pickle() -> None:
    made = result(status="failed", exit_code=1, error=ERROR)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made
        assert again.error == made.error
        assert again.exit_code == 1


@pytest.mark.parametrize("missing", ["status", "stdout", "exit_code", "duration_ms"])
def test_an_answer_that_is_no_exec(missing: str) -> None:
    with pytest.raises(UnexpectedResponseError, match=missing):
        ExecResult.from_body({key: value for key, value in BODY.items() if key != missing})


def test_chunks_hold_the_bytes() -> None:
    plain = ExecChunk.from_event({"type": "exec.stdout.delta", "delta": "é"})
    assert (plain, plain.data, plain.stream) == ("é", b"\xc3\xa9", "stdout")
    binary = ExecChunk.from_event({"type": "exec.stderr.delta", "delta": "/w==", "encoding": "base64"})
    assert (binary, binary.data, binary.stream) == ("\ufffd", b"\xff", "stderr")
    for wrong in ({"delta": "%", "encoding": "base64"}, {"delta": 1}, {}):
        with pytest.raises(UnexpectedResponseError):
            ExecChunk.from_event({"type": "exec.stdout.delta", **wrong})


def test_unknown_fields_of_a_sandbox_are_kept() -> None:
    info = SandboxInfo.from_body({"id": "sbx_1", "status": "running", "later": 1})
    assert info.alive
    assert info.raw["later"] == 1
    with pytest.raises(UnexpectedResponseError):
        SandboxInfo.from_body({"id": "sbx_1"})
