import json
import stat
from pathlib import Path

from tests.e80_cli.conftest import Cli
from tests.e80_sdk.fake_server import API_KEY, FakeServer


def test_a_key_from_stdin_is_stored_privately_and_used(cli_alone: Cli, fake: FakeServer) -> None:
    done = cli_alone("apikey", "set", "--base-url", f"{fake.base_url}/v1", "-", stdin=f"{API_KEY}\n".encode())
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    credentials = Path(cli_alone.env["_8080_CONFIG_DIR"]) / "credentials.toml"
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
    assert cli_alone("sandbox", "list").returncode == 0
    assert fake.last("GET", "/sandboxes").headers["authorization"] == f"Bearer {API_KEY}"
    assert API_KEY in cli_alone("env").stdout.decode()


def test_a_key_in_the_command_line_is_stored_with_a_warning(cli_alone: Cli) -> None:
    done = cli_alone("apikey", "set", "some-key", "--json")
    assert done.returncode == 0
    assert b"history" in done.stderr
    assert json.loads(done.stdout)["base_url"] == "http://127.0.0.1:8080"
    assert cli_alone("env", "--json").stdout.count(b"some-key") == 2


def test_a_key_typed_on_a_terminal_is_not_shown(cli_alone: Cli) -> None:
    code, shown = cli_alone.on_terminal("apikey", "set", answer=b"typed-key\n", hidden=True)
    assert code == 0
    assert "stored the key for http://127.0.0.1:8080" in shown
    assert b"typed-key" in cli_alone("env").stdout


def test_what_is_no_key_is_refused(cli_alone: Cli) -> None:
    for wrong in (b"", b"\n", b"two words\n", b"k\x00y\n", "schlüssel\n".encode()):
        done = cli_alone("apikey", "set", "-", stdin=wrong)
        assert done.returncode == 64
        assert b"no API key" in done.stderr
    assert cli_alone("env").returncode == 4


def test_a_folder_that_cannot_be_written_is_named(cli_alone: Cli) -> None:
    blocked = cli_alone.folder / "file"
    blocked.write_text("")
    done = cli_alone("apikey", "set", "-", stdin=b"key\n", _8080_CONFIG_DIR=str(blocked / "8080"))
    assert done.returncode == 1
    assert str(blocked).encode() in done.stderr
    assert b"Traceback" not in done.stderr


def test_create_list_revoke(cli: Cli, fake: FakeServer) -> None:
    assert cli("apikey", "create", "ci").stdout == b"8080_live_new\n"
    made = json.loads(cli("apikey", "create", "laptop", "--json").stdout)
    assert (made["name"], made["key"]) == ("laptop", "8080_live_new")
    assert cli("apikey", "list").stdout == b"key_0\nkey_1\n"
    listed = json.loads(cli("apikey", "list", "--json").stdout)
    assert [key["name"] for key in listed["data"]] == ["ci", "laptop"]
    assert cli("apikey", "revoke", "key_0", "key_1").stdout == b"key_0\nkey_1\n"
    assert all(key["revoked_at"] for key in fake.keys)
    code, shown = cli.on_terminal("apikey", "list")
    assert code == 0
    assert "laptop" in shown
    assert "revoked" in shown


def test_one_unknown_key_does_not_keep_the_others(cli: Cli, fake: FakeServer) -> None:
    cli("apikey", "create", "ci")
    done = cli("apikey", "revoke", "key_none", "key_0")
    assert (done.returncode, done.stdout) == (1, b"key_0\n")
    assert b"key_none" in done.stderr


def test_revoking_asks_on_a_terminal(cli: Cli, fake: FakeServer) -> None:
    cli("apikey", "create", "ci")
    code, shown = cli.on_terminal("apikey", "revoke", "key_0", answer=b"n\n")
    assert code == 2
    assert "nothing was revoked" in shown
    assert fake.keys[0]["revoked_at"] is None
    assert cli.on_terminal("apikey", "revoke", "key_0", answer=b"y\n")[0] == 0
    assert fake.keys[0]["revoked_at"] is not None
    assert cli.on_terminal("apikey", "revoke", "--yes", "key_0")[0] == 0
