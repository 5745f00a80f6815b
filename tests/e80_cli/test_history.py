"""pause, resume, update, execs; events, usage, audit; and a server that is away for a while."""

import json
import socket
import threading
import time

import pytest

from tests.e80_cli.conftest import Cli
from tests.e80_sdk.fake_history import note
from tests.e80_sdk.fake_server import FakeServer, Fault


def create(cli: Cli, *words: str) -> str:
    return cli("sandbox", "create", *words).stdout.decode().strip()


def test_pause_resume_update(cli: Cli, fake: FakeServer) -> None:
    first, second = create(cli, "--idle-timeout", "90"), create(cli, "--idle-timeout-s", "none")
    assert fake.sandboxes[first]["idle_timeout_s"] == 90
    assert fake.last("POST", "/sandboxes").body == {"idle_timeout_s": None}
    assert b"idle_timeout_s      90" in cli("sandbox", "get", first).stdout
    assert cli("sandbox", "pause", first, second).stdout.decode().split() == [first, second]
    done = cli("sandbox", "exec", first, "--", "true")
    assert done.returncode == 125
    assert b"hint: let it go on with `8080 sandbox resume`" in done.stderr
    assert cli("sandbox", "list", "--status", "paused").stdout.decode().split() == [second, first]
    assert json.loads(cli("sandbox", "resume", first, "--json").stdout)["status"] == "running"
    words = ("--timeout-s", "none", "--idle-timeout", "5", "--label", "a=b", "--cpu-mhz", "500")
    assert cli("sandbox", "update", first, *words, "--memory-size-mb", "64").stdout.decode().split() == [
        first
    ]
    assert fake.last("PATCH", first).body == {
        "timeout_s": None,
        "idle_timeout_s": 5,
        "labels": {"a": "b"},
        "cpu_mhz": 500,
        "memory_size_mb": 64,
    }
    assert json.loads(cli("sandbox", "update", first, "--cpu-mhz", "1", "--json").stdout)["cpu_mhz"] == 1
    assert cli("sandbox", "update", first).returncode == 64
    assert cli("sandbox", "list", "--label", "a=b").stdout.decode().split() == [first]
    assert cli("sandbox", "list", "--label", "ab").returncode == 64
    done = cli("sandbox", "pause", "sbx_none", first)
    assert (done.returncode, done.stdout.decode().split()) == (1, [first])


def test_execs(cli: Cli) -> None:
    sandbox_id = create(cli)
    cli("sandbox", "exec", sandbox_id, "--", "sh", "-c", "exit 3")
    (ran,) = cli("sandbox", "execs", sandbox_id).stdout.decode().split()
    (listed,) = json.loads(cli("sandbox", "execs", sandbox_id, "--json").stdout)["data"]
    assert (listed["id"], listed["exit_code"]) == (ran, 3)
    code, shown = cli.on_terminal("sandbox", "execs", sandbox_id)
    assert code == 0
    assert ran in shown
    assert "failed" in shown


def test_events(cli: Cli, fake: FakeServer) -> None:
    sandbox_id = create(cli)
    cli("sandbox", "stop", sandbox_id)
    first, second = cli("events").stdout.decode().splitlines()
    assert first.endswith("sandbox.created")
    assert second.split()[2:] == [sandbox_id, "sandbox.stopped", "reason=user"]
    (only,) = cli(
        "events", "--type", "sandbox.stopped", "--sandbox", sandbox_id, "--json"
    ).stdout.splitlines()
    assert json.loads(only) == fake.events[-1]
    assert len(cli("events", "--limit", "1").stdout.splitlines()) == 1
    assert json.loads(cli("events", "--after", "evt_0000", "--json").stdout)["id"] == "evt_0001"


