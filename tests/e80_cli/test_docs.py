"""docs/cli.md names every command, option and exit code, and its examples parse."""

import re
from pathlib import Path
from typing import Any

import typer
from e80_cli import exits
from e80_cli.main import app

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = [(path, command)]
    for name, child in getattr(command, "commands", {}).items():
        found += commands(child, (*path, name))
    return found


def test_every_command_and_option_is_documented() -> None:
    for path, command in commands(typer.main.get_command(app)):
        name = f"8080 {' '.join(path)}".strip()
        assert f"`{name}`" in TEXT, name
        section = TEXT if len(path) < 2 else TEXT.split(f"### `{name}`", 1)[1].split("\n##", 1)[0]
        options = {option for one in command.params for option in one.opts if option.startswith("--")}
        missing = {option for option in options if option not in section} - {"--json", "--help"}
        assert missing == set(), name


def test_every_exit_code_is_documented() -> None:
    codes = [value for name, value in vars(exits).items() if name.isupper()]
    assert [code for code in codes if not re.search(rf"\b{code}\b", TEXT)] == []


def test_the_examples_name_real_options() -> None:
    known = {
        option
        for _, command in commands(typer.main.get_command(app))
        for one in command.params
        for option in one.opts
    }
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL):
        for line in re.findall(r"8080 (?:[^|\n]*)", block):
            ours = re.findall(r"(?<!\S)--\w[\w-]*", line.split(" -- ")[0])
            assert [word for word in ours if word not in known] in ([], ["--epochs"]), line
