"""What a user can set, call or type is in the documentation."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts

from sandboxd.app import create_app
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.settings import Settings, variable_name

ROOT = Path(__file__).parents[2]
PARAMETER = re.compile(r"\{[^}]+\}")


@pytest.fixture(scope="module")
def docs() -> str:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_every_setting_is_documented(docs):
    missing = [name for field in Settings.model_fields if (name := variable_name(field)) not in docs]
    assert missing == []


def test_no_documented_setting_is_unknown(docs):
    known = {variable_name(field) for field in Settings.model_fields}
    assert sorted(set(re.findall(r"\bSANDBOXD_[A-Z_]+[A-Z]\b", docs)) - known) == []


def test_every_route_is_documented(docs, tmp_path):
    # The name of a path parameter is free: /v1/sandboxes/{id} documents /v1/sandboxes/{sandbox_id}.
    text = PARAMETER.sub("{}", docs)
    documented = {
        (method, path)
        for methods, path in re.findall(r"((?:[A-Z]+/?)+)[`\s|]+(/[^\s`?)|,]*)", text)
        for method in methods.split("/")
    }
    app = create_app(Settings(state_dir=tmp_path))
    missing = [
        f"{method} {context.path_format}"
        for context in iter_route_contexts(app.routes)
        for method in sorted((context.methods or set()) - {"HEAD"})
        if (method, PARAMETER.sub("{}", context.path_format)) not in documented
        and context.path_format != app.swagger_ui_oauth2_redirect_url
    ]
    assert missing == []


def test_every_command_of_the_daemon_is_documented(docs):
    for command in ("sandboxd serve", "sandboxd create-key", "sandboxd set-quota"):
        assert command in docs


def test_every_cli_command_is_documented(docs):
    main = pytest.importorskip("e80_cli.main", reason="the CLI is not there yet")
    missing = [command for command in commands_of(main.app) if f"8080 {command}" not in docs]
    assert missing == []


def commands_of(app, prefix: str = "") -> Iterator[str]:
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        yield f"{prefix}{name}"
    for group in app.registered_groups:
        yield from commands_of(
            group.typer_instance, f"{prefix}{group.name or group.typer_instance.info.name} "
        )


def test_the_settings_table_has_the_true_defaults(docs):
    rows = dict(re.findall(r"^\| `(SANDBOXD_[A-Z_]+)` \| `([^`]*)` \|", docs, re.MULTILINE))
    wrong = {
        variable_name(name): (rows.get(variable_name(name)), field.default)
        for name, field in Settings.model_fields.items()
        if field.default_factory is None and rows.get(variable_name(name)) != _as_text(field.default)
    }
    assert wrong == {}


def test_every_metric_is_documented(docs):
    families = re.findall(r"^# TYPE (sandboxd_\w+) ", Metrics().render().decode(), re.MULTILINE)
    missing = [name for name in families if f"`{name}`" not in docs and not name.endswith("_created")]
    assert missing == []


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
