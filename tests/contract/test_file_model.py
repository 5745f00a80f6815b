"""Histories of a file system over REST, on a real sandbox, held against a model of one."""

import base64
import io
import itertools
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_from_bytes

import httpx2
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.contract.file_model import FileModel, Node, Path, Refused

HISTORIES = 70
# Short ones: Hypothesis ends a history when it has drawn some 6 KB, and then not always at the same place.
STEPS = 18
Where = tuple[Path, int]
STATUS = {
    "file_not_found": 404,
    "not_directory": 400,
    "is_directory": 400,
    "bad_path": 400,
    "file_exists": 409,
    "not_empty": 409,
}
# Few, so that they meet; each one a different way to get a name wrong.
NAMES = st.sampled_from([b"a", b"b", b"\xff\xfe", b"caf\xc3\xa9 %41&+=#", b"\n\xe9'", b"-rf *"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
# Mostly what is there; the number says which.
SOMEWHERE = st.tuples(PATHS, st.integers(0, 199))
CONTENTS = st.binary(max_size=40) | st.integers(1, 300_000).map(lambda size: b"\0\xff\r\n" * (size // 4))
FILE_MODES = st.sampled_from([None, 0o600, 0o644, 0o755])
FOLDER_MODES = st.sampled_from([0o700, 0o755, 0o711])


class Files(RuleBasedStateMachine):
    def __init__(self, http: httpx2.Client, sandbox_id: str, numbers: Any, steps: Counter[str]) -> None:
        super().__init__()
        self.http = http
        self.base = f"/v1/sandboxes/{sandbox_id}"
        self.root = b"m%d" % next(numbers)
        self.steps = steps
        self.model = FileModel()
        self.copies = itertools.count()

    @initialize()
    def make_root(self) -> None:
        assert self.post("mkdir", "path", ()).status_code == 201

    @rule(path=PATHS, content=CONTENTS, mode=FILE_MODES)
    def write(self, path: Path, content: bytes, mode: int | None) -> None:
        query = {} if mode is None else {"mode": f"{mode:o}"}
        self.check(
            path,
            lambda: 201 if self.model.write(path, content, mode) else 200,
            lambda: self.send("PUT", "", path, content=content, **query),
        )

    @rule(where=SOMEWHERE)
    def read(self, where: Where) -> None:
        path = self.at(where)
        answer = self.check(
            path, lambda: self.model.read(path) is None or 200, lambda: self.send("GET", "", path)
        )
        if answer is not None and answer.status_code == 200:
            assert answer.content == self.model.read(path)

    @rule(where=SOMEWHERE, first=st.integers(0, 30), size=st.integers(1, 30))
    def read_a_part(self, where: Where, first: int, size: int) -> None:
        path = self.at(where)

        def expected() -> int:
            return 206 if first < len(self.model.read(path)) else 416

        header = {"Range": f"bytes={first}-{first + size - 1}"}
        answer = self.check(path, expected, lambda: self.send("GET", "", path, headers=header))
        if answer is not None and answer.status_code == 206:
            assert answer.content == self.model.read(path)[first : first + size]

    @rule(where=SOMEWHERE)
    def stat(self, where: Where) -> None:
        path = self.at(where)
        answer = self.check(
            path, lambda: self.model.find(path) is None or 200, lambda: self.send("GET", "/stat", path)
        )
        if answer is not None and answer.status_code == 200:
            self.same(answer.json(), path)

    @rule(where=SOMEWHERE | st.just(((), 0)), limit=st.integers(1, 4))
    def list(self, where: Where, limit: int) -> None:
        path = self.at(where)
        answer = self.check(
            path,
            lambda: self.model.list(path) is None or 200,
            lambda: self.send("GET", "/list", path, limit=str(limit)),
        )
        if answer is None or answer.status_code != 200:
            return
        real = self.model.follow(path)
        expected = self.model.list(path)
        found = []
        while True:
            page = answer.json()
            found += page["data"]
            if not page["has_more"]:
                break
            answer = self.send("GET", "/list", path, limit=str(limit), after=page["last_id"])
        assert len(found) == len(expected)
        for item, name in zip(found, expected, strict=True):
            self.same(item, (*real, name), (*path, name))

    @rule(path=PATHS, parents=st.booleans(), mode=FOLDER_MODES)
    def mkdir(self, path: Path, parents: bool, mode: int) -> None:
        self.check(
            path,
            lambda: 201 if self.model.mkdir(path, parents, mode) else 200,
            lambda: self.post("mkdir", "path", path, parents=parents, mode=f"{mode:04o}"),
        )

    @rule(where=SOMEWHERE, to=PATHS, overwrite=st.booleans())
    def move(self, where: Where, to: Path, overwrite: bool) -> None:
        source = self.at(where)
        if self.model.is_clear(to):
            self.check(
                source,
                lambda: self.model.move(source, to, overwrite) or 200,
                lambda: self.post("move", "from", source, overwrite=overwrite, **self.named("to", to)),
            )

    @rule(where=SOMEWHERE, recursive=st.booleans())
    def delete(self, where: Where, recursive: bool) -> None:
        path = self.at(where)
        flag = str(recursive).lower()
        self.check(
            path,
            lambda: self.model.delete(path, recursive) or 200,
            lambda: self.send("DELETE", "", path, recursive=flag),
        )

    @rule(where=SOMEWHERE, mode=FOLDER_MODES, recursive=st.booleans())
    def chmod(self, where: Where, mode: int, recursive: bool) -> None:
        path = self.at(where)
        self.check(
            path,
            lambda: self.model.chmod(path, mode, recursive) or 200,
            lambda: self.post("chmod", "path", path, mode=f"{mode:o}", recursive=recursive),
        )

    @rule(path=PATHS, leads_to=NAMES)
    def link_from_inside(self, path: Path, leads_to: bytes) -> None:
        if self.model.is_clear(path) and self.model.link(path, leads_to):
            code = f"import os\nos.symlink({leads_to!r}, {self.joined(path)!r})"
            answer = self.http.post(f"{self.base}/exec", json={"code": code})
            assert answer.json()["status"] == "completed", answer.text
            self.steps["link"] += 1

    @rule(where=SOMEWHERE | st.just(((), 0)), compression=st.sampled_from(["none", "gzip"]))
    def pack_and_unpack(self, where: Where, compression: str) -> None:
        path = self.at(where)
        answer = self.check(
            path,
            lambda: self.model.list(path) is None or 200,
            lambda: self.send("GET", "/archive", path, compression=compression),
        )
        if answer is not None and answer.status_code == 200:
            target = (b"copy%d" % next(self.copies),)
            entries = self.model.copy(path, target)
            answer = self.send("PUT", "/archive", target, content=answer.content)
            assert (answer.status_code, answer.json()["entries"]) == (200, entries), answer.text

    def teardown(self) -> None:
        """All of it, by another way than the one it was made by: every name, mode, link and byte."""
        answer = self.send("GET", "/archive", ())
        found = {}
        with tarfile.open(fileobj=io.BytesIO(answer.content), errors="surrogateescape") as tar:
            for member in tar:
                path = tuple(member.name.encode("utf-8", "surrogateescape").split(b"/"))
                if member.issym():
                    found[path] = Node("symlink", link=member.linkname.encode("utf-8", "surrogateescape"))
                elif member.isdir():
                    found[path] = Node("directory", member.mode)
                else:
                    content = tar.extractfile(member)
                    assert content is not None
                    found[path] = Node("file", member.mode, content.read())
        assert found == {path: node for path, node in self.model.nodes.items() if path}
        assert self.send("DELETE", "", (), recursive="true").status_code == 200

    def at(self, where: Where) -> Path:
        path, number = where
        known = sorted(self.model.nodes.keys() - {()})
        return known[number % len(known)] if known and number % 5 else path

    def check(
        self, path: Path, expected: Callable[[], Any], send: Callable[[], httpx2.Response]
    ) -> httpx2.Response | None:
        """One request: the model says first what should come of it."""
        if not self.model.is_clear(path):
            return None
        code = None
        try:
            status = expected()
        except Refused as refused:
            code = str(refused)
            status = STATUS[code]
        answer = send()
        assert answer.status_code == status, (path, code, answer.status_code, answer.text[:500])
        if code is not None:
            assert answer.json()["error"]["code"] == code
        self.steps["refused" if status >= 400 else "done"] += 1
        return answer

    def same(self, item: dict[str, Any], path: Path, shown: Path | None = None) -> None:
        node: Node = self.model.nodes[path]
        exact = b"/home/user/" + self.joined(path if shown is None else shown)
        assert item["path"] == exact.decode("utf-8", "replace")
        encoded = item["path_base64"]
        assert (exact if encoded is None else base64.b64decode(encoded)) == exact
        assert item["type"] == node.kind
        if node.kind == "file":
            assert item["size"] == len(node.content)
        if node.kind == "symlink":
            assert item["link_target"] == node.link.decode("utf-8", "replace")
        else:
            assert item["mode"] == f"{node.mode:04o}"

    def joined(self, path: Path) -> bytes:
        return b"/".join((self.root, *path))

    def named(self, key: str, path: Path) -> dict[str, str]:
        raw = self.joined(path)
        try:
            return {key: raw.decode()}
        except UnicodeDecodeError:
            return {f"{key}_base64": base64.b64encode(raw).decode()}

    def send(
        self, method: str, what: str, path: Path, headers: Any = None, content: Any = None, **query: str
    ) -> httpx2.Response:
        pairs = [f"path={quote_from_bytes(self.joined(path), safe='')}"]
        pairs += [f"{key}={quote_from_bytes(value.encode(), safe='')}" for key, value in query.items()]
        url = f"{self.base}/files{what}?{'&'.join(pairs)}"
        return self.http.request(method, url, headers=headers, content=content)

    def post(self, what: str, key: str, path: Path, **body: Any) -> httpx2.Response:
        return self.http.post(f"{self.base}/files/{what}", json={**self.named(key, path), **body})


@pytest.mark.docker
@pytest.mark.timeout(180)
def test_files_go_as_modelled(tell, make_tenant):
    tenant = make_tenant("files", 1)
    sandbox_id, numbers = tenant.sandbox(), itertools.count()
    steps: Counter[str] = Counter()
    started_at = time.monotonic()
    run_state_machine_as_test(
        lambda: Files(tenant.http, sandbox_id, numbers, steps),
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    tell(
        f"{HISTORIES} histories of a file system in {time.monotonic() - started_at:.0f} s in a sandbox: "
        f"{steps['done']} requests done, {steps['refused']} refused, {steps['link']} links: all as modelled"
    )
