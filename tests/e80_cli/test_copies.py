"""`cp` and `files` against a real daemon."""

import json
import os
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.e80_cli.conftest import Cli

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = pytest.mark.docker
STRANGE = os.fsdecode(b"gr\xfc\xdfe \x1b[31m")


@pytest.fixture
def cli(cli_alone: Cli, daemon: "Daemon") -> Cli:
    cli_alone.env |= {"_8080_BASE_URL": daemon.base_url, "_8080_API_KEY": daemon.api_key}
    return cli_alone


@pytest.fixture
def box(cli: Cli) -> Iterator[str]:
    made = cli("sandbox", "create").stdout.decode().strip()
    yield made
    cli("sandbox", "stop", made)


def done(cli: Cli, *words: str) -> bytes:
    result = cli("sandbox", *words)
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout


def tree(cli: Cli, name: str) -> dict[str, tuple[int, bytes | str | None]]:
    """Mode and content of everything below a folder here."""
    root = cli.folder / name
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
    }


def test_folders_there_and_back(cli: Cli, box: str) -> None:
    """Byte for byte and whole, where others fail silently over 18 KB: OpenSandbox#1016."""
    source = cli.folder / "src"
    (source / "deep" / "empty").mkdir(parents=True)
    (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (source / "run.sh").chmod(0o755)
    (source / "deep" / STRANGE).write_bytes(os.urandom(100_000))
    (source / "deep" / ("long" * 50)).write_bytes(b"")
    (source / "link").symlink_to(f"deep/{STRANGE}")
    before = tree(cli, "src")
    assert len(before) == 6
    done(cli, "cp", "-r", "src", f"{box}:made")
    assert done(cli, "exec", box, "--", "made/run.sh") == b"ran\n"
    done(cli, "cp", "-r", f"{box}:made", "back")
    assert tree(cli, "back") == before
    done(cli, "cp", "-r", "src", f"{box}:made")  # that is a folder now
    done(cli, "cp", "-r", f"{box}:made/src", "back")  # and so is this
    assert tree(cli, "back/src") == before
    # Merged into what is there: same names are replaced, others stay.
    (cli.folder / "back" / "run.sh").write_text("changed")
    (cli.folder / "back" / "mine").write_text("stays")
    done(cli, "cp", "-r", f"{box}:made/.", "back")
    assert (cli.folder / "back" / "run.sh").read_text() == (source / "run.sh").read_text()
    assert (cli.folder / "back" / "mine").read_text() == "stays"
    assert [path.name for path in cli.folder.iterdir() if path.name.endswith(".part")] == []


def test_a_folder_wants_to_be_asked_for(cli: Cli, box: str) -> None:
    (cli.folder / "src").mkdir()
    for words in (("src", f"{box}:x"), (f"{box}:/home/user", "x"), ("-r", f"{box}:/home/user", "-")):
        result = cli("sandbox", "cp", *words)
        assert result.returncode == 1, words
        assert b"directory" in result.stderr.lower() or b"folder" in result.stderr.lower()
    assert not (cli.folder / "x").exists()


def test_a_link_out_of_its_folder_is_refused_and_nothing_is_left(cli: Cli, box: str) -> None:
    done(cli, "exec", box, "--", "sh", "-c", "mkdir d && echo 1 >d/f && ln -s /etc/passwd d/out")
    result = cli("sandbox", "cp", "-r", f"{box}:d", "d")
    assert result.returncode == 1
    assert b"/etc/passwd" in result.stderr
    assert list(cli.folder.glob("d*")) == []
    assert list(cli.folder.glob(".d*")) == []


def test_a_file_goes_into_a_folder_under_its_own_name(cli: Cli, box: str) -> None:
    (cli.folder / STRANGE).write_bytes(b"1")
    done(cli, "cp", STRANGE, f"{box}:/tmp")
    done(cli, "cp", f"{box}:/tmp/{STRANGE}", "copy")
    assert (cli.folder / "copy").read_bytes() == b"1"
    (cli.folder / "into").mkdir()
    done(cli, "cp", f"{box}:/tmp/{STRANGE}", "into")
    assert (cli.folder / "into" / STRANGE).read_bytes() == b"1"
    told = json.loads(done(cli, "cp", "--json", f"{box}:/tmp/{STRANGE}", "into"))
    assert (told["path"], told["size"]) == (f"into/{STRANGE}", 1)


def test_a_process_substitution_is_a_file(cli: Cli, box: str) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    program = cli.start("sandbox", "cp", f"/dev/fd/{reader}", f"{box}:f", pass_fds=[reader])
    os.close(reader)
    assert program.communicate(timeout=30) == (b"", b"")
    assert program.returncode == 0
    assert done(cli, "cp", f"{box}:f", "-") == b"piped"


def test_a_bar_shows_how_far_a_copy_is(cli: Cli, box: str) -> None:
    (cli.folder / "big").write_bytes(bytes(30_000_000))
    code, shown = cli.on_terminal("sandbox", "cp", "big", f"{box}:big")
    assert code == 0
    assert "30.0/30.0 MB" in shown
    assert "30000000 bytes -> big" in shown
    code, shown = cli.on_terminal("sandbox", "cp", f"{box}:big", "back")
    assert code == 0
    assert "30.0/30.0 MB" in shown


def test_files_without_copying_them(cli: Cli, box: str) -> None:
    assert done(cli, "files", "mkdir", box, "a/b") == b"/home/user/a/b\n"
    done(cli, "files", "mkdir", box, "a/b")
    for name in ("one", "two"):
        (cli.folder / name).write_text(name)
        done(cli, "cp", name, f"{box}:a/{name}")
    assert done(cli, "files", "ls", box, "a") == b"b\none\ntwo\n"
    assert done(cli, "files", "ls", "--limit", "1", box, "a") == b"b\n"
    entry = json.loads(done(cli, "files", "stat", box, "a/one", "--json"))
    assert (entry["type"], entry["size"], entry["owner"]) == ("file", 3, "user")
    assert b"size      3\n" in done(cli, "files", "stat", box, "a/one")
    refused = cli("sandbox", "files", "mv", box, "a/one", "a/two")
    assert refused.returncode == 1
    assert done(cli, "files", "mv", "--force", box, "a/one", "a/two") == b"/home/user/a/two\n"
    assert done(cli, "cp", f"{box}:a/two", "-") == b"one"
    assert cli("sandbox", "files", "rm", box, "a").returncode == 1
    done(cli, "files", "rm", "-r", box, "a")
    gone = cli("sandbox", "files", "stat", box, "a")
    assert gone.returncode == 1
    assert b"a" in gone.stderr


def test_names_are_told_byte_for_byte_and_steer_no_terminal(cli: Cli, box: str) -> None:
    done(cli, "files", "mkdir", box, f"d/{STRANGE}")
    assert done(cli, "files", "ls", box, "d") == os.fsencode(STRANGE) + b"\n"
    assert json.loads(done(cli, "files", "ls", box, "d", "--json"))["data"][0]["path_base64"]
    code, shown = cli.on_terminal("sandbox", "files", "ls", box, "d", NO_COLOR="1")
    assert code == 0
    assert "gr\\udcfc\\udcdfe \\x1b[31m" in shown
    assert "\x1b[31m" not in shown


def test_an_address_works_without_a_key(cli: Cli, box: str) -> None:
    (cli.folder / "f").write_text("shared")
    done(cli, "cp", "f", f"{box}:f")
    address = done(cli, "files", "url", box, "f").decode().strip()
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.read() == b"shared"
    upward = done(cli, "files", "url", box, "g", "--method", "upload", "--expires-in-s", "60")
    sent = urllib.request.Request(upward.decode().strip(), b"sent", method="PUT")
    with urllib.request.urlopen(sent, timeout=30) as answer:
        assert answer.status in (200, 201)
    assert done(cli, "cp", f"{box}:g", "-") == b"sent"
