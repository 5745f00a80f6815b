"""What the words of a command line mean: pairs, variables, seconds, text. A wrong one is a usage error."""

from __future__ import annotations

import os

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


def text_of(what: str, data: bytes) -> str:
    """UTF-8 text, which is what a program's code and stdin travel as."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        message = f"{what} is not UTF-8 text (byte {exc.start}); copy it in with `8080 sandbox cp`"
        raise typer.BadParameter(message) from None
