"""The command line of the benchmark."""

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from scripts.benchlib import reference
from scripts.benchlib.bench import Bench
from scripts.benchlib.client import Api
from scripts.benchlib.daemon import Daemon, docker
from scripts.benchlib.figures import BenchError, Row
from scripts.benchlib.table import NAMED, ROWS


def main() -> int:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    daemon = None if options.base_url else Daemon(pool_max="0")
    rows: list[Row] = []
    try:
        if daemon is not None:
            api = daemon.open()
        else:
            api = Api(options.base_url, os.environ.get("_8080_API_KEY", ""))
        facts = _facts()
        print(json.dumps(facts), flush=True)
        bench = Bench(api, daemon, options.quick)
        for name in options.rows or (name for name in ROWS if name not in NAMED):
            rows.append(ROWS[name](bench))
            print(rows[-1].as_text(), end="\n\n", flush=True)
            if options.json:
                options.json.write_text(_document(facts, rows))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted, cleaning up ...", file=sys.stderr)
        return 130
    finally:
        # A second Ctrl-C must not leave half of it behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        reference.clean_up()
        if daemon is not None:
            daemon.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures sandboxd side by side with plain Docker and plain Python. Starts a daemon of"
        " its own on a scratch folder and removes all of it again. docs/benchmarks.md explains the figures.",
    )
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="row",
        choices=[*ROWS, []],
        help=f"{', '.join(ROWS)}; all but {', '.join(NAMED)} by default",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, row by row")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: to see that it works")
    parser.add_argument(
        "--base-url", help="measure a server that runs on this host, with the key in _8080_API_KEY"
    )
    return parser


def _facts() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "engine": docker("version", "--format", "{{.Server.Version}}").strip(),
    }


def _document(facts: dict[str, Any], rows: list[Row]) -> str:
    return json.dumps({**facts, "rows": [row.as_json() for row in rows]}, indent=2) + "\n"


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
