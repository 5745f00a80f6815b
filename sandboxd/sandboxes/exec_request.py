"""What a client can ask to be run."""

import hashlib
import json
import shlex
from dataclasses import dataclass, field
from typing import Any

HOME = "/home/user"
# Where users of a sandbox begin.
HOMES = {"user": HOME, "nobody": "/tmp"}
TITLE_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Pty:
    """The terminal that a command runs in."""

    rows: int
    cols: int
    term: str


@dataclass(frozen=True, slots=True)
class NewExec:
    """What a client wants to run: `code`, or a `command` as argv or as text for `bash -lc`."""

    code: str | None = None
    language: str = "python"
    command: str | list[str] | None = None
    context: str | None = None
    cwd: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    user: str = "user"
    stdin: str = ""
    stdin_open: bool = False
    pty: Pty | None = None
    timeout_s: float | None = None
    background: bool = False
    stream: bool = False
    fresh: bool = False

    @property
    def runs_bash(self) -> bool:
        return self.code is not None and self.language == "bash" and self.context is None

    def argv(self) -> tuple[str, ...]:
        if self.runs_bash:
            return ("bash", "-c", str(self.code))
        command = self.command
        return ("bash", "-lc", command) if isinstance(command, str) else tuple(command or ())

    def title(self) -> str:
        """For people who look at a list; without what the store cannot hold."""
        if self.code is not None:
            text = self.code[:TITLE_LENGTH]
        elif isinstance(self.command, str):
            text = self.command[:TITLE_LENGTH]
        else:
            text = shlex.join(part[:TITLE_LENGTH] for part in (self.command or [])[:TITLE_LENGTH])
        return text[:TITLE_LENGTH].replace("\0", "?") if "\0" in text else text[:TITLE_LENGTH]

    def fingerprint(self) -> str:
        """Equal for requests that would run the same thing, however they want to be told of it."""
        cwd = HOME if self.cwd is None else self.cwd
        said: list[Any] = [self.code, self.command, cwd, self.env, self.stdin, self.timeout_s, self.fresh]
        # Only what differs from the default: an exec that an earlier release started has none of these.
        added = {
            "language": self.language if self.language != "python" else None,
            "context": self.context,
            "user": self.user if self.user != "user" else None,
            "stdin_open": self.stdin_open or None,
            "pty": None if self.pty is None else [self.pty.rows, self.pty.cols, self.pty.term],
            "background": self.background or None,
        }
        if any(value is not None for value in added.values()):
            said.append(added)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode("ascii")).hexdigest()
