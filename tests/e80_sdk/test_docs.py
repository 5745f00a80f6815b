"""docs/sdk.md names everything that is public, and its examples are Python."""

import ast
import re
from pathlib import Path

import e80_sdk
import pytest
from e80_sdk import Sandbox, errors
from e80_sdk.options import (
    CellOptions,
    CommandOptions,
    CommandStartOptions,
    PythonOptions,
    PythonStartOptions,
    SandboxOptions,
)

TEXT = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text()


def test_every_public_name_option_and_code_is_documented() -> None:
    options = (CellOptions, CommandOptions, CommandStartOptions, PythonOptions, PythonStartOptions)
    wanted = {*e80_sdk.__all__, *SandboxOptions.__optional_keys__}
    wanted |= {name for kind in options for name in kind.__optional_keys__}
    faces = (Sandbox, e80_sdk.Process, e80_sdk.Context, e80_sdk.Files, e80_sdk.Result)
    wanted |= {name for face in faces for name in vars(face) if not name.startswith("_")} - {"as_html"}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__doc__]
    # The server's own codes are documented with the server.
    ours = [kind for kind in kinds if issubclass(kind, errors.E80Error) and not kind.__doc__[0].isdigit()]
    wanted |= {kind.default_code for kind in ours} - {errors.E80Error.default_code}
    assert {name for name in wanted if not re.search(rf"\b{name}\b", TEXT)} == set()


def test_the_examples_are_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        indented = "".join(f"    {line}\n" for line in block.splitlines())
        ast.parse(f"async def example():\n{indented}")


@pytest.mark.docker
@pytest.mark.parametrize("section", ["Processes", "Contexts", "Files"])
def test_the_examples_run(
    real_sandbox: Sandbox, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local.bin").write_bytes(bytes(100_000))
    text = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {"sandbox": real_sandbox, "Path": Path})
