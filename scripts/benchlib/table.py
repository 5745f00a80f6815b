"""The table: which rows there are, in the order they are measured."""

from collections.abc import Callable

from scripts.benchlib import create_rows, rows, scale_rows
from scripts.benchlib.bench import Bench
from scripts.benchlib.figures import Row

ROWS: dict[str, Callable[[Bench], Row]] = {
    "first-result": create_rows.first_result,
    "plain": rows.plain,
    "pandas": rows.pandas,
    "create": create_rows.create,
    "burst": create_rows.burst,
    "claims": create_rows.claims,
    "sustained": create_rows.sustained,
    "load-plain": rows.load_plain,
    "load-pandas": rows.load_pandas,
    "load-one": rows.load_one,
    "memory": rows.memory,
    "hold": scale_rows.hold,
    "timeout": rows.timeout,
    "restart": rows.restart,
    "sdk": rows.sdk,
    "cli": rows.cli,
    "soak": scale_rows.soak,
}
# They take minutes each: measured only when they are asked for.
NAMED = ("soak",)
