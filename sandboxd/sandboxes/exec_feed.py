"""Followers of execs. There is one feed for each exec that is followed: it reads the exec's log once, encodes
its events once, and keeps them for all. A follower is a place in that list, so a slow one slows nobody."""

import asyncio
import json
from array import array
from base64 import b64decode
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import structlog

from sandboxd.agentlink.errors import AgentRefusedError, LinkBrokenError, UnknownExecError
from sandboxd.agentlink.exec_log import Event, Outcome, Output
from sandboxd.kit.errors import BadRequestError, SandboxdError, UnavailableError
from sandboxd.kit.metrics import Metrics
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.errors import AgentUnreachableError
from sandboxd.sandboxes.errors import FollowersError
from sandboxd.sandboxes.exec_progress import Entry, Progress
from sandboxd.sandboxes.exec_result import Run, refused
from sandboxd.sandboxes.exec_stream import GAP, STARTED, Teller, Told
from sandboxd.sandboxes.live import LiveSandbox, LiveSandboxes
from sandboxd.sandboxes.states import ExecStatus

log = structlog.get_logger(__name__)

MAX_EXEC_FOLLOWERS = 256
MAX_PROJECT_FOLLOWERS = 512
MAX_FOLLOWERS = 2048
# Each feed takes a connection to its sandbox's agent, which are bounded; only those of execs that
# go on by themselves replace another one.
MAX_SANDBOX_FEEDS = 8
MAX_PROJECT_FEEDS = 64
MAX_FEEDS = 256
# What feeds may hold, in encoded bytes: one that must drop something drops its oldest.
FEED_BYTES = 16 * 1024 * 1024
FEED_MIN_BYTES = 1024 * 1024
ALL_FEEDS_BYTES = 256 * 1024 * 1024
# How long a feed outlives its last follower, who may be on the way back.
LINGER_S = 5.0
# What a follower is sent at once.
BATCH_BYTES = 8 * 1024
# Output that is followed faster than this is left in the sandbox, whose log drops the oldest.
MAX_RATE = 16 * 1024 * 1024
# How often a follower's key is looked at, at most and, while nothing is told, at least.
CHECK_S = 1.0
SILENT_CHECK_S = 15.0
# How long an exec that nobody here runs gets to show that the sandbox has its log.
READY_S = 2.0
_PAUSED_POLL_S = 0.25
# What an event costs beside its text, and how many of the dropped ones are remembered by number.
_OVERHEAD = 150
_REMEMBERED = 65536
_GAPS = 4096
_TRIM = 1024

Allowed = Callable[[], Awaitable[object]]
Chunks = AsyncGenerator[tuple[int, bytes]]


@dataclass(slots=True)
class _Item:
    number: int
    chunk: bytes
    size: int


