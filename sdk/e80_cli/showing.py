"""What an exec tells, as it is printed: output byte for byte, rich results as text, with pictures and the
like kept where wanted."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from e80_sdk.errors import E80Error
from e80_sdk.results import ExecReader, ExecResult

from e80_cli.amounts import size

if TYPE_CHECKING:
    from e80_sdk.mime import Result

    from e80_cli.output import Output

# What a terminal cannot show, with the end of its file's name.
_FILES = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/gif": "gif",
    "image/svg+xml": "svg",
    "application/pdf": "pdf",
    "text/html": "html",
}
_TEXT = ("image/svg+xml", "text/html")


class Screen:
    """Prints the events of one exec.

    Attributes:
        passed: How many bytes of `stdout` and `stderr` were printed.
    """

    def __init__(self, output: Output, results: Results | None = None) -> None:
        self.output = output
        self.passed: Counter[str] = Counter()
        self._results = results or Results(output)
        self._reader = ExecReader()

    @property
    def result(self) -> ExecResult:
        """The result, when all events were shown."""
        assert self._reader.result is not None  # the SDK raises when events end without it
        return self._reader.result

    def show(self, event: Mapping[str, Any]) -> None:
        """Print what an event tells; with `--json` the event itself."""
        chunk = self._reader.chunk(event)
        if chunk is not None and chunk.result is None:
            self.passed[chunk.stream] += len(chunk.data)
        if self.output.as_json:
            self.output.data(event)
            self.output.flush()
        elif event["type"] == "exec.gap":
            self.output.warn(f"8080: {event.get('missed_bytes')} bytes of output are not kept any more")
        elif chunk is not None and chunk.result is not None:
            self._results.show(chunk.result)
        elif chunk is not None:
            self.output.raw(chunk.stream, chunk.data)


class Results:
    """Shows results; those that are more than text go to files in `folder`, if there is one."""

    def __init__(self, output: Output, folder: str | None = None) -> None:
        self._output = output
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise typer.BadParameter(f"{folder}: {exc.strerror}", param_hint="--save") from exc

    def show(self, result: Result) -> None:
        """Print its text; name, or keep, what else there is."""
        if result.text is not None:
            self._output.raw("stdout", f"{result.text}\n".encode("utf-8", "replace"))
        for kind, ending in _FILES.items():
            content = _content(result, kind)
            if content is None:
                continue
            if self._folder is not None:
                self._output.warn(f"8080: {kind}, {size(len(content))} -> {self._keep(content, ending)}")
            elif kind != "text/html" or result.text is None:
                self._output.warn(f"8080: {kind}, {size(len(content))}: keep it with --save DIR")

    def _keep(self, content: bytes, ending: str) -> Path:
        assert self._folder is not None
        for number in itertools.count(1):
            path = self._folder / f"result-{number}.{ending}"
            try:
                with path.open("xb") as file:
                    file.write(content)
            except FileExistsError:
                continue
            except OSError as exc:
                raise E80Error(f"{path}: {exc.strerror}", code="local_file") from exc
            return path
        raise AssertionError("numbers have no end")


def _content(result: Result, kind: str) -> bytes | None:
    value = result.data.get(kind)
    if not isinstance(value, str):
        return None
    if kind in _TEXT:
        return value.encode("utf-8", "replace")
    try:
        return base64.b64decode(value)
    except binascii.Error:
        return None
