"""What a snapshot shows: every place an entry can be in, counted, on every kind of server."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from redis.asyncio import Redis

from bus import (
    Bus,
    DeclarationError,
    Event,
    PermissionDenied,
    Reject,
    RetryLater,
    ServerRefused,
    Snapshot,
    Topic,
    UnknownTopic,
    Worker,
    event_handler,
)
from bus.history import inspector
from bus.history.inspector import Growth, group_of, pinning
from bus.history.snapshot import (
    ConsumerSnapshot,
    LaneSnapshot,
    StreamSnapshot,
)
from bus.streams import keys, overview
from bus.streams.answers import Consumer
from bus.streams.overview import GroupLook, StreamLook
from bus.streams.replies import ReplyError
from tests.faults.crew import Crew
from tests.faults.deeds import GROUP as DEEDS
from tests.faults.deeds import Deed
from tests.proxy import Proxy
from tests.servers import ask
from tests.test_docs import ROOT, blocks, run
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from bus.history.snapshot import GroupSnapshot

TOPIC = Topic("look", maxlen=100_000, keep=100)
S = "bus:{look:0}"
INBOX, DEAD = keys.inbox(S, "index"), keys.dead(S, "index")
NEVER = 4_000_000_000_000  # ms; in the year 2096


class Looked(Event, type="look.looked", key="who"):
    who: str
    n: int = 0


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(url, protocol=2) as redis:
        yield redis


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        yield bus


@pytest.fixture
def counts(server_kind: str) -> bool:
    """Whether this kind of server counts what groups have read."""
    return server_kind != "redis-6.2"


async def add(redis: Redis, ids: Iterable[int | str], stream: str = S, size: int = 1) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for entry_id in ids:
            pipe.xadd(stream, {"n": "1" * size}, id=str(entry_id))
        await pipe.execute()


async def group(redis: Redis, name: str = "index", stream: str = S, read: int = 0) -> None:
    """Make a group that has finished `read` entries."""
    await redis.xgroup_create(stream, name, "0", mkstream=True)
    if read:
        await redis.xack(stream, name, *await take(redis, read, name, stream))


async def take(
    redis: Redis, count: int, name: str = "index", stream: str = S, consumer: str = "me"
) -> list[bytes]:
    """Have entries delivered to a consumer; return their ids."""
    ((_, rows),) = await redis.xreadgroup(name, consumer, {stream: ">"}, count=count)
    return [entry_id for entry_id, _ in rows]


async def live(redis: Redis, worker: str, groups: str = "index", stream: str = S) -> None:
    """Say that a worker lives and serves `groups`."""
    await redis.sadd(keys.workers(stream), worker)
    await redis.set(keys.lease(stream, worker), groups)


async def now_ms(redis: Redis) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def the_stream(bus: Bus, topic: str = "look") -> StreamSnapshot:
    (stream,) = (await bus.inspect([topic])).topic(topic).streams
    return stream


async def the_group(bus: Bus, name: str = "index") -> GroupSnapshot:
    return (await bus.inspect(["look"])).topic("look").group(name)


def in_hand(group: GroupSnapshot) -> tuple[int, int, int, int]:
    return group.running, group.parked, group.due, group.orphaned


# --- every place an entry can be in


async def test_every_entry_is_counted_where_it_is(bus, redis):
    """20 entries and 5 in the inbox: each number is another one."""
    now = await now_ms(redis)
    await add(redis, [f"{now - 1_000_000 + n}-0" for n in range(20)])
    await group(redis)
    ids = await take(redis, 1)
    await redis.xack(S, "index", *ids)  # done
    await take(redis, 2, consumer="alive")
    await take(redis, 3, consumer="gone")
    lanes = [(now - 5_000, 1), (now + 60_000, 2), (now + 3_600_000, 3)]
    for due_ms, entries in lanes:
        for entry_id in await take(redis, entries):
            await redis.xclaim(S, "index", f"parked:{due_ms}", 0, [entry_id])
    await live(redis, "alive", "audit,index")
    await redis.sadd(keys.workers(S), "gone")
    await redis.xgroup_create(INBOX, "index", "0", mkstream=True)
    await add(redis, range(1, 6), INBOX)
    await take(redis, 1, stream=INBOX, consumer="alive")
    (waiting,) = await take(redis, 1, stream=INBOX, consumer="gone")
    await redis.xclaim(INBOX, "index", f"parked:{now + 60_000}", 0, [waiting])
    await take(redis, 1, stream=INBOX, consumer="gone")
    await add(redis, [f"{now - 500_000}-0", f"{now - 300_000}-0", f"{now - 100_000}-0"], DEAD)

    found = await the_group(bus)
    assert (found.undelivered, found.at_least) == (8, False)
    assert (found.pending, found.inbox, found.inbox_pending) == (11, 5, 3)
    assert in_hand(found) == (2 + 1, 6 + 1, 1, 3 + 1)
    assert found.dead == 3
    assert found.total == 20 - 1 + 5
    assert found.running + found.parked + found.orphaned == found.pending + found.inbox_pending
    assert found.oldest_undelivered_age_s == pytest.approx(1_000, abs=9)
    assert found.oldest_pending_age_s == pytest.approx(1_000, abs=9)
    assert found.oldest_pending_age_s > found.oldest_undelivered_age_s
    assert found.oldest_age_s == found.oldest_pending_age_s
    assert found.oldest_dead_age_s == pytest.approx(500, abs=9)
    assert found.newest_dead_age_s == pytest.approx(100, abs=9)
    assert [(lane.due_in_s, lane.pending) for lane in found.lanes] == [
        (0, 1),
        (pytest.approx(60, abs=9), 3),
        (pytest.approx(3_600, abs=9), 3),
    ]
    assert found.served
    consumers = {c.name: c for c in found.consumers}
    assert {n: (c.alive, c.pending) for n, c in consumers.items()} == {
        "alive": (True, 3),
        "gone": (False, 4),
        "me": (True, 0),  # keeps no lease, and was heard of
    }
    assert all(0 <= c.idle_s < 9 for c in consumers.values())


async def test_a_worker_at_work_adds_up(bus, redis):
    """What was published is done, dead, or somewhere in the snapshot."""
    hold, done = asyncio.Event(), []

    @event_handler(Looked, group="sort", concurrency=2, breaker=None)
    async def sort(event: Looked) -> None:
        if event.who == "wait":
            raise RetryLater(3_600)
        if event.who == "die":
            raise Reject("as asked")
        if event.who == "hold":
            await hold.wait()
        done.append(event.n)

    kinds = ["do"] * 5 + ["wait"] * 4 + ["die"] * 3 + ["hold"] * 2 + ["do"] * 100
    async with Worker(bus, [sort], name="sorter"):
        await bus.publish_many(Looked(who=kind, n=n) for n, kind in enumerate(kinds))

        async def holding() -> GroupSnapshot | None:
            found = await the_group(bus, "sort")
            return found if found.dead == 3 and found.parked >= 4 and found.running >= 2 else None

        await eventually(holding)

        async def adding_up() -> GroupSnapshot | None:  # once the last acks have come
            found = await the_group(bus, "sort")
            left = len(kinds) - len(done) - found.dead
            return found if found.undelivered + found.pending == left else None

        found = await eventually(adding_up)
        assert found.running + found.parked == found.pending
        assert (found.orphaned, found.served, found.at_least) == (0, True, False)
        assert {c.name: c.alive for c in found.consumers} == {"sorter": True}
        assert found.lanes[-1].pending == 4
        assert 3_590 < found.lanes[-1].due_in_s <= 4_200  # lanes are ten minutes wide there
        assert found.newest_dead_age_s < 30
        stream = await the_stream(bus)
        assert (stream.workers, stream.dead, stream.length) == (1, 3, len(kinds))
        hold.set()
        await eventually(lambda: len(done) == 107)

        async def settled() -> bool:
            found = await the_group(bus, "sort")
            return (found.undelivered, *in_hand(found)) == (0, 0, 4, 0, 0)

        await eventually(settled)
    found = await the_group(bus, "sort")
    assert (found.served, found.parked) == (False, 4)


async def test_what_a_killed_worker_held_is_orphaned_and_nobody_serves(valkey_url, tmp_path: Path):
    crew = Crew(tmp_path)
    try:
        async with Bus.connect(valkey_url) as bus:
            await bus.publish_many(Deed(n=n, kind="hold") for n in range(3))
            member = crew.start(valkey_url, name="victim", lease_s=0.6)

            async def shown() -> GroupSnapshot:
                return (await bus.inspect(["deed"])).topic("deed").group(DEEDS)

            async def holds() -> bool:
                found = await shown()
                return (found.running, found.served) == (3, True) and found.consumers[0].alive

            await member.started()
            await eventually(holds)
            member.send(signal.SIGKILL)

            async def is_given_up() -> bool:
                return not (await shown()).served

            await eventually(is_given_up)
            found = await shown()
            assert in_hand(found) == (0, 0, 0, 3)
            (victim,) = found.consumers
            assert (victim.name, victim.alive, victim.pending) == ("victim", False, 3)
            assert (await bus.inspect()).topics[0].streams[0].workers == 0
    finally:
        crew.end()


# --- undelivered, counted from the end


async def test_normal_reading(bus, redis):
    await add(redis, range(1, 251))
    for read in (0, 1, 100, 249, 250):
        await group(redis, f"g{read}", read=read)
    await add(redis, range(251, 260))
    found = (await the_stream(bus)).groups
    assert {g.group: (g.undelivered, g.at_least) for g in found} == {
        "g0": (259, False),
        "g1": (258, False),
        "g100": (159, False),
        "g249": (10, False),
        "g250": (9, False),
    }


async def test_where_the_server_has_no_count_the_newest_are_counted_once_for_all(
    bus, redis, monkeypatch
):
    """Groups made by hand in mid-stream have no counter on any server."""
    await add(redis, range(1, 5_001))
    for position in (2, 3_999, 4_000, 4_001, 4_990, 5_000):
        await redis.xgroup_create(S, f"at{position}", f"{position}-0")
    await redis.xgroup_create(S, "end", "$")
    await the_stream(bus)
    writes = watch(bus, monkeypatch)
    found = (await the_stream(bus)).groups
    assert {g.group: (g.undelivered, g.at_least) for g in found} == {
        "at2": (1_000, True),
        "at3999": (1_000, True),
        "at4000": (1_000, False),
        "at4001": (999, False),
        "at4990": (10, False),
        "at5000": (0, False),
        "end": (0, False),
    }
    pages = [c for c in asked(writes, "XREVRANGE") if c[-1] > 102]
    assert pages == [("XREVRANGE", S, "+", b"(2-0", "COUNT", 1_001)]
    assert {g.group: g.oldest_undelivered_age_s is None for g in found if g.group > "at4990"} == {
        "at5000": True,
        "end": True,
    }


async def test_counting_goes_no_further_back_than_the_slowest(bus, redis, monkeypatch):
    await add(redis, range(1, 201))
    await redis.xgroup_create(S, "near", "190-0")
    writes = watch(bus, monkeypatch)
    assert (await the_group(bus, "near")).undelivered == 10
    assert [c[3] for c in asked(writes, "XREVRANGE") if c[-1] > 102] == [b"(190-0"]


async def test_large_entries_are_not_counted_far(bus, redis):
    await add(redis, range(1, 201), size=100_000)
    await redis.xgroup_create(S, "index", "2-0")
    found = await the_group(bus)
    assert (found.undelivered, found.at_least) == (41, True)  # 4 MiB


async def test_many_streams_share_what_may_be_counted(url, redis):
    async with Bus.connect(url, topics=[Topic("spread", partitions=8)]) as bus:
        for partition in range(8):
            stream = keys.stream("spread", partition)
            await add(redis, range(1, 201), stream, size=10_000)
            await redis.xgroup_create(stream, "index", "2-0")
        found = (await bus.inspect(["spread"])).topic("spread")
        assert {s.groups[0].undelivered for s in found.streams} == {4 * 1024**2 // 8 // 10_065}
        assert found.group("index").at_least


@pytest.mark.parametrize("deleted", [20, 50, 120, 299, 300])
async def test_deleted_entries_are_not_counted(bus, redis, deleted):
    """Behind the group, right behind it, ahead and at the end."""
    await add(redis, range(1, 301))
    await group(redis, read=50)
    await redis.xdel(S, f"{deleted}-0")
    left = 250 - (deleted > 50)
    assert (await the_group(bus)).undelivered == left
    await take(redis, 100)
    assert (await the_group(bus)).undelivered == left - 100


async def test_trimmed_entries_are_not_counted(bus, redis):
    await add(redis, range(1, 401))
    await group(redis, read=50)
    await take(redis, 10)
    await redis.xtrim(S, minid="41-0", approximate=False)
    assert (await the_group(bus)).undelivered == 340
    await redis.xtrim(S, minid="151-0", approximate=False)  # pending and undelivered ones are gone
    found = await the_group(bus)
    assert (found.undelivered, found.pending, found.running) == (250, 10, 10)
    assert found.oldest_pending_age_s is None  # of no entry that exists
    assert found.oldest_undelivered_age_s is not None
    await redis.xtrim(S, maxlen=0, approximate=False)
    stream = await the_stream(bus)
    assert (stream.length, stream.groups[0].undelivered, stream.pinned_by) == (0, 0, None)
    assert (stream.first_id, stream.oldest_age_s, stream.last_id) == (None, None, None)


async def test_the_largest_id_there_can_be(bus, redis):
    await group(redis)
    await add(redis, ["18446744073709551615-18446744073709551615"])
    assert (await the_group(bus)).undelivered == 1
    await take(redis, 1)
    found = await the_group(bus)
    assert (found.undelivered, found.running, found.oldest_pending_age_s) == (0, 1, 0)


# --- who lives, and who serves; without a server

NOW_MS = 1_000_000


def judged(
    consumers: Sequence[tuple[bytes, int, int]] = (),
    inbox: Sequence[tuple[bytes, int, int]] = (),
    listed: Iterable[bytes] = (),
    leases: dict[bytes, bytes] | None = None,
    name: bytes = b"g",
) -> GroupSnapshot:
    rows, inbox_rows = [Consumer(*c) for c in consumers], [Consumer(*c) for c in inbox]
    look = GroupLook(
        name, {"pending": 99}, 0, False, None, None, rows, 0, inbox_rows, 0, None, None
    )
    held = {n: frozenset(groups.split(b",")) for n, groups in (leases or {}).items()}
    stream = StreamLook(S, {}, frozenset(listed), held, [], [look], None, hidden=False)
    return group_of(stream, look, NOW_MS)


@pytest.mark.parametrize(
    ("idle_ms", "listed", "leases", "alive", "workers"),
    [
        (999_999_999, [b"w"], {b"w": b"g"}, True, 1),
        (999_999_999, [b"w"], {b"w": b"f,g,h"}, True, 1),
        (0, [b"w"], {b"w": b"f,gg"}, True, 0),  # it has left the group, and not its entries
        (0, [b"w"], {}, False, 0),  # however lately it was heard of
        (0, [b"w", b"v"], {b"v": b"g"}, False, 1),
        (0, [b"w", b"v"], {b"v": b"g", b"w": b"g"}, True, 2),
        (59_999, [], {}, True, 1),  # another language
        (59_999, [b"v"], {b"v": b"g"}, True, 2),
        (60_000, [], {}, False, 0),
        (60_000, [b"v"], {b"v": b"f"}, False, 0),
    ],
)
def test_who_lives_and_who_serves(idle_ms, listed, leases, alive, workers):
    found = judged([(b"w", 3, idle_ms)], [], listed, leases)
    assert [(c.alive, c.leased) for c in found.consumers] == [(alive, b"w" in listed)]
    assert (found.running, found.orphaned) == ((3, 0) if alive else (0, 3))
    assert (found.served, found.workers) == (workers > 0, workers)


def test_a_consumer_that_reads_stream_and_inbox_is_one():
    found = judged([(b"w", 3, 70_000), (b"x", 1, 0)], [(b"w", 2, 50_000)])
    assert found.consumers == (
        ConsumerSnapshot("w", True, 5, 50.0),
        ConsumerSnapshot("x", True, 1, 0.0),
    )
    assert (found.pending, found.inbox_pending, found.running) == (4, 2, 6)


def test_a_lane_is_due_when_its_time_has_come():
    lanes = [(b"parked:%d" % ms, n, 0) for ms, n in ((0, 1), (999_999, 2), (1_000_000, 4))]
    lanes += [(b"parked:1000001", 8, 0), (b"parked:5000000", 16, 0), (b"parked:6000000", 0, 0)]
    found = judged(lanes, [(b"parked:5000000", 32, 0), (b"parked:late", 64, 0)])
    assert (found.parked, found.due, found.running) == (63, 7, 64)  # the last is no lane
    assert found.lanes == (
        LaneSnapshot(0.0, 1),
        LaneSnapshot(0.0, 2),
        LaneSnapshot(0.0, 4),
        LaneSnapshot(0.001, 8),
        LaneSnapshot(4_000.0, 48),
    )


def test_a_group_whose_consumers_could_not_be_seen_has_what_it_has_pending():
    assert judged().pending == 99


def test_the_server_is_asked_about_leases_in_bytes():
    found = judged([(b"caf\xff", 1, 0)], [], [b"caf\xff"], {b"caf\xff": b"g\xff"}, b"g\xff")
    assert (found.consumers[0].name, found.served) == ("caf\\xff", True)


# --- who is paused


async def pause(redis: Redis, name: str = "index", topic: str = "look", **value: Any) -> None:
    await redis.hset("bus:paused", f"{topic}:{name}", json.dumps(value))


async def test_a_group_that_is_paused_says_since_when_and_why(bus, redis):
    await group(redis)
    await group(redis, "audit")
    assert (await the_group(bus)).paused is None
    since = await now_ms(redis) - 5_000
    await pause(redis, since_ms=since, until_ms=since + 60_000, why="bad deploy")
    await pause(redis, "else")
    await pause(redis, topic="other")
    stream = await the_stream(bus)
    audit, index = stream.groups
    assert audit.paused is None
    assert index.paused is not None
    assert index.paused.since.timestamp() * 1000 == pytest.approx(since)
    assert index.paused.until is not None
    assert index.paused.until - index.paused.since == timedelta(seconds=60)
    assert index.paused.why == "bad deploy"
    assert str(await bus.inspect()).count("paused until ") == 1


async def test_a_pause_that_is_over_is_none(bus, redis):
    await group(redis)
    now = await now_ms(redis)
    await pause(redis, since_ms=now - 9_000, until_ms=now - 1)
    assert (await the_group(bus)).paused is None
    await pause(redis, since_ms=now - 9_000, until_ms=now + 60_000)
    assert (await the_group(bus)).paused is not None


async def test_what_no_pause_of_ours_says_is_one_without_end(bus, redis):
    await group(redis)
    await redis.hset("bus:paused", "look:index", "")
    paused = (await the_group(bus)).paused
    assert paused is not None
    assert (paused.since, paused.until) == (None, None)
    assert "neither since when nor why" in paused.why


async def test_pauses_that_cannot_be_read_hide_nothing_else(bus, redis):
    await group(redis)
    await redis.set("bus:paused", "a string")
    snapshot = await bus.inspect(["look"])
    assert snapshot.errors == ("the key bus:paused holds another Redis type than it should",)
    assert snapshot.topic("look").group("index").paused is None
    assert "the key bus:paused holds" in str(snapshot)


async def test_who_may_not_see_who_is_paused_sees_the_rest(url, redis, eye):
    await busy(redis)
    await pause(redis)
    async with await with_rights(
        url, "resetkeys", "~bus:{*", "~bus:topics", "~bus:probe", "+@all"
    ) as bus:
        snapshot = await bus.inspect()
    assert (snapshot.errors, snapshot.topic("look").group("index").paused) == ((), None)


# --- what the server itself counts


async def test_the_lag_is_what_the_server_says_right_or_wrong(bus, redis, counts):
    """Beside what there is: so everybody sees when they differ."""
    await add(redis, range(1, 101))
    await group(redis, read=40)
    await redis.xgroup_create(S, "middle", "30-0")
    found = {g.group: (g.undelivered, g.lag) for g in (await the_stream(bus)).groups}
    assert found == {"index": (60, 60 if counts else None), "middle": (70, None)}
    await redis.xtrim(S, minid=61, approximate=False)  # by hand, ahead of both
    found = {g.group: (g.undelivered, g.lag) for g in (await the_stream(bus)).groups}
    said = {g["name"].decode(): g.get("lag") for g in await redis.xinfo_groups(S)}
    assert found == {name: (40, lag) for name, lag in said.items()}
    assert said["index"] == (60 if counts else None)


async def test_the_lag_of_a_group_of_several_streams_is_known_if_each_is(url, redis, counts):
    async with Bus.connect(url, topics=[Topic("look", partitions=2)]) as bus:
        for stream, entries in ((S, 5), ("bus:{look:1}", 7)):
            await add(redis, range(1, entries + 1), stream)
            await group(redis, stream=stream)
        assert (await the_group(bus)).lag == (12 if counts else None)
        await redis.xgroup_setid("bus:{look:1}", "index", "3-0")
        assert (await the_group(bus)).lag is None


# --- the stream itself


async def test_the_ends_of_a_stream_and_who_holds_it(bus, redis):
    now = await now_ms(redis)
    await add(redis, [f"{now - 900_000}-3", f"{now - 600_000}-0", f"{now - 1_000}-7"])
    await group(redis, "audit", read=3)
    await group(redis, "index", read=1)
    await group(redis, "late", read=2)
    stream = await the_stream(bus)
    assert (stream.stream, stream.partition, stream.length) == (S, 0, 3)
    assert (stream.maxlen, stream.keep, stream.room) == (100_000, 100, 99_997)
    assert (stream.first_id, stream.last_id) == (f"{now - 900_000}-3", f"{now - 1_000}-7")
    assert stream.oldest_age_s == pytest.approx(900, abs=9)
    assert stream.newest_age_s == pytest.approx(1, abs=9)
    assert stream.pinned_by == "index"
    assert stream.pinned_age_s == pytest.approx(600, abs=9)
    await redis.xack(S, "index", *await take(redis, 2, "index"))
    await take(redis, 1, "late")
    stream = await the_stream(bus)  # what is pending holds it as well
    assert (stream.pinned_by, round(stream.pinned_age_s / 9)) == ("late", 0)
    await redis.xack(S, "late", stream.last_id)
    stream = await the_stream(bus)
    assert (stream.pinned_by, stream.pinned_age_s, stream.full_in_s) == (None, None, None)


@pytest.mark.parametrize(
    ("groups", "who"),
    [
        ([], None),
        ([(b"a", None, None)], None),
        ([(b"a", None, None), (b"b", b"9-0", None)], (b"b", b"9-0")),
        ([(b"a", b"10-0", None), (b"b", b"9-0", None)], (b"b", b"9-0")),
        ([(b"a", b"10-0", b"8-0"), (b"b", b"9-0", None)], (b"a", b"8-0")),
        ([(b"b", b"9-10", None), (b"a", b"9-9", None)], (b"a", b"9-9")),
    ],
)
def test_who_needs_the_oldest_entry(groups, who):
    looks = [
        GroupLook(n, {}, 0, False, ahead, held, [], 0, [], 0, None, None)
        for n, ahead, held in groups
    ]
    assert pinning(looks) == who


async def test_the_last_id_that_was_given_is_known_without_an_entry(bus, redis):
    assert (await the_stream(bus)).generated_id is None
    await add(redis, ["5-1"])
    await redis.xtrim(S, maxlen=0, approximate=False)
    stream = await the_stream(bus)
    assert (stream.last_id, stream.generated_id) == (None, "5-1")


async def test_a_full_stream(bus, redis):
    bus.topics.declare(Topic("small", maxlen=20, keep=10))
    stream = keys.stream("small", 0)
    await add(redis, range(1, 26), stream)
    await group(redis, stream=stream)
    found = await the_stream(bus, "small")
    assert (found.room, found.full_in_s, found.pinned_by) == (0, 0, "index")
    assert "is pinned by index for" in str(await bus.inspect())
    await redis.xack(stream, "index", *await take(redis, 25, stream=stream))
    found = await the_stream(bus, "small")
    assert (found.room, found.full_in_s, found.pinned_by) == (0, None, None)
    assert f"{stream} is full" in str(await bus.inspect())


# --- how fast it grows


def test_a_rate_is_what_came_in_5_to_10_s():
    growth, rates = Growth(), []
    added = [0, 10, 20, 30, 40, 50, 150, 250, 350, 450, 550, 550, 550]  # one a second
    for second, count in enumerate(added):
        assert growth.known(second * 1000) == ({"s"} if second else set())
        rates.append(growth.per_s("s", second * 1000, count, []))
    assert rates == pytest.approx(
        [0, 10, 10, 10, 10, 10, 150 / 6, 250 / 7, 350 / 8, 450 / 9, 100, 500 / 6, 500 / 7]
    )


def test_who_looks_seldom_sees_what_came_since():
    growth = Growth()
    looks = [(0, 0), (15, 150), (30, 150), (90, 750)]
    rates = [growth.per_s("s", second * 1000, added, []) for second, added in looks]
    assert rates == [0, 10, 0, 10]
    assert growth.known(690_000) == {"s"}
    assert growth.known(690_001) == set()  # too long ago


def test_two_looks_close_together_say_the_same():
    growth = Growth()
    assert growth.per_s("s", 10_000, 500, [b"10000-0", b"9900-0"]) == 10
    assert growth.per_s("s", 10_005, 503, []) == 10
    assert growth.per_s("s", 11_000, 600, []) == 100
    assert growth.per_s("s", 11_005, 600, []) == pytest.approx(99.5, abs=0.1)


def test_a_stream_made_anew_begins_anew_and_a_clock_set_back_too():
    growth = Growth()
    growth.per_s("s", 10_000, 500, [])
    assert growth.per_s("s", 20_000, 100, []) == 0
    assert growth.per_s("s", 22_000, 120, []) == 10
    assert growth.known(19_000) == set()
    assert growth.per_s("s", 19_000, 120, [b"19000-0", b"18000-0"]) == 1


def test_a_snapshot_that_took_longer_than_the_next_one_changes_nothing():
    growth = Growth()
    growth.per_s("s", 10_000, 500, [])
    assert growth.per_s("s", 20_000, 600, []) == 10
    assert growth.per_s("s", 19_000, 590, []) == 10
    assert growth.per_s("s", 30_000, 900, []) == 30


async def test_a_first_look_goes_by_the_newest_entries(bus, redis):
    bus.topics.declare(Topic("small", maxlen=1_000, keep=100))
    stream = keys.stream("small", 0)
    now = await now_ms(redis)
    await add(redis, range(now - 400_000, now, 2_000), stream)  # one in 2 s
    assert (await the_stream(bus, "small")).full_in_s is None  # nobody pins it
    await group(redis, stream=stream)
    found = await the_stream(bus, "small")
    assert found.appends_per_s == pytest.approx(0.5, rel=0.1)
    assert found.full_in_s == pytest.approx(1600, rel=0.1)


async def test_of_large_entries_a_first_look_takes_few(bus, redis, monkeypatch):
    await add(redis, ["*"] * 20, size=20_000)
    writes = watch(bus, monkeypatch)
    assert (await the_stream(bus)).appends_per_s > 0
    assert [c[-1] for c in asked(writes, "XREVRANGE")] == [64 * 1024 // 20_065 + 1]


async def test_later_looks_go_by_the_counter_and_read_no_entries(bus, redis, counts, monkeypatch):
    monkeypatch.setattr(inspector, "RATED_LEAST_MS", 1)
    bus.topics.declare(TOPIC)
    await add(redis, ["*"] * 50)
    await the_stream(bus)
    await add(redis, ["*"] * 500)
    writes = watch(bus, monkeypatch)

    async def rises() -> bool:  # more than 100 newest entries could say
        return (await the_stream(bus)).appends_per_s > 0

    await eventually(rises)
    assert (asked(writes, "XREVRANGE") == []) == counts


async def test_an_idle_stream_does_not_grow_and_is_not_looked_into(bus, redis, monkeypatch):
    now = await now_ms(redis)
    await add(redis, range(now - 700_000, now - 600_500, 1_000))
    writes = watch(bus, monkeypatch)
    assert (await the_stream(bus)).appends_per_s == 0
    assert not asked(writes, "XREVRANGE")


# --- which topics


async def test_all_topics_that_are_known(bus, redis):
    await bus.publish(Looked(who="a"))
    async with Bus.connect(
        bus.address, topics=[Topic("other", partitions=3, on_full="reject")]
    ) as b:
        await b.topics.record("other")
    bus.topics.declare(Topic("declared", retention=timedelta(hours=1)))
    snapshot = await bus.inspect()
    assert [t.name for t in snapshot.topics] == ["declared", "look", "other"]
    declared, look, other = snapshot.topics
    assert (declared.partitions, declared.length, declared.groups) == (1, 0, ())
    assert declared.retention_s == 3_600
    assert (look.maxlen, look.keep, look.on_full, look.implicit) == (100_000, 100, "block", False)
    assert (other.partitions, other.on_full, other.retention_s) == (3, "reject", None)
    assert [s.stream for s in other.streams] == [f"bus:{{other:{n}}}" for n in range(3)]
    assert [s.partition for s in other.streams] == [0, 1, 2]
    assert all((s.length, s.error, s.appends_per_s) == (0, None, 0) for s in other.streams)
    assert not await redis.exists("bus:{other:0}", "bus:{declared:0}")
    with pytest.raises(KeyError, match="nope"):
        snapshot.topic("nope")
    with pytest.raises(KeyError, match="nope"):
        look.group("nope")


async def test_only_the_topics_that_were_asked_for(bus, redis):
    await bus.publish(Looked(who="a"))
    await add(redis, [1], "bus:{foreign:0}")  # nobody recorded it
    assert [t.name for t in (await bus.inspect(["look"])).topics] == ["look"]
    asked = await bus.inspect(iter(["look", "foreign", "look"]))
    assert [(t.name, t.length, t.implicit) for t in asked.topics] == [
        ("foreign", 1, True),
        ("look", 1, False),
    ]
    assert (await bus.inspect([])).topics == ()
    with pytest.raises(UnknownTopic, match="did you mean look"):
        await bus.inspect(["look", "lok"])
    with pytest.raises(DeclarationError, match="a list of names, not a string"):
        await bus.inspect("look")
    for bad in (["a b"], [None], [["look"]]):
        with pytest.raises(DeclarationError):
            await bus.inspect(bad)


async def test_a_bus_without_topics(url):
    async with Bus.connect(url) as bus:
        snapshot = await bus.inspect()
        assert snapshot.topics == ()
        assert abs(snapshot.time.timestamp() - await now_ms(bus.redis) / 1000) < 9
        assert snapshot.server.memory_bytes > 100_000
        assert snapshot.server.kind in ("valkey", "redis")
        assert snapshot.server.version.split(".")[0] in ("6", "7", "9")
        assert snapshot.server.memory_limit_bytes is None
        assert snapshot.server.uptime_s >= 0


# --- several streams


async def test_partitions_are_summed(url, redis):
    async with Bus.connect(url, topics=[Topic("spread", partitions=4, maxlen=1000)]) as bus:
        for n in range(3):  # nothing in the fourth, not even a stream
            stream = keys.stream("spread", n)
            await add(redis, range(1, 10 * (n + 1) + 1), stream)
            await group(redis, stream=stream)
            await take(redis, n + 1, stream=stream)
            await add(redis, [1], keys.dead(stream, "index"))
        await group(redis, "audit", keys.stream("spread", 1))
        topic = (await bus.inspect()).topic("spread")
        assert (topic.length, topic.dead, topic.partitions) == (60, 3, 4)
        index = topic.group("index")
        assert (index.undelivered, index.pending, index.running, index.dead) == (54, 6, 6, 3)
        assert topic.group("audit").undelivered == 20
        assert [s.length for s in topic.streams] == [10, 20, 30, 0]
        assert [g.group for g in topic.groups] == ["audit", "index"]


# --- what should not be there, and what goes away


async def test_a_key_of_another_type_hides_nothing_else(bus, redis):
    bus.topics.declare(Topic("broken"))
    await add(redis, [1, 2])
    await group(redis)
    await redis.set("bus:{broken:0}", "precious")
    snapshot = await bus.inspect()
    broken, look = snapshot.topic("broken").streams[0], snapshot.topic("look").streams[0]
    assert "bus:{broken:0} holds another Redis type" in broken.error
    assert (broken.length, broken.groups, broken.room) == (0, (), 1_000_000)
    assert (look.error, look.groups[0].undelivered) == (None, 2)
    assert "bus:{broken:0} holds another Redis type" in str(snapshot)


@pytest.mark.parametrize("key", [INBOX, DEAD, keys.workers(S), keys.lease(S, "w").decode()])
async def test_a_broken_key_beside_a_stream_is_told_and_the_rest_is_shown(bus, redis, key):
    await add(redis, range(1, 6))
    await group(redis)
    await group(redis, "audit")
    await add(redis, [1], keys.inbox(S, "audit"))
    await take(redis, 2, consumer="w")
    await live(redis, "w")
    await redis.delete(key)
    await redis.hset(key, "a", "b")
    stream = await the_stream(bus)
    assert f"{key} holds another Redis type" in stream.error
    index = stream.groups[1]
    assert (index.undelivered, index.pending, index.running, index.dead) == (3, 2, 2, 0)
    assert stream.groups[0].inbox == 1
    assert stream.workers == (0 if key == keys.workers(S) else 1)


async def test_groups_and_consumers_that_others_named_in_any_bytes(bus, redis):
    await redis.xgroup_create(S, b"caf\xff", "0", mkstream=True)
    await add(redis, [1, 2, 3])
    await redis.xadd(b"bus:{look:0}:inbox:caf\xff", {"n": "1"})
    await redis.xadd(b"bus:{look:0}:dead:caf\xff", {"n": "1"})
    await redis.xreadgroup(b"caf\xff", b"\xfe\x1b[2J", {S: ">"}, count=1)
    await redis.xgroup_create(S, "\x1b[2Jé", "0")
    await redis.xgroup_create(S, "", "0")
    snapshot = await bus.inspect()
    found = snapshot.topic("look").group("caf\\xff")
    assert (found.running, found.inbox, found.dead, found.undelivered) == (1, 1, 1, 2)
    assert found.consumers[0].name == "\\xfe\x1b[2J"
    assert "\x1b" not in str(snapshot)
    json.loads(msgspec.json.encode(snapshot))


@pytest.mark.parametrize("asked", ["TIME", "INFO", "XINFO", "XLEN"])
async def test_what_is_wrong_with_the_server_is_raised(bus, redis, monkeypatch, asked):
    await busy(redis)
    answer(bus, monkeypatch, asked, ReplyError("LOADING", "Redis is loading"))
    monkeypatch.setattr(inspector, "INSPECT_PATIENCE_S", 0.1)
    with pytest.raises(ServerRefused, match="LOADING"):
        await bus.inspect()


async def test_a_record_that_cannot_be_read_is_named(bus, redis):
    await redis.hset("bus:topics", mapping={"broken": "{", "no name": '{"partitions": 1}'})
    snapshot = await bus.inspect()
    assert [e for e in snapshot.errors if "broken" in e]
    assert [e for e in snapshot.errors if "'no name'" in e]
    assert "broken" in str(snapshot)
    assert {t.name for t in snapshot.topics}.isdisjoint({"broken", "no name"})


async def test_a_connection_that_is_cut_is_made_again(server):
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as bus:
        before = await bus.inspect()
        proxy.lose_replies = 1
        after = await bus.inspect()
        assert proxy.lost == 1
        assert [t.name for t in after.topics] == [t.name for t in before.topics]


async def test_what_the_server_does_not_understand_is_told(bus, redis, monkeypatch):
    await busy(redis)
    answer(bus, monkeypatch, "XPENDING", ReplyError("ERR", "unknown command"))
    stream = await the_stream(bus)
    assert stream.error == f"the key {S} cannot be looked at: ERR"
    assert stream.groups[0].running == 5


def answer(bus: Bus, monkeypatch: pytest.MonkeyPatch, name: str, reply: Any) -> None:
    """Answer all commands of that name with `reply`."""
    look = bus.store.archive.look

    async def watched(commands: Sequence[tuple[Any, ...]]) -> Any:
        replies = await look(commands)
        return [reply if c[0] == name else r for c, r in zip(commands, replies, strict=True)]

    monkeypatch.setattr(bus.store.archive, "look", watched)


def before(bus: Bus, monkeypatch: pytest.MonkeyPatch, nth: int, act: Callable[[], Any]) -> None:
    """Do something just before the nth write of the next snapshot."""
    look, writes = bus.store.archive.look, 0

    async def watched(commands: Sequence[Any]) -> Any:
        nonlocal writes
        writes += 1
        if writes == nth:
            await act()
        return await look(commands)

    monkeypatch.setattr(bus.store.archive, "look", watched)


async def busy(redis: Redis) -> None:
    """Something of everything."""
    await add(redis, range(1, 301))
    await group(redis)
    await take(redis, 5)
    await redis.xgroup_create(S, "middle", "150-0")
    await live(redis, "w")
    await redis.xgroup_create(INBOX, "index", "0", mkstream=True)
    await add(redis, [1, 2], INBOX)
    await add(redis, [1, 2], DEAD)


@pytest.mark.parametrize("nth", [2, 3, 4])
@pytest.mark.parametrize("what", ["group", "stream", "type", "beside", "trim"])
async def test_what_goes_away_meanwhile_breaks_nothing(bus, redis, monkeypatch, what, nth):
    await busy(redis)

    async def go_away() -> None:
        if what == "group":
            await redis.xgroup_destroy(S, "index")
            await redis.xgroup_destroy(INBOX, "index")
        elif what == "trim":
            await redis.xtrim(S, maxlen=0, approximate=False)
            await redis.xtrim(DEAD, maxlen=0, approximate=False)
        elif what == "beside":
            await redis.delete(INBOX, DEAD, keys.workers(S), keys.lease(S, "w"))
        else:
            await redis.delete(S, INBOX, DEAD)
            if what == "type":
                for key in (S, INBOX, DEAD):
                    await redis.set(key, "precious")

    before(bus, monkeypatch, nth, go_away)
    stream = await the_stream(bus)
    assert (stream.error is None) == (what != "type")
    if nth == 2:
        assert stream.length == (0 if what in ("stream", "type", "trim") else 300)
    else:
        assert (stream.length, [g.group for g in stream.groups]) == (300, ["index", "middle"])
    str(await bus.inspect())


# --- rights


async def with_rights(url: str, *rights: str) -> Bus:
    async with Redis.from_url(url) as admin:
        await admin.execute_command("ACL", "SETUSER", "eye", "reset", "on", ">pw", "~*", *rights)
    return Bus.connect(url.replace("redis://", "redis://eye:pw@"), topics=[TOPIC])


@pytest.fixture
def eye(server: Any) -> Any:
    yield
    ask(server, "ACL", "DELUSER", "eye")


async def test_who_may_see_nothing_is_told(url, redis, eye):
    await busy(redis)
    async with await with_rights(url, "+@all", "-xinfo") as bus:
        with pytest.raises(PermissionDenied, match=r"bus:\{look:0\}.*docs/wire.md"):
            await bus.inspect()
    async with await with_rights(url, "+@all", "-hgetall") as bus:
        with pytest.raises(PermissionDenied, match="bus:topics"):
            await bus.inspect()
    async with await with_rights(url, "+@all", "-time") as bus:
        with pytest.raises(PermissionDenied, match="TIME"):
            await bus.inspect()


@pytest.mark.parametrize("lacks", ["smembers", "get", "xlen", "xrange", "xrevrange", "xpending"])
async def test_what_may_not_be_seen_is_told_and_the_rest_is_shown(url, redis, eye, lacks):
    await busy(redis)
    await take(redis, 1, consumer="w")  # listed; judged by its idle time if not by its lease
    async with await with_rights(url, "+@all", f"-{lacks}") as bus:
        stream = await the_stream(bus)
    assert "lacks a right on bus:{look:0}" in stream.error
    index, middle = stream.groups
    assert (stream.length, index.pending, index.running) == (300, 6, 6)
    assert (index.inbox, index.dead) == ((0, 0) if lacks == "xlen" else (2, 2))
    known = lacks != "xrevrange"
    assert (middle.undelivered, middle.at_least) == ((150, False) if known else (0, True))
    assert stream.workers == (0 if lacks in ("smembers", "get") else 1)


async def test_one_topic_that_may_be_seen_is_enough(url, redis, eye):
    await busy(redis)
    bus = await with_rights(url, "resetkeys", "~bus:*look*", "~bus:topics", "~bus:probe", "+@all")
    bus.topics.declare(Topic("other"))
    async with bus:
        snapshot = await bus.inspect()
    assert snapshot.topic("look").streams[0].error is None
    assert "lacks a right on bus:{other:0}" in snapshot.topic("other").streams[0].error


async def test_without_info_there_are_no_facts_of_the_server(url, redis, eye):
    async with await with_rights(url, "+@all", "-info") as bus:
        snapshot = await bus.inspect()
    assert snapshot.server is None
    assert str(snapshot).startswith(f"{snapshot.time:%Y}")


# --- what it costs, and that it only looks


def watch(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[Any, ...]]]:
    """Return a list that fills with the writes of the connection for looking back."""
    writes: list[list[tuple[Any, ...]]] = []
    look = bus.store.archive.look

    async def watched(commands: Sequence[tuple[Any, ...]]) -> Any:
        writes.append(list(commands))
        return await look(commands)

    monkeypatch.setattr(bus.store.archive, "look", watched)
    return writes


def asked(writes: Iterable[Sequence[tuple[Any, ...]]], name: str) -> list[tuple[Any, ...]]:
    """Return the commands of that name."""
    return [command for write in writes for command in write if command[0] == name]


READING = {"xinfo", "xrange", "xrevrange", "xpending", "xlen", "smembers", "get", "time", "info"}


async def test_it_only_reads(bus, redis):
    await busy(redis)
    await bus.inspect()
    await redis.config_resetstat()
    await bus.inspect()
    used = {name.partition("|")[0] for name in await redis.info("commandstats")}
    used = {name.removeprefix("cmdstat_") for name in used}
    assert used - {"config", "hgetall"} == READING


async def test_it_works_as_a_user_who_may_only_read(url, redis, eye):
    await busy(redis)
    read = [f"+{command}" for command in (*READING, "hgetall")]
    start = ("+ping", "+client", "+select", "+auth")
    bus = await with_rights(url, *start, *read)
    snapshot = await bus.inspect()  # without `async with`, which would try whether it may write
    assert snapshot.topic("look").group("index").pending == 5
    await bus.close()


async def test_no_group_notices(bus, redis, server):
    await busy(redis)
    looks = [("XINFO", "GROUPS", S), ("XINFO", "GROUPS", INBOX), ("XPENDING", S, "index")]
    shown = [ask(server, *words) for words in looks]
    await bus.inspect()
    assert [ask(server, *words) for words in looks] == shown


async def fifty(redis: Redis, stream: str, groups: int, *, idle: bool) -> None:
    await add(redis, ["*"] * 10, stream)
    await live(redis, "w", ",".join(f"g{n}" for n in range(groups)), stream)
    for n in range(groups):
        await group(redis, f"g{n}", stream, read=10)
        if not idle:
            await redis.xgroup_create(keys.inbox(stream, f"g{n}"), f"g{n}", "0", mkstream=True)
            await add(redis, [1], keys.inbox(stream, f"g{n}"))
            await add(redis, [1], keys.dead(stream, f"g{n}"))
    if not idle:
        await add(redis, ["*"] * 10, stream)
        for n in range(groups):
            await take(redis, 5, f"g{n}", stream)


async def test_what_50_groups_on_one_stream_cost(bus, redis, counts, monkeypatch):
    """Idle groups: three commands each, no bodies. Busy ones: eight, and a body or two each."""
    await fifty(redis, S, 50, idle=True)
    await bus.inspect(["look"])
    writes = watch(bus, monkeypatch)
    await bus.inspect(["look"])
    assert [len(w) for w in writes] == [4, 3, 1 + 50 * 3 + (not counts)]
    assert not asked(writes, "XRANGE")


async def test_groups_that_never_read_cost_two_commands(bus, redis, counts, monkeypatch):
    await add(redis, ["*"] * 10)
    for n in range(10):
        await redis.xgroup_create(S, f"g{n}", "0")
    await bus.inspect(["look"])
    writes = watch(bus, monkeypatch)
    snapshot = await bus.inspect(["look"])
    assert [len(w) for w in writes] == [4, 3, 2 * 10 + (not counts)]
    found = snapshot.topic("look").groups
    assert all((g.undelivered, g.oldest_undelivered_age_s is None) == (10, False) for g in found)


async def test_what_50_busy_groups_cost(bus, redis, counts, monkeypatch):
    await fifty(redis, S, 50, idle=False)
    await bus.inspect(["look"])
    writes = watch(bus, monkeypatch)
    snapshot = await bus.inspect(["look"])
    assert [len(w) for w in writes] == [4, 3, 1 + 50 * 4 + 1 + 2 * (not counts), 50 * 3]
    # All groups stand at one place: the next entry is asked for once.
    assert len([c for c in asked(writes, "XRANGE") if c[1] == S]) == 1
    bodies = [c[-1] for c in asked(writes, "XRANGE") + asked(writes, "XREVRANGE")]
    assert max(bodies) == (1 if counts else 1_001)
    found = snapshot.topic("look").groups
    assert {(g.undelivered, g.running, g.inbox, g.dead) for g in found} == {(5, 5, 1, 1)}


async def test_40_streams_cost_no_more_round_trips_than_one(url, redis, monkeypatch):
    topics = [Topic(f"many{n}", partitions=4) for n in range(10)]
    async with Bus.connect(url, topics=topics) as bus:
        streams = [keys.stream(t.name, p) for t in topics for p in range(4)]
        for stream in streams:
            await fifty(redis, stream, 5, idle=False)
        await bus.inspect()
        writes = watch(bus, monkeypatch)
        snapshot = await bus.inspect()
        assert len(writes) == 4
        assert sum(map(len, writes)) <= 4 + 40 * (3 + 1 + 3) + 200 * 7
        assert all(len(w) <= overview.COMMANDS_AT_ONCE for w in writes)
        assert {t.group("g3").running for t in snapshot.topics} == {4 * 5}


async def test_many_questions_go_out_in_several_writes(bus, redis, monkeypatch):
    await fifty(redis, S, 50, idle=True)
    monkeypatch.setattr(overview, "COMMANDS_AT_ONCE", 40)
    writes = watch(bus, monkeypatch)
    snapshot = await bus.inspect(["look"])
    assert [len(w) for w in writes[2:-1]] == [40] * (len(writes) - 3)
    assert len(snapshot.topic("look").groups) == 50


async def test_it_holds_up_neither_verdicts_nor_publishes(bus, redis):
    await bus.publish(Looked(who="a"))
    slow = bus.store.archive.look([("BLPOP", "none", 5)])
    held = asyncio.ensure_future(slow)
    looking = asyncio.create_task(bus.inspect())
    await asyncio.wait_for(bus.publish(Looked(who="b")), 4)
    assert await asyncio.wait_for(bus.store.commands.call("PING"), 4) == b"PONG"
    assert not looking.done()
    for task in (looking, held):
        task.cancel()


# --- to be passed on


async def test_it_goes_through_json_and_back(bus, redis):
    await busy(redis)
    snapshot = await bus.inspect()
    plain = msgspec.to_builtins(snapshot)
    (topic,) = plain["topics"]
    (consumer,) = topic["streams"][0]["groups"][0]["consumers"]
    said = {"name": "me", "alive": True, "pending": 5, "leased": False}
    assert consumer == {**said, "idle_s": consumer["idle_s"]}
    assert topic["groups"][0]["undelivered"] == 295
    assert json.loads(json.dumps(plain)) == msgspec.json.decode(msgspec.json.encode(snapshot))
    assert msgspec.convert(json.loads(json.dumps(plain)), Snapshot) == snapshot


async def test_it_is_printed_as_the_operations_document_has_it(valkey_url, tmp_path: Path):
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    script = tmp_path / "glance.py"
    script.write_text(blocks(text)["inspect"], encoding="utf-8")
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Looked(who="a"))
        await bus.redis.xgroup_create(S, "receipt", "0")
    printed = (await asyncio.to_thread(run, script, valkey_url)).splitlines()
    shown = text.partition("2026-11-20 09:03:00Z  valkey")[2].partition("```")[0].splitlines()
    assert printed[3].split() == shown[3].split()
    assert re.fullmatch(r"  receipt +1 +0 +0 +0 +0 +0 +0 +\d s  not served", printed[4])
