import sys
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
        ("DATABASE_URL", "hunter2"),
        ("DATABASE_URL", "postgres://user:hunter2@host/db"),
        ("DATABASE_URL", "postgresql+psycopg://user:hunter2@host/db"),
        ("DATABASE_URL", "postgresql://user:hunter2@host"),
        ("DATABASE_URL", "postgresql://user:p@hunter2:db"),
        ("DATABASE_URL", "postgresql://user:hunter2@host:port/db"),
        ("DATABASE_URL", "postgresql://user:hunter2@host/db?pasword=hunter2"),
    ],
)
def test_a_wrong_value_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(f"SANDBOXD_{name}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert caught.value.errors()[0]["loc"] == (name.lower(),)
    assert "hunter2" not in caught.value.errors()[0]["msg"]
    assert "hunter2" not in str(caught.value)


def test_a_postgresql_url_gets_its_driver_and_keeps_its_password(monkeypatch):
    monkeypatch.setenv("SANDBOXD_DATABASE_URL", "postgresql://e80:a%40b%2Fc@host:5433/db?sslmode=require")
    settings = Settings()
    assert settings.database_url == "postgresql+asyncpg://e80:a%40b%2Fc@host:5433/db?sslmode=require"
    assert "a%40b" not in repr(settings)


def test_a_missing_driver_is_said_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    monkeypatch.setenv("SANDBOXD_DATABASE_URL", "postgresql://e80:hunter2@host/db")
    with pytest.raises(ValidationError, match=r"pip install 'e80\[server,postgres\]'"):
        Settings()


def test_a_misspelt_variable_is_found(monkeypatch):
    monkeypatch.setenv("SANDBOXD_PROT", "1")
    assert "SANDBOXD_PROT" in unknown_variables()
    assert variable_name("port") == "SANDBOXD_PORT"


def test_every_setting_says_what_it_is_for():
    missing = [name for name, field in Settings.model_fields.items() if not field.description]
    assert missing == []


def test_paths_are_paths():
    assert isinstance(Settings(state_dir="/x").state_dir, Path)
