import json
import os
import subprocess

import pytest

from tests.e80_cli.conftest import Cli
from tests.e80_sdk.fake_server import FakeServer, Fault

DATA = os.urandom(3_000_000)
BUSY = {"error": {"message": "busy", "code": "unavailable"}}


@pytest.fixture
def sandbox_id(cli: Cli) -> str:
    return cli("sandbox", "create").stdout.decode().strip()


def test_there_and_back(cli: Cli, fake: FakeServer, sandbox_id: str) -> None:
    (cli.folder / "in.bin").write_bytes(DATA)
    done = cli("sandbox", "cp", "in.bin", f"{sandbox_id}:dir.bin")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert fake.file(sandbox_id, "dir.bin").read_bytes() == DATA
    assert cli("sandbox", "cp", f"{sandbox_id}:dir.bin", "out.bin").returncode == 0
    assert (cli.folder / "out.bin").read_bytes() == DATA
    assert (cli.folder / "out.bin").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022) or 0o022)


def test_folders_take_the_name(cli: Cli, fake: FakeServer, sandbox_id: str) -> None:
    (cli.folder / "in.txt").write_text("x")
    (cli.folder / "sub").mkdir()
    assert cli("sandbox", "cp", "in.txt", f"{sandbox_id}:").returncode == 0
    assert cli("sandbox", "cp", "in.txt", f"{sandbox_id}:/home/user/").returncode == 0
    assert fake.file(sandbox_id, "in.txt").read_text() == "x"
    assert cli("sandbox", "cp", f"{sandbox_id}:/home/user/in.txt", "sub").returncode == 0
    assert (cli.folder / "sub" / "in.txt").read_text() == "x"


def test_pipes(cli: Cli, sandbox_id: str) -> None:
    assert cli("sandbox", "cp", "-", f"{sandbox_id}:f", stdin=DATA).returncode == 0
    assert cli("sandbox", "cp", f"{sandbox_id}:f", "-").stdout == DATA


def test_json(cli: Cli, sandbox_id: str) -> None:
    (cli.folder / "f").write_text("12345")
    up = json.loads(cli("sandbox", "cp", "--json", "f", f"{sandbox_id}:g").stdout)
    assert up == {"source": "f", "target": f"{sandbox_id}:g", "path": "g", "size": 5}
    assert json.loads(cli("sandbox", "cp", "--json", f"{sandbox_id}:g", "h").stdout)["size"] == 5
    assert cli("sandbox", "cp", "--json", f"{sandbox_id}:g", "-").returncode == 64


def test_progress_is_shown_on_a_terminal(cli: Cli, sandbox_id: str) -> None:
    (cli.folder / "in.bin").write_bytes(DATA)
    code, shown = cli.on_terminal("sandbox", "cp", "in.bin", f"{sandbox_id}:f")
    assert code == 0
    assert "in.bin" in shown
    assert "3000000 bytes -> f" in shown


def test_a_cut_download_leaves_the_old_file_and_nothing_else(
    cli: Cli, fake: FakeServer, sandbox_id: str
) -> None:
    (cli.folder / "in.bin").write_bytes(DATA)
    cli("sandbox", "cp", "in.bin", f"{sandbox_id}:f")
    folder = cli.folder / "target"
    folder.mkdir()
    (folder / "f").write_text("old")
    fake.cut_file = True
    done = cli("--patience-s", "0", "sandbox", "cp", f"{sandbox_id}:f", "target/f")
    assert done.returncode == 1
    assert b"connection broke" in done.stderr
    assert (folder / "f").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["f"]


def test_an_upload_that_is_asked_for_again_is_sent_from_its_start(
    cli: Cli, fake: FakeServer, sandbox_id: str
) -> None:
    (cli.folder / "in.bin").write_bytes(DATA)
    fake.faults.append(Fault("PUT", "/files", 503, {"Retry-After": "0"}, BUSY))
    assert cli("sandbox", "cp", "in.bin", f"{sandbox_id}:f").returncode == 0
    assert fake.file(sandbox_id, "f").read_bytes() == DATA
    fake.faults.append(Fault("PUT", "/files", 503, {"Retry-After": "0"}, BUSY))
    # A pipe, unlike a file, is gone when it has been read.
    program = cli.start("sandbox", "cp", "-", f"{sandbox_id}:g", stdin=subprocess.PIPE)
    _, errors = program.communicate(DATA, timeout=20)
    assert program.returncode == 1
    assert b"stdin" in errors
    assert not fake.file(sandbox_id, "g").exists()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("missing", "ID:f", "missing: No such file"),
        (".", "ID:f", "Is a directory"),
        ("ID:missing", "out", "no file 'missing'"),
        ("ID:f", "no/such/folder", "no/such/folder: No such file"),
        ("f", "sbx_none:f", "sbx_none"),
    ],
)
def test_what_cannot_be_copied_is_named(
    cli: Cli, fake: FakeServer, sandbox_id: str, source: str, target: str, message: str
) -> None:
    (cli.folder / "f").write_text("x")
    fake.file(sandbox_id, "f").write_text("x")
    done = cli("sandbox", "cp", source.replace("ID", sandbox_id), target.replace("ID", sandbox_id))
    assert done.returncode == 1
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert not (cli.folder / "out").exists()
