import json
from pathlib import Path

from tests.e80_cli.conftest import Cli
from tests.e80_sdk.fake_server import FakeServer, Fault

SERVER_CHECKS = [
    {
        "name": "live_restore",
        "status": "warn",
        "value": "off",
        "message": "runs end with the engine",
        "fix": "turn it on",
    },
    {"name": "seccomp", "status": "ok", "value": "builtin", "message": "", "fix": None},
]


def checks(cli: Cli, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = cli("doctor", "--json", **env)
    body = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in body["data"]}


def test_all_is_well(cli: Cli, fake: FakeServer) -> None:
    fake.checks = SERVER_CHECKS
    done = cli("doctor")
    text = done.stdout.decode()
    assert done.returncode == 0
    assert "warn  server  live_restore" in text
    assert "-> fix: turn it on" in text
    assert "isolation level 0 (runc)" in text
    code, found = checks(cli)
    assert code == 0
    assert found["seccomp"]["scope"] == "server"
    assert set(found["seccomp"]) == {"name", "status", "value", "message", "fix", "scope"}
    assert found["api_key"]["value"] == "8080_live_aaaa..."


def test_a_failing_check_of_the_server_fails(cli: Cli, fake: FakeServer) -> None:
    fake.checks = [{"name": "engine", "status": "fail", "value": "", "message": "gone", "fix": "start it"}]
    assert cli("doctor").returncode == 1


def test_each_fault_of_this_side_has_a_fix(cli_alone: Cli, fake: FakeServer) -> None:
    code, found = checks(cli_alone, _8080_BASE_URL="http://127.0.0.1:1")
    assert code == 1
    assert found["reachable"]["status"] == found["api_key"]["status"] == "fail"
    assert "8080 apikey set -" in found["api_key"]["fix"]
    assert "scripts/up" in found["reachable"]["fix"]
    code, found = checks(cli_alone, _8080_BASE_URL=fake.base_url, _8080_API_KEY="wrong")
    assert (code, found["api_key_valid"]["status"], found["reachable"]["status"]) == (1, "fail", "ok")
    code, found = checks(cli_alone, _8080_BASE_URL="nonsense")
    assert (code, found["config"]["status"]) == (1, "fail")
    code, found = checks(cli_alone, _8080_BASE_URL="http://192.0.2.1.invalid", _8080_API_KEY="k")
    assert found["transport"]["status"] == "warn"


def test_a_key_that_others_can_read_is_a_fault(cli_alone: Cli, fake: FakeServer) -> None:
    cli_alone("apikey", "set", "--base-url", fake.base_url, "-", stdin=fake.api_key.encode())
    assert cli_alone("doctor").returncode == 0
    folder = Path(cli_alone.env["_8080_CONFIG_DIR"])
    (folder / "credentials.toml").chmod(0o644)
    code, found = checks(cli_alone)
    assert code == 1
    assert found["permissions"]["fix"] == f"chmod 600 {folder / 'credentials.toml'}"


def test_a_server_without_a_self_check_is_told(cli: Cli, fake: FakeServer) -> None:
    fake.faults.append(
        Fault("GET", "/v1/doctor", 404, {}, {"error": {"message": "no route", "code": "not_found"}})
    )
    code, found = checks(cli)
    assert (code, found["server_checks"]["status"]) == (1, "fail")
