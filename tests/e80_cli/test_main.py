"""What all commands share: usage errors, help, errors, login, start-up."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import typer
from e80_cli.main import app

from tests.e80_cli.conftest import Cli
from tests.e80_sdk.fake_server import FakeServer, Fault

GROUPS = [("sandbox",), ("sandbox", "context"), ("sandbox", "files"), ("apikey",)]


def all_commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []

    def walk(command: Any, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", {})
        if not children:
            found.append(path)
        for name, child in children.items():
            walk(child, (*path, name))

    walk(typer.main.get_command(app), ())
    return found


def test_the_commands_of_this_version() -> None:
    lives = ("create", "list", "get", "stop", "pause", "resume", "update")
    work = ("exec", "run", "ps", "logs", "kill", "execs", "cp")
    sandbox = [("sandbox", name) for name in (*lives, *work)]
    contexts = ("create", "list", "restart", "interrupt", "delete")
    sandbox += [("sandbox", "context", name) for name in contexts]
    sandbox += [("sandbox", "files", name) for name in ("ls", "stat", "mkdir", "mv", "rm", "url")]
    history = [("events",), ("usage",), ("audit",)]
    apikey = [("apikey", name) for name in ("set", "list", "create", "revoke")]
    assert sorted(all_commands()) == sorted([("env",), ("doctor",), *history, *sandbox, *apikey])


@pytest.mark.parametrize("path", [(), *GROUPS, *all_commands()], ids=" ".join)
def test_every_help_shows_examples(cli_alone: Cli, path: tuple[str, ...]) -> None:
    done = cli_alone(*path, "--help")
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"Usage: 8080 {' '.join(path)}".strip() in text
    if path in all_commands():
        assert "Examples:\n" in text
        assert re.search(rf"8080 {' '.join(path)}\b", text.split("Examples:")[1])
        assert "--json" in text


def test_bare_groups_show_their_help(cli_alone: Cli) -> None:
    for path in ((), *GROUPS):
        done = cli_alone(*path)
        assert done.returncode == 0
        assert b"Commands:" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["sandbox", "lst"], "Did you mean 'list'?"),
        (["sandbox", "list", "--nothing"], "No such option: --nothing"),
        (["sandbox", "get"], "Missing argument 'ID'"),
        (["sandbox", "list", "--limit", "0"], "--limit"),
        (["sandbox", "create", "--timeout-s", "soon"], "'soon' is neither a number nor `none`"),
        (["sandbox", "create", "--label", "x"], "'x' is not NAME=VALUE"),
        (["sandbox", "exec", "sbx_1"], "either a command after `--` or --code"),
        (["sandbox", "exec", "sbx_1", "--code", "1", "--", "ls"], "either a command after `--` or --code"),
        (["sandbox", "exec", "sbx_1", "-d", "-t", "--", "ls"], "leave -i and -t away"),
        (["sandbox", "exec", "sbx_1", "-t", "--code", "1"], "code has no terminal"),
        (["sandbox", "exec", "sbx_1", "-t", "--json", "--", "ls"], "takes no JSON"),
        (["sandbox", "exec", "sbx_1", "-it", "--", "ls"], "stdin is no terminal"),
        (["sandbox", "exec", "sbx_1", "--context", "ctx_1", "--", "ls"], "this is for --code"),
        (["sandbox", "kill", "sbx_1"], "Missing argument 'EXEC...'"),
        (["sandbox", "run"], "name a script"),
        (["sandbox", "run", "missing.py"], "missing.py: No such file"),
        (["sandbox", "run", "-i", "-"], "cannot be both"),
        (["sandbox", "cp", "a", "b"], "exactly one of SOURCE and TARGET"),
        (["sandbox", "cp", "sbx_1:a", "sbx_2:b"], "exactly one of SOURCE and TARGET"),
    ],
)
def test_wrong_usage_is_64_and_says_what(cli_alone: Cli, words: list[str], message: str) -> None:
    done = cli_alone(*words)
    assert done.returncode == 64
    assert done.stdout == b""
    assert message in done.stderr.decode()
    assert "--help` shows examples" in done.stderr.decode()


def test_not_logged_in_is_4(cli_alone: Cli, fake: FakeServer) -> None:
    for words in (["sandbox", "list"], ["sandbox", "run", "-c", "1"], ["apikey", "list"], ["env"]):
        done = cli_alone(*words, _8080_BASE_URL=fake.base_url)
        assert done.returncode == 4
        assert done.stdout == b""
        assert b"8080 apikey set -" in done.stderr
    done = cli_alone("--api-key", "wrong", "--base-url", fake.base_url, "sandbox", "list")
    assert done.returncode == 4
    assert b"unknown API key" in done.stderr


def test_a_flag_beats_the_environment(cli: Cli, fake: FakeServer) -> None:
    assert cli("--patience-s", "0", "--base-url", "http://127.0.0.1:1", "sandbox", "list").returncode == 1
    assert cli("--api-key", "wrong", "sandbox", "list").returncode == 4
    assert cli("sandbox", "list").returncode == 0


def test_a_server_that_is_down_is_1_and_says_what_to_do(cli: Cli) -> None:
    done = cli("--patience-s", "0", "sandbox", "list", _8080_BASE_URL="http://127.0.0.1:1")
    assert done.returncode == 1
    assert b"scripts/up" in done.stderr


def test_errors_are_json_on_stderr_with_json(cli: Cli) -> None:
    done = cli("sandbox", "get", "sbx_none", "--json")
    assert (done.returncode, done.stdout) == (1, b"")
    error = json.loads(done.stderr)["error"]
    assert (error["status"], error["code"], error["request_id"]) == (404, "not_found", "req_fake")
    assert "sbx_none" in error["message"]


def test_the_request_id_is_told(cli: Cli, fake: FakeServer) -> None:
    assert b"(request req_fake)" in cli("sandbox", "get", "sbx_none").stderr
    fake.faults.append(
        Fault("GET", "/sandboxes", 500, {"X-Request-Id": "r1"}, {"error": {"message": "oops"}})
    )
    done = cli("sandbox", "list")
    assert done.stderr == b"error: oops (request r1)\n"


def test_a_pipe_that_closes_early_is_no_traceback(cli: Cli, fake: FakeServer) -> None:
    program = cli.start("sandbox", "run", "-c", "while True: print('x' * 1000)")
    assert program.stdout is not None
    program.stdout.read(10)
    program.stdout.close()
    assert program.stderr is not None
    errors = program.stderr.read()
    program.stderr.close()
    assert program.wait(timeout=30) == 1
    assert b"Traceback" not in errors
    assert fake.alive() == []


def test_a_pipe_that_nobody_reads_is_no_traceback(cli: Cli) -> None:
    cli("sandbox", "create")
    reader, writer = os.pipe()
    os.close(reader)
    program = cli.start("sandbox", "list", stdout=writer)
    os.close(writer)
    _, errors = program.communicate(timeout=20)
    assert (program.returncode, errors) == (1, b"")


def test_completion_knows_the_commands(cli_alone: Cli) -> None:
    words = {"_8080_COMPLETE": "complete_bash", "COMP_WORDS": "8080 sandbox st", "COMP_CWORD": "2"}
    cli_alone.env |= words
    program = cli_alone.start()
    assert program.communicate(timeout=20)[0].split() == [b"stop"]


def test_colour_only_on_a_terminal_that_wants_it(cli: Cli, fake: FakeServer) -> None:
    cli("sandbox", "create")
    assert "\x1b[" in cli.on_terminal("sandbox", "list")[1]
    assert "\x1b[" not in cli.on_terminal("sandbox", "list", NO_COLOR="1")[1].replace("\x1b[1m", "").replace(
        "\x1b[0m", ""
    )
    assert "\x1b[32m" in cli.on_terminal("doctor")[1]
    assert "\x1b[" not in cli.on_terminal("doctor", NO_COLOR="1")[1]
    assert b"\x1b[" not in cli("doctor").stdout


def test_version(cli_alone: Cli) -> None:
    assert re.fullmatch(rb"8080 \d+\.\d+\.\d+\S*\n", cli_alone("--version").stdout)


def test_commands_load_only_what_they_need() -> None:
    code = (
        "import sys, e80_cli.main as m\nm.run(sys.argv[1:])\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    )

    def loaded(*words: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=60
        )
        return set(done.stderr.split())

    heavy = {"asyncio", "httpx2", "rich", "fastapi", "anyio"}
    assert loaded("--help") & heavy == set()
    assert loaded("env") & heavy == set()
    listing = loaded(
        "--patience-s", "0", "--base-url", "http://127.0.0.1:1", "--api-key", "k", "sandbox", "list"
    )
    assert "httpx2" in listing
    assert listing & {"rich", "fastapi"} == set()
