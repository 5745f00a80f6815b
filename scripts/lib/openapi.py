"""Writes the OpenAPI document of the server to the file that is its argument, docs/openapi.json as a rule."""

import json
import sys
from pathlib import Path

from sandboxd.app import create_app
from sandboxd.kit.settings import Settings

NOWHERE = Path("/nonexistent")


def document() -> str:
    """The same text for the same sources: nothing of this machine is in it, and nothing is opened."""
    app = create_app(Settings(state_dir=NOWHERE, run_dir=NOWHERE))
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
