import json
import subprocess

from tests.e80_cli.conftest import Cli


def test_the_lines_are_safe_for_eval(cli_alone: Cli) -> None:
    nasty = "k'; touch owned; echo $(id) \"`id`"
    done = cli_alone("env", _8080_API_KEY=nasty, _8080_BASE_URL="http://127.0.0.1:9/v1")
    assert done.returncode == 0
    names = ("_8080_API_KEY", "_8080_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL")
    script = done.stdout.decode() + "".join(f'printf "%s\\n" "${name}"\n' for name in names)
    shown = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, cwd=cli_alone.folder
    )
    assert shown.stdout.splitlines() == [nasty, "http://127.0.0.1:9", nasty, "http://127.0.0.1:9/v1"]
    assert not (cli_alone.folder / "owned").exists()


def test_json(cli_alone: Cli) -> None:
    done = cli_alone("env", "--json", _8080_API_KEY="k")
    assert json.loads(done.stdout) == {
        "_8080_API_KEY": "k",
        "_8080_BASE_URL": "http://127.0.0.1:8080",
        "OPENAI_API_KEY": "k",
        "OPENAI_BASE_URL": "http://127.0.0.1:8080/v1",
    }


def test_foreign_keys_are_not_taken_for_ours(cli_alone: Cli) -> None:
    done = cli_alone("env", OPENAI_API_KEY="sk-foreign", OPENAI_BASE_URL="https://elsewhere/v1")
    assert (done.returncode, done.stdout) == (4, b"")
