"""docs/sdk.md names everything that is public, and its examples are Python."""

import ast
import re
from pathlib import Path

import e80_sdk
from e80_sdk import errors
from e80_sdk.options import PythonOptions, SandboxOptions

TEXT = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text()


def test_every_public_name_option_and_code_is_documented() -> None:
    wanted = {*e80_sdk.__all__, *SandboxOptions.__optional_keys__, *PythonOptions.__optional_keys__}
    wanted |= {"run_python", "run", "read_file", "write_file", "stop"}
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
