"""Files of a sandbox from either face: transfers that break, names of any bytes, folders, changes, URLs."""

import asyncio
import base64
import hashlib
import io
import os
import signal
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from e80_sdk import (
    BadArchiveError,
    BadRequestError,
    ConflictError,
    ConnectionLostError,
    Eighty80,
    NotFoundError,
    Sandbox,
)

from tests.e80_sdk.fake_server import FakeServer, Fault
from tests.e80_sdk.test_archives import archive, link, tree

if TYPE_CHECKING:
    from tests.conftest import Daemon

SIZE = 32 * 1024 * 1024
DATA = bytes(range(256)) * 4096
ODD = os.fsdecode(b"caf\xe9 \xff.txt")


class Progress:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int | None]] = []

    def __call__(self, done: int, total: int | None) -> None:
        self.told.append((done, total))


def test_a_download_that_breaks_goes_on_where_it_broke(login: FakeServer, tmp_path: Path) -> None:
    """Transfers fail silently (OpenSandbox#1016) or start over until a limit (E2B#1433): this one does
    neither."""
    with Eighty80() as client, client.sandbox() as sandbox:
        sandbox.files.write("big", DATA)
        login.file_cuts = [100_000, 0, 200_000]
        progress = Progress()
        assert sandbox.files.download("big", tmp_path, progress=progress) == len(DATA)
        assert (tmp_path / "big").read_bytes() == DATA
        ranges = [one.headers.get("range") for one in login.seen if one.method == "GET"]
        assert ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=300000-"]
        assert progress.told[-1] == (len(DATA), len(DATA))
        assert progress.told == sorted(progress.told)
        login.file_cuts = [5, 6]
        assert sandbox.files.read("big") == DATA
        login.file_cuts = [5, 6]
        assert b"".join(sandbox.files.stream("big")) == DATA


def test_a_file_that_changes_while_it_is_fetched(login: FakeServer, tmp_path: Path) -> None:
    with Eighty80() as client, client.sandbox() as sandbox:
        sandbox.files.write("big", DATA)

        def change() -> None:
            login.file(sandbox.id, "big").write_bytes(b"another")

        login.on_cut = change
        login.file_cuts = [100_000]
        assert sandbox.files.download("big", tmp_path / "here") == 7
        assert (tmp_path / "here").read_bytes() == b"another"
        sandbox.files.write("big", DATA)
        login.file_cuts = [100_000]
        assert sandbox.files.read("big") == b"another"
        sandbox.files.write("big", DATA)
        login.file_cuts = [100_000]
        with pytest.raises(ConflictError, match="the file has changed since"):
            list(sandbox.files.stream("big"))
        sandbox.files.write("big", DATA)
        login.file_cuts = [100_000]
        target = io.BytesIO(b"head")
        target.seek(4)
        assert sandbox.files.download("big", target) == 7
        assert target.getvalue() == b"headanother"


def test_a_download_that_fails_leaves_what_was_there(login: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with Eighty80(patience_s=0) as client, client.sandbox() as sandbox:
        sandbox.files.write("f", DATA)
        login.file_cuts = [1000]
        with pytest.raises(ConnectionLostError):
            sandbox.files.download("f", tmp_path / "f")

        def refuse(done: int, total: int | None) -> None:
            raise KeyError(done)

        with pytest.raises(KeyError):
            sandbox.files.download("f", tmp_path / "f", progress=refuse)
        with pytest.raises(NotFoundError):
            sandbox.files.download("nowhere", tmp_path / "f")
        with pytest.raises(FileNotFoundError):
            sandbox.files.download("f", tmp_path / "no" / "such" / "folder")
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "config"] == ["f"]


