"""Files of one sandbox, through its agent."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable

from e80_agent import protocol

from sandboxd.agentlink.errors import LinkBrokenError
from sandboxd.agentlink.wire import (
    CALL_TIMEOUT_S,
    Dial,
    check,
    count,
    read_answer,
    read_header,
    read_record,
    send,
    send_chunks,
)
from sandboxd.kit.streams import Stream


class Files:
    """Raises AgentRefusedError, LinkBrokenError, and what `dial` raises."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial

    async def read(self, path: str) -> tuple[int, AsyncGenerator[bytes]]:
        """The file's size when it was opened, and its bytes. The iterator must be used up or closed."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            send(stream, {"op": "read_file", "path": path}, b"")
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = check(await read_header(stream))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            stream.close()
            raise LinkBrokenError("the agent hung up before the file") from error
        except BaseException:
            stream.close()
            raise
        try:
            return count(reply, "size"), _file_chunks(stream)
        except LinkBrokenError:
            stream.close()
            raise

    async def write(self, path: str, chunks: AsyncIterable[bytes]) -> tuple[int, bool]:
        """Writes the file in one step at the end; returns its size and whether it is new."""
        stream = await self._dial(CALL_TIMEOUT_S)
        try:
            send(stream, {"op": "write_file", "path": path}, b"")
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(read_answer(stream))
                await send_chunks(stream, chunks, answer)
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    reply = await answer
        except BaseExceptionGroup as faults:
            # Of the two only the sender can fail, and then the answer was cancelled: one fault, its own.
            fault = faults.exceptions[0]
            if isinstance(fault, TimeoutError):
                raise LinkBrokenError("the agent did not say that the file was written") from fault
            raise fault from None
        finally:
            stream.close()
        if reply is None:
            raise LinkBrokenError("the agent hung up before the file was written")
        reply = check(reply)
        return count(reply, "size"), reply.get("created") is True


async def _file_chunks(stream: Stream) -> AsyncGenerator[bytes]:
    try:
        while True:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                kind, payload = await read_record(stream)
            if kind == protocol.RECORD_END:
                return
            if kind != protocol.RECORD_DATA:
                raise LinkBrokenError("the agent could not read the file to its end")
            yield payload
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
        raise LinkBrokenError("the agent hung up in the middle of the file") from error
    finally:
        stream.close()
