"""The command against a real daemon on a real engine: what a newcomer does in the first minutes."""

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e80_cli.conftest import Cli

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = pytest.mark.docker
ALL_BYTES = bytes(range(256))


@pytest.fixture
def cli(cli_alone: Cli, daemon: "Daemon") -> Cli:
    done = cli_alone("apikey", "set", "--base-url", daemon.base_url, "-", stdin=daemon.api_key.encode())
    assert done.returncode == 0, done.stderr
    return cli_alone


def test_run_a_script(cli: Cli) -> None:
    (cli.folder / "job.py").write_text(
        "import sys, pandas as pd\nprint(pd.DataFrame({'a': [1, 2]})['a'].sum(), sys.argv[1:], __file__)\n"
        "print('warn', file=sys.stderr)\nsys.stdout.flush()\n"
        "sys.stdout.buffer.write(bytes(range(256)))\nsys.exit(7)\n"
    )
    before = cli("sandbox", "list").stdout
    done = cli("sandbox", "run", "job.py", "x", "--json")
    assert done.returncode == 7, done.stderr
    assert done.stdout == b"3 ['x', '--json'] /home/user/job.py\n" + ALL_BYTES
    assert done.stderr == b"warn\n"
    assert cli("sandbox", "list").stdout == before


def test_run_other_forms(cli: Cli) -> None:
    assert cli("sandbox", "run", "-c", "print(6*7)").stdout == b"42\n"
    assert cli("sandbox", "run", "-", stdin=b"print(6*7)").stdout == b"42\n"
    assert cli("sandbox", "run", "-i", "-c", "print(input())", stdin=b"hello").stdout == b"hello\n"
    done = cli("sandbox", "run", "-c", "1/0")
    assert done.returncode == 1
    assert b"ZeroDivisionError" in done.stderr
    assert cli("sandbox", "run", "--timeout-s", "1", "-c", "while True: pass").returncode == 124
    done = cli("sandbox", "run", "--image", "no-such-image:none", "-c", "1")
    assert done.returncode == 125
    assert b"no-such-image:none" in done.stderr