def test_every_source_is_sent_whole_and_again_where_it_can_be(login: FakeServer, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(DATA)
    progress = Progress()
    with Eighty80() as client, client.sandbox() as sandbox:
        with local.open("rb") as file:
            for source in (DATA, bytearray(DATA), memoryview(DATA), local, file, io.BytesIO(DATA)):
                login.faults.append(Fault("PUT", "/files", 0))
                assert sandbox.files.write("f", source, progress=progress) == len(DATA)
                assert sandbox.files.read("f") == DATA
                assert progress.told[-1] == (len(DATA), len(DATA))
                assert login.last("PUT", "/files").headers["content-length"] == str(len(DATA))
        assert sandbox.files.write("f", "grüße") == 7
        assert sandbox.files.read_text("f") == "grüße"
        assert sandbox.files.write("f", (bytes([n]) for n in range(3))) == 3
        read, write = os.pipe()
        os.write(write, b"piped")
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert sandbox.files.write("f", pipe) == 5
        login.faults.append(Fault("PUT", "/files", 0))
        with pytest.raises(ConnectionLostError, match="this iterator cannot be read a second time"):
            sandbox.files.write("f", iter([b"x"]))
        for wrong in (5, None):
            with pytest.raises(TypeError, match="data must be bytes"):
                sandbox.files.write("f", wrong)  # type: ignore[arg-type]  # the misuse under test
        with pytest.raises(TypeError, match="from bytes, not from str"):
            sandbox.files.write("f", iter(["x"]))  # type: ignore[list-item]  # the misuse under test
        with pytest.raises(TypeError, match="from bytes, not from NoneType"):
            sandbox.files.write("f", iter([b"x", None]))  # type: ignore[list-item]  # would be cut short
        with pytest.raises(FileNotFoundError):
            sandbox.files.write("f", tmp_path / "nowhere")


async def test_an_asynchronous_source(login: FakeServer) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.sleep(0)
        yield b"two"

    async with Eighty80() as client, client.sandbox() as sandbox:
        sandbox.files.write("f", pieces())
        assert await sandbox.files.read("f") == b"onetwo"
        login.file_cuts = [2]
        assert b"".join([piece async for piece in sandbox.files.stream("f")]) == b"onetwo"


def test_a_removal_whose_answer_was_lost_is_no_error(login: FakeServer) -> None:
    with Eighty80() as client, client.sandbox() as sandbox:
        sandbox.files.write("f", b"x")
        login.faults.append(Fault("DELETE", "/files", 0, after=True))
        sandbox.files.remove("f")
        with pytest.raises(NotFoundError):
            sandbox.files.remove("f")
        # Without its sandbox nobody knows whether it was removed.
        gone = {"error": {"message": "no sandbox", "type": "x", "param": None, "code": "sandbox_not_found"}}
        login.faults += [Fault("DELETE", "/files", 0), Fault("DELETE", "/files", 404, body=gone)]
        with pytest.raises(NotFoundError, match="no sandbox"):
            sandbox.files.remove("f")


def test_a_folder_whose_archive_breaks_comes_from_its_start(login: FakeServer, tmp_path: Path) -> None:
    login.archive = archive(("a", DATA), ("b/c", b"x"))
    login.file_cuts = [200_000, 10]
    progress = Progress()
    with Eighty80() as client, client.sandbox() as sandbox:
        assert sandbox.files.download_dir("x", tmp_path / "here", progress=progress) == 2
        assert progress.told[-1] == (len(login.archive), None)
        assert (tmp_path / "here" / "a").read_bytes() == DATA
        login.archive = archive(("../a", DATA))
        with pytest.raises(BadArchiveError, match="outside"):
            sandbox.files.download_dir("x", tmp_path / "there")
        login.archive = archive(("a", DATA))[:5000]
        with pytest.raises(BadArchiveError, match="unexpected end"):
            sandbox.files.download_dir("x", tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


async def test_a_folder_that_nobody_waits_for_any_more(login: FakeServer, tmp_path: Path) -> None:
    login.archive = archive(*((str(n), DATA) for n in range(20)))
    async with Eighty80() as client, client.sandbox() as sandbox:
        pending = sandbox.files.download_dir("x", tmp_path / "here", progress=lambda *_: pending.cancel())
        with pytest.raises(asyncio.CancelledError):
            await pending
    assert os.listdir(tmp_path) == []


def test_a_folder_is_sent_again_when_the_connection_breaks(login: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    progress = Progress()
    with Eighty80() as client, client.sandbox() as sandbox:
        login.faults.append(Fault("PUT", "/archive", 0))
        assert sandbox.files.upload_dir(tmp_path, "x", progress=progress) == 7
    assert progress.told[-1] == (len(login.archive), len(login.archive))
    assert b"".join(io.BytesIO(login.archive)) == login.archive


def test_a_watch_that_breaks_says_what_may_be_missed(login: FakeServer) -> None:
    odd = base64.b64encode(b"/x/\xff").decode()
    moved = {"type": "file.moved", "path": "/x/\ufffd", "path_base64": odd, "from": "/x/a"}
    login.changes = [
        [{"type": "watch.started", "path": "/x"}, {"type": "file.created", "path": "/x/a"}],
        [{"type": "watch.started", "path": "/x"}, moved, {"type": "watch.overflow"}],
    ]
    with Eighty80() as client, client.sandbox() as sandbox:
        changes: Iterator[object] = sandbox.files.watch("/x")
        told = [next(changes) for _ in range(5)]
    assert [(one.type, one.path, one.from_path) for one in told] == [  # type: ignore[attr-defined]
        ("started", "", None),
        ("created", "/x/a", None),
        ("overflow", "", None),
        ("moved", os.fsdecode(b"/x/\xff"), "/x/a"),
        ("overflow", "", None),
    ]


@pytest.mark.docker
def test_files_of_a_sandbox(real_sandbox: Sandbox, tmp_path: Path) -> None:
    files = real_sandbox.files
    progress = Progress()
    assert files.write("big.bin", DATA * 8, mode=0o600, progress=progress) == len(DATA) * 8
    assert progress.told[-1] == (len(DATA) * 8, len(DATA) * 8)
    assert files.read("/home/user/big.bin") == DATA * 8
    assert files.download("big.bin", tmp_path) == len(DATA) * 8
    assert (tmp_path / "big.bin").read_bytes() == DATA * 8
    entry = files.stat("big.bin")
    assert (entry.path, entry.name, entry.type) == ("/home/user/big.bin", "big.bin", "file")
    assert (entry.size, entry.mode, entry.owner) == (len(DATA) * 8, "0600", "user")
    assert files.exists("big.bin")
    assert not files.exists("nowhere/at/all")
    assert files.mkdir("a/b/c").type == "directory"
    assert files.mkdir("a/b/c").type == "directory"
    files.write("a/b/text", "grüße")
    assert files.read_text("a/b/text") == "grüße"
    assert files.move("a/b/text", "a/moved").path == "/home/user/a/moved"
    files.write("a/other", b"x")
    with pytest.raises(ConflictError):
        files.move("a/other", "a/moved")
    files.move("a/other", "a/moved", overwrite=True)
    assert files.chmod("a/moved", 0o755).mode == "0755"
    assert [(one.name, one.type) for one in files.list("a")] == [("b", "directory"), ("moved", "file")]
    assert [one.name for one in files.list("a", limit=1)] == ["b"]
    with pytest.raises(ConflictError):
        files.remove("a")
    files.remove("a", recursive=True)
    with pytest.raises(NotFoundError):
        files.remove("a")
    with pytest.raises(NotFoundError, match="nowhere"):
        files.read("nowhere")
    with pytest.raises(BadRequestError):
        files.read("big.bin\0")
    with pytest.raises(NotFoundError):
        real_sandbox.files.list("nowhere")


@pytest.mark.docker
def test_names_of_any_bytes(real_sandbox: Sandbox, tmp_path: Path) -> None:
    files = real_sandbox.files
    for name in (ODD, "a b", "a+b", "a%20b", "a&b=c#d?e", "grüße", "-x", "'\"\n"):
        folder = f"odd/{name}"
        files.mkdir(folder)
        files.write(f"{folder}/{name}", name.encode("utf-8", "surrogateescape"))
        [entry] = files.list(folder)
        assert entry.name == name
        assert entry.path == f"/home/user/{folder}/{name}"
        assert files.read(entry.path) == name.encode("utf-8", "surrogateescape")
        assert files.stat(entry.path).name == name
        files.chmod(entry.path, "600")
        files.move(entry.path, f"{folder}/{name}.new")
        assert files.exists(f"{folder}/{name}.new")
    assert len(files.list("odd")) == 8
    assert files.download_dir("odd", tmp_path / "odd") == 16
    assert (tmp_path / "odd" / ODD / f"{ODD}.new").read_bytes() == ODD.encode("utf-8", "surrogateescape")
    files.upload_dir(tmp_path / "odd", "again")
    assert [one.name for one in files.list("again")] == [one.name for one in files.list("odd")]


@pytest.mark.docker
def test_a_list_of_many_pages(real_sandbox: Sandbox) -> None:
    real_sandbox.run("mkdir many; cd many; seq -w 2500 | xargs touch; touch $'\\xff'")
    names = [one.name for one in real_sandbox.files.list("many")]
    assert names == [f"{n:04}" for n in range(1, 2501)] + [os.fsdecode(b"\xff")]
    assert len(real_sandbox.files.list("many", limit=1500)) == 1500


@pytest.mark.docker
def test_folders_there_and_back(real_sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "sub" / "run.sh").write_text("echo hi")
    (source / "sub" / "run.sh").chmod(0o755)
    (source / "big").write_bytes(DATA)
    (source / "link").symlink_to("sub/run.sh")
    files = real_sandbox.files
    assert files.upload_dir(source, "up") == 5
    assert real_sandbox.run("up/link") == "hi\n"
    assert files.download_dir("up", tmp_path / "back") == 5
    assert tree(tmp_path / "back") == tree(source)
    real_sandbox.run("ln -s /etc/passwd up/out")
    with pytest.raises(BadArchiveError, match="leads out of its folder, to '/etc/passwd'"):
        files.download_dir("up", tmp_path / "hostile")
    assert not (tmp_path / "hostile").exists()
    (source / "away").symlink_to("/etc/passwd")
    with pytest.raises(Exception, match="away"):
        files.upload_dir(source, "up2")
    with pytest.raises(NotADirectoryError):
        files.upload_dir(source / "big", "up2")
    with pytest.raises(NotFoundError):
        files.download_dir("nowhere", tmp_path / "hostile")
    assert link("a", "b").issym()


@pytest.mark.docker
def test_changes_are_watched(real_sandbox: Sandbox) -> None:
    real_sandbox.files.mkdir("seen")
    changes = real_sandbox.files.watch("seen")
    assert next(changes).type == "started"
    real_sandbox.run("echo 1 > seen/a; mv seen/a seen/b; rm seen/b")
    told = []
    for change in changes:
        told.append((change.type, change.path, change.from_path))
        if change.type == "deleted":
            break
    assert ("created", "/home/user/seen/a", None) in told
    assert ("moved", "/home/user/seen/b", "/home/user/seen/a") in told
    assert told[-1] == ("deleted", "/home/user/seen/b", None)


@pytest.mark.docker
def test_addresses_that_need_no_key(real_sandbox: Sandbox) -> None:
    up = real_sandbox.files.upload_url("given.txt", expires_in_s=60)
    down = real_sandbox.files.download_url("given.txt")
    assert httpx2.put(up, content=b"hello").is_success
    assert httpx2.get(down).content == b"hello"
    assert httpx2.put(down, content=b"x").status_code in (401, 403)
    assert httpx2.get(down.replace("given", "other")).status_code in (401, 403)
    assert real_sandbox.files.read("given.txt") == b"hello"


@pytest.mark.docker
def test_big_files_take_little_memory(real_sandbox: Sandbox, tmp_path: Path) -> None:
    """Big files fail for their size in memory (deer-flow#4811): 64 MB go each way in pieces."""
    local = tmp_path / "big"
    piece = os.urandom(1024 * 1024)
    with local.open("wb") as file:
        for _ in range(64):
            file.write(piece)
    tracemalloc.start()
    real_sandbox.files.write("big", local)
    real_sandbox.files.download("big", tmp_path / "back")
    real_sandbox.files.download_dir(".", tmp_path / "folder")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16_000_000
    assert len({_digest(path) for path in (local, tmp_path / "back", tmp_path / "folder" / "big")}) == 1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.docker
def test_transfers_over_restarts(own_daemon: "Daemon", tmp_path: Path) -> None:
    """The daemon is killed in the middle of an upload and of a download."""
    local = tmp_path / "big"
    local.write_bytes(os.urandom(SIZE))
    killed: list[int] = []

    def kill_at(size: int) -> None:
        if not killed:
            killed.append(size)
            own_daemon.stop(signal.SIGKILL)
            threading.Thread(target=own_daemon.start).start()

    with Eighty80(own_daemon.api_key, own_daemon.base_url) as client, client.sandbox() as sandbox:
        for transfer in ("up", "down"):
            killed.clear()

            def watch(done: int, total: int | None) -> None:
                if done > SIZE // 3:
                    kill_at(done)

            if transfer == "up":
                assert sandbox.files.write("big", local, progress=watch) == SIZE
            else:
                sandbox.files.download("big", tmp_path / "back", progress=watch)
            assert killed
        assert (tmp_path / "back").read_bytes() == local.read_bytes()
        assert sandbox.run("ls -A ~") == "big\n"
