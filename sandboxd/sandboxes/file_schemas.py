"""Bodies of the file routes, and paths as they come in: percent-encoded bytes in a query, text or base64 in a
body."""

import base64
import binascii
import posixpath
import re
from typing import Annotated, Literal, Self
from urllib.parse import unquote_to_bytes

from fastapi import Depends, Query
from pydantic import AfterValidator, BaseModel, Field, model_validator
from starlette.requests import Request

from sandboxd.agentlink.files import MAX_NAME, MAX_PATH, Entry
from sandboxd.kit.errors import BadRequestError
from sandboxd.kit.http import Body
from sandboxd.sandboxes.files import shown
from sandboxd.sandboxes.schemas import Argument

HOME = b"/home/user"
MAX_LIST = 1000
DEFAULT_LIST = 100
MAX_URL_S = 7 * 24 * 3600
_MODE = r"^[0-7]{3,4}$"
_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{1,18})?|-(\d{1,18}))")


async def path_bytes(
    request: Request,
    path: Annotated[
        str,
        Query(
            min_length=1,
            max_length=MAX_PATH,
            description="Absolute, or relative to /home/user; percent-encoded bytes: `%FF` is the byte FF.",
        ),
    ],
) -> bytes:
    """The path of the query, byte by byte: as text it has lost what is no UTF-8."""
    [value] = values_of(request, b"path")
    if b"\0" in value or b"\0" in path.encode("utf-8", "replace"):
        raise BadRequestError("'path' in the query holds a NUL character, which no path can.", param="path")
    return value


async def after_bytes(
    request: Request,
    after: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=4 * MAX_NAME,
            description="A name, or the `last_id` of the page before: continue behind it.",
        ),
    ] = None,
) -> bytes | None:
    if after is None:
        return None
    [value] = values_of(request, b"after")
    if value.startswith(b"/"):
        try:
            value = base64.b64decode(value[1:], altchars=b"-_", validate=True)
        except binascii.Error:
            value = b"/"
    if b"/" in value or b"\0" in value or len(value) > MAX_NAME:
        raise BadRequestError("'after' in the query is not a name in a folder.", param="after")
    return value


async def signed_query(
    expires: Annotated[str | None, Query(description="Of a signed URL.")] = None,
    key_id: Annotated[str | None, Query(description="Of a signed URL.")] = None,
    signature: Annotated[str | None, Query(description="Of a signed URL.")] = None,
) -> None:
    """What a signed URL has besides. It was checked at the door, before anything else."""


SignedQuery = Annotated[None, Depends(signed_query)]
PathBytes = Annotated[bytes, Depends(path_bytes)]
AfterBytes = Annotated[bytes | None, Depends(after_bytes)]
ModeQuery = Annotated[
    str | None,
    Query(
        pattern=_MODE, description="Octal, like `644`; without it a file keeps its own, a new one has 644."
    ),
]


def values_of(request: Request, name: bytes) -> list[bytes]:
    """The one value of a parameter, as bytes. Raises BadRequestError when there are several."""
    pairs = [pair.partition(b"=") for pair in request.scope["query_string"].split(b"&")]
    found = [
        unquote_to_bytes(value.replace(b"+", b" "))
        for key, _, value in pairs
        if unquote_to_bytes(key.replace(b"+", b" ")) == name
    ]
    if len(found) != 1:
        text = name.decode()
        raise BadRequestError(f"'{text}' is in the query {len(found)} times; send it once.", param=text)
    return found


def parse_mode(mode: str | None) -> int | None:
    return None if mode is None else int(mode, 8)


def parse_range(header: str | None) -> tuple[int | None, int | None] | None:
    """First and last byte. None for what is no single range: such a header is passed over, says the RFC."""
    found = _RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None:
        return None
    first, last, tail = (None if text is None else int(text) for text in found.groups())
    if first is None:
        return None, tail
    return None if last is not None and last < first else (first, last)


def absolute(path: bytes) -> bytes:
    """The path as it is from the root. Dots stay where leaving them out could lead elsewhere."""
    joined = posixpath.join(HOME, path)
    parts = [part for part in joined.split(b"/") if part not in (b"", b".")]
    return b"/" + b"/".join(parts)


def exact(path: bytes) -> str | None:
    """Base64 of a path that has no text."""
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(path).decode("ascii")
    return None


def _base64(value: str) -> str:
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64") from None
    if not data or b"\0" in data or len(data) > MAX_PATH:
        raise ValueError(f"is not a path of 1 to {MAX_PATH} bytes without NUL")
    return value


