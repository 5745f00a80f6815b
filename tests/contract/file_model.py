"""A file system as the file routes should show it: folders, files and links in a dictionary."""

from dataclasses import dataclass, replace

Path = tuple[bytes, ...]


@dataclass(frozen=True)
class Node:
    kind: str
    mode: int = 0o777
    content: bytes = b""
    link: bytes = b""


class Refused(Exception):
    """What the server should answer instead, by its code."""


class FileModel:
    """Every method raises Refused where the kernel would refuse.

    No path goes through a link, and links lead to names in their own folder."""

    def __init__(self) -> None:
        self.nodes: dict[Path, Node] = {(): Node("directory", 0o755)}

    def is_clear(self, path: Path) -> bool:
        """Whether no folder on the way is a link."""
        return all(self.kind(path[:depth]) != "symlink" for depth in range(len(path)))

    def kind(self, path: Path) -> str | None:
        return self.nodes[path].kind if path in self.nodes else None

    def below(self, path: Path) -> list[Path]:
        return [other for other in self.nodes if len(other) > len(path) and other[: len(path)] == path]

    def children(self, path: Path) -> list[bytes]:
        return sorted(other[-1] for other in self.below(path) if len(other) == len(path) + 1)

    def find(self, path: Path) -> Node:
        for depth in range(len(path)):
            kind = self.kind(path[:depth])
            if kind != "directory":
                raise Refused("file_not_found" if kind is None else "not_directory")
        if path not in self.nodes:
            raise Refused("file_not_found")
        return self.nodes[path]

    def follow(self, path: Path) -> Path:
        """Where a chain of links ends, whether there is something or not."""
        seen = set()
        while self.kind(path) == "symlink":
            if path in seen:
                raise Refused("bad_path")
            seen.add(path)
            path = (*path[:-1], self.nodes[path].link)
        return path

    def write(self, path: Path, content: bytes, mode: int | None) -> bool:
        self._make_parents(path)
        path = self.follow(path)
        old = self.nodes.get(path)
        if old is not None and old.kind == "directory":
            raise Refused("is_directory")
        self.nodes[path] = Node("file", mode or (old.mode if old else 0o644), content)
        return old is None

    def read(self, path: Path) -> bytes:
        self.find(path)
        node = self.find(self.follow(path))
        if node.kind == "directory":
            raise Refused("is_directory")
        return node.content

    def list(self, path: Path) -> list[bytes]:
        self.find(path)
        path = self.follow(path)
        if self.find(path).kind != "directory":
            raise Refused("not_directory")
        return self.children(path)

    def mkdir(self, path: Path, parents: bool, mode: int) -> bool:
        if parents:
            self._make_parents(path)
        else:
            self.find(path[:-1])
            if self.kind(path[:-1]) != "directory":
                raise Refused("not_directory")
        if path not in self.nodes:
            self.nodes[path] = Node("directory", mode)
            return True
        try:
            there = self.kind(self.follow(path))
        except Refused:
            there = None
        if there != "directory":
            raise Refused("file_exists")
        return False

    def move(self, source: Path, target: Path, overwrite: bool) -> None:
        node = self.find(source)
        self.find(target[:-1])
        if self.kind(target[:-1]) != "directory":
            raise Refused("not_directory")
        there = self.kind(target)
        if there is not None and not overwrite:
            raise Refused("file_exists")
        if target == source:
            return
        if target[: len(source)] == source:
            # Of a file nothing can be below.
            raise Refused("bad_path")
        if source[: len(target)] == target:
            raise Refused("not_empty")
        if there is not None:
            if node.kind == "directory" and there != "directory":
                raise Refused("not_directory")
            if node.kind != "directory" and there == "directory":
                raise Refused("is_directory")
            if there == "directory" and self.children(target):
                raise Refused("not_empty")
        moved = {path: self.nodes.pop(path) for path in [source, *self.below(source)]}
        self.nodes.update({target + path[len(source) :]: item for path, item in moved.items()})

    def delete(self, path: Path, recursive: bool) -> None:
        self.find(path)
        if self.children(path) and not recursive:
            raise Refused("not_empty")
        for gone in [path, *self.below(path)]:
            del self.nodes[gone]

    def chmod(self, path: Path, mode: int, recursive: bool) -> None:
        self.find(path)
        path = self.follow(path)
        self.find(path)
        for changed in [path, *(self.below(path) if recursive else [])]:
            if self.nodes[changed].kind != "symlink":
                self.nodes[changed] = replace(self.nodes[changed], mode=mode)

    def link(self, path: Path, target: bytes) -> bool:
        """As `ln -s` without -f; whether it worked."""
        if path in self.nodes or self.kind(path[:-1]) != "directory":
            return False
        self.nodes[path] = Node("symlink", link=target)
        return True

    def copy(self, source: Path, target: Path) -> int:
        """A folder's content into a new folder, as an archive carries it; how many names it has."""
        self.list(source)
        source = self.follow(source)
        copied = {target + path[len(source) :]: self.nodes[path] for path in self.below(source)}
        self.nodes[target] = Node("directory", 0o755)
        self.nodes.update(copied)
        return len(copied)

    def _make_parents(self, path: Path) -> None:
        for depth in range(1, len(path)):
            if self.kind(path[:depth]) not in (None, "directory"):
                raise Refused("not_directory")
        for depth in range(1, len(path)):
            self.nodes.setdefault(path[:depth], Node("directory", 0o755))
