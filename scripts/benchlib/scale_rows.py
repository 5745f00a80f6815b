"""Rows of many sandboxes: held at once, and one after another."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from scripts.benchlib import leftovers
from scripts.benchlib.bench import Bench, timed_create
from scripts.benchlib.client import Api
from scripts.benchlib.create_rows import AT_ONCE, stop_all
from scripts.benchlib.daemon import Daemon
from scripts.benchlib.figures import Row, Series, at_least, at_most
from scripts.benchlib.kernel import Group, available_mb, open_files, resident_kb

HELD = 300
CYCLES = 1000
SOAK_POOL = 2
# A tenth of a soak fills caches; memory counts from there on.
_WARM_UP = 10
# Ends are answered a moment before the engine has removed the last of a group.
_GONE_S = 10.0
_COUNTED_S = 5.0


def hold(bench: Bench) -> Row:
    """Without loading libraries: an interpreter that has them is parked two minutes later anyway, and while
    it is not, sandboxes cost what the row `memory` says."""
    count = bench.times(HELD, 8)
    settings = {"max_sandboxes": str(count + 8), "pool_max": "0", "warm_libraries": "false"}
    with bench.own("hold", **settings) as (api, daemon):
        free = available_mb()
        daemon_before = resident_kb(daemon.pid), open_files(daemon.pid)
        start = time.perf_counter()
        ids: list[str] = []
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                futures = [pool.submit(lambda: timed_create(api.another()).id) for _ in range(count)]
            there = time.perf_counter() - start
            ids = [future.result() for future in futures if future.exception() is None]
            for future in futures:
                future.result()
            groups = [Group.of(sandbox_id) for sandbox_id in ids]
            execs = [api.timed_check(sandbox_id) for sandbox_id in ids for _ in range(2)]
            again = execs[1::2]
            taken = free - available_mb()
            memory = Series("", [group.memory_mb() for group in groups])
            shims = sum(group.shim_mb() for group in groups)
            daemon_after = resident_kb(daemon.pid), open_files(daemon.pid)
            admission = _admission(api)
        finally:
            start = time.perf_counter()
            stop_all(api, ids)
            stopped = time.perf_counter() - start
    row = Row(
        "hold",
        f"{count} idle sandboxes at once: print(6*7) in each of them, one after another",
        "ms",
        Series("the first look into each", execs[::2]),
        [Series("at once again", again)],
        notes=[
            f"all were there, and had answered, after {there:.1f} s ({count / there:.1f} a second);"
            f" stopped within {stopped:.1f} s",
            f"each holds p50 {memory.p50:.1f} MB, p99 {memory.percentile(99):.1f}; together"
            f" {sum(memory.values):.0f} MB, and the engine's processes {shims:.0f} MB",
            f"the host has {taken:.0f} MB less, {taken / count:.1f} MB for each",
            f"the daemon holds {daemon_after[0] / 1024:.0f} MB and {daemon_after[1]} files;"
            f" {daemon_before[0] / 1024:.0f} MB and {daemon_before[1]} files before",
            f"admission made creates wait {admission[0]:g} times and refused {admission[1]:g}",
        ],
    )
    row.goals = [
        at_most("memory p50", memory.p50, 30, " MB"),
        at_least("sandboxes that answered", len(ids), count),
    ]
    return row


def soak(bench: Bench) -> Row:
    """Both ways to a sandbox: a small pool that is empty half of the time."""
    cycles = bench.times(CYCLES, 50)
    settings = {"pool_size": str(SOAK_POOL), "pool_max": str(SOAK_POOL), "warm_libraries": "false"}
    groups_before = leftovers.control_groups()
    files: list[int] = []
    with bench.own("soak", **settings) as (api, daemon):
        clients = [api.another() for _ in range(AT_ONCE)]
        times: list[float] = []
        hits = 0
        memory: list[tuple[int, int]] = []

        def cycle(client: Api) -> tuple[float, bool]:
            start = time.perf_counter()
            made = timed_create(client)
            client.stop(made.id)
            return (time.perf_counter() - start) * 1000, made.hit

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for stage in (cycles // _WARM_UP, cycles):
                while len(times) < stage:
                    part = min(AT_ONCE, stage - len(times))
                    done = list(pool.map(cycle, clients[:part]))
                    times += [took for took, _ in done]
                    hits += sum(hit for _, hit in done)
                    if stage == cycles:
                        memory.append((len(times), resident_kb(daemon.pid)))
                # Nobody is connected when files are counted.
                for client in clients:
                    client.hang_up()
                left = _left_after(api, daemon, groups_before)
                files.append(_fewest_files(daemon.pid))
    growth = _per_100(memory)
    # Caches fill at first (SQLite's of each connection, malloc's free pieces); a leak goes on.
    late = _per_100([(at, kb) for at, kb in memory if at >= cycles // 2])
    row = Row(
        "soak",
        f"{cycles} times: create, print(6*7), stop, {AT_ONCE} clients",
        "ms",
        Series("one cycle", times),
        notes=[
            f"{hits / cycles:.0%} out of a pool of {SOAK_POOL}",
            f"the daemon's memory: {memory[0][1] / 1024:.1f} MB after {memory[0][0]} cycles,"
            f" {memory[-1][1] / 1024:.1f} at the end; by the line {growth:.0f} KB for 100 cycles,"
            f" {late:.0f} in the second half",
            f"its open files: {files[0]} after {cycles // _WARM_UP} cycles, {files[1]} at the end",
            "left behind: " + (", ".join(sorted(left)[:10]) or "nothing"),
        ],
    )
    row.goals = [
        at_most("containers, mounts, loop devices, folders, groups and zombies left", len(left), 0),
        at_most("more files open than after the first tenth", files[1] - files[0], 0),
    ]
    if not bench.quick:
        row.goals.append(at_most("growth of the daemon for 100 cycles", growth, 100, " KB"))
    return row


def _per_100(memory: list[tuple[int, int]]) -> float:
    return statistics.linear_regression([at for at, _ in memory], [kb for _, kb in memory]).slope * 100


def _left_after(api: Api, daemon: Daemon, groups_before: set[str]) -> list[str]:
    """What is left of those that ended. Only members of the pool live, as many as the daemon knows of."""
    deadline = time.monotonic() + _GONE_S
    while True:
        alive = leftovers.members(daemon.root)
        left = leftovers.left(daemon.root, alive, groups_before, daemon.pid)
        ready = int(api.metrics()["sandboxd_pool_ready"])
        if len(alive) > ready:
            left.append(f"{len(alive)} containers for {ready} members of the pool")
        if (not left and ready == SOAK_POOL) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def _fewest_files(pid: int) -> int:
    """Over a while: now and then the daemon asks members of its pool, or the engine, on a new socket."""
    deadline = time.monotonic() + _COUNTED_S
    fewest = open_files(pid)
    while time.monotonic() < deadline:
        time.sleep(0.1)
        fewest = min(fewest, open_files(pid))
    return fewest


def _admission(api: Api) -> tuple[float, float]:
    """How often creates were made to wait, and how often refused."""
    found = api.metrics()
    waits, refusals = (
        sum(value for name, value in found.items() if name.startswith(f"sandboxd_admission_{kind}_total"))
        for kind in ("waits", "refusals")
    )
    return waits, refusals
