"""An upload that a pause cuts off."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.kit.errors import ConflictError
from sandboxd.sandboxes import files


async def chunks() -> AsyncIterator[bytes]:
    yield b"x"


async def hang_up(_path: str, _chunks: Any) -> tuple[int, bool]:
    raise LinkBrokenError("the agent hung up before the file was written")


def sandbox(*, paused: bool) -> Any:
    return SimpleNamespace(id="sbx_1", paused=paused, agent=SimpleNamespace(files=SimpleNamespace(write=hang_up)), bytes_in=0)


async def test_an_upload_that_a_pause_cuts_off_says_so():
    with pytest.raises(ConflictError, match="paused while the file was sent") as raised:
        await files.write(sandbox(paused=True), "a", chunks())
    assert raised.value.code == "sandbox_paused"
    with pytest.raises(LinkBrokenError):
        await files.write(sandbox(paused=False), "a", chunks())
