"""Which installation this is: made once, kept in the state folder with the store that knows its sandboxes."""

import secrets
from pathlib import Path


def installation_id(state_dir: Path) -> str:
    """The name of this installation, 16 hex digits: the mark of its containers and, on a store that several
    daemons share, of its rows."""
    path = state_dir / "installation"
    if not path.exists():
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(secrets.token_hex(8))
        partial.replace(path)
    return path.read_text().strip()