def test_life_of_a_sandbox(cli: Cli) -> None:
    sandbox_id = cli("sandbox", "create", "--label", "a=b", "--timeout-s", "200").stdout.decode().strip()
    try:
        assert sandbox_id in cli("sandbox", "list").stdout.decode().split()
        info = json.loads(cli("sandbox", "get", sandbox_id, "--json").stdout)
        assert (info["status"], info["labels"], info["timeout_s"]) == ("running", {"a": "b"}, 200)
        done = cli("sandbox", "exec", sandbox_id, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
        assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
        assert cli("sandbox", "exec", sandbox_id, "--code", "print(6*7)").stdout == b"42\n"
        assert cli("sandbox", "exec", sandbox_id, "--", "bash", "-c", "kill -TERM $$").returncode == 143
        events = cli("sandbox", "exec", sandbox_id, "--json", "--", "echo", "hi").stdout.splitlines()
        assert [json.loads(line)["type"] for line in events] == [
            "exec.started",
            "exec.stdout.delta",
            "exec.completed",
        ]
        data = ALL_BYTES * 20_000
        (cli.folder / "in.bin").write_bytes(data)
        assert cli("sandbox", "cp", "in.bin", f"{sandbox_id}:sub.bin").returncode == 0
        assert cli("sandbox", "cp", f"{sandbox_id}:/home/user/sub.bin", "out.bin").returncode == 0
        assert (cli.folder / "out.bin").read_bytes() == data
        done = cli("sandbox", "cp", f"{sandbox_id}:nowhere", "x")
        assert done.returncode == 1
        assert b"nowhere" in done.stderr
    finally:
        assert cli("sandbox", "stop", sandbox_id).stdout.decode().strip() == sandbox_id
    assert cli("sandbox", "stop", sandbox_id).returncode == 0
    done = cli("sandbox", "exec", sandbox_id, "--", "true")
    assert done.returncode == 125
    assert b"user" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_stops_the_sandbox(cli: Cli, number: int, code: int) -> None:
    before = set(cli("sandbox", "list").stdout.split())
    program = cli.start("sandbox", "run", "-c", "import time; print('on', flush=True); time.sleep(60)")
    assert program.stdout is not None
    assert program.stdout.readline() == b"on\n"
    program.send_signal(number)
    program.communicate(timeout=30)
    assert program.returncode == code
    assert set(cli("sandbox", "list").stdout.split()) == before


def test_output_comes_live(cli: Cli) -> None:
    script = "import time\nprint('first')\ntime.sleep(3)\nprint('second')\n"
    Path(cli.folder / "slow.py").write_text(script)
    program = cli.start("sandbox", "run", "slow.py")
    assert program.stdout is not None
    program.stdout.readline()
    first = time.monotonic()
    program.stdout.readline()
    assert time.monotonic() - first > 2
    program.communicate(timeout=30)


def test_output_goes_on_over_restarts(cli_alone: Cli, own_daemon: "Daemon") -> None:
    env = {"_8080_BASE_URL": own_daemon.base_url, "_8080_API_KEY": own_daemon.api_key}
    cli_alone.env |= env
    sandbox_id = cli_alone("sandbox", "create").stdout.decode().strip()
    script = "echo ran >> runs; for i in $(seq 300); do echo $i; echo e$i >&2; sleep 0.03; done; exit 9"
    program = cli_alone.start("sandbox", "exec", sandbox_id, "--", "bash", "-c", script)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        time.sleep(1)
        own_daemon.stop(number)
        own_daemon.start()
    out, err = program.communicate(timeout=60)
    assert program.returncode == 9
    assert out.decode() == "".join(f"{i}\n" for i in range(1, 301))
    assert err.decode() == "".join(f"e{i}\n" for i in range(1, 301))
    assert cli_alone("sandbox", "exec", sandbox_id, "--", "cat", "runs").stdout == b"ran\n"


def test_pause_update_and_what_happened(cli: Cli) -> None:
    sandbox_id = cli("sandbox", "create", "--idle-timeout", "100").stdout.decode().strip()
    try:
        assert b"idle_timeout_s      100" in cli("sandbox", "get", sandbox_id).stdout
        assert cli("sandbox", "pause", sandbox_id).returncode == 0
        done = cli("sandbox", "exec", sandbox_id, "--", "true")
        assert done.returncode == 125
        assert b"8080 sandbox resume" in done.stderr
        assert sandbox_id in cli("sandbox", "list", "--status", "paused").stdout.decode().split()
        assert cli("sandbox", "resume", sandbox_id).returncode == 0
        assert cli("sandbox", "update", sandbox_id, "--timeout-s", "400", "--label", "x=y").returncode == 0
        assert sandbox_id in cli("sandbox", "list", "--label", "x=y").stdout.decode().split()
        assert cli("sandbox", "exec", sandbox_id, "--", "true").returncode == 0
    finally:
        cli("sandbox", "stop", sandbox_id)
    shown = cli("events", "--sandbox", sandbox_id).stdout.decode()
    assert "sandbox.paused" in shown
    assert "sandbox.stopped" in shown
    assert len(cli("sandbox", "execs", sandbox_id).stdout.split()) == 1
    assert json.loads(cli("usage", "--json").stdout)["total"]["sandboxes"] >= 1
    assert cli("usage", "--from", "24h", "--bucket", "hour").stdout.splitlines()[-1].startswith(b"total\t")
    assert json.loads(cli("audit", "--json", "--limit", "3").stdout)["data"]


def test_keys(cli: Cli) -> None:
    made = json.loads(cli("apikey", "create", "for-a-test", "--json").stdout)
    assert made["id"] in cli("apikey", "list").stdout.decode().split()
    assert cli("--api-key", made["key"], "sandbox", "list").returncode == 0
    assert cli("apikey", "revoke", made["id"]).returncode == 0
    assert cli("--api-key", made["key"], "sandbox", "list").returncode == 4


def test_doctor_and_env(cli: Cli, daemon: "Daemon") -> None:
    done = cli("doctor", "--json")
    checks = json.loads(done.stdout)
    failed = [check for check in checks["data"] if check["status"] == "fail"]
    assert done.returncode == (1 if failed else 0)
    assert not [check for check in failed if check["scope"] == "client"]
    assert checks["isolation"]["runtime"]
    assert all(check["fix"] for check in checks["data"] if check["status"] != "ok")
    assert f"export _8080_BASE_URL={daemon.base_url}" in cli("env").stdout.decode().splitlines()
