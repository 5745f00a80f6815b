"""What a client is told when a file operation is cut off, refused, or has to wait."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from e80_agent import protocol

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.kit.errors import ConflictError, SandboxdError
from sandboxd.kit.settings import Settings
from sandboxd.sandboxes import files
from sandboxd.sandboxes.errors import FilesBusyError, SandboxNotRunningError
from sandboxd.sandboxes.exec_feed import MAX_SANDBOX_FEEDS
from sandboxd.sandboxes.files import FileService, Target
from sandboxd.sandboxes.live import MAX_FILE_OPERATIONS, MAX_WATCHES

TARGET = Target("proj_1", "sbx_1", b"a\xff")


async def chunks() -> AsyncIterator[bytes]:
    yield b"x"


class World:
    """One sandbox, and an agent that does what the test says."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.ended = False
        self.work = work
        self.sandbox = SimpleNamespace(
            id="sbx_1",
            paused=False,
            agent=SimpleNamespace(files=self),
            bytes_in=0,
            disk_size_mb=16,
            file_places=asyncio.Semaphore(MAX_FILE_OPERATIONS),
        )
        self.service = FileService(self, closing=lambda: False)  # type: ignore[arg-type]  # as much as is needed

    async def running(self, _project_id: str, sandbox_id: str) -> Any:
        if self.ended:
            raise SandboxNotRunningError(sandbox_id, "stopped", "user")
        return self.sandbox

    async def write(self, _path: bytes, _chunks: Any, _mode: int | None) -> tuple[int, bool]:
        result: tuple[int, bool] = await self.work()
        return result


async def hang_up() -> tuple[int, bool]:
    raise LinkBrokenError("the agent hung up before the data was written")


async def test_an_upload_that_a_pause_cuts_off_says_so():
    world = World(hang_up)

    async def pause() -> tuple[int, bool]:
        world.sandbox.paused = True
        return await hang_up()

    world.work = pause
    with pytest.raises(ConflictError, match="paused meanwhile") as raised:
        await world.service.write(TARGET, chunks())
    assert raised.value.code == "sandbox_paused"


async def test_an_upload_that_a_stop_cuts_off_says_so():
    async def stop() -> tuple[int, bool]:
        world.ended = True
        return await hang_up()

    world = World(stop)
    with pytest.raises(SandboxNotRunningError):
        await world.service.write(TARGET, chunks())


async def test_a_link_that_breaks_by_itself_is_a_fault():
    with pytest.raises(LinkBrokenError):
        await World(hang_up).service.write(TARGET, chunks())


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("file_not_found", 404, "file_not_found"),
        ("permission_denied", 403, "file_forbidden"),
        ("read_only", 403, "file_forbidden"),
        ("disk_full", 507, "disk_full"),
        ("file_exists", 409, "file_exists"),
        ("not_empty", 409, "not_empty"),
        ("busy", 409, "busy"),
        ("bad_archive", 400, "bad_archive"),
        ("unsupported", 400, "unsupported"),
        ("io_error", 500, "file_error"),
    ],
)
async def test_a_refusal_names_the_path_and_has_a_code(code, status, told):
    async def refuse() -> tuple[int, bool]:
        raise AgentRefusedError(code, "because")

    with pytest.raises(SandboxdError) as raised:
        await World(refuse).service.write(TARGET, chunks())
    assert (raised.value.status, raised.value.code, raised.value.param) == (status, told, "path")
    assert "'a\ufffd'" in raised.value.message


async def test_operations_beyond_the_places_wait_and_are_refused_at_last(monkeypatch):
    free = asyncio.Event()

    async def wait() -> tuple[int, bool]:
        await free.wait()
        return 1, True

    world = World(wait)
    running = [
        asyncio.ensure_future(world.service.write(TARGET, chunks())) for _ in range(MAX_FILE_OPERATIONS + 1)
    ]
    await asyncio.sleep(0)
    monkeypatch.setattr(files, "_PLACE_S", 0.01)
    with pytest.raises(FilesBusyError):
        await world.service.write(TARGET, chunks())
    free.set()
    # The one that waited for a place has got it.
    assert await asyncio.gather(*running) == [(1, True)] * (MAX_FILE_OPERATIONS + 1)


def test_what_holds_connections_for_long_leaves_some_for_calls():
    """A sandbox at all of its limits still answers, say to a signal that is to end what fills it."""
    most_execs = max(item.le for item in Settings.model_fields["max_execs"].metadata if hasattr(item, "le"))
    lasting = most_execs + MAX_FILE_OPERATIONS + MAX_WATCHES + MAX_SANDBOX_FEEDS
    assert lasting + 32 < protocol.MAX_CONNECTIONS
