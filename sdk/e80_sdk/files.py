"""The files of a sandbox: `Files` (calls block) and `AsyncFiles` (calls give `Pending`). No HTTP in here."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import BinaryIO, overload

from e80_sdk import transfers
from e80_sdk.file_api import FileApi, Method
from e80_sdk.pending import Calls, Pending
from e80_sdk.portal import Portal
from e80_sdk.records import FileChange, FileEntry
from e80_sdk.sources import Data, OnProgress, Source
from e80_sdk.streams import iterate

Mode = int | str
"""As a number (`0o644`) or as octal text (`"644"`)."""
LocalPath = str | os.PathLike[str]


class AsyncFiles:
    """The files of an `AsyncSandbox`: calls start at once and give a `Pending`; what they mean is at `Files`.

    Calls made after one that changes something wait for it.
    """

    def __init__(self, api: FileApi, sandbox_id: str, calls: Calls) -> None:
        self._api = api
        self._id = sandbox_id
        self._calls = calls

    def read(self, path: str) -> Pending[bytes]:
        """The bytes of a file."""
        return self._calls.start("files.read", lambda: self._api.read(self._id, path))

    def read_text(self, path: str, encoding: str = "utf-8") -> Pending[str]:
        """The text of a file."""
        return self._calls.start("files.read_text", lambda: _text(self._api, self._id, path, encoding))

    def stream(self, path: str) -> AsyncIterator[bytes]:
        """The bytes of a file, piece by piece, for `async for`."""
        return self._api.chunks(self._id, path)

    def write(
        self, path: str, data: Data, *, mode: Mode | None = None, progress: OnProgress | None = None
    ) -> Pending[int]:
        """Write a file; gives its size. `data` may be an asynchronous iterator, too."""
        source = Source.of(data, progress)
        return self._calls.start(
            "files.write", lambda: self._api.write(self._id, path, source, mode=octal(mode)), write=True
        )

    def download(
        self, path: str, target: LocalPath | BinaryIO, *, progress: OnProgress | None = None
    ) -> Pending[int]:
        """Fetch a file to a path or into an open file; gives its size."""
        return self._calls.start(
            "files.download", lambda: transfers.download(self._api, self._id, path, target, progress)
        )

    def stat(self, path: str, *, follow: bool = False) -> Pending[FileEntry]:
        """What there is at a path."""
        return self._calls.start("files.stat", lambda: self._api.stat(self._id, path, follow=follow))

    def exists(self, path: str) -> Pending[bool]:
        """Whether there is something at a path."""
        return self._calls.start("files.exists", lambda: self._api.exists(self._id, path))

    def mkdir(self, path: str, *, parents: bool = True, mode: Mode | None = None) -> Pending[FileEntry]:
        """Make a folder."""
        return self._calls.start(
            "files.mkdir",
            lambda: self._api.mkdir(self._id, path, parents=parents, mode=octal(mode)),
            write=True,
        )

    def move(self, source: str, target: str, *, overwrite: bool = False) -> Pending[FileEntry]:
        """Give a file or folder another name."""
        return self._calls.start(
            "files.move", lambda: self._api.move(self._id, source, target, overwrite=overwrite), write=True
        )

    def remove(self, path: str, *, recursive: bool = False) -> Pending[None]:
        """Remove a file or folder."""
        return self._calls.start(
            "files.remove", lambda: self._api.remove(self._id, path, recursive=recursive), write=True
        )

    def chmod(self, path: str, mode: Mode, *, recursive: bool = False) -> Pending[FileEntry]:
        """Change the mode of a file or folder."""
        return self._calls.start(
            "files.chmod",
            lambda: self._api.chmod(self._id, path, octal(mode), recursive=recursive),
            write=True,
        )

    def watch(self, path: str = ".", *, recursive: bool = False) -> AsyncIterator[FileChange]:
        """What changes in a folder from now on, for `async for`."""
        return self._api.watch(self._id, path, recursive=recursive)

    def upload_dir(self, folder: LocalPath, path: str, *, progress: OnProgress | None = None) -> Pending[int]:
        """Send a folder of this machine; gives how many entries it had."""
        return self._calls.start(
            "files.upload_dir",
            lambda: transfers.upload_dir(self._api, self._id, folder, path, progress),
            write=True,
        )

    def download_dir(
        self, path: str, folder: LocalPath, *, progress: OnProgress | None = None
    ) -> Pending[int]:
        """Fetch a folder to this machine; gives how many entries it had."""
        return self._calls.start(
            "files.download_dir", lambda: transfers.download_dir(self._api, self._id, path, folder, progress)
        )

    def upload_url(self, path: str, *, expires_in_s: int = 3600) -> Pending[str]:
        """An address that takes the file by `PUT`, without a key."""
        return self._calls.start("files.upload_url", lambda: self._url(path, "upload", expires_in_s))

    def download_url(self, path: str, *, expires_in_s: int = 3600) -> Pending[str]:
        """An address that gives the file, without a key."""
        return self._calls.start("files.download_url", lambda: self._url(path, "download", expires_in_s))

    def list(self, path: str = ".", *, limit: int | None = None) -> Pending[list[FileEntry]]:
        """What is in a folder, by name."""
        return self._calls.start("files.list", lambda: _listed(self._api, self._id, path, limit))

    async def _url(self, path: str, method: Method, expires_in_s: int) -> str:
        return (await self._api.url(self._id, path, method, expires_in_s=expires_in_s)).url


class Files:
    """The files of a `Sandbox`: calls block.

    Paths are absolute or relative to /home/user. Bytes of a name that are not UTF-8 are surrogates, as in
    `os.listdir`. `progress` is called after each piece with the bytes that are through and how many there are
    in all (None: nobody knows), from a thread of the SDK.
    """

    def __init__(self, api: FileApi, sandbox_id: str, portal: Portal) -> None:
        self._api = api
        self._id = sandbox_id
        self._portal = portal

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            NotFoundError: There is none.
        """
        return self._portal.call(self._api.read, self._id, path)

    def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """The text of a file.

        Raises:
            UnicodeDecodeError: It is no text in this encoding.
        """
        return self._portal.call(_text, self._api, self._id, path, encoding)

    def stream(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece, of any size.

        Raises:
            ConflictError: The connection broke, and the file has changed since.
        """
        return iterate(self._portal, self._api.chunks(self._id, path))

    def write(
        self, path: str, data: Data, *, mode: Mode | None = None, progress: OnProgress | None = None
    ) -> int:
        """Write a file; returns its size. It appears, or changes, when all of it has arrived.

        Args:
            path: Where to; its folder must be there.
            data: Bytes, text (as UTF-8), a `pathlib.Path` of this machine, a file that is open for reading
                bytes, or an iterator of bytes. When the connection breaks it is sent again; a file that
                cannot go back and an iterator cannot.
            mode: The file's mode, such as `0o644`.
            progress: Called after each piece.

        Raises:
            E80Error: The server refused, or the connection broke and `data` could not be read again.
            OSError: `data` cannot be read.
        """
        return self._portal.call(self._api.write, self._id, path, Source.of(data, progress), mode=octal(mode))

    def download(self, path: str, target: LocalPath | BinaryIO, *, progress: OnProgress | None = None) -> int:
        """Fetch a file of any size; returns its size. A connection that breaks is taken up where it broke; a
        file that has changed meanwhile comes from its start.

        Args:
            path: The file of the sandbox.
            target: A path of this machine, where it appears when all of it has arrived (in a folder under its
                own name), or a file that is open for writing bytes.
            progress: Called after each piece.
        """
        return self._portal.call(transfers.download, self._api, self._id, path, target, progress)

    def stat(self, path: str, *, follow: bool = False) -> FileEntry:
        """What there is at a path; of a link, the link itself, or with `follow` where it leads.

        Raises:
            NotFoundError: There is nothing.
        """
        return self._portal.call(self._api.stat, self._id, path, follow=follow)

    def exists(self, path: str) -> bool:
        """Whether there is something at a path."""
        return self._portal.call(self._api.exists, self._id, path)

    def mkdir(self, path: str, *, parents: bool = True, mode: Mode | None = None) -> FileEntry:
        """Make a folder, and with `parents` those above it. One that is there already is no error."""
        return self._portal.call(self._api.mkdir, self._id, path, parents=parents, mode=octal(mode))

    def move(self, source: str, target: str, *, overwrite: bool = False) -> FileEntry:
        """Give a file or folder another name.

        Raises:
            ConflictError: There is something of that name, and `overwrite` was not asked for.
        """
        return self._portal.call(self._api.move, self._id, source, target, overwrite=overwrite)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or an empty folder; with `recursive` a folder and all that is in it.

        Raises:
            NotFoundError: There is nothing.
            ConflictError: The folder is not empty.
        """
        self._portal.call(self._api.remove, self._id, path, recursive=recursive)

    def chmod(self, path: str, mode: Mode, *, recursive: bool = False) -> FileEntry:
        """Change the mode of a file or folder; with `recursive` of all that is in it, too."""
        return self._portal.call(self._api.chmod, self._id, path, octal(mode), recursive=recursive)

    def watch(self, path: str = ".", *, recursive: bool = False) -> Iterator[FileChange]:
        """What changes in a folder from now on, without end.

        The first is of type `started`: what happens from then on is told. One of type `overflow` says that
        changes were missed, for example because the connection broke: look at the folder anew.
        """
        return iterate(self._portal, self._api.watch(self._id, path, recursive=recursive))

    def upload_dir(self, folder: LocalPath, path: str, *, progress: OnProgress | None = None) -> int:
        """Send what is in a folder of this machine into a folder of the sandbox, which is made if it is not
        there; returns how many entries it had."""
        return self._portal.call(transfers.upload_dir, self._api, self._id, folder, path, progress)

    def download_dir(self, path: str, folder: LocalPath, *, progress: OnProgress | None = None) -> int:
        """Fetch what is in a folder of the sandbox into a folder of this machine, which is made if it is not
        there; returns how many entries it had. It appears when all of it has arrived.

        Raises:
            BadArchiveError: Something in it would land outside of the folder.
        """
        return self._portal.call(transfers.download_dir, self._api, self._id, path, folder, progress)

    def upload_url(self, path: str, *, expires_in_s: int = 3600) -> str:
        """An address that takes the file by `PUT`, without a key, as long as the sandbox and the key of this
        client live."""
        return self._portal.call(self._url, path, "upload", expires_in_s)

    def download_url(self, path: str, *, expires_in_s: int = 3600) -> str:
        """An address that gives the file, without a key, as long as the sandbox and the key of this client
        live."""
        return self._portal.call(self._url, path, "download", expires_in_s)

    def list(self, path: str = ".", *, limit: int | None = None) -> list[FileEntry]:
        """What is in a folder, by name; at most `limit`."""
        return self._portal.call(_listed, self._api, self._id, path, limit)

    async def _url(self, path: str, method: Method, expires_in_s: int) -> str:
        return (await self._api.url(self._id, path, method, expires_in_s=expires_in_s)).url


@overload
def octal(mode: Mode) -> str: ...
@overload
def octal(mode: None) -> None: ...
def octal(mode: Mode | None) -> str | None:
    """A mode as octal text."""
    return f"{mode:04o}" if isinstance(mode, int) else mode


async def _text(api: FileApi, sandbox_id: str, path: str, encoding: str) -> str:
    return (await api.read(sandbox_id, path)).decode(encoding)


async def _listed(api: FileApi, sandbox_id: str, path: str, limit: int | None) -> list[FileEntry]:
    return [entry async for entry in api.list(sandbox_id, path, limit=limit)]
