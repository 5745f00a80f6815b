"""The table: which rows there are, in the order they are measured."""

from collections.abc import Callable

from scripts.benchlib import context_rows, create_rows, rows, scale_rows, stream_rows
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
    "context": context_rows.context,
    "context-call": context_rows.context_call,
    "load-plain": rows.load_plain,
    "load-pandas": rows.load_pandas,
    "load-one": rows.load_one,
    "upload": stream_rows.upload,
    "download": stream_rows.download,
    "followers": stream_rows.followers,
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
