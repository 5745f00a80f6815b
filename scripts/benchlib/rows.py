"""Rows of sandboxes that live: each function measures one, cleans up after itself and returns it."""

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from e80_sdk import Eighty80

from scripts.benchlib import reference
from scripts.benchlib.bench import Bench
from scripts.benchlib.client import PANDAS, PANDAS_OUTPUT, PLAIN, PLAIN_OUTPUT
from scripts.benchlib.figures import BenchError, Row, Series, alternate, at_least, at_most
from scripts.benchlib.kernel import Group, process_cpu_ms

CLIENTS = 16
HOST_MEMORY_MB = 24 * 1024
# Longer than an agent keeps a warm interpreter that nobody uses.
PARKED_S = 180
_TIMEOUT_S = 0.2

# Times another interpreter from inside the container, so that no docker exec is in the figure.
_TIME_INSIDE = """
import subprocess, sys, time
start = time.perf_counter()
done = subprocess.run([sys.executable, "-c", {code!r}], capture_output=True, text=True)
elapsed = time.perf_counter() - start
assert done.stdout == {expected!r}, done
print(elapsed * 1000)
"""
_BUSY = "while True: pass"
# What a timeout finds at its worst: children in sessions of their own that ignore signals and use up the CPU.
_BUSY_MANY = """
import os, signal
for number in range(4):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        break
while True: pass
"""


def plain(bench: Bench) -> Row:
    inside = _TIME_INSIDE.format(code=PLAIN, expected=PLAIN_OUTPUT)
    with bench.api.sandboxes(1) as (sandbox_id,):
        group = Group.of(sandbox_id)
        throttled = group.throttled()
        ours, bare, execs = alternate(
            bench.times(200, 30),
            lambda: bench.api.timed_check(sandbox_id),
            lambda: float(bench.api.output(sandbox_id, inside)),
            lambda: reference.exec_in(sandbox_id),
        )
        throttled = group.throttled() - throttled
    row = Row(
        "plain",
        "print(6*7) in a live sandbox, through REST",
        "ms",
        Series("sandboxd", ours),
        [Series("python3 -c in the same container", bare), Series("docker exec", execs)],
        notes=[f"{throttled} periods in which the sandbox had used up its CPU quota"],
    )
    row.goals = [
        at_most("p50 against bare python3", row.ratio(row.references[0]), 0.5),
        at_least("times faster than docker exec", 1 / row.ratio(row.references[1]), 10),
    ]
    return row


def pandas(bench: Bench) -> Row:
    inside = _TIME_INSIDE.format(code=PANDAS, expected=PANDAS_OUTPUT)
    with bench.api.sandboxes(1) as (sandbox_id,):
        ours, fresh = alternate(
            bench.times(60, 8),
            lambda: bench.api.timed_check(sandbox_id, PANDAS, PANDAS_OUTPUT),
            lambda: float(bench.api.output(sandbox_id, inside)),
        )
    row = Row(
        "pandas",
        "import numpy and pandas, group 1000 lines, in a live sandbox, through REST",
        "ms",
        Series("sandboxd", ours),
        [Series("a fresh interpreter in the same container", fresh)],
    )
    row.goals = [
        at_most("p50", row.ours.p50, 20, " ms"),
        at_least("times faster than fresh", 1 / row.ratio(row.references[0]), 20),
    ]
    return row


def sdk(bench: Bench) -> Row:
    with bench.api.sandboxes(1) as (sandbox_id,), Eighty80(bench.api.key, bench.api.base_url) as client:
        sandbox = client.sandboxes.get(sandbox_id)

        def run() -> float:
            start = time.perf_counter()
            said = sandbox.run_python(PLAIN).stdout
            elapsed = time.perf_counter() - start
            if said != PLAIN_OUTPUT:
                raise BenchError(f"the SDK answered {said!r}")
            return elapsed * 1000

        ours, rest = alternate(bench.times(200, 30), run, lambda: bench.api.timed_check(sandbox_id))
    return Row(
        "sdk",
        "print(6*7) in a live sandbox, through the Python SDK",
        "ms",
        Series("Sandbox.run_python", ours),
        [Series("the same request through http.client", rest)],
    )


