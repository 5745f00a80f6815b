"""Files of a sandbox, handled by its agent as the tenant; bytes only pass through here. Paths are bytes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.agentlink.files import Change, Content, Entry, Range
from sandboxd.kit.errors import BadRequestError, ConflictError, SandboxdError, UnavailableError
from sandboxd.runtimes.errors import AgentUnreachableError
from sandboxd.sandboxes.errors import (
    DiskFullError,
    FileForbiddenError,
    FileNotFound,
    FilesBusyError,
    RangeError,
)
from sandboxd.sandboxes.live import MAX_FILE_OPERATIONS, MAX_WATCHES, LiveSandbox
from sandboxd.sandboxes.service import SandboxService

_WRITABLE = "only /home/user, /tmp and /dev/shm can be written"
# How long an operation waits for a place before it is refused.
_PLACE_S = 30.0
# How often a watch in which nothing happens looks whether it should end.
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """What an operation is about: a sandbox as a client named it, a path, and what the client calls it."""

    project_id: str
    sandbox_id: str
    path: bytes
    param: str = "path"


class FileService:
    """Everything here raises SandboxNotFoundError, SandboxNotRunningError, FileNotFound, FileForbiddenError,
    BadRequestError, ConflictError, FilesBusyError, DiskFullError."""

    def __init__(self, sandboxes: SandboxService, closing: Callable[[], bool]) -> None:
        self._sandboxes = sandboxes
        self._closing = closing

    @asynccontextmanager
    async def read(
        self, target: Target, part: Range | None = None, tag: str | None = None
    ) -> AsyncIterator[Content]:
        """A file that is open until the context is left. Raises RangeError, too."""
        async with self._work(target) as sandbox:
            content = await sandbox.agent.files.read(target.path, part, tag)
            try:
                if content.start is None:
                    raise RangeError(content.size)
                async with aclosing(_count_out(sandbox, content.chunks)) as chunks:
                    yield Content(
                        content.size, content.start, content.length, content.tag, chunks, content.close
                    )
            finally:
                content.close()

    async def write(
        self, target: Target, chunks: AsyncIterable[bytes], mode: int | None = None
    ) -> tuple[int, bool]:
        """Replaces the file in one step; returns its size and whether it is new. After an error the file is
        as it was."""
        async with self._work(target) as sandbox:
            return await sandbox.agent.files.write(target.path, _count_in(sandbox, chunks), mode)

    async def stat(self, target: Target, *, follow: bool) -> Entry:
        async with self._work(target) as sandbox:
            return await sandbox.agent.files.stat(target.path, follow)

    async def list(self, target: Target, limit: int, after: bytes | None) -> tuple[list[Entry], bool]:
        """The next entries behind the name `after`, in the order of their bytes, and whether there are
        more."""
        async with self._work(target) as sandbox:
            return await sandbox.agent.files.list(target.path, limit, after)

    async def make_folder(self, target: Target, *, parents: bool, mode: int | None) -> tuple[Entry, bool]:
        async with self._work(target) as sandbox:
            return await sandbox.agent.files.make_folder(target.path, parents, mode)

    async def move(self, target: Target, to: bytes, *, overwrite: bool) -> Entry:
        async with self._work(target) as sandbox:
            return await sandbox.agent.files.move(target.path, to, overwrite)

    async def remove(self, target: Target, *, recursive: bool) -> None:
        async with self._work(target) as sandbox:
            await sandbox.agent.files.remove(target.path, recursive)

    async def chmod(self, target: Target, mode: int, *, recursive: bool) -> Entry:
        async with self._work(target) as sandbox:
            return await sandbox.agent.files.chmod(target.path, mode, recursive)

    @asynccontextmanager
    async def pack(self, target: Target, *, gzip: bool) -> AsyncIterator[AsyncGenerator[bytes]]:
        """A tar archive of a folder, open until the context is left."""
        async with self._work(target) as sandbox:
            chunks, close = await sandbox.agent.files.pack(target.path, gzip)
            try:
                async with aclosing(_count_out(sandbox, chunks)) as counted:
                    yield counted
            finally:
                close()

    async def unpack(self, target: Target, chunks: AsyncIterable[bytes]) -> tuple[int, int]:
        """Unpacks an archive below a folder; how many entries it had, and how many bytes of content."""
        async with self._work(target) as sandbox:
            return await sandbox.agent.files.unpack(target.path, _count_in(sandbox, chunks))

    async def watch(self, target: Target, *, recursive: bool) -> AsyncGenerator[Change | None]:
        """What happens at and below a path. The first item is None and says that it has begun; another None
        comes at times when nothing happens."""
        sandbox = await self._sandboxes.running(target.project_id, target.sandbox_id)
        if sandbox.watches >= MAX_WATCHES:
            raise FilesBusyError(f"{MAX_WATCHES} clients watch files of sandbox {sandbox.id}, the limit")
        sandbox.watches += 1
        try:
            async with self._explained(sandbox, target), AsyncExitStack() as stack:
                changes = await sandbox.agent.files.watch(target.path, recursive)
                await stack.enter_async_context(aclosing(changes))
                yield None
                paced = await stack.enter_async_context(aclosing(_with_pauses(changes)))
                async for change in paced:
                    if self._closing():
                        raise UnavailableError("The server is shutting down; watch again.")
                    yield change
        finally:
            sandbox.watches -= 1

    @asynccontextmanager
    async def _work(self, target: Target) -> AsyncIterator[LiveSandbox]:
        """A place for an operation in the sandbox that a client named."""
        sandbox = await self._sandboxes.running(target.project_id, target.sandbox_id)
        try:
            async with asyncio.timeout(_PLACE_S):
                await sandbox.file_places.acquire()
        except TimeoutError:
            raise FilesBusyError(
                f"{MAX_FILE_OPERATIONS} requests for files of sandbox {sandbox.id} are under way, the limit"
            ) from None
        try:
            async with self._explained(sandbox, target):
                yield sandbox
        finally:
            sandbox.file_places.release()

    @asynccontextmanager
    async def _explained(self, sandbox: LiveSandbox, target: Target) -> AsyncIterator[None]:
        """Turns what the agent and the link say into what the client can act on."""
        try:
            yield
        except AgentRefusedError as error:
            raise _explain(error, sandbox, target) from error
        except (LinkBrokenError, AgentUnreachableError) as error:
            if sandbox.paused:
                raise ConflictError(
                    f"Sandbox {sandbox.id} was paused meanwhile. A file that was being written is as it was;"
                    " send the request again when the sandbox is resumed.",
                    param="id",
                    code="sandbox_paused",
                ) from error
            # Says so when it has ended.
            await self._sandboxes.running(target.project_id, target.sandbox_id)
            raise


async def _with_pauses(changes: AsyncGenerator[Change]) -> AsyncGenerator[Change | None]:
    """The changes, and None whenever there was none for a while."""
    following = asyncio.ensure_future(anext(changes))
    try:
        while True:
            await asyncio.wait([following], timeout=_LOOK_S)
            if not following.done():
                yield None
                continue
            try:
                change = following.result()
            except StopAsyncIteration:
                return
            following = asyncio.ensure_future(anext(changes))
            yield change
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _count_out(sandbox: LiveSandbox, chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        async for chunk in chunks:
            sandbox.bytes_out += len(chunk)
            yield chunk


async def _count_in(sandbox: LiveSandbox, chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    async for chunk in chunks:
        sandbox.bytes_in += len(chunk)
        yield chunk


def shown(path: bytes) -> str:
    """A path for people: what is no UTF-8 shows as U+FFFD."""
    return path.decode("utf-8", "replace")


def _explain(error: AgentRefusedError, sandbox: LiveSandbox, target: Target) -> SandboxdError:
    path = repr(shown(target.path)[:200])
    param = target.param
    reason = error.message
    match error.agent_code:
        case "file_not_found":
            return FileNotFound(f"There is no file {path} in sandbox {sandbox.id}.", param=param)
        case "permission_denied":
            return FileForbiddenError(f"{path} is not open to the sandbox's user: {reason}.", param=param)
        case "read_only":
            return FileForbiddenError(f"{path} is read-only in a sandbox: {_WRITABLE}.", param=param)
        case "disk_full":
            return DiskFullError(
                f"The disk of sandbox {sandbox.id} ({sandbox.disk_size_mb} MB) is full; delete files or "
                f"create a sandbox with a larger disk_size_mb. {path}: {reason}.",
                param=param,
            )
        case "file_exists" | "not_empty" | "busy":
            return ConflictError(f"{path}: {reason}.", param=param, code=error.agent_code)
        case (
            "is_directory"
            | "not_regular"
            | "not_directory"
            | "bad_path"
            | "bad_request"
            | "bad_archive"
            | "unsupported"
        ):
            return BadRequestError(f"{path}: {reason}.", param=param, code=error.agent_code)
        case _:
            return SandboxdError(f"{path}: {reason}.", param=param, code="file_error")
