"""Rows of much data: one big file in and out of a sandbox, and one exec that many follow."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import IO, Any
from urllib.parse import urlsplit

from scripts.benchlib.bench import Bench
from scripts.benchlib.client import TIMEOUT_S, Api
from scripts.benchlib.daemon import Daemon, docker
from scripts.benchlib.figures import BenchError, Row, Series, alternate, at_most
from scripts.benchlib.kernel import resident_kb

MB = 1_000_000
_BLOCK = os.urandom(1 << 20)
_DISK_MB = 4096
_OURS, _RAW = "/home/user/ours", "/home/user/raw"
_SAMPLE_S = 0.01
FOLLOWERS = 200
_LINES = 20_000
_LINE = "x" * 99 + "\n"
# Prints when it is told to, so that all followers are there by then.
_PROGRAM = f"input()\nfor _ in range({{lines}} // 100): print({_LINE!r} * 100, end='', flush=True)"


def upload(bench: Bench) -> Row:
    return _transfer(bench, "upload", _send, _send_raw)


def download(bench: Bench) -> Row:
    return _transfer(bench, "download", _fetch, _fetch_raw)


def followers(bench: Bench) -> Row:
    daemon = bench.needs_daemon("followers")
    count, lines = bench.times(FOLLOWERS, 20), bench.times(_LINES, 2000)
    readers = count // 2
    alone: list[float] = []
    took: list[float] = []
    costs: list[float] = []
    notes: list[str] = []
    with bench.api.sandboxes(1) as (sandbox_id,):
        for _ in range(bench.times(3, 1)):
            seconds, _, memory_of_one = _follow(bench.api, daemon, sandbox_id, 1, 0, lines)
            alone.append(seconds)
            seconds, streamed, memory = _follow(
                bench.api, daemon, sandbox_id, readers, count - readers, lines
            )
            took.append(seconds)
            costs.append((memory["at most"] - memory_of_one["at most"]) / (count - 1))
            notes.append(
                f"{readers * lines * len(_LINE) / MB:.0f} MB of output, {streamed / MB:.0f} MB of events,"
                f" {streamed / MB / seconds:.0f} MB/s; the daemon's memory in MB: with one follower"
                f" {memory_of_one['at most'] / 1024:.1f}, then "
                + ", ".join(f"{name} {kb / 1024:.1f}" for name, kb in memory.items())
            )
    row = Row(
        "followers",
        f"{count} followers of one exec, half of which do not read: until the others have all of its"
        f" {lines * len(_LINE) / MB:g} MB",
        "s",
        Series(f"the last of {readers} readers", took),
        [Series("one follower alone", alone)],
        notes=notes,
    )
    if not bench.quick:
        row.goals = [at_most("the daemon's memory for each further follower", max(costs), 64, " KB")]
    return row


def _follow(
    api: Api, daemon: Daemon, sandbox_id: str, readers: int, silent: int, lines: int
) -> tuple[float, int, dict[str, int]]:
    program = {"code": _PROGRAM.format(lines=lines), "background": True, "stdin_open": True}
    exec_path = f"/v1/sandboxes/{sandbox_id}/execs/{api.execute(sandbox_id, program)['id']}"
    address = urlsplit(api.base_url)
    plan = {
        "host": address.hostname,
        "port": address.port,
        "key": api.key,
        "path": f"{exec_path}/events",
        "readers": readers,
        "silent": silent,
        "stdout": _LINE * lines,
    }
    before = resident_kb(daemon.pid)
    with _peak(daemon) as peak, _followers_of(plan) as (said, told):
        _expect(said, "ready")
        connected = resident_kb(daemon.pid)
        start = time.monotonic()
        api.call("POST", f"{exec_path}/stdin", {"data": "\n", "close": True})
        result = json.loads(_expect(said, "{"))
        told.close()
    memory = {"before": before, "connected": connected, "at most": peak()}
    return result["ended"] - start, result["bytes"], memory | {"afterwards": resident_kb(daemon.pid)}


@contextmanager
def _followers_of(plan: dict[str, Any]) -> Iterator[tuple[IO[str], IO[str]]]:
    command = [sys.executable, "-m", "scripts.benchlib.followers"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(plan) + "\n")
            process.stdin.flush()
            yield process.stdout, process.stdin
            if process.wait(TIMEOUT_S):
                raise BenchError("the followers failed; their own words are above")
        finally:
            process.kill()


def _expect(said: IO[str], beginning: str) -> str:
    line = said.readline()
    if not line.startswith(beginning):
        raise BenchError(f"the followers said {line[:300]!r}; their own words are above")
    return line


@contextmanager
def _peak(daemon: Daemon) -> Iterator[Callable[[], int]]:
    """The largest memory of the daemon, in KB, from now to the end of the block."""
    most = [resident_kb(daemon.pid)]
    over = Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_S):
            most.append(max(most.pop(), resident_kb(daemon.pid)))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        thread.join()


def _transfer(
    bench: Bench,
    name: str,
    ours: Callable[[Api, str, int], None],
    raw: Callable[[list[str], int], None],
) -> Row:
    daemon = bench.needs_daemon(name)
    blocks = bench.times(1024, 64)
    grown: list[int] = []

    def through_us() -> float:
        before = resident_kb(daemon.pid)
        with _peak(daemon) as peak:
            speed = _speed(blocks, lambda: ours(bench.api, sandbox_id, blocks))
        grown.append(peak() - before)
        return speed

    with bench.api.sandboxes(1, disk_size_mb=_DISK_MB) as (sandbox_id,):
        _send(bench.api, sandbox_id, blocks)
        inside = _docker_exec(sandbox_id)
        _send_raw(inside, blocks)
        speeds, raws = alternate(
            bench.times(3, 1), through_us, lambda: _speed(blocks, lambda: raw(inside, blocks))
        )
        compared = bench.api.execute(sandbox_id, {"command": ["cmp", _OURS, _RAW]})
    if compared["status"] != "completed":
        raise BenchError(f"the two files differ: {compared['stdout']}{compared['stderr']}")
    row = Row(
        name,
        f"{blocks} MiB, one file, {'into' if name == 'upload' else 'out of'} a sandbox",
        "MB/s",
        Series("through REST", speeds),
        [Series("docker exec, cat and a pipe, the same file system", raws)],
        notes=[f"the daemon's memory grew by at most {max(grown) / 1024:.1f} MB meanwhile"],
    )
    row.goals = [at_most("growth of the daemon", max(grown) / 1024, 16, " MB")]
    return row


def _speed(blocks: int, copy: Callable[[], None]) -> float:
    start = time.perf_counter()
    copy()
    return blocks * len(_BLOCK) / MB / (time.perf_counter() - start)


def _send(api: Api, sandbox_id: str, blocks: int) -> None:
    size = blocks * len(_BLOCK)
    with _answer(api, "PUT", sandbox_id, (_BLOCK for _ in range(blocks)), size) as answer:
        taken = json.loads(answer.read())["size"]
    if taken != size:
        raise BenchError(f"the server took {taken} bytes of {size}")


def _fetch(api: Api, sandbox_id: str, blocks: int) -> None:
    with _answer(api, "GET", sandbox_id) as answer:
        _check(answer, blocks)


@contextmanager
def _answer(
    api: Api, method: str, sandbox_id: str, body: Iterator[bytes] | None = None, size: int = 0
) -> Iterator[http.client.HTTPResponse]:
    address = urlsplit(api.base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
    headers = {"Authorization": f"Bearer {api.key}", "Content-Length": str(size)}
    try:
        connection.request(method, f"/v1/sandboxes/{sandbox_id}/files?path={_OURS}", body, headers)
        answer = connection.getresponse()
        if answer.status >= 300:
            raise BenchError(f"{method} of a file answered {answer.status}: {answer.read(500)!r}")
        yield answer
    finally:
        connection.close()


def _send_raw(inside: list[str], blocks: int) -> None:
    with subprocess.Popen([*inside, "sh", "-c", f"cat > {_RAW}"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # its exit code says so
            for _ in range(blocks):
                process.stdin.write(_BLOCK)
            process.stdin.close()
        if process.wait(TIMEOUT_S):
            raise BenchError("docker exec with a pipe into cat failed; its own words are above")


def _fetch_raw(inside: list[str], blocks: int) -> None:
    command = [*inside, "cat", _RAW]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        _check(process.stdout, blocks)
        if process.wait(TIMEOUT_S):
            raise BenchError("docker exec with cat failed; its own words are above")


def _docker_exec(sandbox_id: str) -> list[str]:
    """The beginning of a command that runs as the sandbox's user: root has no power over its files there."""
    url = os.environ.get("SANDBOXD_DOCKER_URL")
    user = docker("exec", sandbox_id, "stat", "--format=%u", "/home/user").strip()
    return ["docker", *(["--host", url] if url else []), "exec", "--interactive", "--user", user, sandbox_id]


def _check(source: Any, blocks: int) -> None:
    """Exactly so many blocks come, and they are what was sent."""
    piece = bytearray(len(_BLOCK))
    view = memoryview(piece)
    for number in range(blocks):
        have = 0
        while have < len(piece):
            taken = source.readinto(view[have:])
            if not taken:
                raise BenchError(f"the file ended in block {number} of {blocks}")
            have += taken
        if piece != _BLOCK:
            raise BenchError(f"block {number} of the file has other bytes than were sent")
    if source.read(1):
        raise BenchError("the file is longer than what was sent")
