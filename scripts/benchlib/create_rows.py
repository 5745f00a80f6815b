"""Rows of new sandboxes: cold, out of the pool, and many of them."""

import itertools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from scripts.benchlib import reference
from scripts.benchlib.bench import Bench, Made, timed_cold, timed_create
from scripts.benchlib.client import Api
from scripts.benchlib.figures import BenchError, Row, Series, alternate, at_least, at_most

T = TypeVar("T")

# As many as the daemon itself starts at once.
AT_ONCE = 4
SUSTAINED_CLIENTS = 4
POOL_FULL_S = 120.0
# What the pool started last has loaded its libraries by then: a second of CPU that is not the next create's.
SETTLE_S = 1.5
# A refill begins when nobody has claimed for 150 ms: now one is on its way.
QUIET_S = 0.22


def first_result(bench: Bench) -> Row:
    rounds, every = bench.times(40, 3), bench.times(8, 2)
    size = 4
    missed: list[float] = []
    with bench.own("first-result", pool_size=str(size), pool_max=str(size)) as (api, _):
        hits_before, misses_before = _claims(api)

        def hit() -> float:
            _wait_until_full(api, size)
            made = timed_create(api)
            api.stop(made.id)
            if made.hit:
                return made.result_ms
            raise BenchError("a full pool gave no sandbox")

        ours, runs = alternate(rounds, hit, reference.run_once)
        claimed, others = rounds, 0
        for _ in range(rounds // every):
            made = _drain(api, size)
            missed += [item.result_ms for item in made if not item.hit]
            claimed += sum(item.hit for item in made)
            others += sum(not item.hit for item in made)
        _agree(api, hits_before + claimed, misses_before + others)
    row = Row(
        "first-result",
        "a new sandbox until the first result of print(6*7), through REST",
        "ms",
        Series("out of the pool", ours),
        [Series("the pool is empty", missed), Series("docker run --rm", runs)],
        notes=[f"the daemon counts as we do: {claimed} hits, {others} misses"],
    )
    row.goals = [
        at_most("p50", row.ours.p50, 15, " ms"),
        at_most("p99", row.ours.percentile(99), 60, " ms"),
        at_least("times faster than docker run --rm", 1 / row.ratio(row.references[1]), 10),
    ]
    return row


def create(bench: Bench) -> Row:
    answered = []

    def ours() -> float:
        made = timed_cold(bench.api)
        answered.append(made.answered_ms)
        return made.result_ms

    results, raw = alternate(bench.times(30, 5), ours, _raw)
    row = Row(
        "create",
        "a new sandbox without a pool, until Python inside has answered",
        "ms",
        Series("sandboxd, first result", results),
        [Series("docker run -d of the same container", raw)],
        notes=[f"the agent had answered, and the create with it, at p50 {Series('', answered).p50:.1f} ms"],
    )
    row.goals = [at_most("p50 against docker run -d", row.ratio(row.references[0]), 1.25)]
    return row


def burst(bench: Bench) -> Row:
    count, size = bench.times(50, 8), bench.times(16, 4)
    bench.needs_daemon("burst")
    cold = _burst(bench.api, count)[0]
    with bench.own("burst", pool_size=str(size), pool_max=str(size)) as (api, _):
        _wait_until_full(api, size)
        pooled, made = _burst(api, count)
    with ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as pool:
        containers = [stack.enter_context(reference.RawContainer()) for _ in range(count)]
        start = time.perf_counter()
        list(pool.map(lambda container: container.start(), containers))
        raw = time.perf_counter() - start
    row = Row(
        "burst",
        f"{count} sandboxes asked for at once, until the last one has run print(6*7)",
        "s",
        Series("without a pool", [cold]),
        [
            Series(f"with {size} in the pool", [pooled]),
            Series(f"docker run -d, {AT_ONCE} at a time", [raw]),
        ],
        notes=[
            f"{count / cold:.1f} a second without a pool; {count / pooled:.1f} with one, of which"
            f" {sum(item.hit for item in made)} were hits; docker run -d {count / raw:.1f}"
        ],
    )
    if not bench.quick:
        row.goals = [at_most("without a pool, the last one usable after", cold, 15, " s")]
    return row


def claims(bench: Bench) -> Row:
    """Libraries are not loaded here: it is the refill alone whose share is asked for."""
    size, at_a_time = 8, 4
    quiet: list[Made] = []
    refilling: list[Made] = []
    with bench.own("claims", pool_size=str(size), pool_max=str(size), warm_libraries="false") as (api, _):
        for _ in range(bench.times(15, 2)):
            _wait_until_full(api, size, settle_s=0.3)
            used = [timed_create(api) for _ in range(at_a_time)]
            quiet += used
            for _ in range(at_a_time - 1):
                time.sleep(QUIET_S)
                # Known from the daemon: with all members there, no refill is on its way.
                if api.metrics()["sandboxd_pool_ready"] < size:
                    used.append(timed_create(api))
                    refilling.append(used[-1])
            for made in used:
                api.stop(made.id)
    if not all(made.hit for made in (*quiet, *refilling)):
        raise BenchError("a claim found the pool empty")
    return Row(
        "claims",
        "a sandbox out of the pool until its first result, while the pool refills",
        "ms",
        Series("while it refills", [made.result_ms for made in refilling]),
        [Series("while it waits", [made.result_ms for made in quiet])],
        notes=[
            f"{name}: the claim alone at p50 {alone.p50:.1f}, p99 {alone.percentile(99):.1f} ms"
            for name, alone in (
                ("while it refills", Series("", [made.answered_ms for made in refilling])),
                ("while it waits", Series("", [made.answered_ms for made in quiet])),
            )
        ],
    )


def sustained(bench: Bench) -> Row:
    seconds, raw_seconds = bench.times(25, 4), bench.times(10, 3)
    with bench.own("sustained") as (api, _):
        _wait_until_full(api, 4)
        before = _claims(api)
        clients = [api.another() for _ in range(SUSTAINED_CLIENTS)]

        def cycle(number: int) -> Made:
            made = timed_create(clients[number])
            clients[number].stop(made.id)
            return made

        made, took = _for_seconds(seconds, cycle)
        hits, misses = (now - then for now, then in zip(_claims(api), before, strict=True))
    raws, raw_took = _for_seconds(raw_seconds, lambda _number: _raw())
    groups = {
        "hits": [item.result_ms for item in made if item.hit],
        "misses": [item.result_ms for item in made if not item.hit],
    }
    if (len(groups["hits"]), len(groups["misses"])) != (hits, misses):
        raise BenchError(f"the daemon counts {hits:g} hits and {misses:g} misses, we count others")
    return Row(
        "sustained",
        f"{SUSTAINED_CLIENTS} clients create, run print(6*7) and stop, {took:.0f} s: until the first result",
        "ms",
        Series("all", [item.result_ms for item in made]),
        [Series(name, values) for name, values in groups.items() if values]
        + [Series("docker run -d, until its Python has answered", raws)],
        notes=[
            f"{len(made) / took:.1f} sandboxes a second, no error, {hits / len(made):.0%} out of the pool",
            f"docker run -d and rm, {SUSTAINED_CLIENTS} at a time: {len(raws) / raw_took:.1f} a second",
        ],
    )


def _for_seconds(seconds: float, work: Callable[[int], T]) -> tuple[list[T], float]:
    """What SUSTAINED_CLIENTS threads get done, and how long it took. The first error ends the run."""
    start = time.perf_counter()

    def client(number: int) -> list[T]:
        done = []
        while time.perf_counter() < start + seconds:
            done.append(work(number))
        return done

    with ThreadPoolExecutor(SUSTAINED_CLIENTS) as pool:
        results = list(pool.map(client, range(SUSTAINED_CLIENTS)))
    return list(itertools.chain(*results)), time.perf_counter() - start


def _burst(api: Api, count: int) -> tuple[float, list[Made]]:
    """Seconds until the last one was usable. All are stopped."""
    with ThreadPoolExecutor(count) as pool:
        start = time.perf_counter()
        futures = [pool.submit(timed_create, api.another()) for _ in range(count)]
    took = time.perf_counter() - start
    stop_all(api, [future.result().id for future in futures if future.exception() is None])
    return took, [future.result() for future in futures]


def stop_all(api: Api, ids: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda sandbox_id: api.another().stop(sandbox_id), ids))