def cli(bench: Bench) -> Row:
    def run(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return (time.perf_counter() - start) * 1000

    program = str(Path(sys.executable).with_name("8080"))
    ours, python = alternate(
        bench.times(20, 5), lambda: run(program, "--help"), lambda: run(sys.executable, "-c", "pass")
    )
    return Row("cli", "8080 --help", "ms", Series("8080 --help", ours), [Series("python -c pass", python)])


def load_plain(bench: Bench) -> Row:
    return _load(bench, "load-plain", PLAIN, PLAIN_OUTPUT, 400, CLIENTS)


def load_pandas(bench: Bench) -> Row:
    return _load(bench, "load-pandas", PANDAS, PANDAS_OUTPUT, 150, CLIENTS)


def load_one(bench: Bench) -> Row:
    row = _load(bench, "load-one", PLAIN, PLAIN_OUTPUT, 0, 1)
    row.goals = []
    return row


def memory(bench: Bench) -> Row:
    with ExitStack() as stack:
        ids, groups, bare = [], [], []
        for _ in range(bench.times(10, 3)):
            ids += stack.enter_context(bench.api.sandboxes(1, warm=False))
            bench.api.check(ids[-1])
            groups.append(Group.of(ids[-1]))
            bare.append(groups[-1].memory_mb())
        for sandbox_id in ids:
            bench.api.wait_until_warm(sandbox_id)
        warm = [group.memory_mb() for group in groups]
        ours, references = Series("new", bare), [Series("with the warm interpreter", warm)]
        if not bench.quick:
            references.append(ours)
            ours = Series("idle, the warm interpreter parked", _parked(groups, references[0].p50 / 2))
        shim = Series("", [group.shim_mb() for group in groups]).p50
    row = Row(
        "memory",
        "memory of an idle sandbox: anonymous, shared and the kernel's, without page cache",
        "MB",
        ours,
        references,
        notes=[f"on top of it the engine's own process for each container: {shim:.1f} MB"],
    )
    row.goals = [
        at_most("p50", ours.p50, 30, " MB"),
        at_least(
            "sandboxes on 24 GiB, the engine's process counted in", HOST_MEMORY_MB / (ours.p50 + shim), 300
        ),
    ]
    return row


def _parked(groups: list[Group], below_mb: float) -> list[float]:
    """Their memory once the agents have ended the warm interpreters that nobody uses."""
    deadline = time.monotonic() + PARKED_S
    while max(found := [group.memory_mb() for group in groups]) > below_mb:
        if time.monotonic() > deadline:
            raise BenchError(f"warm interpreters still live after {PARKED_S} s without use")
        time.sleep(1)
    return found


def timeout(bench: Bench) -> Row:
    def kill(sandbox_id: str, code: str) -> float:
        start = time.perf_counter()
        result = bench.api.execute(sandbox_id, {"code": code, "timeout_s": _TIMEOUT_S})
        elapsed = time.perf_counter() - start
        if result["status"] != "timed_out":
            raise BenchError(f"an endless loop ended as {result['status']}")
        return (elapsed - _TIMEOUT_S) * 1000

    with bench.api.sandboxes(1) as (sandbox_id,):
        one, many = alternate(
            bench.times(100, 10), lambda: kill(sandbox_id, _BUSY), lambda: kill(sandbox_id, _BUSY_MANY)
        )
    row = Row(
        "timeout",
        "from the deadline of an exec to the answer that all of it is dead",
        "ms",
        Series("five busy processes, sessions of their own", many),
        [Series("one busy process", one)],
    )
    row.goals = [at_most("p99", row.ours.percentile(99), 200, " ms")]
    return row


def restart(bench: Bench) -> Row:
    daemon = bench.needs_daemon("restart")
    count = bench.times(20, 5)

    def again(number: int, ids: list[str]) -> float:
        start = time.perf_counter()
        daemon.stop(number)
        daemon.start()
        bench.api.hang_up()
        for sandbox_id in ids:
            bench.api.check(sandbox_id)
        return time.perf_counter() - start

    with bench.api.sandboxes(count, warm=False) as ids:
        term, kill = alternate(
            bench.times(5, 1), lambda: again(signal.SIGTERM, ids), lambda: again(signal.SIGKILL, ids)
        )
    row = Row(
        "restart",
        f"the daemon is stopped and started again, until all of {count} sandboxes have run print(6*7)",
        "s",
        Series("SIGTERM", term),
        [Series("SIGKILL", kill)],
    )
    row.goals = [at_most(f"{series.name} p50", series.p50, 3, " s") for series in (row.ours, *row.references)]
    return row


def _load(bench: Bench, name: str, code: str, expected: str, goal: float, sandboxes: int) -> Row:
    with bench.api.sandboxes(sandboxes) as ids:
        for sandbox_id in ids:
            bench.api.check(sandbox_id, code, expected)
        address = urlsplit(bench.api.base_url)
        plan = {
            "host": address.hostname,
            "port": address.port,
            "key": bench.api.key,
            "sandboxes": [ids[number % sandboxes] for number in range(CLIENTS)],
            "code": code,
            "expected": expected,
            "seconds": bench.times(10, 3),
        }
        groups = [Group.of(sandbox_id) for sandbox_id in ids]
        inside = -sum(group.cpu_ms() for group in groups)
        throttled = -sum(group.throttled() for group in groups)
        ours = -(process_cpu_ms(bench.daemon.pid) if bench.daemon else 0)
        done = subprocess.run(
            [sys.executable, "-m", "scripts.benchlib.load"],
            input=json.dumps(plan),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"the load broke off: {done.stderr[-1000:]}")
        inside += sum(group.cpu_ms() for group in groups)
        throttled += sum(group.throttled() for group in groups)
        ours += process_cpu_ms(bench.daemon.pid) if bench.daemon else 0
    result = json.loads(done.stdout)
    count, seconds = len(result["latencies_ms"]), result["seconds"]
    return Row(
        name,
        f"{CLIENTS} clients as fast as they can, {sandboxes} sandbox{'es' if sandboxes > 1 else ''}",
        "ms",
        Series("latency", result["latencies_ms"]),
        goals=[at_least("execs a second", count / seconds, goal)],
        notes=[
            f"{count / seconds:.0f} execs a second, no error",
            f"CPU of one exec in ms: sandboxes {inside / count:.2f}, daemon {ours / count:.2f},"
            f" this client {result['cpu_ms'] / count:.2f}",
            f"{throttled} periods in which a sandbox had used up its CPU quota",
        ],
    )
