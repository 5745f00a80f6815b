"""The Python half of smoke.sh: libraries, compiled modules, figures, pip and venv without a network."""

import base64
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
import zipfile

import docx
import pandas
import pypdf

LIBRARIES = """
IPython numpy numpy.testing pandas matplotlib.pyplot scipy.stats scipy.optimize sympy sklearn.linear_model
sklearn.ensemble requests bs4 lxml.etree yaml PIL.Image openpyxl pypdf docx tabulate
ssl sqlite3 ctypes lzma bz2 zoneinfo venv ensurepip pip
"""
HOME = pathlib.Path.home()


def main() -> None:
    check_libraries()
    check_compiled()
    check_figure()
    check_documents()
    check_pip_and_venv()
    ok(f"numpy and pandas import in {fastest_import_s():.2f} s")


def ok(text: str) -> None:
    sys.stdout.write(f"    ok: {text}\n")


def check_libraries() -> None:
    for name in LIBRARIES.split():
        importlib.import_module(name)
    if not ran(sys.executable, "-m", "pip", "check"):
        sys.exit("pip check found a library without what it needs")
    ok("all libraries import, nothing they need is missing")


def check_compiled() -> None:
    stale = []
    for folder in (path for path in sys.path if path.startswith("/usr") and os.path.isdir(path)):
        for source in pathlib.Path(folder).rglob("*.py"):
            cached = pathlib.Path(importlib.util.cache_from_source(str(source)))
            stat = source.stat()
            recorded = cached.read_bytes()[8:16] if cached.exists() else b""
            now = (int(stat.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little") + stat.st_size.to_bytes(4, "little")
            if recorded != now:
                stale.append(str(source))
    if stale:
        sys.exit(f"{len(stale)} modules have no valid .pyc, the first: {stale[:3]}")
    ok("every module is compiled")


def check_figure() -> None:
    code = (
        "import matplotlib.pyplot as plt; print(plt.get_backend())\n"
        "plt.title('ünï'); plt.plot([1, 3, 2]); plt.savefig('figure.png')\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=HOME, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    if list(HOME.glob(".cache/matplotlib/fontlist*")):
        sys.exit("matplotlib scanned the fonts again: the baked list was not used")
    if out.strip() != "agg":
        sys.exit(f"matplotlib's backend is not agg: {out[:200]}")
    if (HOME / "figure.png").read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
        sys.exit("figure.png is no PNG")
    ok("a figure renders, from the baked font list")


def check_documents() -> None:
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    frame.to_excel(HOME / "sheet.xlsx", index=False)
    if not pandas.read_excel(HOME / "sheet.xlsx").equals(frame) or "|" not in frame.to_markdown():
        sys.exit("a table did not survive a trip through xlsx")
    docx.Document().save(str(HOME / "empty.docx"))
    writer = pypdf.PdfWriter()
    writer.add_blank_page(width=72, height=72)
    writer.write(HOME / "page.pdf")
    if len(pypdf.PdfReader(HOME / "page.pdf").pages) != 1:
        sys.exit("the PDF has no page")
    ok("xlsx, docx and pdf are written and read")


def check_pip_and_venv() -> None:
    wheel = make_wheel(HOME / "tiny_e80-1.0-py3-none-any.whl")
    install = ("-m", "pip", "install", "--quiet", "--no-index", str(wheel))
    if not ran(sys.executable, *install) or not ran("tiny-e80"):
        sys.exit("pip install did not put a library and its command within reach")
    where = output(sys.executable, "-c", "import tiny_e80; print(tiny_e80.__file__)")
    if not where.startswith(str(HOME / ".local")):
        sys.exit(f"pip installed into {where}, not into the workspace")
    python = str(HOME / "env/bin/python")
    if not ran(sys.executable, "-m", "venv", str(HOME / "env")) or not ran(python, *install):
        sys.exit("python3 -m venv gave no environment with a working pip")
    if not output(python, "-c", "import tiny_e80; print(tiny_e80.__file__)").startswith(str(HOME / "env")):
        sys.exit("pip in the venv did not install into the venv")
    ok("pip installs into the workspace, and into a venv, without a network")


def make_wheel(path: pathlib.Path) -> pathlib.Path:
    info = "tiny_e80-1.0.dist-info"
    files = {
        "tiny_e80.py": "def main():\n    print('tiny')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-e80\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: smoke\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ntiny-e80 = tiny_e80:main\n",
    }
    record = [f"{info}/RECORD,,"]
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(text)}")
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": "\n".join(record) + "\n"}.items():
            archive.writestr(name, text)
    return path


def fastest_import_s(tries: int = 5) -> float:
    times = []
    for _ in range(tries):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", "import numpy, pandas"], check=True)
        times.append(time.monotonic() - begin)
    return min(times)


def ran(*command: str) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
