"""Whole folders as tar archives, both ways; Python's own tarfile is the judge of ours."""

import gzip
import io
import os
import tarfile
import zlib

import pytest

from tests.docker.scene import until
from tests.docker.test_file_names import Files, code

pytestmark = pytest.mark.docker


@pytest.fixture
def files(client, sandbox_id):
    return Files(client, sandbox_id)


def put(files, data, query="path=in"):
    return files.client.put(f"{files.base}/files/archive?{query}", content=data)


def archive(*members, form=tarfile.PAX_FORMAT):
    """A tar archive of (name, content) or (TarInfo, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is not None:
                info.size = len(content)
            tar.addfile(info, None if content is None else io.BytesIO(content))
    return out.getvalue()


def special(name, kind, link="", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def tree(files, folder):
    return files.run(f"cd {folder} && find . -mindepth 1 -printf '%P %m %y %s %l %T@\\n' | LC_ALL=C sort")


MAKE = """
mkdir -p src/sub/empty src/.hidden; cd src
printf 'one' > a; head -c 300000 /dev/urandom > sub/big; chmod 600 a; chmod 4755 sub/big; : > sub/nothing
ln -s ../a sub/link; ln -s nowhere dangling; touch -d @1500000000 a
n=$(printf 'n%.0s' $(seq 120)); mkdir -p $n/$n; echo deep > $n/$n/$n; ln -s $n/$n/$n far
touch $'odd \\xff\\n name'; mkfifo pipe; chmod 750 sub
python3 -c "import socket; socket.socket(socket.AF_UNIX).bind('sock')"
"""


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_folder_goes_out_and_comes_back(files, compression):
    files.run(MAKE)
    got = files.get("/archive", f"path=src&compression={compression}")
    assert got.status_code == 200
    assert got.headers["content-type"] == (
        "application/gzip" if compression == "gzip" else "application/x-tar"
    )
    assert got.headers["x-content-type-options"] == "nosniff"
    plain = gzip.decompress(got.content) if compression == "gzip" else got.content
    with tarfile.open(fileobj=io.BytesIO(plain), errors="surrogateescape") as tar:
        found = {member.name: member for member in tar}
        assert tar.extractfile("a").read() == b"one"
    assert (found["sub/big"].mode, found["a"].mode, found["a"].mtime) == (0o755, 0o600, 1500000000)
    assert (found["sub/link"].issym(), found["sub/link"].linkname) == (True, "../a")
    assert "odd \udcff\n name" in found
    assert not {"pipe", "sock"} & found.keys()
    back = put(files, got.content, "path=new/place")
    assert back.status_code == 200, back.text
    assert back.json() == {
        "object": "sandbox.archive",
        "path": "new/place",
        "entries": len(found),
        "size": sum(member.size for member in found.values()),
    }
    files.run("cd src && rm pipe sock && chmod u-s sub/big")
    assert files.run("diff -r --no-dereference src new/place && echo same") == "same\n"
    modes = "cd {} && find . -mindepth 1 ! -type l -printf '%P %m\\n' | LC_ALL=C sort"
    assert files.run(modes.format("src")) == files.run(modes.format("new/place"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_every_form_come_in(files, form):
    long = "d" * 90 + "/" + "f" * 90
    data = archive(
        (special("dir/", tarfile.DIRTYPE, mode=0o500), None),
        ("dir/inner", b"in a folder that lets nobody write"),
        (long, b"long"),
        ("caf\u00e9", b"text"),
        (special("link", tarfile.SYMTYPE, "dir/inner"), None),
        (special("hard", tarfile.LNKTYPE, "dir/inner"), None),
        (special("set", tarfile.REGTYPE, mode=0o6755), b"uid"),
        form=form,
    )
    answer = put(files, data)
    assert answer.status_code == 200, answer.text
    assert answer.json()["entries"] == 7
    assert files.run(
        "cd in && stat -c %a dir set && cat link hard && cat d*/f* && cat caf*"
    ).splitlines() == [
        "500",
        "755",
        "in a folder that lets nobody writein a folder that lets nobody writelongtext",
    ]
    # Once more over what is there.
    files.run("chmod 700 in/dir")
    assert put(files, data).status_code == 200
    assert files.names("path=in/dir") == ["inner"]


HOSTILE = {
    "an absolute name": archive(("/tmp/out", b"x")),
    "dots at the start": archive(("../out", b"x")),
    "dots in the middle": archive(("a/../../out", b"x")),
    "a link to the root": archive((special("l", tarfile.SYMTYPE, "/etc/passwd"), None)),
    "a link that leads up": archive((special("a/l", tarfile.SYMTYPE, "../../out"), None)),
    "a link by a link": archive(
        (special("here", tarfile.SYMTYPE, "."), None), (special("l", tarfile.SYMTYPE, "here/../out"), None)
    ),
    "a file through a link": archive(
        ("real/", None), (special("l", tarfile.SYMTYPE, "real"), None), ("l/out", b"x")
    ),
    "a file through a link that was there": archive(("away/out", b"x")),
    "a hard link that leads up": archive((special("l", tarfile.LNKTYPE, "../secret"), None)),
    "a hard link to the root": archive((special("l", tarfile.LNKTYPE, "/home/user/secret"), None)),
    "a hard link through a link": archive((special("l", tarfile.LNKTYPE, "away/passwd"), None)),
    "a character device": archive((special("d", tarfile.CHRTYPE, devmajor=1, devminor=3), None)),
    "a block device": archive((special("d", tarfile.BLKTYPE), None)),
    "a pipe": archive((special("p", tarfile.FIFOTYPE), None)),
    "a sparse file": archive((special("s", tarfile.REGTYPE, pax_headers={"GNU.sparse.major": "1"}), b"x")),
    "an unknown kind": archive((special("s", b"Z"), b"x")),
    "a name with a NUL": archive((special("s", tarfile.REGTYPE, pax_headers={"path": "a\0b"}), b"x")),
    "a name too long": archive(("a/" * 3000 + "x", b"x")),
    "a size beyond all": archive((special("s", tarfile.REGTYPE, pax_headers={"size": "9" * 18}), None)),
    "a size that is none": archive((special("s", tarfile.REGTYPE, pax_headers={"size": "-5"}), None)),
    "a time that is none": archive((special("s", tarfile.REGTYPE, pax_headers={"mtime": "now"}), b"x")),
    "a huge header": archive((special("s", tarfile.REGTYPE, pax_headers={"comment": "x" * 10**6}), b"x")),
    "nothing": b"",
    "no archive": b"x" * 5000,
    "a page": b"<html>" * 1000,
    "more behind its end": archive(("z", b"x")) + b"x" * 2_000_000,
    "gzip without an archive": gzip.compress(b"hello"),
    "gzip that is broken": gzip.compress(archive(("z", os.urandom(5000))))[:-8] + b"\0" * 8,
    "gzip with more behind it": gzip.compress(archive(("z", b"x"))) + b"more",
}


def test_archives_that_are_broken_or_hostile_leave_nothing_outside(files):
    """`OpenSandbox#1016`: what was not unpacked must never look as if it were."""
    files.run("echo s > secret; mkdir in; ln -s /tmp in/away")
    before = files.run("ls -A . /tmp | grep -v matplotlib; cat secret")
    for name, data in HOSTILE.items():
        answer = put(files, data)
        assert code(answer) == (400, "bad_archive"), name
        assert "unpacked" in answer.json()["error"]["message"], name
        assert files.run("ls -A . /tmp | grep -v matplotlib; cat secret") == before, name
    assert put(files, archive(("x", b"1")), "path=secret/x").json()["error"]["code"] == "not_directory"
    assert code(put(files, archive(("x", b"1")), "path=/usr/x")) == (403, "file_forbidden")


def test_an_archive_cut_short_anywhere_is_an_error(files):
    plain = archive(("a", b"one"), ("b", b"x" * 700), form=tarfile.USTAR_FORMAT)[: 512 * 6]
    for size in (1, 511, 512, 600, 1024, 1500, 2048, 2600):
        assert code(put(files, plain[:size])) == (400, "bad_archive"), size
    # The marker of the end is there, and that is enough.
    assert put(files, plain[: 512 * 5 + 512]).status_code == 200
    packed = gzip.compress(plain)
    for size in (1, 2, 9, 30, len(packed) - 9, len(packed) - 1):
        assert code(put(files, packed[:size])) == (400, "bad_archive"), size
    answer = put(files, plain[:1024])
    assert "1 entries before it are unpacked" in answer.json()["error"]["message"]


def test_bombs_end_where_the_disk_does(client):
    sandbox_id = client.post("/v1/sandboxes", json={"disk_size_mb": 16}).json()["id"]
    files = Files(client, sandbox_id)
    try:
        files.put("path=in/zeros", b"old")
        packer = zlib.compressobj(9, 8, 31)
        head = archive((special("zeros", tarfile.REGTYPE, size=10**9), None))[:512]
        bomb = (
            packer.compress(head)
            + b"".join(packer.compress(bytes(10**6)) for _ in range(100))
            + packer.flush()
        )
        assert len(bomb) < 200_000
        answer = put(files, bomb)
        assert code(answer) == (507, "disk_full")
        assert files.run("cat in/zeros; ls -A in") == "oldzeros\n"
        crowd = archive(*((f"n{number}", b"") for number in range(3000)), form=tarfile.USTAR_FORMAT)
        answer = put(files, crowd)
        assert code(answer) == (507, "disk_full")
        assert " at n" in answer.json()["error"]["message"]
        files.run("rm -r in; echo room > there && cat there")
    finally:
        client.delete(f"/v1/sandboxes/{sandbox_id}")


def test_what_cannot_be_packed_says_why(files):
    files.run("mkdir d locked; touch d/secret file; chmod 0 d/secret; chmod 0 locked")
    assert code(files.get("/archive", "path=file")) == (400, "not_directory")
    assert code(files.get("/archive", "path=none")) == (404, "file_not_found")
    assert code(files.get("/archive", "path=locked")) == (403, "file_forbidden")
    refused = files.get("/archive", "path=d")
    assert code(refused) == (403, "file_forbidden")
    assert "secret" in refused.json()["error"]["message"]
    assert code(files.get("/archive", "path=.&compression=zip")) == (400, "invalid_request")


def test_files_that_grow_while_they_are_packed_do_not_spoil_the_archive(files):
    files.run("mkdir d; head -c 3000000 /dev/urandom > d/a; touch d/b")
    grow = "while :; do head -c 20000 /dev/zero >> d/a; head -c 100 /dev/zero >> d/b; sleep 0.01; done"
    started = files.client.post(f"{files.base}/exec", json={"command": grow, "background": True})
    assert started.status_code == 200, started.text
    until(lambda: files.get("/stat", "path=d/a").json()["size"] > 3_000_000)
    for _ in range(5):
        got = files.get("/archive", "path=d")
        with tarfile.open(fileobj=io.BytesIO(got.content)) as tar:
            assert sorted(member.name for member in tar) == ["a", "b"]
            assert len(tar.extractfile("a").read()) >= 3_000_000


def test_only_what_streams_is_free_of_the_limit_of_bodies(files):
    big = os.urandom(9_000_000)
    answer = put(files, archive(("big", big)))
    assert (answer.status_code, answer.json()["size"]) == (200, len(big))
    for what in ("mkdir", "move", "chmod", "urls"):
        assert code(files.post(what, path="x" * 9_000_000)) == (413, "too_large"), what
