"""The program of `8080 sandbox run`: where it comes from and how it gets into the sandbox."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from e80_cli.words import text_of

HOME = "/home/user"


@dataclass(frozen=True)
class Script:
    """What `run` is to run, and how it gets there.

    A script file is uploaded and run by the sandbox's `python3`, so that `__file__`, `sys.argv` and imports
    beside it are what they are at home. Bare code goes to the interpreter that waits in the sandbox, which
    is faster.
    """

    body: dict[str, Any]
    path: str = ""
    upload: bytes | None = None

    @classmethod
    def of(cls, code: str | None, words: list[str], *, stdin: bool) -> Script:
        """The script that a command line names: `-c` code, or a file or `-` with arguments."""
        if code is not None:
            if words:
                return cls({"command": ["python3", "-u", "-c", code, *words]})
            return cls({"code": code, "language": "python"})
        if not words:
            raise typer.BadParameter("name a script, - for stdin, or give -c CODE", param_hint="SCRIPT")
        if words[0] == "-":
            if stdin:
                raise typer.BadParameter(
                    "stdin cannot be both the script and its input", param_hint="--stdin"
                )
            source = text_of("stdin", sys.stdin.buffer.read())
            if len(words) > 1:
                return cls({"command": ["python3", "-u", *words], "stdin": source})
            return cls({"code": source, "language": "python"})
        try:
            content = Path(words[0]).read_bytes()
        except OSError as exc:
            raise typer.BadParameter(f"{words[0]}: {exc.strerror}", param_hint="SCRIPT") from exc
        path = f"{HOME}/{os.path.basename(words[0])}"
        return cls({"command": ["python3", "-u", path, *words[1:]]}, path=path, upload=content)
