"""The main job, before the user's eyes: a sandbox, a file, a program over it; and how long each step took."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from e80_sdk import Eighty80
from rich.console import Console
from rich.table import Table

CSV = """city,month,visitors
Lisbon,May,5200
Lisbon,June,7100
Oslo,May,1900
Oslo,June,3300
Kyoto,May,8800
Kyoto,June,6400
"""
PROGRAM = """
import pandas as pd

visitors = pd.read_csv("visitors.csv")
table = visitors.pivot_table(index="city", columns="month", values="visitors", aggfunc="sum")
table["growth %"] = (table["June"] / table["May"] * 100 - 100).round(1)
print(table.sort_values("growth %", ascending=False).to_markdown())
"""

Value = TypeVar("Value")
steps: list[tuple[str, float]] = []


def main() -> None:
    console = Console()
    with Eighty80(base_url=sys.argv[1]) as client:
        sandbox = timed("create a sandbox", lambda: client.sandboxes.create(timeout_s=300))
        try:
            timed("write visitors.csv into it", lambda: sandbox.files.write("visitors.csv", CSV))
            timed("print(6 * 7) in it", lambda: sandbox.run_python("print(6 * 7)", timeout_s=30))
            result = timed("run a pandas program in it", lambda: sandbox.run_python(PROGRAM, timeout_s=60))
        finally:
            timed("stop it", sandbox.stop)
    if result.status != "completed":
        sys.exit(f"the program in sandbox {sandbox.id} {result.status}:\n{result}")
    console.print(f"\n[bold]What the program in sandbox {sandbox.id} printed:[/bold]")
    console.print(str(result), highlight=False, markup=False)
    table = Table("step", title="How long each step took")
    table.add_column("ms", justify="right")
    for name, ms in steps:
        table.add_row(name, f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}")
    console.print(table)


def timed(name: str, step: Callable[[], Value]) -> Value:
    begin = time.perf_counter()
    value = step()
    steps.append((name, (time.perf_counter() - begin) * 1000))
    return value


if __name__ == "__main__":
    main()
