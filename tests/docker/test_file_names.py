"""Folders and names over REST: list, stat, mkdir, move, delete, chmod, also where a name is no UTF-8."""

import base64
import json

import pytest

pytestmark = pytest.mark.docker


class Files:
    def __init__(self, client, sandbox_id):
        self.client = client
        self.base = f"/v1/sandboxes/{sandbox_id}"

    def get(self, what, query):
        return self.client.get(f"{self.base}/files{what}?{query}")

    def post(self, what, **body):
        return self.client.post(f"{self.base}/files/{what}", json=body)

    def put(self, query, content=b"x"):
        answer = self.client.put(f"{self.base}/files?{query}", content=content)
        assert answer.status_code in (200, 201), answer.text

    def delete(self, query):
        return self.client.delete(f"{self.base}/files?{query}")

    def run(self, command):
        result = self.client.post(f"{self.base}/exec", json={"command": command}).json()
        assert result["exit_code"] == 0, result
        return result["stdout"]

    def names(self, query="path=."):
        answer = self.get("/list", query)
        assert answer.status_code == 200, answer.text
        return [item["name"] for item in answer.json()["data"]]


@pytest.fixture
def files(client, sandbox_id):
    return Files(client, sandbox_id)


@pytest.fixture(scope="module")
def untouched(daemon):
    """For requests that change nothing."""
    with daemon.client() as client:
        sandbox_id = client.post("/v1/sandboxes", json={"timeout_s": 600}).json()["id"]
        yield Files(client, sandbox_id)
        client.post(f"/v1/sandboxes/{sandbox_id}/stop")


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_an_entry_tells_all_there_is(files):
    files.put("path=dir/a.txt%26&mode=640", b"hello")
    files.run("cd dir && ln -s a.txt\\& link && mkfifo pipe && touch -d @1500000000.25 a.txt\\&")
    entry = files.get("/stat", "path=dir/a.txt%26").json()
    assert entry == {
        "object": "sandbox.file",
        "name": "a.txt&",
        "path": "/home/user/dir/a.txt&",
        "path_base64": None,
        "type": "file",
        "size": 5,
        "mode": "0640",
        "owner": "user",
        "modified_at": 1500000000.25,
        "link_target": None,
    }
    link = files.get("/stat", "path=dir/link").json()
    assert (link["type"], link["link_target"]) == ("symlink", "a.txt&")
    followed = files.get("/stat", "path=dir/link&follow=true").json()
    assert (followed["type"], followed["size"], followed["name"]) == ("file", 5, "link")
    assert files.get("/stat", "path=dir/pipe").json()["type"] == "fifo"
    assert files.get("/stat", "path=/dev/null").json()["type"] == "device"
    assert files.get("/stat", "path=/etc").json()["owner"] == "root"
    assert files.get("/stat", "path=/").json()["name"] == "/"
    assert code(files.get("/stat", "path=dir/none")) == (404, "file_not_found")
    assert code(files.get("/stat", "path=dir/link/x")) == (400, "not_directory")


def test_lists_go_page_by_page_in_the_order_of_the_bytes(files):
    made = [f"n{number:03d}" for number in range(25)] + ["Z", "ä", "~", ".hidden", "a b"]
    files.run("mkdir d && cd d && touch " + " ".join(f"'{name}'" for name in made))
    expected = sorted(made, key=str.encode)
    assert files.names("path=d&limit=1000") == expected
    found, after = [], ""
    while True:
        page = files.get("/list", f"path=d&limit=7{after}").json()
        found += [item["name"] for item in page["data"]]
        assert page["object"] == "list"
        if not page["has_more"]:
            break
        assert len(page["data"]) == 7
        after = (
            "&after="
            + str(files.client.build_request("GET", "/", params={"a": page["last_id"]}).url.query, "ascii")[
                2:
            ]
        )
    assert found == expected
    assert code(files.get("/list", "path=d/Z")) == (400, "not_directory")
    assert code(files.get("/list", "path=nothing")) == (404, "file_not_found")
    for query in ("path=d&limit=0", "path=d&limit=1001", "path=d&after=a/b", "path=d&after=", "path="):
        assert files.get("/list", query).status_code == 400, query