class Feed:
    """The events of one exec, as far as they are kept, and who follows them."""

    def __init__(self, run: Run, sandbox: LiveSandbox, entry: Entry | None) -> None:
        self.run = run
        self.sandbox = sandbox
        self.entry = entry
        self.followers = 0
        self.ended = False
        # Why it can tell no more; and whether the agent has nothing of the exec.
        self.fault: SandboxdError | None = None
        self.unknown = False
        self.task: asyncio.Task[None] | None = None
        self.leaving: asyncio.TimerHandle | None = None
        self.bytes = 0
        # The first event there ever was.
        self.first = (0, b"")
        # Events that were dropped before the first of `_items`, and the output they stood for.
        self.dropped = 0
        self.dropped_size = 0
        self._items: list[_Item] = []
        self._gone_numbers = array("Q")
        self._gone_sizes = array("Q")
        # Gaps in the log itself: where each leads to -> where it began, and what it says is missed.
        self._gaps: dict[int, tuple[int, int]] = {}
        self._changed = asyncio.Event()

    @property
    def end(self) -> int:
        """How many events there were so far."""
        return self.dropped + len(self._items)

    @property
    def last(self) -> int:
        """The number of the last event; -1 without any."""
        return self._items[-1].number if self._items else -1

    @property
    def can_grow(self) -> bool:
        return not self.ended and not self.unknown and self.fault is None

    def add(self, told: Told) -> None:
        if told.type == GAP:
            last = self._items[-1].number if self._items else 0
            self._gaps[told.number] = (last, told.size)
            if len(self._gaps) > _GAPS:
                del self._gaps[next(iter(self._gaps))]
        item = _Item(told.number, told.encoded(), told.size)
        if not self.end:
            self.first = (item.number, item.chunk)
        self._items.append(item)
        self.bytes += len(item.chunk) + _OVERHEAD

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, at: int, timeout_s: float = SILENT_CHECK_S) -> None:
        """Until there is an event with the index `at`, or somebody has called `wake`; at most a while."""
        changed = self._changed
        if self.end > at or not self.can_grow:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()

    def trim(self, limit: int) -> None:
        """Drops the oldest events beyond the limit, never the last one."""
        if self.bytes <= limit:
            return
        count = 0
        while self.bytes > limit and count < len(self._items) - 1:
            item = self._items[count]
            self.bytes -= len(item.chunk) + _OVERHEAD
            self.dropped_size += item.size
            self._gone_numbers.append(item.number)
            self._gone_sizes.append(self.dropped_size)
            count += 1
        del self._items[:count]
        self.dropped += count
        if len(self._gone_numbers) > _REMEMBERED + _TRIM:
            del self._gone_numbers[:-_REMEMBERED], self._gone_sizes[:-_REMEMBERED]

    def place(self, after: int) -> tuple[int, int]:
        """The index of the first event after a number, and the output that all before it stood for."""
        if self.dropped and after < self._items[0].number:
            index = bisect_right(self._gone_numbers, after)
            behind = self.dropped - len(self._gone_numbers) + index
            if index:
                began, missed = (after, 0)
                if index < len(self._gone_numbers):
                    began, missed = self._gaps.get(self._gone_numbers[index], (after, 0))
                # Of a gap in the log it may have had a part.
                had = 0 if after <= began else max(0, missed - (self._gone_numbers[index] - after))
                return behind, self._gone_sizes[index - 1] + had
            # So long ago that its number is forgotten: told is at most a little more than what is missing.
            first = self._gone_numbers[0] if self._gone_numbers else self._items[0].number
            before = self._gone_sizes[0] if self._gone_sizes else self.dropped_size
            return (behind if behind < self.dropped else 0), max(0, before - max(0, first - after))
        index = bisect_right(self._items, after, key=lambda item: item.number)
        return self.dropped + index, self.dropped_size + sum(item.size for item in self._items[:index])

    def batch(self, at: int) -> tuple[int, bytes, int, int]:
        """Events from the index `at` on, as much as is sent at once: the number of the last, their text, how
        many they are, and the output they stand for."""
        first = at - self.dropped
        size, last = 0, first
        length = len(self._items[first].chunk)
        while True:
            size += self._items[last].size
            last += 1
            if last >= len(self._items) or length + len(self._items[last].chunk) > BATCH_BYTES:
                break
            length += len(self._items[last].chunk)
        items = self._items[first:last]
        chunk = items[0].chunk if len(items) == 1 else b"".join(item.chunk for item in items)
        return items[-1].number, chunk, len(items), size

    def gap_from(self, at: int, after: int) -> Told | None:
        """What the event at `at` says, if it is a gap that a follower had a part of already."""
        if at < self.dropped or at >= self.end:
            return None
        number = self._items[at - self.dropped].number
        began, missed = self._gaps.get(number, (after, 0))
        if after <= began:
            return None
        return Told(number, GAP, {"missed_bytes": min(missed, number - after)}, missed)

    def last_dropped(self) -> int:
        return self._gone_numbers[-1]

    def output(self) -> Iterable[Event]:
        """What the kept events have of the output: of an exec whose sandbox is gone, nothing else has it."""
        for item in self._items:
            fact = json.loads(item.chunk.partition(b"data: ")[2])
            if "delta" in fact:
                text = fact["delta"]
                data = b64decode(text) if "encoding" in fact else text.encode("utf-8", "surrogatepass")
                yield Output(fact["type"] == "exec.stderr.delta", data)


