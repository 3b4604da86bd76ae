"""A stream at its cap: who waits, who is refused, what is dropped, and what is never lost."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import Bus, Event, InvalidEvent, PublishError, StreamFull, Topic
from tests.eyes import eyes_on, length_of
from tests.proxy import Proxy
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from bus import Receipt

pytestmark = pytest.mark.everywhere

STREAM, GROUP = "bus:{cap:0}", "slow"
SOON_S = 5.0  # what happens at once takes less, also on a busy machine; a blocked publish waits 15


class Poured(Event, type="cap.poured"):
    n: int
    text: str = ""


class Spilt(Event, type="spill.spilt", key="key"):
    key: str


def cap(maxlen: int, keep: int, on_full: Any = "block") -> Topic:
    return Topic("cap", maxlen=maxlen, keep=keep, on_full=on_full)


def poured(numbers: Iterable[int]) -> list[Poured]:
    return [Poured(n=n) for n in numbers]


@pytest.fixture
async def redis(url) -> AsyncIterator[Any]:
    async with eyes_on(url) as redis:
        yield redis


@asynccontextmanager
async def pouring(url: str, topic: Topic, **settings: Any) -> AsyncIterator[tuple[Bus, Witness]]:
    bus = Bus.connect(url, topics=[topic], **{"publish_timeout_s": 15, **settings})
    witness = Witness(bus)
    async with bus:
        yield bus, witness


class Follower:
    """A group served by hand: what it holds stays until it says so."""

    def __init__(self, redis: Any, name: str = GROUP) -> None:
        self._redis = redis
        self.name = name
        self.held: list[bytes] = []
        self.seen: list[int] = []

    async def come(self) -> Follower:
        await self._redis.xgroup_create(STREAM, self.name, "0", mkstream=True)
        return self

    async def read(self, count: int = 1000) -> list[bytes]:
        reply = await self._redis.xreadgroup(self.name, "me", {STREAM: ">"}, count=count)
        rows = reply[0][1] if reply else []
        self.seen += [json.loads(fields[b"data"])["n"] for _, fields in rows]
        self.held += [entry_id for entry_id, _ in rows]
        return [entry_id for entry_id, _ in rows]

    async def finish(self, count: int = 1000) -> None:
        """Ack the oldest that it holds."""
        if self.held:
            await self._redis.xack(STREAM, self.name, *self.held[:count])
        del self.held[:count]

    async def follow(self, until: int, at_once: int = 7) -> None:
        """Read and finish, slowly, until it has seen that many."""
        while len(self.seen) < until:
            await self.read(at_once)
            await asyncio.sleep(0.003)
            await self.finish()


async def numbers(redis: Any) -> list[int]:
    return [json.loads(fields[b"data"])["n"] for _, fields in await redis.xrange(STREAM)]


async def fill(bus: Bus, count: int, first: int = 0) -> list[Receipt]:
    """Publish single events that fit."""
    async with asyncio.timeout(SOON_S):
        return await asyncio.gather(*map(bus.publish, poured(range(first, first + count))))


async def blocked(witness: Witness, times: int = 1) -> None:
    await eventually(lambda: len(witness.of("publish.full")) >= times, "the stream is full")


def asks(server: Any) -> int:
    """How often a script ran since the statistics were reset; while blocked, to look for room."""
    stats = ask(server, "INFO", "commandstats")
    return sum(int(n) for n in re.findall(rb"cmdstat_evalsha:calls=(\d+)", stats))


# --- the mark holds, and is felt


def watch(url: str, stop: threading.Event, seen: Counter[int]) -> None:
    with length_of(url, STREAM) as length:
        while not stop.is_set():
            seen[length()] += 1
            time.sleep(0)  # the others are perhaps in this process


async def test_no_observation_shows_more_than_maxlen_under_eight_publishers(url, redis):
    follower = await Follower(redis).come()
    lengths: Counter[int] = Counter()
    told: list[list[str]] = []
    stop = threading.Event()
    watching = asyncio.create_task(asyncio.to_thread(watch, url, stop, lengths))

    async def publisher(base: int) -> None:
        async with pouring(url, cap(maxlen=40, keep=5)) as (bus, witness):
            for start in range(base, base + 60, 15):
                await asyncio.gather(*map(bus.publish, poured(range(start, start + 8))))
                await bus.publish_many(poured(range(start + 8, start + 15)))
            told.append([n for n, _ in witness.seen if n in ("publish.full", "publish.resumed")])

    following = asyncio.create_task(follower.follow(until=8 * 60))
    try:
        await asyncio.gather(*(publisher(base) for base in range(0, 8000, 1000)))
        await following
    finally:
        stop.set()
        await watching
    assert max(lengths) == 40, "never more, and the mark was reached"
    assert lengths.total() > 100
    for names in told:
        rounds = len(names) // 2
        assert names == ["publish.full", "publish.resumed"] * rounds, "each said once, in turn"
    for base in range(0, 8000, 1000):
        own = [n for n in follower.seen if base <= n < base + 1000]
        assert own == list(range(base, base + 60)), "each once, in the order of its publisher"


@pytest.mark.servers_only("it asks a server about itself")
async def test_blocked_publishers_resume_within_100_ms_of_room(url, redis, server):
    """The median of ten; one of them may be held up by whatever else the machine does."""
    follower = await Follower(redis).come()
    took_s = []
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        await fill(bus, 10)
        await follower.read()
        for n in range(10):
            waiting = asyncio.create_task(bus.publish(Poured(n=n)))
            await blocked(witness, times=n + 1)
            ask(server, "CONFIG", "RESETSTAT")
            await eventually(lambda: asks(server) >= 4)  # its pauses are at their longest
            await follower.finish(1)
            started = time.perf_counter()
            await waiting
            took_s.append(time.perf_counter() - started)
            await follower.read()
        assert len(witness.of("publish.resumed")) == 10
    assert median(took_s) < 0.1, took_s
    assert max(took_s) < 2, took_s


async def test_a_new_group_at_the_beginning_of_a_stream_at_keep_blocks_nobody(url, redis):
    """It needs all that is kept, and what lies between keep and maxlen is its room to catch up."""
    async with pouring(url, cap(maxlen=500, keep=50)) as (bus, witness):
        for first in range(0, 1000, 25):
            await fill(bus, 25, first)
        standing = await redis.xlen(STREAM)
        assert 50 <= standing < 50 + 45 + 100 + 25, "keep, slack, a node of the server, a batch"
        follower = await Follower(redis).come()
        room = 500 - standing
        await fill(bus, room, first=1000)
        assert witness.of("publish.full") == []
        following = asyncio.create_task(follower.follow(until=1000, at_once=50))
        await fill(bus, 1000 - 500, first=1000 + room)
        await following
    assert follower.seen == list(range(1000 - standing, 2000 - standing))


@pytest.mark.parametrize("groups", [0, 2])
async def test_after_a_hundred_caps_the_last_keep_entries_can_be_replayed(url, redis, groups):
    followers = [await Follower(redis, f"g{n}").come() for n in range(groups)]
    total = 100 * 20
    async with pouring(url, cap(maxlen=20, keep=6)) as (bus, _):
        following = [asyncio.create_task(f.follow(until=total, at_once=100)) for f in followers]
        for start in range(0, total, 10):
            if start % 20:
                await bus.publish_many(poured(range(start, start + 10)))
            else:
                await asyncio.gather(*map(bus.publish, poured(range(start, start + 10))))
        await asyncio.gather(*following)
        kept = [envelope.event.n async for envelope in bus.history("cap")]
    assert kept[-6:] == list(range(total - 6, total))
    assert len(kept) <= 20
    assert all(f.seen == list(range(total)) for f in followers)


async def test_a_stream_that_everybody_follows_is_never_full(url, redis):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=20, keep=6)) as (bus, witness):
        for n in range(100):
            await bus.publish(Poured(n=n))
            await follower.read()
            await follower.finish()
        assert witness.of("publish.full") == []


# --- those who wait


async def test_one_callers_publishes_keep_their_order_while_they_wait(url, redis):
    rnd = random.Random(5)
    follower = await Follower(redis).come()

    async def caller(bus: Bus, base: int) -> None:
        n = base
        while n < base + 40:
            if rnd.random() < 0.3:
                size = min(rnd.randint(2, 6), base + 40 - n)
                await bus.publish_many(poured(range(n, n + size)))
                n += size
            else:
                both = [asyncio.create_task(bus.publish(Poured(n=n)))]
                if n + 1 < base + 40:
                    both.append(asyncio.create_task(bus.publish(Poured(n=n + 1))))
                await asyncio.gather(*both)
                n += len(both)

    async with pouring(url, cap(maxlen=12, keep=2)) as (bus, witness):
        following = asyncio.create_task(follower.follow(until=5 * 40, at_once=3))
        await asyncio.gather(*(caller(bus, base) for base in range(0, 500, 100)))
        await following
        assert witness.of("publish.full")
    for base in range(0, 500, 100):
        assert [n for n in follower.seen if base <= n < base + 100] == list(range(base, base + 40))


@pytest.mark.parametrize("room", [0, 5])
async def test_what_is_published_while_a_batch_finds_no_room_stays_behind_it(url, redis, room):
    """The first are on their way, or just refused, when the later ones are called."""
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=50, keep=2)) as (bus, witness):
        await fill(bus, 50 - room)
        await follower.read()
        tasks = []
        for n in range(100, 140):
            tasks.append(asyncio.create_task(bus.publish(Poured(n=n))))
            await asyncio.sleep(0)
        await blocked(witness)
        await follower.finish()
        await asyncio.gather(*tasks)
    assert (await numbers(redis))[-40:] == list(range(100, 140))


@pytest.mark.servers_only("it asks a server about itself")
async def test_what_comes_later_does_not_overtake_a_list_that_waits(url, redis, server):
    """Although the single events would fit: else a list might wait for ever."""
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=12, keep=2)) as (bus, witness):
        await fill(bus, 9)
        await follower.read()
        many = asyncio.create_task(bus.publish_many(poured(range(100, 105))))
        await blocked(witness)
        singles = [asyncio.create_task(bus.publish(Poured(n=n))) for n in (200, 201)]
        ask(server, "CONFIG", "RESETSTAT")
        await eventually(lambda: asks(server) >= 3)
        await follower.finish(1)  # room for four now
        ask(server, "CONFIG", "RESETSTAT")
        await eventually(lambda: asks(server) >= 3)
        assert not any(t.done() for t in (many, *singles))
        await follower.finish(3)
        await asyncio.gather(many, *singles)
    assert (await numbers(redis))[-7:] == [*range(100, 105), 200, 201]


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_list_goes_in_whole_or_waits_whole(url, redis, server):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=12, keep=2)) as (bus, witness):
        await fill(bus, 12)
        await follower.read()
        lists = [[Poured(n=100 * i + n) for n in range(1, 5)] for i in range(1, 5)]
        waiting = [asyncio.create_task(bus.publish_many(events)) for events in lists]
        await blocked(witness)
        for _ in range(16):
            await follower.finish(1)
            ask(server, "CONFIG", "RESETSTAT")
            await eventually(lambda: asks(server) >= 1 or all(t.done() for t in waiting))
            found = {n for n in (*follower.seen, *await numbers(redis)) if n > 100}
            assert len(found) % 4 == 0, "never a part of a list"
            await follower.read()
        await asyncio.gather(*waiting)
    assert [n for n in follower.seen if n > 100] == [e.n for events in lists for e in events]


async def test_a_blocked_publish_that_is_cancelled_is_not_published_later(url, redis):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        await fill(bus, 10)
        await follower.read()
        tasks = [asyncio.create_task(bus.publish(Poured(n=n))) for n in range(100, 106)]
        await blocked(witness)
        for task in (tasks[0], tasks[3], tasks[5]):  # the first in line, one amid, the last
            task.cancel()
        await follower.finish()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await bus.publish(Poured(n=200))
    assert [isinstance(r, asyncio.CancelledError) for r in results] == [
        *(True, False, False, True, False, True)
    ]
    assert (await numbers(redis))[-4:] == [101, 102, 104, 200]


async def test_when_nobody_waits_any_more_nobody_asks(url, redis):
    await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        await fill(bus, 10)
        tasks = [asyncio.create_task(bus.publish(Poured(n=n))) for n in range(3)]
        await blocked(witness)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: bus._publisher._senders[STREAM].task is None, "the asker ends")


async def test_a_blocked_publish_whose_time_is_up_names_who_holds_it_up(url, redis, server_kind):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2), publish_timeout_s=0.3) as (bus, witness):
        receipts = await fill(bus, 10)
        await follower.read(4)
        await follower.finish(1)
        started = time.monotonic()
        with pytest.raises(StreamFull, match=re.escape("the event was not published")) as raised:
            await bus.publish_many(poured([100, 101]))
        assert time.monotonic() - started >= 0.3
        error = raised.value
        undelivered = None if server_kind == "redis-6.2" else 6
        assert (error.stream, error.group) == (STREAM, GROUP)
        assert (error.pending, error.undelivered) == (3, undelivered)
        words = str(error)
        assert f"{STREAM} is full (10 entries)" in words
        assert f"Group slow still needs what begins at {receipts[1].entry_id}" in words
        assert "3 pending" in words
        assert ("6 not delivered yet" in words) == (undelivered is not None)
        (told,) = witness.of("publish.failed")
        assert (told["stream"], told["count"], told["error_type"]) == (STREAM, 2, "StreamFull")
        (full,) = witness.of("publish.full")
        assert (full["pinned_by"], full["pending"], full["undelivered"]) == (GROUP, 3, undelivered)
        await follower.finish()
        await bus.publish(Poured(n=200))
        assert 100 not in await numbers(redis)
        assert (await numbers(redis))[-1] == 200
        assert (
            witness.of("publish.resumed")[0]["full_s"] >= 0.25
        )  # full when it was told, not asked


async def test_each_caller_is_told_when_its_own_time_is_up(url, redis):
    await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2), publish_timeout_s=0.3) as (bus, witness):
        await fill(bus, 10)
        first = asyncio.create_task(bus.publish(Poured(n=1)))
        await blocked(witness)
        await asyncio.wait([first], timeout=0.1)
        second = asyncio.create_task(bus.publish(Poured(n=2)))
        with pytest.raises(StreamFull):
            await first
        assert not second.done()
        with pytest.raises(StreamFull):
            await second
    assert len(await numbers(redis)) == 10


async def test_leaving_the_block_waits_for_those_who_wait_for_room(url, redis):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        await fill(bus, 10)
        await follower.read()
        waiting = asyncio.create_task(bus.publish(Poured(n=100)))
        await blocked(witness)
        asyncio.get_running_loop().call_soon(asyncio.ensure_future, follower.finish())
    assert (await waiting).stream == STREAM
    assert (await numbers(redis))[-1] == 100


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_connection_that_breaks_while_they_wait_changes_nothing(url, redis, server):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        await fill(bus, 10)
        await follower.read()
        tasks = [asyncio.create_task(bus.publish(Poured(n=n))) for n in range(100, 105)]
        await blocked(witness)
        for hurt in (["CLIENT", "KILL", "TYPE", "normal"], ["SCRIPT", "FLUSH"]):
            ask(server, *hurt)
            ask(server, "CONFIG", "RESETSTAT")
            await eventually(lambda: asks(server) >= 3)
        await follower.finish()
        await asyncio.gather(*tasks)
    assert (await numbers(redis))[-5:] == [100, 101, 102, 103, 104]


# --- asking for room


@pytest.mark.servers_only("connections break")
async def test_while_fifty_callers_wait_one_asks_and_no_event_is_sent_again(url, redis, server):
    follower = await Follower(redis).come()
    marks = [f"canary-{n}-" for n in range(50)]
    async with (
        Proxy(server.port) as proxy,
        pouring(proxy.url, cap(maxlen=100, keep=10)) as (bus, witness),
    ):
        await fill(bus, 100)
        await follower.read()
        proxy.requests.clear()
        tasks = [asyncio.create_task(bus.publish(Poured(n=0, text=m * 20))) for m in marks]
        await blocked(witness)
        started = time.monotonic()
        await eventually(lambda: proxy.requests.count(b"EVAL") > 12)
        # One asker, whose pauses are 25 ms in the mean; fifty would ask as often within 10 ms.
        assert time.monotonic() - started > 0.05
        sent = [proxy.requests.count(m.encode()) // 20 for m in marks]
        assert max(sent) == 1, "the batch that found no room, and nothing again"
        await follower.finish()
        await asyncio.gather(*tasks)
        assert max(proxy.requests.count(m.encode()) // 20 for m in marks) == 2


@pytest.mark.servers_only("connections break")
async def test_however_slowly_room_comes_each_event_is_sent_twice_at_most(url, redis, server):
    """Once to find no room, and once when it fits; what does not fit yet is not sent along."""
    follower = await Follower(redis).come()
    marks = [f"canary-{n}-" for n in range(200)]
    async with (
        Proxy(server.port) as proxy,
        pouring(proxy.url, cap(maxlen=300, keep=2)) as (bus, witness),
    ):
        await fill(bus, 300)
        await follower.read()
        tasks = [asyncio.create_task(bus.publish(Poured(n=0, text=m))) for m in marks]
        await blocked(witness)
        for done in range(4, 24, 4):
            await follower.finish(4)
            await eventually(lambda n=done: sum(t.done() for t in tasks) == n)
        assert witness.of("publish.resumed") == [], "there are still some who wait"
        witness.forget()
        await follower.finish()
        await asyncio.gather(*tasks)
        assert max(proxy.requests.count(m.encode()) for m in marks) == 2
        assert witness.counts()["publish.appended"] < 10, "what fits goes together"
        assert witness.counts()["publish.resumed"] == 1
        assert witness.counts()["publish.full"] == 0


async def test_room_for_many_is_taken_at_once(url, redis):
    """Also where it has to be made entry by entry, in the middle of a node of the server."""
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=40, keep=2)) as (bus, witness):
        await fill(bus, 40)
        await follower.read()
        tasks = [asyncio.create_task(bus.publish(Poured(n=n))) for n in range(100, 120)]
        await blocked(witness)
        witness.forget()
        await follower.finish(20)
        await asyncio.gather(*tasks)
        assert witness.counts()["publish.appended"] <= 3
    assert (await numbers(redis))[20:] == list(range(100, 120))


# --- what is too large, and what is just not


async def test_a_list_that_can_never_fit_is_refused_at_once_and_the_largest_one_fits(url, redis):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=20, keep=5)) as (bus, _):
        await fill(bus, 20)
        await follower.read()
        await follower.finish()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(InvalidEvent, match=r"16 events can never .* 15 between keep and"):
                await bus.publish_many(poured(range(16)))
            assert await redis.xlen(STREAM) == 20
            for first in (100, 200, 300):
                await bus.publish_many(poured(range(first, first + 15)))
                await follower.read()
                await follower.finish()
    assert (await numbers(redis))[-15:] == list(range(300, 315))


# --- those who do not wait


async def test_rejecting_is_told_at_once_and_what_is_smaller_still_goes_in(url, redis):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=12, keep=2, on_full="reject")) as (bus, witness):
        await fill(bus, 9)
        await follower.read()
        async with asyncio.timeout(SOON_S):
            results = await asyncio.gather(
                bus.publish_many(poured(range(100, 105))),
                bus.publish(Poured(n=200)),
                bus.publish_many(poured([300, 301])),
                bus.publish(Poured(n=400)),
                return_exceptions=True,
            )
        assert [isinstance(r, StreamFull) for r in results] == [True, False, False, True]
        assert results[0].group == GROUP
        assert results[0].pending == 9
        assert witness.total("publish.rejected") == 6
        await follower.finish()
        await bus.publish(Poured(n=500))
        assert len(witness.of("publish.resumed")) == 1
    assert [n for n in await numbers(redis) if n >= 100] == [200, 300, 301, 500]


async def test_rejecting_refuses_nothing_while_nobody_needs_what_is_there(url, redis):
    """More at once than lies between keep and the mark: what went in first makes room."""
    async with pouring(url, cap(maxlen=20, keep=4, on_full="reject")) as (bus, witness):
        await fill(bus, 200)
        count = 200
        while not (room := 20 - await redis.xlen(STREAM)):  # as the batches have happened to fall
            await fill(bus, 1, first=count)
            count += 1
        follower = await Follower(redis).come()
        await follower.read()
        assert 0 < room <= 16
        await fill(bus, room, first=count)
        results = await asyncio.gather(
            *map(bus.publish, poured(range(300, 310))), return_exceptions=True
        )
        assert {type(r) for r in results} == {StreamFull}
        assert {r.group for r in results} == {GROUP}
    assert await numbers(redis) == list(range(count + room - 20, count + room))
    assert witness.total("publish.rejected") == 10


async def test_one_full_stream_of_several_refuses_its_part(url, redis):
    topic = Topic("spill", partitions=2, maxlen=10, keep=2, on_full="reject")
    streams = ["bus:{spill:0}", "bus:{spill:1}"]
    async with pouring(url, topic) as (bus, _):
        await redis.xgroup_create(streams[0], GROUP, "0", mkstream=True)
        where = {k: (await bus.publish(Spilt(key=k))).stream for k in "abcdef"}
        keys = [next(k for k in where if where[k] == s) for s in streams]
        while await redis.xlen(streams[0]) < 10:
            await bus.publish(Spilt(key=keys[0]))
        before = await redis.xinfo_stream(streams[1])
        with pytest.raises(StreamFull) as raised:
            await bus.publish_many([Spilt(key=k) for k in (*keys, *keys)])
    assert raised.value.stream == streams[0]
    assert raised.value.__notes__ == ["2 of 4 events, of other streams, are in"]
    assert await redis.xlen(streams[0]) == 10
    new = await redis.xrange(streams[1], f"({before['last-generated-id'].decode()}", "+")
    assert len(new) == 2


async def test_dropping_the_oldest_never_blocks_and_says_what_is_lost_to_whom(url, redis):
    slow = await Follower(redis, "slow").come()
    idle = await Follower(redis, "idle").come()
    async with pouring(url, cap(maxlen=20, keep=4, on_full="drop_oldest")) as (bus, witness):
        await fill(bus, 20)
        await slow.read(8)
        await slow.finish(3)
        await fill(bus, 10, first=20)
        assert witness.total("delivery.overrun", group="slow") == 7  # the eighth to the third last
        assert witness.total("delivery.overrun", group="idle") == 10
        assert await numbers(redis) == list(range(10, 30))
        assert (await redis.xpending(STREAM, "slow"))["pending"] == 0
        await slow.read()
        await idle.read()
        assert slow.seen == [*range(8), *range(10, 30)]
        assert idle.seen == list(range(10, 30))
        await fill(bus, 5, first=30)
        # Told at once, and then once a second; the server counts them all the same.
        await eventually(lambda: witness.total("delivery.overrun") == 7 + 10 + 2 * 5)
        assert await redis.hgetall(f"{STREAM}:overrun") == {b"slow": b"12", b"idle": b"15"}
        assert [p["message_id"] for p in await pending(redis, "slow")] == slow.held[-15:]
        assert {t["stream"] for t in witness.of("delivery.overrun")} == {STREAM}
        await fill(bus, 3, first=40)
    assert witness.total("delivery.overrun") == 17 + 10 + 2 * 3, "nothing is left untold at the end"


async def pending(redis: Any, group: str = GROUP) -> Sequence[dict[str, Any]]:
    return await redis.xpending_range(STREAM, group, "-", "+", 10_000)


async def test_dropping_takes_more_at_once_than_the_stream_holds(url, redis):
    """Every event goes in and `keep` always stays, although most drop out again at once."""
    await Follower(redis).come()
    async with pouring(url, cap(maxlen=20, keep=4, on_full="drop_oldest")) as (bus, witness):
        receipts = await fill(bus, 300)
        async with asyncio.timeout(SOON_S):
            lists = [bus.publish_many(poured(range(i, i + 16))) for i in range(1000, 1160, 16)]
            await asyncio.gather(*lists)
    assert await numbers(redis) == list(range(1140, 1160))
    assert [r.entry_id for r in receipts] == sorted({r.entry_id for r in receipts}, key=_number)
    assert witness.total("delivery.overrun") == 300 + 160 - 20
    assert witness.of("publish.rejected") == witness.of("publish.failed") == []


def _number(entry_id: str) -> tuple[int, int]:
    ms, _, low = entry_id.partition("-")
    return int(ms), int(low)


# --- entries that vanish


async def test_one_vanished_entry_does_not_stop_a_topic(url, redis):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        receipts = await fill(bus, 10)
        await follower.read()
        ghost = follower.held.pop(0)
        await follower.finish()
        await redis.xdel(STREAM, ghost)
        async with asyncio.timeout(SOON_S):
            for n in range(100, 140):
                await bus.publish(Poured(n=n))
                await follower.read()
                await follower.finish()
        (told,) = witness.of("delivery.lost")
        assert (told["group"], told["count"]) == (GROUP, 1)
        assert told["entry_ids"] == [receipts[0].entry_id] == [ghost.decode()]
    assert await pending(redis) == []


async def test_what_is_trimmed_by_hand_lets_publishers_go_on(url, redis):
    """Also those that wait already; what is still there is still needed."""
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        receipts = await fill(bus, 10)
        await follower.read()
        waiting = [asyncio.create_task(bus.publish(Poured(n=n))) for n in range(100, 108)]
        await blocked(witness)
        await redis.xtrim(STREAM, maxlen=3, approximate=False)
        await eventually(lambda: sum(t.done() for t in waiting) == 7)
        await eventually(lambda: witness.of("delivery.lost"))
        assert not waiting[7].done()
        assert [n for n in await numbers(redis) if n < 100] == [7, 8, 9]
        del follower.held[:7]
        await follower.finish(1)
        await asyncio.gather(*waiting)
        (told,) = witness.of("delivery.lost")
        assert told["count"] == 7
        assert told["entry_ids"] == [r.entry_id for r in receipts[:7]]
    assert await numbers(redis) == [8, 9, *range(100, 108)]


# --- answers that get lost at the cap


@pytest.mark.servers_only("connections break")
@pytest.mark.parametrize("losses", [1, 3])
async def test_a_lost_answer_to_a_part_that_fitted_loses_and_doubles_nothing(
    url, redis, server, losses
):
    follower = await Follower(redis).come()
    async with (
        Proxy(server.port) as proxy,
        pouring(proxy.url, cap(maxlen=20, keep=2)) as (bus, witness),
    ):
        await fill(bus, 17)
        await follower.read()
        proxy.lose_replies = losses
        tasks = [asyncio.create_task(bus.publish(Poured(n=n))) for n in range(100, 110)]
        await asyncio.wait(tasks[:3])
        assert proxy.lost == losses
        assert (await numbers(redis))[17:] == [100, 101, 102]
        assert witness.counts()["publish.retried"] == losses
        proxy.lose_replies = losses  # of the asker, too
        await follower.finish()
        receipts = await asyncio.gather(*tasks)
    found = await redis.xrange(STREAM)
    assert (await numbers(redis))[-10:] == list(range(100, 110))
    assert [r.entry_id for r in receipts] == [i.decode() for i, _ in found[-10:]]


@pytest.mark.servers_only("connections break")
async def test_a_lost_answer_where_nobody_waits_refuses_just_what_is_not_in(url, redis, server):
    follower = await Follower(redis).come()
    async with (
        Proxy(server.port) as proxy,
        pouring(proxy.url, cap(maxlen=20, keep=2, on_full="reject")) as (bus, _),
    ):
        await fill(bus, 17)
        await follower.read()
        proxy.lose_replies = 1
        results = await asyncio.gather(
            *map(bus.publish, poured(range(100, 110))), return_exceptions=True
        )
        assert [isinstance(r, StreamFull) for r in results] == [False] * 3 + [True] * 7
        await follower.finish()
        await bus.publish(Poured(n=200))
    assert (await numbers(redis))[-4:] == [100, 101, 102, 200]


@pytest.mark.servers_only("connections break")
async def test_a_lost_answer_where_the_oldest_are_dropped_doubles_nothing(url, redis, server):
    async with (
        Proxy(server.port) as proxy,
        pouring(proxy.url, cap(maxlen=20, keep=12, on_full="drop_oldest")) as (bus, _),
    ):
        await fill(bus, 20)
        proxy.lose_replies = 1
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*map(bus.publish, poured(range(100, 112))))
    found = await numbers(redis)
    assert found[-12:] == list(range(100, 112))
    assert len(found) <= 20


# --- marks declared here and recorded there


async def test_marks_that_differ_are_told_once_and_the_recorded_ones_hold(url, redis):
    follower = await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness):
        await fill(bus, 5)
        assert witness.of("topic.differs") == []
    async with pouring(url, cap(maxlen=1_000, keep=100), publish_timeout_s=0.3) as (bus, witness):
        await fill(bus, 5)
        with pytest.raises(StreamFull, match=r"is full \(10 entries\)"):
            await bus.publish(Poured(n=0))
        with pytest.raises(InvalidEvent, match="room for 8 between keep and maxlen"):
            await bus.publish_many(poured(range(9)))
        (told,) = witness.of("topic.differs")
        assert told["topic"] == "cap"
        assert told["differences"] == (
            "maxlen 10 recorded, 1000 declared, keep 2 recorded, 100 declared"
        )
    await follower.read()
    await follower.finish()
    async with pouring(url, cap(maxlen=1_000, keep=100)) as (bus, _):
        for n in range(40):
            await bus.publish(Poured(n=n))
            await follower.read()
            await follower.finish()
    assert await redis.xlen(STREAM) <= 10


async def test_who_declares_nothing_keeps_to_the_recorded_marks(url, redis):
    await Follower(redis).come()
    async with pouring(url, cap(maxlen=10, keep=2, on_full="reject")) as (bus, _):
        await bus.publish(Poured(n=0))
    async with Bus.connect(url) as bus, asyncio.timeout(SOON_S):
        await fill(bus, 9)
        with pytest.raises(StreamFull, match=r"is full \(10 entries\)"):
            await bus.publish(Poured(n=1))
    async with pouring(url, cap(maxlen=10, keep=2)) as (bus, witness), asyncio.timeout(SOON_S):
        with pytest.raises(StreamFull):  # how one waits is recorded, too
            await bus.publish(Poured(n=1))
        (told,) = witness.of("topic.differs")
        assert told["differences"] == "on_full reject recorded, block declared"


# --- while callers wait, other things change


async def test_those_who_wait_notice_that_the_cap_was_raised(url, redis, monkeypatch):
    monkeypatch.setattr("bus.streams.topics.RECORD_TTL_S", 0.05)
    await Follower(redis).come()
    async with pouring(url, cap(maxlen=20, keep=4)) as (bus, witness):
        await fill(bus, 20)
        waiting = asyncio.gather(*map(bus.publish, poured(range(20, 30))))
        await blocked(witness)
        record = json.loads(await redis.hget("bus:topics", "cap"))
        await redis.hset("bus:topics", "cap", json.dumps({**record, "maxlen": 100}))
        async with asyncio.timeout(SOON_S):
            await waiting
    assert await numbers(redis) == list(range(30))


async def test_a_server_that_dies_while_callers_wait_is_not_told_as_a_full_stream(private_server):
    """Whether there is room is not known any more, and no group is to blame."""
    server = private_server()
    async with Redis.from_url(server.url) as redis:
        await Follower(redis).come()
        async with pouring(server.url, cap(maxlen=20, keep=4), publish_timeout_s=1.0) as (
            bus,
            witness,
        ):
            await fill(bus, 20)
            waiting = asyncio.create_task(bus.publish(Poured(n=20)))
            await blocked(witness)
            server.kill()
            for publish in (waiting, bus.publish(Poured(n=21))):
                with pytest.raises(PublishError) as raised:
                    await publish
                assert not isinstance(raised.value, StreamFull), raised.value
            server.restart()