def test_names_that_are_no_utf8_survive_everything(files):
    raw = b"\xff\xfe/na\xc3me\x80.bin"
    shown = "\ufffd\ufffd/na\ufffdme\ufffd.bin"
    path = "%FF%FE/na%C3me%80.bin"
    files.put(f"path={path}", b"\0\xff")
    assert files.get("", f"path={path}").content == b"\0\xff"
    # What was written is the file of these bytes, not of what they look like.
    assert files.run("ls -b */*").strip() == r"\377\376/na\303me\200.bin"
    entry = files.get("/stat", f"path={path}").json()
    assert (entry["name"], entry["path"]) == ("na\ufffdme\ufffd.bin", f"/home/user/{shown}")
    assert base64.b64decode(entry["path_base64"]) == b"/home/user/" + raw
    [listed] = files.get("/list", "path=%FF%FE").json()["data"]
    assert listed["path_base64"] == entry["path_base64"]
    files.run("cd $'\\xff\\xfe' && touch a $'b\\xff' c")
    first = files.get("/list", "path=%FF%FE&limit=2").json()
    assert (first["has_more"], first["last_id"].startswith("/")) == (True, True)
    rest = files.client.get(f"{files.base}/files/list?path=%FF%FE", params={"path": "x"})
    assert rest.status_code in (200, 400, 404)
    rest = files.get("/list", f"path=%FF%FE&after={first['last_id']}").json()
    assert [item["name"] for item in rest["data"]] == ["c", "na\ufffdme\ufffd.bin"]
    assert files.names("path=%FF%FE&after=b%FF") == ["c", "na\ufffdme\ufffd.bin"]
    target = base64.b64encode(b"to \x9c").decode()
    moved = files.post("move", from_base64=base64.b64encode(raw).decode(), to_base64=target)
    assert moved.status_code == 200, moved.text
    assert base64.b64decode(moved.json()["path_base64"]) == b"/home/user/to \x9c"
    assert files.post("chmod", path_base64=target, mode="600").json()["mode"] == "0600"
    made = files.post("mkdir", path_base64=base64.b64encode(b"d\xe9/e").decode())
    assert (made.status_code, made.json()["type"]) == (201, "directory")
    deleted = files.delete("path=to+%9c")
    assert (deleted.status_code, deleted.json()["path"]) == (200, "to \ufffd")
    assert files.delete("path=%FF%FE&recursive=true").status_code == 200
    assert files.names() == ["d\ufffd"]


