"""Folders as archives: what is packed comes out again, and a hostile archive leaves nothing behind."""

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from e80_sdk import BadArchiveError, E80Error
from e80_sdk.archives import MAX_HEADER_BYTES, pack, packed_size, unpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Add = Callable[[tarfile.TarFile], None]


def archive(*entries: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return made.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tree(folder: Path) -> dict[str, object]:
    """Everything in a folder, with its mode and content."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = (path.read_bytes(), stat.S_IMODE(path.stat().st_mode), int(path.stat().st_mtime))
    return found


def test_what_is_packed_comes_out_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "deep" / "run.sh").write_text("echo")
    (source / "deep" / "run.sh").chmod(0o755)
    (source / "deep" / "er" / ("n" * 200)).write_bytes(bytes(range(256)) * 3000)
    (source / "deep" / "er" / "back").symlink_to("../run.sh")
    (source / os.fsdecode(b"no utf-8 \xff")).write_bytes(b"")
    os.mkfifo(source / "pipe")
    made = b"".join(pack(source))
    assert len(made) % 512 == 0
    assert abs(packed_size(source) - len(made)) <= 2048, "long names need a header of their own"
    entries = unpack(io.BytesIO(made), tmp_path / "target")
    (source / "pipe").unlink()
    assert tree(tmp_path / "target") == tree(source)
    assert entries == len(tree(source))
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        assert len(tar.getnames()) == entries


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(st.sampled_from(["a", "b/c", "b/d", "e/f/g"]), st.binary(max_size=2000)))
def test_any_folder_comes_out_again(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("any")
    for name, content in files.items():
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "source" / name).write_bytes(content)
    (root / "source").mkdir(exist_ok=True)
    unpack(io.BytesIO(b"".join(pack(root / "source"))), root / "target")
    assert tree(root / "target") == tree(root / "source")


def test_a_file_that_shrinks_while_it_is_packed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1_000_000)
    pieces = pack(tmp_path)
    next(pieces)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(E80Error, match="changed while it was read"):
        list(pieces)


def _huge_header() -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, MAX_HEADER_BYTES + 1
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(MAX_HEADER_BYTES * 2)


HOSTILE = {
    "absolute": archive(("/etc/passwd", b"x")),
    "above": archive(("../x", b"x")),
    "above from below": archive(("a/../../x", b"x")),
    "above and back": archive(("a/../x", b"x")),
    "absolute link": archive(link("a", "/etc")),
    "link above": archive(link("a/b", "../../x")),
    "link above by a link": archive(link("a/b/up", "../.."), link("a/b/out", "up/../../x")),
    "link to nothing": archive(link("a", "")),
    "through a link": archive(link("a", "b"), ("a/x", b"x"), link("a/x/y", "z")),
    "hard link": archive(("x", b"x"), link("a", "x", tarfile.LNKTYPE)),
    "device": archive(link("a", "", tarfile.CHRTYPE)),
    "pipe": archive(link("a", "", tarfile.FIFOTYPE)),
    "no folder at the top": archive((".", b"x")),
    "huge header": _huge_header(),
    "garbage": b"x" * 10240,
    "nothing": b"",
    "cut in a header": archive(("a", b"x"))[:700],
    "cut in a file": archive(("a", b"x" * 5000))[:3000],
    "cut behind a file": archive(("a", bytes(1024)), ("b", b"x"))[:1536],
    "garbage behind a file": archive(("a", b"x"))[:1024] + b"x" * 1024,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_archive_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises((BadArchiveError, OSError)):
        unpack(io.BytesIO(HOSTILE[name]), outside / "target")
    assert list(outside.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


def test_links_inside_are_made_after_everything_else(tmp_path: Path) -> None:
    made = archive(link("a", "b"), ("b/x", b"1"), link("c/d", "../b/./x"), ("gone", b"1"), link("gone", "b"))
    unpack(io.BytesIO(made), tmp_path / "target")
    assert (tmp_path / "target" / "a" / "x").read_bytes() == b"1"
    assert (tmp_path / "target" / "c" / "d").read_bytes() == b"1"


def test_what_is_there_already_stays_or_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "mine").write_text("mine")
    (target / "sub" / "ours").write_text("old")
    unpack(io.BytesIO(archive(("sub/ours", b"new"), ("sub/yours/x", b"yours"))), target)
    assert (target / "sub" / "mine").read_text() == "mine"
    assert (target / "sub" / "ours").read_text() == "new"
    assert (target / "sub" / "yours" / "x").read_text() == "yours"
    (tmp_path / "elsewhere").mkdir()
    (target / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError):
        unpack(io.BytesIO(archive(("link/x", b"x"))), target)
    assert list((tmp_path / "elsewhere").iterdir()) == [], "a link that is there is not followed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "target"]
