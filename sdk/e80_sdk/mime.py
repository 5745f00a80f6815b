"""Rich results of code in a context: MIME bundles, and how they show in a notebook. No HTTP in here."""

from __future__ import annotations

import base64
import binascii
import html
from collections.abc import Mapping
from typing import Any

# Passive, whoever made them. Other types can run scripts, and a notebook's page holds the keys of its server.
_PASSIVE = ("text/plain", "image/png", "image/jpeg", "image/gif", "application/json")
_FRAME = (
    '<iframe sandbox="" style="width:100%;height:24em;border:0;background:white" srcdoc="{page}"></iframe>'
)


class Result:
    """Something that code showed: the value of its last line, a picture, a table.

    In a notebook it shows as itself. HTML and SVG show in a frame without scripts, because they come out of a
    sandbox; who trusts them shows `result.html` as HTML.

    Attributes:
        data: The MIME bundle: a value per MIME type, binary ones as base64.
    """

    __slots__ = ("data",)

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data: dict[str, Any] = dict(data)

    @property
    def text(self) -> str | None:
        """As plain text."""
        return self._text("text/plain")

    @property
    def html(self) -> str | None:
        """As HTML, just as the sandbox made it."""
        return self._text("text/html")

    @property
    def markdown(self) -> str | None:
        """As Markdown."""
        return self._text("text/markdown")

    @property
    def svg(self) -> str | None:
        """As SVG, just as the sandbox made it."""
        return self._text("image/svg+xml")

    @property
    def png(self) -> bytes | None:
        """The bytes of a PNG picture."""
        return self._bytes("image/png")

    @property
    def jpeg(self) -> bytes | None:
        """The bytes of a JPEG picture."""
        return self._bytes("image/jpeg")

    @property
    def json(self) -> Any:
        """As JSON, decoded; None where there is none."""
        return self.data.get("application/json")

    def __repr__(self) -> str:
        return self.text if self.text is not None else f"<Result {', '.join(sorted(self.data))}>"

    def __eq__(self, other: object) -> bool:
        return self.data == other.data if isinstance(other, Result) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it holds a dict

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        made = {kind: value for kind, value in self.data.items() if kind in _PASSIVE}
        made.setdefault("text/plain", repr(self))
        page = self.html if self.html is not None else self.svg
        if page is not None:
            made["text/html"] = _FRAME.format(page=html.escape(page))
        return made

    def as_html(self) -> str:
        """A piece of HTML that shows it and runs nothing of it."""
        page = self.html if self.html is not None else self.svg
        if page is not None:
            return _FRAME.format(page=html.escape(page))
        for kind in ("image/png", "image/jpeg", "image/gif"):
            value = self._text(kind)
            if value is not None:
                return f'<img src="data:{kind};base64,{html.escape("".join(value.split()))}">'
        return preformatted(repr(self))

    def _text(self, kind: str) -> str | None:
        value = self.data.get(kind)
        return value if isinstance(value, str) else None

    def _bytes(self, kind: str) -> bytes | None:
        value = self._text(kind)
        if value is None:
            return None
        try:
            return base64.b64decode(value)
        except (binascii.Error, ValueError):
            return None


def preformatted(text: str) -> str:
    """Text as HTML, with its line breaks."""
    return f"<pre>{html.escape(text)}</pre>"