@pytest.mark.parametrize(
    "query", ["path=a&path=b", "path=a&p%61th=b", "path", "path=", "path=a%00b", "path=a&depth=1", "path=%00"]
)
def test_a_query_that_is_ambiguous_or_unknown_is_refused(untouched, query):
    for what in ("", "/stat", "/list"):
        assert code(untouched.get(what, query)) == (400, "invalid_request"), what
    assert code(untouched.delete(query)) == (400, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"path": "a", "path_base64": "YQ=="},
        {"path": ""},
        {"path": "a\0b"},
        {"path_base64": "YQ"},
        {"path_base64": "AA=="},
        {"path_base64": "*"},
        {"path": "\ud800"},
        {"path": "a", "mode": "999"},
        {"path": "a", "mode": "0o755"},
        {"path": "a", "recursive": True},
    ],
)
def test_a_body_without_one_good_path_is_refused(untouched, body):
    answer = untouched.client.post(
        f"{untouched.base}/files/mkdir",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    assert code(answer) == (400, "invalid_request")


def test_mkdir(files):
    assert files.post("mkdir", path="a/b/c", mode="0700").status_code == 201
    assert files.run("stat -c %a a a/b/c").split() == ["755", "700"]
    again = files.post("mkdir", path="a/b/c/", mode="0711")
    assert (again.status_code, again.json()["mode"]) == (200, "0700")
    assert code(files.post("mkdir", path="x/y", parents=False)) == (404, "file_not_found")
    assert files.post("mkdir", path="x", parents=False).status_code == 201
    files.put("path=file")
    assert code(files.post("mkdir", path="file")) == (409, "file_exists")
    assert code(files.post("mkdir", path="file/below")) == (400, "not_directory")
    assert code(files.post("mkdir", path="/usr/new")) == (403, "file_forbidden")


def test_move(files):
    files.put("path=a", b"a")
    files.put("path=b", b"b")
    assert code(files.post("move", **{"from": "a", "to": "b"})) == (409, "file_exists")
    assert files.get("", "path=b").content == b"b"
    moved = files.post("move", **{"from": "a", "to": "b", "overwrite": True}).json()
    assert (moved["name"], moved["path"], moved["size"]) == ("b", "/home/user/b", 1)
    assert files.get("", "path=b").content == b"a"
    assert code(files.post("move", **{"from": "a", "to": "c"})) == (404, "file_not_found")
    assert code(files.post("move", **{"from": "b", "to": "no/where"})) == (404, "file_not_found")
    files.run("mkdir -p d/e full/x empty; ln -s nowhere dangling; chmod 750 d/e; touch -d @1400000000 d/e/f")
    assert code(files.post("move", **{"from": "d", "to": "empty"})) == (409, "file_exists")
    assert code(files.post("move", **{"from": "d", "to": "full", "overwrite": True})) == (409, "not_empty")
    assert code(files.post("move", **{"from": "d", "to": "d/e/g"})) == (400, "bad_path")
    assert code(files.post("move", **{"from": "b", "to": "dangling"})) == (409, "file_exists")
    assert code(files.post("move", **{"from": "b", "to": "d/.."})) == (400, "bad_path")
    assert files.post("move", **{"from": "dangling", "to": "dangling2"}).json()["type"] == "symlink"
    assert files.post("move", **{"from": "d", "to": "empty", "overwrite": True}).status_code == 200
    assert files.names("path=empty") == ["e"]


def test_a_move_between_the_home_folder_and_tmp(files):
    """/tmp is another mount: the kernel refuses to rename, so that many a tool fails there."""
    files.run(
        "mkdir -p d/e d/void; echo x > d/e/f; ln -s e/f d/l; chmod 640 d/e/f; chmod 711 d/e; "
        "touch -d @1400000000 d/e/f"
    )
    assert files.post("move", **{"from": "d", "to": "/tmp/d"}).status_code == 200
    assert files.names() == []
    assert files.run("cd /tmp/d && find . -printf '%p %m %y %l\\n' | sort").splitlines() == [
        ". 755 d ",
        "./e 711 d ",
        "./e/f 640 f ",
        "./l 777 l e/f",
        "./void 755 d ",
    ]
    assert files.get("/stat", "path=/tmp/d/e/f").json()["modified_at"] == 1400000000
    files.put("path=d/there")
    assert code(files.post("move", **{"from": "/tmp/d", "to": "d", "overwrite": True})) == (409, "not_empty")
    assert code(files.post("move", **{"from": "/tmp/d/l", "to": "d"})) == (409, "file_exists")
    # Nor can a copy take the place of what cannot be taken away.
    assert code(files.post("move", **{"from": "/tmp", "to": "taken"})) == (403, "file_forbidden")
    assert files.run("ls -A . d /tmp; cat /tmp/d/e/f") == ".:\nd\n\n/tmp:\nd\n\nd:\nthere\nx\n"


def test_delete(files):
    files.run(
        "mkdir -p d/e/f keep; touch d/e/x keep/x; ln -s ../keep d/link; ln -s keep link; chmod 500 keep"
    )
    assert code(files.delete("path=d")) == (409, "not_empty")
    assert code(files.delete("path=none")) == (404, "file_not_found")
    assert files.delete("path=link").json() == {"path": "link", "object": "sandbox.file", "deleted": True}
    assert files.delete("path=d&recursive=true").status_code == 200
    assert files.names() == ["keep"]
    assert files.names("path=keep") == ["x"]
    # A folder that nothing may be taken out of.
    assert code(files.delete("path=keep&recursive=true")) == (403, "file_forbidden")
    for path in (".", "/home/user", "/tmp", "/", "keep/..", "/home/user/"):
        answer = files.delete(f"path={path}&recursive=true")
        assert answer.status_code in (400, 403), path
    assert files.names("path=keep") == ["x"]
    assert code(files.delete("path=/etc/passwd")) in [(403, "file_forbidden"), (409, "busy")]


@pytest.mark.parametrize("what", ["put", "archive", "mkdir"])
def test_missing_folders_are_made_as_deep_as_a_path_can(files, what):
    folder = "d/" * 2000
    if what == "put":
        files.put(f"path={folder}end", b"deep")
        assert files.get("", f"path={folder}end").content == b"deep"
    elif what == "mkdir":
        assert files.post("mkdir", path=folder).status_code == 201
    else:
        answer = files.client.put(f"{files.base}/files/archive?path={folder}", content=bytes(1024))
        assert answer.status_code == 200, answer.text
    assert files.get("/stat", f"path={folder}").json()["type"] == "directory"


def test_delete_goes_as_deep_as_a_tree_can(files):
    code = (
        "import os\nfor _ in range(3000):\n    os.mkdir('deep'); os.chdir('deep')\nopen('end', 'w').close()"
    )
    files.client.post(f"{files.base}/exec", json={"code": code})
    assert files.delete("path=deep&recursive=true").status_code == 200
    assert files.names() == []


def test_chmod(files):
    files.run("mkdir -p d/e; touch d/e/f; ln -s /etc/passwd d/link; mkdir -m 000 d/locked; ln -s d/e/f l")
    assert files.post("chmod", path="d/e/f", mode="755").json()["mode"] == "0755"
    assert files.post("chmod", path="l", mode="0400").json()["mode"] == "0400"
    assert files.run("stat -c %a d/e/f").strip() == "400"
    assert files.post("chmod", path="d", mode="711", recursive=True).json()["mode"] == "0711"
    assert files.run("stat -c %a d d/e d/e/f d/locked").split() == ["711"] * 4
    assert files.post("chmod", path="d", mode="000", recursive=True).json()["mode"] == "0000"
    assert files.post("chmod", path="d", mode="700", recursive=True).json()["mode"] == "0700"
    assert files.run("stat -c %a d d/e d/e/f d/locked").split() == ["700"] * 4
    assert code(files.post("chmod", path="/etc/passwd", mode="777")) == (403, "file_forbidden")
    assert files.post("chmod", path="d").status_code == 400


def test_ranges(files):
    data = bytes(range(256)) * 1200
    files.put("path=big", data)
    files.put("path=small", b"0123456789")

    def part(path, header, **more):
        headers = {"Range": header, **more}
        return files.client.get(f"{files.base}/files?path={path}", headers=headers)

    for path, content in (("big", data), ("small", b"0123456789")):
        size = len(content)
        for header, first, last in (
            ("bytes=0-0", 0, 0),
            ("bytes=2-5", 2, 5),
            ("bytes=7-", 7, size - 1),
            ("bytes=-3", size - 3, size - 1),
            (f"bytes=3-{size * 2}", 3, size - 1),
            (f"bytes=-{size * 2}", 0, size - 1),
        ):
            answer = part(path, header)
            assert answer.status_code == 206, header
            assert answer.headers["content-range"] == f"bytes {first}-{last}/{size}"
            assert answer.content == content[first : last + 1], header
        for header in (f"bytes={size}-", f"bytes={size + 5}-{size + 9}", "bytes=-0"):
            answer = part(path, header)
            assert code(answer) == (416, "range_not_satisfiable"), header
            assert answer.headers["content-range"] == f"bytes */{size}"
        # What is no single range is passed over.
        for header in ("bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "bytes=", "bytes=-"):
            answer = part(path, header)
            assert (answer.status_code, answer.content) == (200, content), header
    tag = part("small", "bytes=0-1").headers["etag"]
    assert part("small", "bytes=4-", **{"If-Range": tag}).content == b"456789"
    files.put("path=small", b"9876543210")
    changed = part("small", "bytes=4-", **{"If-Range": tag})
    assert (changed.status_code, changed.content) == (200, b"9876543210")
    assert part("small", "bytes=400-", **{"If-Range": tag}).status_code == 200


def test_what_cannot_be_taken_away_keeps_what_is_in_it(files):
    files.put("path=/dev/shm/kept", b"x")
    for path in ("/dev/shm", "/tmp", "/home/user"):
        assert code(files.delete(f"path={path}&recursive=true")) == (403, "file_forbidden")
    for path, to in (("/dev/shm", "/tmp/moved"), ("/tmp", "/home/user/moved")):
        assert code(files.post("move", **{"from": path, "to": to})) == (403, "file_forbidden")
        assert files.get("/stat", f"path={to}").status_code == 404
    assert files.get("", "path=/dev/shm/kept").content == b"x"
