"""The recipe of the default image, without an engine."""

import re
import shutil
from pathlib import Path

import pytest

from tests.scripts.shell import REPO, bash

RECIPE = REPO / "images" / "default"
PROMISED_LIBRARIES = """
ipython numpy pandas matplotlib scipy sympy scikit-learn requests beautifulsoup4 lxml pyyaml pillow openpyxl
pypdf python-docx tabulate pip
"""
PROMISED_TOOLS = """
git curl jq ripgrep less procps rsync nano vim-tiny htop unzip openssh-client netcat-openbsd python3
python3-venv
"""
HASHED = ("Dockerfile", "bake_fonts.py", "finish.sh", "packages.txt", "requirements.lock")


def lines_of(name: str) -> list[str]:
    return [line for line in (RECIPE / name).read_text().splitlines() if line and not line.startswith("#")]


def locked() -> dict[str, list[str]]:
    """Hashes of each `name==version`."""
    text = (RECIPE / "requirements.lock").read_text().replace("\\\n", " ")
    entries = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {entry[0]: [part.removeprefix("--hash=sha256:") for part in entry[1:]] for entry in entries}


def test_recipe_lists_what_is_promised() -> None:
    assert set(PROMISED_LIBRARIES.split()) <= set(lines_of("requirements.in"))
    assert set(PROMISED_TOOLS.split()) <= set(lines_of("packages.txt"))


def test_lock_pins_every_library_with_hashes() -> None:
    pins = locked()
    names = {pin.partition("==")[0] for pin in pins}
    assert set(lines_of("requirements.in")) <= names
    for pin, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)
        # One wheel for every machine, or one for x86_64 and one for aarch64.
        assert len(hashes) in (1, 2), pin
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes), pin


def test_lists_are_sorted_and_without_repeats() -> None:
    for name in ("packages.txt", "requirements.in"):
        tools = [line for line in lines_of(name) if not line.startswith("python3")]
        assert tools == sorted(set(tools)), name


def test_dockerfile_needs_no_buildkit() -> None:
    text = (RECIPE / "Dockerfile").read_text()
    assert not re.search(r"# *syntax=|--mount|--chmod|<<", text)


def test_nothing_names_a_mirror() -> None:
    for path in [*RECIPE.iterdir(), *(REPO / "scripts").rglob("*")]:
        if path.is_file() and path.suffix != ".pyc":
            urls = re.findall(r"(?:https?|ftp)://[^\s'\"]+", path.read_text())
            assert not [url for url in urls if not re.match(r"https?://(127\.0\.0\.1|\[?\$|\[)", url)], path


def image_hash(repo: Path) -> str:
    done = bash(f"RECIPE='{repo}'; image_hash")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", HASHED)
def test_content_hash_follows_the_recipe(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "recipe"
    shutil.copytree(RECIPE, copy)
    before = image_hash(copy)
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    (copy / "README.md").write_text("other words")
    assert image_hash(copy) == before
    with (copy / name).open("a") as file:
        file.write("\n# changed\n")
    assert image_hash(copy) != before


def test_unknown_way_of_building_is_refused() -> None:
    done = bash("build_image 0", E80_IMAGE_BUILD="magic")
    assert done.returncode == 1
    assert "E80_IMAGE_BUILD=magic is unknown" in done.stderr
    assert "auto, dockerfile or bootstrap" in done.stderr
