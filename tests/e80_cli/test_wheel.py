"""The base wheel alone gives a working command and SDK: built, installed without extras, in an empty
environment."""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*argv: str | Path, **env: str) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("_8080", "PYTHON", "VIRTUAL"))
    }
    done = subprocess.run(
        argv, capture_output=True, text=True, env=kept | env, cwd="/", check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_base_wheel_alone_works(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("e80-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    bin_ = home / "bin"
    run(bin_ / "python", "-m", "pip", "install", "--quiet", wheel)
    assert "Commands:" in run(bin_ / "8080", "--help")
    config = {"_8080_CONFIG_DIR": str(tmp_path / "none"), "_8080_API_KEY": "k"}
    assert "export OPENAI_BASE_URL=" in run(bin_ / "8080", "env", **config)
    code = (
        "from e80_sdk import Eighty80, eighty80_app\n"
        "app = eighty80_app()\n"
        "@app.tool\nasync def run_python(code: str) -> str:\n    return code\n"
        "print(app.get_tools()[0]['function']['name'], Eighty80().connection.base_url)"
    )
    assert run(bin_ / "python", "-c", code, **config) == "run_python http://127.0.0.1:8080\n"
    assert "sqlmodel" not in run(bin_ / "python", "-m", "pip", "list").lower(), (
        "an extra slipped into the base"
    )
