"""What the words of a command line mean: pairs, variables, seconds, times, text. A wrong one is a usage
error."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime

import typer


def variables(given: list[str] | None) -> dict[str, str]:
    """`--env` words; a name alone passes this process's variable on, if it is set."""
    named = {word: os.environ.get(word) for word in given or [] if "=" not in word}
    passed = {name: value for name, value in named.items() if value is not None}
    return passed | pairs("--env", [word for word in given or [] if "=" in word])


def pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """Repeated NAME=VALUE words of an option."""
    found = {}
    for word in given or []:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"{word!r} is not NAME=VALUE", param_hint=option)
        found[name] = value
    return found


def seconds(option: str, text: str) -> float | None:
    """A number of seconds, or None for the word `none`."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor `none`", param_hint=option) from None


def instant(option: str, text: str) -> float:
    """A time as Unix seconds: those themselves, `24h` (so long ago), or a day or time of this clock."""
    ago = re.fullmatch(r"(\d+)([smhd])", text)
    if ago:
        return time.time() - int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[ago[2]]
    try:
        return (
            float(text) if re.fullmatch(r"\d{5,}(\.\d+)?", text) else datetime.fromisoformat(text).timestamp()
        )
    except ValueError:
        message = f"{text!r} is no time; write 2026-11-21, 2026-11-21T08:00, 24h (ago) or Unix seconds"
        raise typer.BadParameter(message, param_hint=option) from None


def text_of(what: str, data: bytes) -> str:
    """UTF-8 text, which is what a program's code and stdin travel as."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        message = f"{what} is not UTF-8 text (byte {exc.start}); copy it in with `8080 sandbox cp`"
        raise typer.BadParameter(message) from None
