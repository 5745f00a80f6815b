"""Files of a sandbox over the wire: whole ones and folders, streamed, resumed where a connection breaks.

A path is absolute or relative to /home/user; bytes of it that are not UTF-8 are surrogates, as in
`os.listdir`.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, TypeVar

from e80_sdk.errors import ConflictError, ConnectionLostError, NotFoundError, UnavailableError
from e80_sdk.paging import pages
from e80_sdk.paths import sandbox_path
from e80_sdk.records import FileChange, FileEntry, FileUrl, exact_path
from e80_sdk.retries import STREAM_SILENCE_S, Failure, silence_is_broken
from e80_sdk.sources import Data, Source
from e80_sdk.transport import Params, Request, Transport

FILE_TIMEOUT_S = 120.0
"""The longest silence in a file transfer."""
LIST_PAGE = 1000
T = TypeVar("T")
Method = Literal["download", "upload"]
Start = Callable[[int | None], None]


class FileApi:
    """Files of a sandbox by its id."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def read(self, sandbox_id: str, path: str) -> bytes:
        """The bytes of a file."""
        pieces: list[bytes] = []
        async with aclosing(self.download(sandbox_id, path, lambda _: pieces.clear())) as chunks:
            async for chunk in chunks:
                pieces.append(chunk)  # noqa: PERF401  # the list is emptied in between
        return b"".join(pieces)

    async def chunks(self, sandbox_id: str, path: str) -> AsyncGenerator[bytes]:
        """The bytes of a file, piece by piece.

        Raises:
            ConflictError: The connection broke, and the file has changed since.
        """
        begun = 0

        def start(_: int | None) -> None:
            nonlocal begun
            begun += 1
            if begun > 1:
                raise ConflictError(
                    f"the connection broke while {path!r} was read, and the file has changed since",
                    code="file_changed",
                )

        async with aclosing(self.download(sandbox_id, path, start)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def download(self, sandbox_id: str, path: str, start: Start) -> AsyncGenerator[bytes]:
        """The bytes of a file, piece by piece. A connection that breaks is taken up where it broke.

        Args:
            sandbox_id: The sandbox.
            path: The file.
            start: Called with the size of the file, where it is known, before the first piece; and again
                when the file has changed meanwhile and comes from its beginning.
        """
        request = Request(
            "GET",
            f"{sandbox_path(sandbox_id)}/files",
            params={"path": path},
            idempotent=True,
            lasting=True,
            timeout_s=FILE_TIMEOUT_S,
        )
        call = self._transport.call(request)
        done = furthest = 0
        while True:
            try:
                async with call.open() as response:
                    if response.status_code != 206:
                        done, tag = 0, response.headers.get("etag")
                        size = response.headers.get("content-length", "")
                        start(int(size) if size.isdigit() else None)
                    async for chunk in response.aiter_bytes():
                        done += len(chunk)
                        if done > furthest:
                            furthest = done
                            call.progress()
                        yield chunk
                return
            except Failure as failure:
                await call.again(failure)
            # Without its tag the file may have changed, and two halves of two files are no file.
            resumed = {"Range": f"bytes={done}-", "If-Range": tag} if tag and done else {}
            call.turn(replace(request, headers=resumed))

    async def write(self, sandbox_id: str, path: str, data: Data | Source, *, mode: str | None = None) -> int:
        """Write a file; gives its size. It appears, or changes, when all of it has arrived.

        Sent again when the connection breaks, where the source can be read again.
        """
        source = data if isinstance(data, Source) else Source.of(data)
        params = {"path": path} | ({} if mode is None else {"mode": mode})
        answer = await self._put(f"{sandbox_path(sandbox_id)}/files", params, source)
        size = answer.get("size")
        return size if isinstance(size, int) else 0

    async def list(
        self, sandbox_id: str, path: str = ".", *, limit: int | None = None
    ) -> AsyncGenerator[FileEntry]:
        """What is in a folder, by name."""
        found = pages(
            self._transport, self._path(sandbox_id, "list"), {"path": path}, limit=limit, size=LIST_PAGE
        )
        async with aclosing(found) as bodies:
            async for body in bodies:
                yield FileEntry.from_body(body)

    async def stat(self, sandbox_id: str, path: str, *, follow: bool = False) -> FileEntry:
        """What there is at a path; with `follow`, where a link leads."""
        params: Params = {"path": path} | ({"follow": "true"} if follow else {})
        request = Request("GET", self._path(sandbox_id, "stat"), params=params, idempotent=True)
        return FileEntry.from_body(await self._transport.send(request))

    async def exists(self, sandbox_id: str, path: str) -> bool:
        """Whether there is something at a path."""
        try:
            await self.stat(sandbox_id, path)
        except NotFoundError as exc:
            if exc.code == "sandbox_not_found":
                raise
            return False
        return True

    async def mkdir(
        self, sandbox_id: str, path: str, *, parents: bool = True, mode: str | None = None
    ) -> FileEntry:
        """Make a folder; one that is there already is no error."""
        body = {**named("path", path), "parents": parents} | ({} if mode is None else {"mode": mode})
        return await self._post(sandbox_id, "mkdir", body)

    async def move(self, sandbox_id: str, source: str, target: str, *, overwrite: bool = False) -> FileEntry:
        """Give a file or folder another name."""
        body = {**named("from", source), **named("to", target), "overwrite": overwrite}
        return await self._post(sandbox_id, "move", body, idempotent=False)

    async def chmod(self, sandbox_id: str, path: str, mode: str, *, recursive: bool = False) -> FileEntry:
        """Change the mode of a file or folder."""
        return await self._post(
            sandbox_id, "chmod", {**named("path", path), "mode": mode, "recursive": recursive}
        )

    async def remove(self, sandbox_id: str, path: str, *, recursive: bool = False) -> None:
        """Remove a file or an empty folder; with `recursive` a folder and all that is in it."""
        params: Params = {"path": path} | ({"recursive": "true"} if recursive else {})
        request = Request("DELETE", f"{sandbox_path(sandbox_id)}/files", params=params)
        try:
            await self._transport.send(request)
        except (ConnectionLostError, UnavailableError):
            try:
                await self._transport.send(replace(request, idempotent=True))
            except NotFoundError as exc:
                if exc.code != "file_not_found":
                    raise
                return  # it was removed, and the answer got lost

    async def watch(
        self, sandbox_id: str, path: str = ".", *, recursive: bool = False
    ) -> AsyncGenerator[FileChange]:
        """What changes in a folder from now on, without end. After a break, and where the server lost count,
        comes a change of type `overflow`; one of type `started` comes first."""
        request = Request(
            "GET",
            self._path(sandbox_id, "watch"),
            params={"path": path} | ({"recursive": "true"} if recursive else {}),
            idempotent=True,
            lasting=True,
            timeout_s=STREAM_SILENCE_S,
        )
        call = self._transport.call(request)
        again = False
        while True:
            failure = None
            async with call.events() as events:
                try:
                    async for event in events:
                        call.progress()
                        change = _change_in(event, again=again)
                        again = True
                        if change is not None:
                            yield change
                except Failure as caught:
                    failure = silence_is_broken(caught)
            await call.again(failure or _ended())

    async def archive(
        self, sandbox_id: str, path: str, receive: Callable[[AsyncGenerator[bytes]], Awaitable[T]]
    ) -> T:
        """Pass a folder as a tar archive to `receive`, in pieces, and give what that gives. When the
        connection breaks, `receive` gets the error, and is called again with the archive from its start."""
        request = Request(
            "GET",
            self._path(sandbox_id, "archive"),
            params={"path": path},
            idempotent=True,
            lasting=True,
            timeout_s=FILE_TIMEOUT_S,
        )
        call = self._transport.call(request)
        while True:
            try:
                async with call.open() as response, aclosing(response.aiter_bytes()) as chunks:
                    return await receive(chunks)
            except Failure as failure:
                await call.again(failure)

    async def unpack(self, sandbox_id: str, path: str, source: Source) -> int:
        """Unpack a tar archive below a path; gives how many entries it had."""
        answer = await self._put(self._path(sandbox_id, "archive"), {"path": path}, source)
        entries = answer.get("entries")
        return entries if isinstance(entries, int) else 0

    async def url(self, sandbox_id: str, path: str, method: Method, *, expires_in_s: int = 3600) -> FileUrl:
        """An address for one file that works without a key."""
        body = {**named("path", path), "method": method, "expires_in_s": expires_in_s}
        request = Request("POST", self._path(sandbox_id, "urls"), body=body, idempotent=True)
        return FileUrl.from_body(await self._transport.send(request))

    async def _put(self, path: str, params: Params, source: Source) -> dict[str, Any]:
        request = Request(
            "PUT",
            path,
            params=params,
            content=source.chunks,
            headers={} if source.size is None else {"Content-Length": str(source.size)},
            idempotent=True,
            timeout_s=FILE_TIMEOUT_S,
        )
        return await self._transport.send(request)

    async def _post(
        self, sandbox_id: str, what: str, body: Mapping[str, Any], *, idempotent: bool = True
    ) -> FileEntry:
        request = Request("POST", self._path(sandbox_id, what), body=body, idempotent=idempotent)
        return FileEntry.from_body(await self._transport.send(request))

    def _path(self, sandbox_id: str, what: str) -> str:
        return f"{sandbox_path(sandbox_id)}/files/{what}"


def named(name: str, path: str) -> dict[str, str]:
    """A path in a body: as text, or as its bytes where they are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raw = path.encode("utf-8", "surrogateescape")
        return {f"{name}_base64": base64.b64encode(raw).decode("ascii")}
    return {name: path}


def _change_in(event: Mapping[str, Any], *, again: bool) -> FileChange | None:
    kind = str(event.get("type"))
    if kind == "watch.started":
        # Nobody knows what happened between two streams.
        return FileChange("overflow" if again else "started", raw=dict(event))
    if kind == "watch.overflow":
        return FileChange("overflow", raw=dict(event))
    family, _, what = kind.partition(".")
    if family != "file":
        return None
    return FileChange(what, exact_path(event) or "", exact_path(event, "from"), dict(event))


def _ended() -> Failure:
    return Failure(ConnectionLostError("the stream of file changes ended"), resend=True, broken=True)
