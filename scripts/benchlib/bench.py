"""What every row works with: the server, how much to do, and daemons with settings of a row's own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scripts.benchlib.client import Api, made_at_ms
from scripts.benchlib.daemon import Daemon
from scripts.benchlib.figures import BenchError


@dataclass(frozen=True)
class Made:
    """A new sandbox: milliseconds until it was answered, and until its first result was here."""

    id: str
    hit: bool
    answered_ms: float
    result_ms: float


@dataclass
class Bench:
    """`daemon` is None when the server is not ours to restart or look into; ours has no pool, so that what
    a row creates is cold. Rows of the pool open a daemon of their own."""

    api: Api
    daemon: Daemon | None
    quick: bool

    def times(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def needs_daemon(self, row: str) -> Daemon:
        if self.daemon is None:
            raise BenchError(f"the row '{row}' needs a daemon of its own: leave --base-url away")
        return self.daemon

    @contextmanager
    def own(self, row: str, **settings: str) -> Iterator[tuple[Api, Daemon]]:
        """Another daemon for the time of one row; `settings` are SANDBOXD_ variables, in lower case."""
        self.needs_daemon(row)
        daemon = Daemon(**settings)
        try:
            yield daemon.open(), daemon
        finally:
            daemon.close()


def timed_create(api: Api) -> Made:
    """A hit is a sandbox that was made before it was asked for: its id tells."""
    asked_ms = time.time_ns() // 1_000_000
    start = time.perf_counter()
    sandbox_id = api.create()
    answered = time.perf_counter()
    try:
        api.check(sandbox_id)
    except BaseException:
        api.stop(sandbox_id)
        raise
    ended = time.perf_counter()
    return Made(
        id=sandbox_id,
        hit=made_at_ms(sandbox_id) < asked_ms,
        answered_ms=(answered - start) * 1000,
        result_ms=(ended - start) * 1000,
    )


def timed_cold(api: Api) -> Made:
    """The same for a row of cold creates: a sandbox out of a pool ends the run. It is stopped at once."""
    made = timed_create(api)
    api.stop(made.id)
    if made.hit:
        raise BenchError("a cold create was answered from the pool: the server needs SANDBOXD_POOL_MAX=0")
    return made