PathText = Annotated[Argument, Field(min_length=1, max_length=MAX_PATH)]
PathBase64 = Annotated[str, Field(max_length=2 * MAX_PATH), AfterValidator(_base64)]


def _one(text: str | None, encoded: str | None, name: str) -> bytes:
    if (text is None) == (encoded is None):
        raise ValueError(f"takes exactly one of {name} and {name}_base64")
    return text.encode() if text is not None else base64.b64decode(encoded or "")


class _PathBody(Body):
    path: PathText | None = Field(None, description="Absolute, or relative to /home/user.")
    path_base64: PathBase64 | None = Field(None, description="The same where its bytes are no UTF-8.")

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        _one(self.path, self.path_base64, "path")
        return self

    @property
    def path_bytes(self) -> bytes:
        return _one(self.path, self.path_base64, "path")


class MkdirBody(_PathBody):
    parents: bool = Field(True, description="Make missing folders on the way.")
    mode: str | None = Field(None, pattern=_MODE, description="Of a new folder, in octal; 0755 without it.")


class ChmodBody(_PathBody):
    mode: str = Field(pattern=_MODE, description="In octal.")
    recursive: bool = Field(False, description="Everything below a folder, too; links are left alone.")


class MoveBody(Body):
    source: PathText | None = Field(None, alias="from")
    source_base64: PathBase64 | None = Field(None, alias="from_base64")
    to: PathText | None = None
    to_base64: PathBase64 | None = None
    overwrite: bool = Field(False, description="Replace what has the new name: a file, or an empty folder.")

    @model_validator(mode="after")
    def _has_paths(self) -> Self:
        _one(self.source, self.source_base64, "from")
        _one(self.to, self.to_base64, "to")
        return self

    @property
    def source_bytes(self) -> bytes:
        return _one(self.source, self.source_base64, "from")

    @property
    def to_bytes(self) -> bytes:
        return _one(self.to, self.to_base64, "to")


class UrlBody(_PathBody):
    method: Literal["download", "upload"]
    expires_in_s: int = Field(3600, ge=1, le=MAX_URL_S)


class FileOut(BaseModel):
    """A file that was written."""

    object: Literal["sandbox.file"] = "sandbox.file"
    path: str
    size: int


class DeletedFileOut(BaseModel):
    path: str
    object: Literal["sandbox.file"] = "sandbox.file"
    deleted: Literal[True] = True


class EntryOut(BaseModel):
    object: Literal["sandbox.file"] = "sandbox.file"
    name: str
    path: str
    path_base64: str | None = Field(description="The exact bytes of a path that is no UTF-8.")
    type: Literal["file", "directory", "symlink", "fifo", "socket", "device"]
    size: int
    mode: str = Field(description="Permission bits, in octal.")
    owner: str = Field(description="`user`, `nobody`, `root`, or a number.")
    modified_at: float
    link_target: str | None

    @classmethod
    def of(cls, entry: Entry, path: bytes) -> Self:
        return cls(
            name=shown(entry.name),
            path=shown(path),
            path_base64=exact(path),
            type=entry.type,
            size=entry.size,
            mode=f"{entry.mode:04o}",
            owner=entry.owner,
            modified_at=round(entry.modified_ns / 1e9, 6),
            link_target=None if entry.link is None else shown(entry.link),
        )


class EntryListOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[EntryOut]
    first_id: str | None = Field(description="The first name; one that is no UTF-8 as `/` and base64.")
    last_id: str | None = Field(description="The last name, for the `after` of the next page.")
    has_more: bool

    @classmethod
    def of(cls, entries: list[Entry], folder: bytes, *, has_more: bool) -> Self:
        return cls(
            data=[EntryOut.of(entry, posixpath.join(folder, entry.name)) for entry in entries],
            first_id=_cursor(entries[0].name) if entries else None,
            last_id=_cursor(entries[-1].name) if entries else None,
            has_more=has_more,
        )


class ArchiveOut(BaseModel):
    """An archive that was unpacked."""

    object: Literal["sandbox.archive"] = "sandbox.archive"
    path: str
    entries: int
    size: int = Field(description="Bytes of the files' content.")


class FileUrlOut(BaseModel):
    object: Literal["sandbox.file_url"] = "sandbox.file_url"
    url: str
    method: Literal["download", "upload"]
    path: str
    expires_at: int


def _cursor(name: bytes) -> str:
    # No name has a slash in it.
    return shown(name) if exact(name) is None else "/" + base64.urlsafe_b64encode(name).decode("ascii")