def test_events_are_followed_over_breaks(cli: Cli, fake: FakeServer) -> None:
    note(fake, "old", "sbx_old")
    fake.event_cuts = [1, 0]
    program = cli.start("events", "--follow", "--json", "--limit", "3")
    deadline = time.monotonic() + 20
    while fake.count("GET", "/events") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for n in range(3):
        note(fake, "new", f"sbx_{n}")
    out, _ = program.communicate(timeout=30)
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["evt_0001", "evt_0002", "evt_0003"]
    assert program.returncode == 0


def test_usage(cli: Cli, fake: FakeServer) -> None:
    lines = cli("usage", "--from", "2023-11-14", "--to", "1700006400", "--bucket", "hour").stdout.decode()
    row, total = (line.split("\t") for line in lines.splitlines())
    assert row[0].startswith("2023-11-1")
    assert total == ["total", "2h00m", "12.5s", "2.0 kB", "3.0 MB", "42", "3"]
    assert fake.last("GET", "/usage").query.endswith("&to=1700006400&bucket=hour")
    assert json.loads(cli("usage", "--json").stdout)["total"]["execs"] == 42
    cli("usage", "--from", "24h")
    asked = dict(pair.split("=") for pair in fake.last("GET", "/usage").query.split("&"))
    assert abs(time.time() - 86400 - int(asked["from"])) < 5
    assert cli("usage", "--from", "yesterday").returncode == 64
    code, shown = cli.on_terminal("usage")
    assert code == 0
    assert "SANDBOX TIME" in shown


def test_audit(cli: Cli, fake: FakeServer) -> None:
    entry = {"id": "aud_1", "object": "audit_entry", "created_at": 1_700_000_000, "actor": "key_1"}
    fake.audit = [
        entry | {"action": "sandbox.stop", "resource_id": "sbx_1", "client": None, "details": {"a": 1}}
    ]
    (line,) = cli("audit", "--action", "sandbox.stop").stdout.decode().splitlines()
    assert line.split("\t")[1:] == ["sandbox.stop", "sbx_1", "key_1", "-", "a=1"]
    assert json.loads(cli("audit", "--resource", "sbx_1", "--json").stdout)["data"] == fake.audit
    assert "resource_id=sbx_1" in fake.last("GET", "/audit").query


def test_a_break_in_the_output_is_not_seen(cli: Cli, fake: FakeServer) -> None:
    sandbox_id = create(cli)
    fake.cuts = [(2, "drop"), (3, "interrupted"), (1, "end")]
    command = "for n in 1 2 3 4 5; do echo $n; sleep 0.05; done; exit 7"
    done = cli("sandbox", "exec", sandbox_id, "--", "sh", "-c", command)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"1\n2\n3\n4\n5\n", b"")


def test_a_lost_answer_makes_no_second_key(cli: Cli, fake: FakeServer) -> None:
    error = {"message": "it made key_7", "type": "x", "code": "idempotency_replayed", "param": None}
    fake.faults += [Fault("POST", "/apikeys", 0), Fault("POST", "/apikeys", 409, body={"error": error})]
    done = cli("apikey", "create", "ci")
    assert done.returncode == 1
    assert b"it made key_7" in done.stderr
    assert b"8080 apikey revoke" in done.stderr


def test_a_server_that_is_away_is_waited_for(cli: Cli) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    body = b'{"object": "list", "data": [], "has_more": false}'

    def serve() -> None:
        time.sleep(1.5)
        with socket.create_server(("127.0.0.1", port)) as listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode() + body)

    server = threading.Thread(target=serve)
    server.start()
    code, shown = cli.on_terminal("--base-url", f"http://127.0.0.1:{port}", "sandbox", "list")
    server.join()
    assert code == 0
    assert shown.count("trying for") == 1, "a person is told once why nothing happens"


@pytest.mark.parametrize("patience", ["0", "0.3"])
def test_patience_can_be_set(cli: Cli, patience: str) -> None:
    began = time.monotonic()
    done = cli("--patience-s", patience, "--base-url", "http://127.0.0.1:1", "sandbox", "list")
    assert done.returncode == 1
    assert time.monotonic() - began < 5
    assert (b"gave up after" in done.stderr) == (patience != "0")
