from pathlib import Path

import pytest
from pydantic import ValidationError

from sandboxd.kit.settings import Settings, unknown_variables, variable_name


def test_the_database_lives_in_the_state_folder_by_default(monkeypatch):
    monkeypatch.setenv("SANDBOXD_STATE_DIR", "/somewhere/else")
    assert Settings().database_url == "sqlite+aiosqlite:////somewhere/else/sandboxd.db"


def test_the_environment_wins_over_defaults(monkeypatch):
    monkeypatch.setenv("SANDBOXD_PORT", "9090")
    monkeypatch.setenv("SANDBOXD_METRICS_PUBLIC", "true")
    settings = Settings()
    assert settings.port == 9090
    assert settings.metrics_public is True


def test_settings_cannot_change():
    with pytest.raises(ValidationError):
        Settings().port = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("RUNTIME", "kata"),
        ("LOG_LEVEL", "loud"),
        ("STATE_DIR", "relative/path"),
        ("DRAIN_TIMEOUT_S", "-1"),
        ("MAX_BODY_MB", "0"),
        ("DATABASE_URL", "sqlite+aiosqlite:///relative.db"),
        ("DATABASE_URL", "mysql://user:hunter2@host/db"),
    ],
)
def test_a_wrong_value_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(f"SANDBOXD_{name}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert caught.value.errors()[0]["loc"] == (name.lower(),)
    assert "hunter2" not in caught.value.errors()[0]["msg"]


def test_a_misspelt_variable_is_found(monkeypatch):
    monkeypatch.setenv("SANDBOXD_PROT", "1")
    assert "SANDBOXD_PROT" in unknown_variables()
    assert variable_name("port") == "SANDBOXD_PORT"


def test_every_setting_says_what_it_is_for():
    missing = [name for name, field in Settings.model_fields.items() if not field.description]
    assert missing == []


def test_paths_are_paths():
    assert isinstance(Settings(state_dir="/x").state_dir, Path)
