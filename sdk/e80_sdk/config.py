"""Where the server is and which key opens it: arguments, then environment, then the user's files. The only
reader of both."""

from __future__ import annotations

import ipaddress
import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from e80_sdk.errors import ConfigError

DEFAULT_BASE_URL = "http://127.0.0.1:8080"
API_KEY_VARIABLE = "_8080_API_KEY"
BASE_URL_VARIABLE = "_8080_BASE_URL"
CONFIG_DIR_VARIABLE = "_8080_CONFIG_DIR"


@dataclass(frozen=True)
class Connection:
    """A server and the key for it, and where each came from (`argument`, `environment`, `file`, `default`,
    `none`)."""

    base_url: str
    api_key: str | None = field(repr=False)
    base_url_source: str
    api_key_source: str
    other_servers: tuple[str, ...] = ()
    """Servers that the credentials file holds a key for, when it holds none for `base_url`."""

    def missing_key(self) -> str:
        """What to tell a user who has no key for this server."""
        how = "set _8080_API_KEY or run `8080 apikey set -`"
        if self.other_servers:
            return (
                f"no API key for {self.base_url}: the stored keys are for {', '.join(self.other_servers)}; "
                f"{how} with `--base-url {self.base_url}`"
            )
        return f"no API key for {self.base_url}: {how}"


def load_connection(
    *, api_key: str | None = None, base_url: str | None = None, environ: Mapping[str, str] | None = None
) -> Connection:
    """Find server and key. A stored key is only ever used for the server it was stored for.

    Raises:
        ConfigError: A file cannot be read or the base URL is not one.
    """
    env = os.environ if environ is None else environ
    files = ConfigFiles(config_dir(env))
    url, url_source = _first(
        (base_url, "argument"), (env.get(BASE_URL_VARIABLE), "environment"), (files.base_url(), "file")
    )
    url = normalize_base_url(url or DEFAULT_BASE_URL)
    key, key_source = _first((api_key, "argument"), (env.get(API_KEY_VARIABLE), "environment"))
    others: tuple[str, ...] = ()
    if key is None:
        keys = files.keys()
        key = keys.get(_server_of(url))
        key_source = "file" if key else "none"
        others = () if key else tuple(sorted(keys))
    return Connection(url, key, url_source or "default", key_source or "none", others)


def config_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of the user's files: `_8080_CONFIG_DIR`, else `$XDG_CONFIG_HOME/8080`, else
    `~/.config/8080`."""
    env = os.environ if environ is None else environ
    if chosen := env.get(CONFIG_DIR_VARIABLE):
        return Path(chosen)
    if xdg := env.get("XDG_CONFIG_HOME"):
        return Path(xdg) / "8080"
    return Path(env.get("HOME") or Path.home()) / ".config" / "8080"


def normalize_base_url(url: str) -> str:
    """The server root: no trailing slash, no `/v1`.

    Raises:
        ConfigError: It is not an http(s) URL.
    """
    text = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(
            f"base URL {url!r} is not usable; write it like {DEFAULT_BASE_URL}", code="base_url_invalid"
        )
    return text


def is_loopback(base_url: str) -> bool:
    """Whether the server is on this machine, so that no proxy can be meant and plain HTTP leaks nothing."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class ConfigFiles:
    """`config.toml` (which server) and `credentials.toml` (its key, mode 0600) in one folder."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def credentials(self) -> Path:
        return self.folder / "credentials.toml"

    def base_url(self) -> str | None:
        """The stored server, if any."""
        value = _read_toml(self.config).get("base_url")
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"base_url in {self.config} is not text; run `8080 apikey set` again")
        return value

    def keys(self) -> dict[str, str]:
        """Stored keys by server."""
        table = _read_toml(self.credentials).get("keys", {})
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise ConfigError(f"{self.credentials} is not a table of keys; run `8080 apikey set` again")
        return dict(table)

    def store_key(self, base_url: str, api_key: str) -> None:
        """Store the key for that server and make the server the stored one. Each file is replaced in one
        step."""
        keys = self.keys() | {_server_of(base_url): api_key}
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lines = [f"{_quoted(server)} = {_quoted(key)}" for server, key in sorted(keys.items())]
        _replace(self.credentials, "\n".join(["[keys]", *lines, ""]), mode=0o600)
        _replace(self.config, f"base_url = {_quoted(normalize_base_url(base_url))}\n", mode=0o644)


def _first(*candidates: tuple[str | None, str]) -> tuple[str | None, str | None]:
    for value, source in candidates:
        if value:
            return value, source
    return None, None


def _server_of(base_url: str) -> str:
    """The server as it keys the credentials: the names of this machine's loopback are one server."""
    url = normalize_base_url(base_url)
    parts = urlsplit(url)
    if not is_loopback(url) or parts.path:
        return url
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://127.0.0.1{port}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(
            f"cannot read {path}: {exc}; repair or remove it", code="config_unreadable"
        ) from exc


def _quoted(text: str) -> str:
    # A JSON string without control characters is a TOML basic string; keys and URLs hold none.
    return json.dumps(text, ensure_ascii=False)


def _replace(path: Path, text: str, *, mode: int) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
