"""schemathesis sends what docs/openapi.json allows, and what it does not, to a live server."""

import zlib
from collections import Counter

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import CHECKS

from tests.contract.conftest import raw_document

BY_HAND = "x-test-by-hand"
EXAMPLES = 40
SANDBOXES = 6
CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "missing_required_header",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)
# The schema cannot say all: limits are settings of the server, and some fields exclude others.
RULES_BEYOND_THE_SCHEMA = {
    "create_context": "names of variables; languages and folders that are there",
    "create_key": "a name has no space around it",
    "create_sandbox": "limits; images that exist",
    "list_sandboxes": "label is name=value",
    "update_sandbox": "limits; at least one field",
    "exec_in_sandbox": "either code or command",
    "follow_exec": "after is not beyond the end of what is kept",
    "write_stdin": "stdin is open; data is base64 when it says so",
    "signal_exec": "signals that there are",
    "resize_exec": "the exec has a terminal",
    "read_file": "folders; loops; names too long",
    "write_file": "folders; loops; names too long",
    "delete_file": "a path ends in a name; folders that are not empty",
    "list_files": "after is a name; files",
    "stat_file": "loops; names too long",
    "make_folder": "one of path and path_base64; names too long",
    "move_file": "one of each path and its base64; a path ends in a name",
    "chmod_file": "one of path and path_base64",
    "create_file_url": "one of path and path_base64",
    "read_archive": "files",
    "write_archive": "the body is an archive",
    "list_execs": "after names an exec of the sandbox",
    "list_events": "after names an event",
    "list_sandbox_events": "after names an event",
    "get_usage": "from is before to",
}


def without_endless_streams(document):
    """Leaves out operations and parameters that are marked: generated requests would wait for ever."""
    for path, methods in document["paths"].items():
        document["paths"][path] = {
            method: {
                **operation,
                "parameters": [
                    parameter
                    for parameter in operation.get("parameters", [])
                    if BY_HAND not in parameter["schema"]
                ],
            }
            for method, operation in methods.items()
            if BY_HAND not in operation
        }
    return document


schema = schemathesis.openapi.from_dict(without_endless_streams(raw_document()))
sent: Counter[str] = Counter()
answers: Counter[int] = Counter()


@pytest.fixture(scope="module")
def tenant(make_tenant, tell):
    yield make_tenant("fuzz", SANDBOXES)
    faults = sum(count for status, count in answers.items() if status >= 500)
    tell(
        f"{sum(sent.values())} generated requests to {len(sent)} operations, {faults} answers of 500 or more"
    )
    tell(f"their answers by status: {dict(sorted(answers.items()))}")


@pytest.fixture
def real_ids(tenant):
    """One thing of each kind that there is, for requests to hit."""
    tenant.stop_all()
    sandbox_id = tenant.sandbox()
    return {
        "sandbox_id": sandbox_id,
        "exec_id": tenant.run(sandbox_id, "print(1)")["id"],
        "context_id": tenant.make(f"/v1/sandboxes/{sandbox_id}/contexts", {"language": "bash"})["id"],
        "key_id": tenant.make("/v1/apikeys")["id"],
    }


def wanted_checks(operation):
    name = operation.definition.raw["operationId"]
    more = () if name in RULES_BEYOND_THE_SCHEMA else ("positive_data_acceptance",)
    return [CHECKS.get_one(check) for check in (*CHECKED, *more)]


@pytest.mark.docker
@pytest.mark.timeout(120)
@schema.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_server_keeps_the_contract(case, daemon, tenant, real_ids):
    # Ids that are made up lead to 404; most of the requests that are valid are to get further.
    if case.meta.generation.mode.is_positive and zlib.crc32(repr(case.path_parameters).encode()) % 4:
        for name in case.path_parameters.keys() & real_ids.keys():
            case.path_parameters[name] = real_ids[name]
    headers = {"Authorization": f"Bearer {tenant.key}"}
    response = case.call(base_url=daemon.base_url, headers=headers, timeout=90)
    sent[case.operation.label] += 1
    answers[response.status_code] += 1
    if case.operation.label == "POST /v1/sandboxes" and response.status_code == 201:
        tenant.http.post(f"/v1/sandboxes/{response.json()['id']}/stop")
    case.validate_response(response, headers=headers, checks=wanted_checks(case.operation))