class Permission:
    """Whether the followers with one key are still told: looked at now and then, and once for all of them."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._loop = asyncio.get_running_loop()
        self._checked_at = self._loop.time()
        self._turn = asyncio.Lock()

    async def check(self) -> None:
        """Raises what `allowed` does."""
        if self._loop.time() - self._checked_at < CHECK_S:
            return
        async with self._turn:
            if self._loop.time() - self._checked_at >= CHECK_S:
                await self._allowed()
                self._checked_at = self._loop.time()


class Feeds:
    """All feeds of this daemon. `draining` tells that it is about to stop: followers are then let go."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        tasks: TaskOwner,
        live: LiveSandboxes,
        progress: Progress,
        draining: Callable[[], bool],
        patience_s: float,
        linger_s: float = LINGER_S,
        feed_bytes: int = FEED_BYTES,
    ) -> None:
        self._tasks = tasks
        self._live = live
        self._progress = progress
        self._draining = draining
        self._patience_s = patience_s
        self._linger_s = linger_s
        self._feed_bytes = feed_bytes
        self._feeds: dict[str, Feed] = {}
        self._followers: Counter[str] = Counter()
        self._permissions: WeakValueDictionary[str, Permission] = WeakValueDictionary()
        self._gaps = metrics.exec_gaps
        metrics.exec_feeds.set_function(lambda: len(self._feeds))
        metrics.exec_followers.set_function(self._followers.total)

    def __len__(self) -> int:
        return len(self._feeds)

    async def open(self, sandbox: LiveSandbox, run: Run) -> Feed | None:
        """The feed of an exec, to be followed at once; None when the sandbox has nothing of the exec. Raises
        FollowersError. `run` is new: it has nothing but what the exec began with."""
        project_id = str(sandbox.project_id)
        feed = self._feeds.get(run.id)
        self._check_room(project_id, feed, sandbox, run)
        if feed is None:
            feed = Feed(run, sandbox, None)
            self._feeds[run.id] = feed
            feed.task = self._tasks.start(f"follow {run.id}", self._feed(feed))
        self._join(feed)
        try:
            # An exec in progress may be silent for long; the log of any other has an end.
            if self._progress.find(sandbox.id, run.id) is None:
                await feed.wait(1, READY_S)
        finally:
            self._leave(feed)
        if feed.fault is not None:
            raise feed.fault
        return None if feed.unknown else feed

    async def follow(self, feed: Feed, after: int, key_id: str, allowed: Allowed) -> Chunks:
        """Batches of events after a number, each with the number of its last. Ends after `exec.completed`.
        Raises UnavailableError when the daemon stops, and what `allowed` raises, which is asked now and
        then whether the followers with this key still may."""
        project_id = str(feed.sandbox.project_id)
        # Once more: others may have come since it was opened.
        self._check_followers(project_id, feed)
        self._join(feed)
        self._followers[project_id] += 1
        try:
            permission = self._permissions.get(key_id)
            if permission is None:
                permission = self._permissions[key_id] = Permission(allowed)
            async for item in self._follow(feed, after, permission):
                yield item
        finally:
            self._followers[project_id] -= 1
            if not self._followers[project_id]:
                del self._followers[project_id]
            self._leave(feed)

    async def _follow(self, feed: Feed, after: int, permission: Permission) -> Chunks:
        while feed.last <= after and feed.can_grow:
            # It is being read anew, and has not come to where the follower was.
            await feed.wait(feed.end)
            await self._go_on(permission)
        if feed.ended and after > feed.last:
            raise BadRequestError(
                f"'after' {after} is beyond the last event of the exec, {feed.last}.", param="after"
            )
        at, seen = (0, 0) if after < 0 else feed.place(after)
        if after < 0 and feed.dropped:
            # However late it comes, it is told whose output this is.
            yield feed.first
        gap = feed.gap_from(at, after)
        if gap is not None:
            at, seen = at + 1, seen + gap.size
            yield gap.number, gap.encoded()
        while True:
            if at < feed.dropped:
                missed = feed.dropped_size - seen
                at, seen = feed.dropped, feed.dropped_size
                self._gaps.inc()
                number = feed.last_dropped()
                yield number, Told(number, GAP, {"missed_bytes": missed}).encoded()
            elif at < feed.end:
                number, chunk, count, size = feed.batch(at)
                at, seen = at + count, seen + size
                yield number, chunk
            elif feed.ended:
                return
            elif feed.fault is not None:
                raise feed.fault
            elif feed.unknown:
                raise UnavailableError("The exec has not started yet, or never will; follow again.")
            else:
                await feed.wait(at)
            if not feed.ended or at < feed.end:
                await self._go_on(permission)

    async def _go_on(self, permission: Permission) -> None:
        await permission.check()
        if self._draining():
            raise UnavailableError("The server is shutting down; follow again from the last event.")

    async def tick(self) -> None:
        """A job: lets followers go when the daemon stops."""
        if self._draining():
            for feed in list(self._feeds.values()):
                feed.wake()

    def _check_followers(self, project_id: str, feed: Feed | None) -> None:
        if feed is not None and feed.followers >= MAX_EXEC_FOLLOWERS:
            raise FollowersError(f"{MAX_EXEC_FOLLOWERS} clients follow exec {feed.run.id}, the limit")
        if self._followers[project_id] >= MAX_PROJECT_FOLLOWERS:
            raise FollowersError(f"{MAX_PROJECT_FOLLOWERS} clients of the project follow execs, the limit")
        if self._followers.total() >= MAX_FOLLOWERS:
            raise FollowersError(f"{MAX_FOLLOWERS} clients follow execs already, the limit")

    def _check_room(self, project_id: str, feed: Feed | None, sandbox: LiveSandbox, run: Run) -> None:
        self._check_followers(project_id, feed)
        if feed is not None:
            return
        if not run.background and not self._has_room(
            MAX_SANDBOX_FEEDS, lambda item: item.sandbox is sandbox and item.entry is None
        ):
            raise FollowersError(f"{MAX_SANDBOX_FEEDS} execs of sandbox {sandbox.id} are followed, the limit")
        if not self._has_room(MAX_PROJECT_FEEDS, lambda item: item.sandbox.project_id == project_id):
            raise FollowersError(f"{MAX_PROJECT_FEEDS} execs of the project are followed, the limit")
        if not self._has_room(MAX_FEEDS, lambda _: True):
            raise FollowersError(f"{MAX_FEEDS} execs are followed already, the limit")

    def _has_room(self, limit: int, counts: Callable[[Feed], bool]) -> bool:
        """Whether one more feed is within the limit. One that outlived its followers makes room for it."""
        counted = [item for item in self._feeds.values() if counts(item)]
        if len(counted) < limit:
            return True
        left = next((item for item in counted if not item.followers), None)
        if left is None:
            return False
        self._end(left)
        return True

    def _join(self, feed: Feed) -> None:
        if feed.leaving is not None:
            feed.leaving.cancel()
            feed.leaving = None
        feed.followers += 1

    def _leave(self, feed: Feed) -> None:
        feed.followers -= 1
        if feed.followers or feed.leaving is not None:
            return
        feed.leaving = asyncio.get_running_loop().call_later(self._linger_s, self._end, feed)

    def _end(self, feed: Feed) -> None:
        self._forget(feed)
        if feed.leaving is not None:
            feed.leaving.cancel()
            feed.leaving = None
        if feed.task is not None:
            feed.task.cancel()

    def _forget(self, feed: Feed) -> None:
        if self._feeds.get(feed.run.id) is feed:
            del self._feeds[feed.run.id]

    async def _feed(self, feed: Feed) -> None:
        """Reads the log into the feed, up to the end of the exec."""
        try:
            await self._read(feed)
        except SandboxdError as error:
            feed.fault = error
        except (Exception, asyncio.CancelledError):
            # Cancelled, it made room for another feed while its next follower was on the way.
            feed.fault = UnavailableError("The server no longer follows the exec; follow again.")
            raise
        finally:
            if not feed.ended:
                self._forget(feed)
            self._let_go(feed)
            feed.wake()

    def _let_go(self, feed: Feed) -> None:
        """Leaves the exec to itself, or to who follows it next."""
        entry, feed.entry = feed.entry, None
        if entry is not None:
            patience_s = None if entry.background else self._patience_s
            self._progress.leave(entry, feed.run, patience_s, taken=True)

    async def _read(self, feed: Feed) -> None:
        run, teller = feed.run, Teller()
        feed.add(Told(0, STARTED, started(run)))
        has_end = False
        while not run.ended:
            feed.entry = self._progress.follow(feed.sandbox, run.id)
            try:
                has_end = await self._read_log(feed, teller)
            except UnknownExecError:
                feed.unknown = teller.offset == 0
                if feed.unknown:
                    return
                run.status = ExecStatus.LOST
            except AgentRefusedError as error:
                for event in refused(error):
                    run.add(event)
                    for told in teller.refuse(event) if isinstance(event, Output) else ():
                        feed.add(told)
            except (LinkBrokenError, AgentUnreachableError) as error:
                run.status = self._progress.fate(feed.sandbox, run.id, error)
                if run.status is None:
                    self._let_go(feed)
                    await self._wait_for_resume(feed.sandbox)
        result = await self._result(feed)
        for told in teller.complete(result, has_end=has_end):
            feed.add(told)
        feed.ended = True

    async def _read_log(self, feed: Feed, teller: Teller) -> bool:
        """Adds what comes after the teller's place in the log. True at its end."""
        loop = asyncio.get_running_loop()
        began_at, read = loop.time(), 0
        async with aclosing(feed.sandbox.agent.follow(feed.run.id, teller.offset)) as events:
            async for event, end in events:
                feed.run.add(event)
                for told in teller.tell(event, end):
                    feed.add(told)
                feed.trim(self._share())
                if isinstance(event, Outcome):
                    return True
                feed.wake()
                read += len(event.data) if isinstance(event, Output) else 0
                if read > MAX_RATE // 16:
                    # An exec that only writes must not have the daemon do nothing but read.
                    await asyncio.sleep(max(0.0, began_at + read / MAX_RATE - loop.time()))
                    began_at, read = loop.time(), 0
        return False

    async def _wait_for_resume(self, sandbox: LiveSandbox) -> None:
        while self._live.get(sandbox.id) is sandbox and sandbox.paused:  # noqa: ASYNC110 - for a rare case
            await asyncio.sleep(_PAUSED_POLL_S)

    async def _result(self, feed: Feed) -> dict[str, Any]:
        """The whole result, with what the sandbox has of the output, or this feed when it is gone."""
        run = feed.run
        try:
            events: Iterable[Event] = await feed.sandbox.agent.read_log(run.id) or feed.output()
        except SandboxdError:
            events = feed.output()
        for event in events:
            run.collect(event)
        return run.result()

    def _share(self) -> int:
        return min(self._feed_bytes, max(FEED_MIN_BYTES, ALL_FEEDS_BYTES // max(1, len(self._feeds))))


def started(run: Run) -> dict[str, Any]:
    """What the first event of a stream carries."""
    return {"exec": {"id": run.id, "sandbox_id": run.sandbox_id, "started_at": run.started_at}}