def _drain(api: Api, size: int) -> list[Made]:
    """Claims all there are without a break, so that no refill comes between, and one more."""
    _wait_until_full(api, size)
    made: list[Made] = []
    try:
        while len(made) < 2 * size and (not made or made[-1].hit):
            made.append(timed_create(api))
    finally:
        stop_all(api, [item.id for item in made])
    return made


def _wait_until_full(api: Api, size: int, settle_s: float = SETTLE_S) -> None:
    # The daemon's figure follows a claim a moment later.
    time.sleep(QUIET_S)
    deadline = time.monotonic() + POOL_FULL_S
    while api.metrics()["sandboxd_pool_ready"] < size:
        if time.monotonic() > deadline:
            raise BenchError(f"the pool has not reached {size} within {POOL_FULL_S:g} s")
        time.sleep(0.1)
    time.sleep(settle_s)


def _claims(api: Api) -> tuple[float, float]:
    """How many creates the daemon has counted: hits and misses."""
    found = api.metrics()
    hit, miss = (found.get(f'sandboxd_pool_claims_total{{result="{name}"}}', 0.0) for name in ("hit", "miss"))
    return hit, miss


def _agree(api: Api, hits: float, misses: float) -> None:
    if _claims(api) != (hits, misses):
        raise BenchError(f"the daemon counts {_claims(api)} hits and misses, we count {(hits, misses)}")


def _raw() -> float:
    with reference.RawContainer() as container:
        return container.start()
