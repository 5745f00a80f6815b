"""Importing is cheap, and every public name exists."""

import subprocess
import sys

import e80_sdk
import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_the_package_alone_loads_nothing_heavy() -> None:
    assert loaded_by("import e80_sdk") & {"httpx2", "fastapi", "pydantic", "asyncio", "anyio"} == set()
    assert loaded_by("from e80_sdk import E80Error") & {"httpx2", "fastapi", "asyncio"} == set()


def test_the_client_does_not_load_fastapi() -> None:
    loaded = loaded_by("from e80_sdk import Eighty80")
    assert "httpx2" in loaded
    assert loaded & {"fastapi", "starlette", "pydantic"} == set()


def test_the_first_request_loads_nothing_more() -> None:
    """A module loaded in the middle of a request would block the caller's loop."""
    code = """
import asyncio, sys
from e80_sdk import AsyncEighty80, ConnectionFailedError
before = set(sys.modules)

async def main():
    try:
        await AsyncEighty80("k", "http://127.0.0.1:1", max_retries=0).health()
    except ConnectionFailedError:
        print(*(set(sys.modules) - before))

asyncio.run(main())
"""
    late = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    packages = {name.split(".")[0] for name in late.split()}
    assert packages & {"anyio", "httpx2", "httpcore2", "h11", "ssl"} == set()


def test_every_public_name_exists_and_is_documented() -> None:
    for name in e80_sdk.__all__:
        assert getattr(e80_sdk, name).__doc__, name
    assert set(e80_sdk.__all__) <= set(dir(e80_sdk))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = e80_sdk.nothing
