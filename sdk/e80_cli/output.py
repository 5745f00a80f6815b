"""What a command prints: data on stdout, words for a person on stderr; tables on a terminal, bare ids in a
pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from e80_sdk.errors import (
    AuthenticationError,
    ConnectionFailedError,
    E80Error,
    IdempotencyReplayedError,
    SandboxPausedError,
)

_HINTS: dict[type[E80Error], str] = {
    AuthenticationError: "run `8080 apikey set -` or set _8080_API_KEY; `8080 doctor` checks both",
    ConnectionFailedError: "start it with `scripts/up`, set _8080_BASE_URL, or run `8080 doctor`",
    SandboxPausedError: "let it go on with `8080 sandbox resume`",
    IdempotencyReplayedError: "the answer got lost: revoke that key with `8080 apikey revoke`, make another",
}


class Output:
    """Where a command's results go."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.on_terminal = sys.stdout.isatty()
        self._line_end = "\n"

    def data(self, body: Mapping[str, Any]) -> None:
        """One JSON object on a line of its own."""
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        # A name that is not UTF-8 holds surrogates, which JSON can only write as escapes.
        self.line(text if _is_utf8(text) else json.dumps(body, separators=(",", ":")))

    def line(self, text: str) -> None:
        """A line on stdout."""
        sys.stdout.write(f"{text}\n")

    def name(self, text: str) -> None:
        """The name of a file on a line of its own, as the bytes that it is; on a terminal, safe to show."""
        if self.on_terminal:
            self.line(printable(text))
        else:
            self.flush()
            self.raw("stdout", f"{text}\n".encode("utf-8", "surrogateescape"))

    def flush(self) -> None:
        """Let a reader see what was printed so far."""
        sys.stdout.flush()

    def raw(self, stream: str, data: bytes) -> None:
        """A program's bytes, as they are and at once."""
        target = sys.stderr.buffer if stream == "stderr" else sys.stdout.buffer
        target.write(data)
        target.flush()

    def note(self, text: str) -> None:
        """A word to a person; none when nobody may be reading."""
        if sys.stderr.isatty():
            self.warn(text)

    def warn(self, text: str) -> None:
        """A line on stderr."""
        sys.stdout.flush()
        sys.stderr.write(f"{text}{self._line_end}")
        sys.stderr.flush()

    @contextmanager
    def on_raw_terminal(self) -> Iterator[None]:
        """In the block, a line feed alone does not go back to the first column."""
        self._line_end = "\r\n"
        try:
            yield
        finally:
            self._line_end = "\n"

    def error(self, error: E80Error) -> None:
        """What failed and what to do next, on stderr."""
        hint = next((text for kind, text in _HINTS.items() if isinstance(error, kind)), None)
        if self.as_json:
            fields = {"message": error.message, "code": error.code, "status": error.status, "hint": hint}
            fields |= {"param": error.param, "request_id": error.request_id}
            self.warn(json.dumps({"error": fields}, ensure_ascii=False))
            return
        trace = f" (request {error.request_id})" if error.request_id else ""
        self.warn(f"{self.styled('error:', 'red', sys.stderr.isatty())} {error.message}{trace}")
        if hint:
            self.warn(f"hint: {hint}")

    def styled(self, text: str, color: str, on_terminal: bool | None = None) -> str:
        """The text in colour, on a terminal that wants colour."""
        wanted = self.on_terminal if on_terminal is None else on_terminal
        return typer.style(text, fg=color) if wanted and not os.environ.get("NO_COLOR") else text

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on a terminal."""
        # Loading rich takes 50 ms, which a pipe has no use for.
        from rich import box, console, table  # noqa: PLC0415

        # The id comes first and is what gets copied: never cut.
        names: list[table.Column | str] = [
            table.Column(columns[0], no_wrap=True, overflow="ignore"),
            *columns[1:],
        ]
        grid = table.Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            grid.add_row(*row)
        console.Console(highlight=False, markup=False).print(grid)

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on a terminal; in a pipe, a line for each row, its values parted by tabs."""
        if self.on_terminal:
            self.table(columns, rows)
            return
        for row in rows:
            self.line("\t".join(row))

    def fields(self, pairs: Mapping[str, str]) -> None:
        """Names and values, one a line."""
        width = max(len(name) for name in pairs)
        for name, value in pairs.items():
            self.line(f"{name:{width}}  {value}".rstrip())


def printable(text: str) -> str:
    """Text from a sandbox, safe to show: what would steer a terminal is written out."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
