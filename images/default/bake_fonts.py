"""Puts matplotlib's font list into the image and lets matplotlib fall back on it.

matplotlib looks for the list only in the user's cache folder, which is empty in every new sandbox; without
this each first figure would scan the fonts again. A list in the user's cache folder still wins.
"""

import json
import pathlib
import sys
import tempfile

import matplotlib

BEFORE = "fm = json_load(fm_path)"
AFTER = "fm = json_load(fm_path if fm_path.exists() else Path(mpl.get_data_path(), 'fontlist.json'))"


def main() -> None:
    source_path = pathlib.Path(matplotlib.__file__).with_name("font_manager.py")
    source = source_path.read_text(encoding="utf-8")
    if source.count(BEFORE) != 1:
        sys.exit(f"{source_path}: the line to patch is not there once; adapt bake_fonts.py to this version")
    with tempfile.TemporaryDirectory() as folder:
        matplotlib.get_cachedir = lambda: folder  # type: ignore[assignment]
        from matplotlib import font_manager  # noqa: PLC0415

        target = pathlib.Path(matplotlib.get_data_path(), "fontlist.json")
        fonts = font_manager.fontManager
        for entries in (fonts.ttflist, fonts.afmlist):  # found in an order of chance
            entries.sort(key=lambda entry: (entry.fname, entry.name))
        font_manager.json_dump(fonts, str(target))
    if not json.loads(target.read_text(encoding="utf-8"))["ttflist"]:
        sys.exit("matplotlib found no fonts")
    source_path.write_text(source.replace(BEFORE, AFTER), encoding="utf-8")


if __name__ == "__main__":
    main()
