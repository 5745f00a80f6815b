"""A socket before an engine's own, whose replies come late, cut off or not at all."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DELAY_S = 0.5


class Proxy:
    """`faulty` is the share of requests that go wrong; while `hangs`, no reply comes through."""

    def __init__(self, path: Path, engine: Path) -> None:
        self.path = path
        self.faulty = 0.0
        self.hangs = False
        self.faults = 0
        self._engine = engine
        self._chance = random.Random(7)  # the same faults each time
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_unix_server(self._serve, self.path))
        self._loop.run_forever()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        self._hang_up()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    def heal(self) -> None:
        """From now on all is well; connections that hang are cut."""
        self.faulty, self.hangs = 0.0, False
        self._loop.call_soon_threadsafe(self._hang_up)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _hang_up(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        engine_reader, engine_writer = await asyncio.open_unix_connection(self._engine)
        self._writers |= {writer, engine_writer}
        answer = asyncio.ensure_future(self._replies(engine_reader, writer))
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    engine_writer.write(data)
                    await engine_writer.drain()
        finally:
            answer.cancel()
            writer.close()
            engine_writer.close()
            self._writers -= {writer, engine_writer}
            self._tasks.discard(task)

    async def _replies(self, engine: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await engine.read(65536):
                fault = ""
                if data.startswith(b"HTTP/") and self._chance.random() < self.faulty:
                    fault = self._chance.choice(("late", "cut", "none"))
                    self.faults += 1
                while self.hangs:  # noqa: ASYNC110  # set from another thread
                    await asyncio.sleep(0.01)
                if fault == "late":
                    await asyncio.sleep(DELAY_S)
                elif fault == "none":
                    break
                client.write(_cut(data) if fault == "cut" else data)
                await client.drain()
                if fault == "cut":
                    break
        client.close()


def _cut(reply: bytes) -> bytes:
    """Its head, which tells how long it is, and half of its body."""
    head, blank, body = reply.partition(b"\r\n\r\n")
    return head + blank + body[: len(body) // 2]


@contextmanager
def faulty_engine(folder: Path, engine: Path) -> Iterator[Proxy]:
    proxy = Proxy(folder / "docker.sock", engine)
    thread = threading.Thread(target=proxy.run)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
