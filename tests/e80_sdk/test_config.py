"""Where server and key come from, and that a key never goes to a server it is not for."""

import stat
from pathlib import Path

import pytest
from e80_sdk.config import ConfigFiles, config_dir, is_loopback, load_connection, normalize_base_url
from e80_sdk.errors import ConfigError


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"_8080_CONFIG_DIR": str(tmp_path / "8080")}


def files_of(env: dict[str, str]) -> ConfigFiles:
    return ConfigFiles(config_dir(env))


def test_argument_beats_environment_beats_file_beats_default(env: dict[str, str]) -> None:
    found = load_connection(environ=env)
    assert (found.base_url, found.api_key) == ("http://127.0.0.1:8080", None)
    assert (found.base_url_source, found.api_key_source) == ("default", "none")
    files_of(env).store_key("http://stored:1", "k-file")
    found = load_connection(environ=env)
    assert (found.base_url, found.api_key, found.base_url_source) == ("http://stored:1", "k-file", "file")
    env |= {"_8080_API_KEY": "k-env", "_8080_BASE_URL": "http://env:2/v1/"}
    found = load_connection(environ=env)
    assert (found.base_url, found.api_key, found.api_key_source) == ("http://env:2", "k-env", "environment")
    found = load_connection(environ=env, api_key="k-arg", base_url="https://arg")
    assert (found.base_url, found.api_key, found.base_url_source) == ("https://arg", "k-arg", "argument")


def test_empty_variables_are_none(env: dict[str, str]) -> None:
    found = load_connection(environ=env | {"_8080_API_KEY": "", "_8080_BASE_URL": ""})
    assert (found.base_url_source, found.api_key) == ("default", None)


def test_a_stored_key_is_used_for_its_server_only(env: dict[str, str]) -> None:
    files_of(env).store_key("http://one:1", "k1")
    files_of(env).store_key("http://two:2", "k2")
    assert load_connection(environ=env).api_key == "k2"
    assert load_connection(environ=env, base_url="http://one:1").api_key == "k1"
    stranger = load_connection(environ=env, base_url="http://three:3")
    assert stranger.api_key is None
    assert "http://one:1, http://two:2" in stranger.missing_key()


def test_the_names_of_loopback_are_one_server(env: dict[str, str]) -> None:
    files_of(env).store_key("http://localhost:8080/v1", "k")
    for name in ("127.0.0.1", "localhost", "[::1]"):
        assert load_connection(environ=env, base_url=f"http://{name}:8080").api_key == "k"
    assert load_connection(environ=env, base_url="http://127.0.0.1:8081").api_key is None


def test_the_key_is_private_and_replaced_in_one_step(env: dict[str, str]) -> None:
    files = files_of(env)
    files.store_key("http://one:1", "k1")
    assert stat.S_IMODE(files.credentials.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.folder.stat().st_mode) == 0o700
    files.credentials.chmod(0o644)
    before = files.credentials.stat().st_ino
    files.store_key("http://one:1", "k2")
    assert stat.S_IMODE(files.credentials.stat().st_mode) == 0o600
    assert files.credentials.stat().st_ino != before
    assert sorted(path.name for path in files.folder.iterdir()) == ["config.toml", "credentials.toml"]
    assert files.keys() == {"http://one:1": "k2"}


def test_the_key_is_not_in_the_repr(env: dict[str, str]) -> None:
    assert "secret" not in repr(load_connection(environ=env, api_key="secret"))


@pytest.mark.parametrize(
    "wrong",
    ["foo", "ftp://x", "http://", "http://x:port", "http://x/?a=b", "http://user:pw@x", "http://x:99999"],
)
def test_a_wrong_base_url_is_named(wrong: str, env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="not usable"):
        load_connection(environ=env, base_url=wrong)


def test_base_urls_keep_their_path() -> None:
    assert normalize_base_url("https://host/prefix/v1/") == "https://host/prefix"


@pytest.mark.parametrize("text", ["not toml [", "keys = 3", "[keys]\na = 1"])
def test_a_broken_file_is_named(env: dict[str, str], text: str) -> None:
    files = files_of(env)
    files.folder.mkdir()
    files.credentials.write_text(text)
    with pytest.raises(ConfigError, match=r"credentials\.toml"):
        load_connection(environ=env)


def test_the_folder() -> None:
    assert config_dir({"_8080_CONFIG_DIR": "/c", "XDG_CONFIG_HOME": "/x", "HOME": "/h"}) == Path("/c")
    assert config_dir({"XDG_CONFIG_HOME": "/x", "HOME": "/h"}) == Path("/x/8080")
    assert config_dir({"HOME": "/h"}) == Path("/h/.config/8080")


def test_loopback() -> None:
    assert is_loopback("http://127.0.0.1:8080")
    assert is_loopback("http://[::1]")
    assert is_loopback("http://app.localhost")
    assert not is_loopback("http://127.0.0.1.example.org")
    assert not is_loopback("http://10.0.0.1")
