"""Rows of contexts: a new one, and one that has been there for a while, against a Jupyter kernel."""

import time

from scripts.benchlib.bench import Bench
from scripts.benchlib.client import PLAIN, PLAIN_OUTPUT, Api
from scripts.benchlib.figures import BenchError, Row, Series, alternate, at_most
from scripts.benchlib.notebook import Kernel, first_result

# Its variables are still there: that is what a context is for.
_PREPARE = "answer = 6*7"
_CALL = "print(answer)"
# A kernel takes half a second to start.
_ROUNDS_FOR_A_KERNEL = 4


def context(bench: Bench) -> Row:
    kernels: list[float] = []
    contexts: list[float] = []
    with bench.api.sandboxes(1) as (sandbox_id,):
        for number in range(bench.times(40, 4)):
            start = time.perf_counter()
            made = _create(bench.api, sandbox_id)
            _run(bench.api, sandbox_id, made, PLAIN, PLAIN_OUTPUT)
            contexts.append((time.perf_counter() - start) * 1000)
            _delete(bench.api, sandbox_id, made)
            if number % _ROUNDS_FOR_A_KERNEL == 0:
                kernels.append(first_result(PLAIN, PLAIN_OUTPUT))
    row = Row(
        "context",
        "a new Python context in a live sandbox until the first result of print(6*7), through REST",
        "ms",
        Series("create the context, run in it", contexts),
        [Series("start a Jupyter kernel, run in it", kernels)],
    )
    row.goals = [at_most("p50", row.ours.p50, 30, " ms")]
    return row


def context_call(bench: Bench) -> Row:
    with bench.api.sandboxes(1) as (sandbox_id,), Kernel() as kernel:
        made = _create(bench.api, sandbox_id)
        _run(bench.api, sandbox_id, made, _PREPARE, "")
        kernel.run(_PREPARE, "")

        def ours() -> float:
            start = time.perf_counter()
            _run(bench.api, sandbox_id, made, _CALL, PLAIN_OUTPUT)
            return (time.perf_counter() - start) * 1000

        calls, executes = alternate(bench.times(200, 20), ours, lambda: kernel.run(_CALL, PLAIN_OUTPUT))
        _delete(bench.api, sandbox_id, made)
    row = Row(
        "context-call",
        "print a variable that an earlier call has set, through REST",
        "ms",
        Series("a Python context", calls),
        [Series("a Jupyter kernel, until it is idle", executes)],
    )
    row.goals = [at_most("p50", row.ours.p50, 5, " ms")]
    return row


def _create(api: Api, sandbox_id: str) -> str:
    return str(api.call("POST", f"/v1/sandboxes/{sandbox_id}/contexts", {"language": "python"})["id"])


def _delete(api: Api, sandbox_id: str, context_id: str) -> None:
    api.call("DELETE", f"/v1/sandboxes/{sandbox_id}/contexts/{context_id}")


def _run(api: Api, sandbox_id: str, context_id: str, code: str, expected: str) -> None:
    result = api.execute(sandbox_id, {"code": code, "context": context_id})
    if (result["status"], result["stdout"]) != ("completed", expected):
        raise BenchError(f"a context answered {result['status']} {result['stdout']!r}: {result['stderr']}")
