"""Files of a sandbox, read and written by its agent as the tenant; bytes only pass through here."""

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError
from sandboxd.kit.errors import BadRequestError, ConflictError, SandboxdError
from sandboxd.sandboxes.errors import DiskFullError, FileForbiddenError, FileNotFound
from sandboxd.sandboxes.live import LiveSandbox

_WRITABLE = "only /home/user and /tmp can be written"


async def read(sandbox: LiveSandbox, path: str) -> tuple[int, AsyncGenerator[bytes]]:
    """Size and content. Raises FileNotFound, FileForbiddenError, BadRequestError, ConflictError."""
    try:
        size, chunks = await sandbox.agent.files.read(path)
    except AgentRefusedError as error:
        raise _explain(error, sandbox, path) from error
    return size, _count_out(sandbox, chunks)


async def write(sandbox: LiveSandbox, path: str, chunks: AsyncIterable[bytes]) -> tuple[int, bool]:
    """Replaces the file in one step; returns its size and whether it is new. Raises as `read`, and
    DiskFullError: then the file is as it was."""
    try:
        return await sandbox.agent.files.write(path, _count_in(sandbox, chunks))
    except AgentRefusedError as error:
        raise _explain(error, sandbox, path) from error
    except LinkBrokenError as error:
        if not sandbox.paused:
            raise
        raise ConflictError(
            f"Sandbox {sandbox.id} was paused while the file was sent, and the file is as it was; send it "
            "again when the sandbox is resumed.",
            param="id",
            code="sandbox_paused",
        ) from error


async def _count_out(sandbox: LiveSandbox, chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        async for chunk in chunks:
            sandbox.bytes_out += len(chunk)
            yield chunk


async def _count_in(sandbox: LiveSandbox, chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    async for chunk in chunks:
        sandbox.bytes_in += len(chunk)
        yield chunk


def _explain(error: AgentRefusedError, sandbox: LiveSandbox, path: str) -> SandboxdError:
    shown = repr(path[:200])
    reason = error.message
    match error.agent_code:
        case "file_not_found":
            return FileNotFound(f"There is no file {shown} in sandbox {sandbox.id}.", param="path")
        case "permission_denied":
            return FileForbiddenError(f"{shown} is not open to the sandbox's user: {reason}.", param="path")
        case "read_only":
            return FileForbiddenError(f"{shown} is read-only in a sandbox: {_WRITABLE}.", param="path")
        case "disk_full":
            return DiskFullError(
                f"The disk of sandbox {sandbox.id} ({sandbox.disk_size_mb} MB) is full; delete files or "
                f"create a sandbox with a larger disk_size_mb. {shown} is as it was.",
                param="path",
            )
        case "is_directory" | "not_regular" | "not_directory" | "bad_path" | "bad_request":
            return BadRequestError(f"{shown}: {reason}.", param="path", code=error.agent_code)
        case "busy":
            return ConflictError(f"{shown}: {reason}.", param="path", code="busy")
        case _:
            return SandboxdError(f"{shown}: {reason}.", param="path", code="file_error")
