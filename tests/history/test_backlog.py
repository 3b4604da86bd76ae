"""Who is how far behind, who holds a stream, and when it will be full: on every kind of server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import (
    Backlog,
    Bus,
    DeclarationError,
    Event,
    Topic,
    UnknownTopic,
    Worker,
    WrongKeyType,
    event_handler,
)
from bus.history.backlog import GroupBacklog, StreamBacklog, appends_per_s, of_stream, pinning
from bus.streams import keys
from bus.streams.inspection import GroupSeen, StreamSeen
from bus.streams.topics import Record
from tests.servers import ask
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

TOPIC = Topic("queue", maxlen=100_000, keep=100)
S = "bus:{queue:0}"
# Below keep there is no share of the room to find out: whatever is counted is the backlog.
WIDE = Topic("wide", maxlen=100_000, keep=50_000)
W = "bus:{wide:0}"


class Queued(Event, type="queue.joined", key="who"):
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


async def add(redis: Redis, ids: Iterable[int | str], stream: str = S) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for entry_id in ids:
            pipe.xadd(stream, {"n": "1"}, id=str(entry_id))
        await pipe.execute()


async def group(redis: Redis, name: str = "index", read: int = 0, stream: str = S) -> None:
    await redis.xgroup_create(stream, name, "0", mkstream=True)
    if read:
        await take(redis, read, name, stream)


async def take(redis: Redis, count: int, name: str = "index", stream: str = S) -> None:
    """Have entries delivered, and finish them."""
    ((_, rows),) = await redis.xreadgroup(name, "me", {stream: ">"}, count=count)
    await redis.xack(stream, name, *(entry_id for entry_id, _ in rows))


async def now_ms(redis: Redis) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def undelivered(bus: Bus, name: str = "index") -> tuple[int, bool]:
    found = (await bus.backlog("queue")).of(name)
    return found.undelivered, found.at_least


async def one(bus: Bus) -> StreamBacklog:
    (stream,) = (await bus.backlog("queue")).streams
    return stream


# --- undelivered


@pytest.mark.parametrize("read", [0, 1, 100, 149, 150, 249, 250])
async def test_normal_reading_is_counted_exactly(bus, redis, read):
    await group(redis)
    await add(redis, range(1, 251))
    if read:
        await take(redis, read)
    assert await undelivered(bus) == (250 - read, False)


@pytest.mark.parametrize("left", [9_999, 10_000, 10_001, 12_000])
async def test_above_ten_thousand_it_is_exact_or_at_least(bus, redis, counts, left):
    await group(redis)
    await add(redis, range(1, left + 6))
    await take(redis, 5)
    exact = counts or left <= 10_000
    assert await undelivered(bus) == (left if exact else 10_000, not exact)


async def test_a_group_that_read_nothing_has_all_there_is(bus, redis, monkeypatch):
    """Also above 10,000 on a server without counters, and with the front trimmed by hand."""
    bus.topics.declare(WIDE)
    await group(redis, stream=W)
    await add(redis, range(1, 11_001), W)
    await redis.xtrim(W, minid="501-0", approximate=False)
    refuse_to_count(bus, monkeypatch)
    assert (await bus.backlog("wide")).of("index").undelivered == 10_500


def refuse_to_count(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr(bus.store.archive, "range", refuse)


async def test_the_servers_count_spares_counting(bus, redis, counts, monkeypatch):
    bus.topics.declare(WIDE)
    await bus.store.create_groups([(W, "index", "0")])
    await add(redis, range(1, 301), W)
    await take(redis, 50, stream=W)
    if counts:
        refuse_to_count(bus, monkeypatch)
    assert (await bus.backlog("wide")).of("index").undelivered == 250


@pytest.mark.parametrize("deleted", [20, 50, 120, 299, 300])
async def test_deleted_entries_are_not_counted(bus, redis, deleted):
    """Behind the group, right behind it, ahead and at the end."""
    await group(redis)
    await add(redis, range(1, 301))
    await take(redis, 50)
    await redis.xdel(S, f"{deleted}-0")
    left = 250 - (deleted > 50)
    assert await undelivered(bus) == (left, False)
    await take(redis, 100)
    assert await undelivered(bus) == (left - 100, False)
    await add(redis, range(301, 500))
    assert await undelivered(bus) == (left + 99, False)


async def test_a_trim_of_handled_entries_changes_nothing(bus, redis):
    await group(redis)
    await add(redis, range(1, 301))
    await take(redis, 50)
    await redis.xtrim(S, minid="40-0", approximate=False)
    assert await undelivered(bus) == (250, False)
    await take(redis, 20)
    await redis.xtrim(S, minid="71-0", approximate=False)
    assert await undelivered(bus) == (230, False)


async def test_a_number_that_cannot_be_is_not_believed(bus, redis):
    """A trim of what nobody was given makes the lag of 7.0 larger than the stream."""
    await group(redis)
    await add(redis, range(1, 401))
    await take(redis, 50)
    await redis.xtrim(S, minid="151-0", approximate=False)
    assert await undelivered(bus) == (250, False)
    await take(redis, 1)
    assert await undelivered(bus) == (249, False)


@pytest.mark.parametrize("how", ["trimmed", "deleted"])
async def test_entries_gone_right_ahead_of_a_group_are_counted_for_ever_by_7_0(
    bus, redis, server_kind, how
):
    await group(redis)
    await add(redis, range(1, 401))
    await take(redis, 50)
    if how == "trimmed":
        await redis.xtrim(S, minid="71-0", approximate=False)
    else:
        await redis.xdel(S, *(f"{n}-0" for n in range(51, 71)))
    assert await undelivered(bus) == (330, False)
    await take(redis, 100)
    wrong = 20 if server_kind == "redis-7.0" else 0
    assert await undelivered(bus) == (230 + wrong, False)
    await take(redis, 150)
    assert await undelivered(bus) == (80, False)  # short: looked at
    await take(redis, 80)
    assert await undelivered(bus) == (0, False)
    await add(redis, range(401, 601))
    assert await undelivered(bus) == (200 + wrong, False)
    await redis.xgroup_setid(S, "index", "400-0")  # the remedy, as the head of the module has it
    assert await undelivered(bus) == (200, False)
    await take(redis, 200)
    await add(redis, range(601, 751))
    assert await undelivered(bus) == (150, False)


async def test_a_stream_trimmed_to_nothing(bus, redis):
    await group(redis)
    await add(redis, range(1, 301))
    await take(redis, 50)
    await redis.xreadgroup("index", "me", {S: ">"}, count=20)
    await redis.xtrim(S, maxlen=0, approximate=False)
    stream = await one(bus)
    assert (stream.length, stream.pinned_by, stream.full_in_s) == (0, None, None)
    assert stream.groups[0] == GroupBacklog("index", 0, False, 20, 0, None, 0.0)
    await add(redis, range(301, 501))
    assert await undelivered(bus) == (200, False)


@pytest.mark.parametrize("first", ["$", "150-0"])
async def test_a_group_that_began_in_mid_stream(bus, redis, first):
    await add(redis, range(1, 301))
    await redis.xgroup_create(S, "index", first)
    await add(redis, range(301, 601))
    begun = 300 if first == "$" else 150
    assert await undelivered(bus) == (600 - begun, False)
    await take(redis, 10)
    assert await undelivered(bus) == (590 - begun, False)


async def test_after_a_restart_it_is_still_exact(private_server, server_kind):
    server = private_server(server_kind, aof=True)
    async with Redis.from_url(server.url) as redis:
        await group(redis)
        await add(redis, range(1, 301))
        await take(redis, 50)
    await asyncio.to_thread(server.restart)
    async with Bus.connect(server.url) as bus, Redis.from_url(server.url) as redis:
        assert await undelivered(bus) == (250, False)
        await take(redis, 50)
        assert await undelivered(bus) == (200, False)


# --- what decides, without a server

INFO = {
    "length": 300,
    "first-entry": [b"5-0", []],
    "last-entry": [b"400-7", []],
    "last-generated-id": b"500-0",
    "max-deleted-entry-id": b"0-0",
    "entries-added": 400,
}


async def test_what_comes_between_two_looks_is_seen():
    """The group had read to the end when it was asked for; then a hundred and one came."""
    row = {"last-delivered-id": b"400-7", "pending": 0}
    late = GroupSeen(b"g", row, [b"%d-0" % n for n in range(501, 602)], None, 0)
    stream = StreamSeen(S, 700, INFO, [], [late])
    judged = await of_stream(None, stream, Record(1))  # needs no server
    assert (judged.groups[0].undelivered, judged.groups[0].oldest_undelivered_age_s) == (101, 0.199)


@pytest.mark.parametrize(
    ("newest", "now", "rate"),
    [
        ([], 10_000, 0),
        ([b"9000-0"], 10_000, 0),  # one entry is no rate
        ([b"9000-0", b"8000-0"], 10_000, 0.5),
        ([b"9000-0", b"8000-0"], 208_000, 0.005),  # it decays
        ([b"9000-0", b"8000-0"], 609_000, 1 / 601),
        ([b"9000-0", b"8000-0"], 609_001, 0),  # nothing in ten minutes
        ([b"9000-1", b"9000-0"], 9_000, 1000),
        ([b"9900-1", b"9900-0"], 9_000, 1000),  # a clock that was set back
    ],
)
def test_how_fast_a_stream_grows(newest, now, rate):
    assert appends_per_s(newest, now) == pytest.approx(rate)


def seen(name: bytes, ahead: list[bytes], oldest: bytes | None) -> GroupSeen:
    return GroupSeen(name, {}, ahead, oldest, 0)


@pytest.mark.parametrize(
    ("groups", "who"),
    [
        ([], None),
        ([seen(b"a", [], None)], None),
        ([seen(b"a", [], None), seen(b"b", [b"9-0"], None)], (b"b", b"9-0")),
        ([seen(b"a", [b"10-0"], None), seen(b"b", [b"9-0"], None)], (b"b", b"9-0")),
        ([seen(b"a", [b"9-10"], None), seen(b"b", [b"9-9"], None)], (b"b", b"9-9")),
        ([seen(b"a", [b"10-0"], b"8-0"), seen(b"b", [b"9-0"], None)], (b"a", b"8-0")),
        ([seen(b"a", [], b"8-0"), seen(b"b", [b"9-0"], None)], (b"a", b"8-0")),
    ],
)
def test_who_needs_the_oldest_entry(groups, who):
    found = pinning(groups)
    assert (found and (found[0].group, found[1])) == who


# --- age


async def test_the_age_is_that_of_the_oldest_undelivered_entry(bus, redis):
    now = await now_ms(redis)
    await add(redis, [f"{now - 500_000}-0", f"{now - 180_000}-3", f"{now - 1_000}-0"])
    await group(redis)
    ages = []
    for _ in range(4):
        ages.append((await bus.backlog("queue")).of("index").oldest_undelivered_age_s)
        if len(ages) < 4:
            await take(redis, 1)
    assert ages[:3] == pytest.approx([500, 180, 1], abs=5)
    assert ages[3] is None


async def test_no_age_is_negative(bus, redis):
    await add(redis, [f"{await now_ms(redis) + 3_600_000}-0"])
    await group(redis)
    assert (await bus.backlog("queue")).of("index").oldest_undelivered_age_s == 0


async def test_the_largest_id_there_can_be(bus, redis):
    await group(redis)
    await group(redis, "audit")
    await add(redis, ["18446744073709551615-18446744073709551615"])
    await take(redis, 1, "audit")
    stream = await one(bus)
    assert [g.undelivered for g in stream.groups] == [0, 1]  # in the order of names
    assert (stream.pinned_by, stream.pinned_since.year) == ("index", 9999)


# --- pending, inbox, several groups and partitions


async def test_pending_and_inbox_are_numbers_of_their_own(bus, redis):
    await add(redis, range(1, 21))
    await group(redis)
    await redis.xreadgroup("index", "me", {S: ">"}, count=12)
    await redis.xack(S, "index", "1-0", "2-0")
    await add(redis, range(1, 4), keys.inbox(S, "index"))
    await group(redis, "audit", read=20)
    backlog = await bus.backlog("queue")
    index, audit = backlog.of("index"), backlog.of("audit")
    assert (index.pending, index.inbox, index.undelivered, index.total) == (10, 3, 8, 21)
    assert (audit.pending, audit.inbox, audit.undelivered, audit.total) == (0, 0, 0, 0)
    assert [g.group for g in backlog.groups] == ["audit", "index"]
    with pytest.raises(KeyError, match="nobody"):
        backlog.of("nobody")


async def test_partitions_are_summed(url, redis):
    async with Bus.connect(url, topics=[Topic("spread", partitions=4, maxlen=1000)]) as bus:
        streams = [keys.stream("spread", p) for p in range(4)]
        now = await now_ms(redis)
        for n, stream in enumerate(streams[:3]):  # nothing in the fourth, not even a stream
            await add(redis, [f"{now - 1000 * (n + 1)}-{i}" for i in range(10 * (n + 1))], stream)
            await group(redis, stream=stream)
            await redis.xreadgroup("index", "me", {stream: ">"}, count=n + 1)
            await add(redis, [1], keys.inbox(stream, "index"))
        await group(redis, "audit", stream=streams[1])
        backlog = await bus.backlog("spread")
        index = backlog.of("index")
        assert (backlog.length, index.undelivered, index.pending, index.inbox) == (60, 54, 6, 3)
        assert index.oldest_undelivered_age_s == pytest.approx(3, abs=2)
        assert backlog.of("audit").undelivered == 20
        assert [s.stream for s in backlog.streams] == streams
        assert [s.length for s in backlog.streams] == [10, 20, 30, 0]
        assert [s.pinned_by for s in backlog.streams[2:]] == ["index", None]
    async with Bus.connect(url, topics=[]) as other:
        await other.topics.record("spread")
        assert len((await other.backlog("spread")).streams) == 1  # nobody recorded four


def test_a_sum_is_at_least_if_a_part_is():
    def part(name: str, **other: Any) -> StreamBacklog:
        of = {"undelivered": 5, "at_least": False, "pending": 1, "inbox": 0, "share": 0.25}
        of |= {"oldest_undelivered_age_s": 3.0, **other}
        return StreamBacklog(name, 9, 100, 10, 91, (GroupBacklog("g", **of),), None, None, None)

    backlog = Backlog(
        "t",
        (part("0"), part("1", at_least=True, share=0.5, oldest_undelivered_age_s=9.0), part("2")),
    )
    assert backlog.of("g") == GroupBacklog("g", 15, True, 3, 0, 9.0, 0.5)
    idle = part("3", oldest_undelivered_age_s=None)
    assert Backlog("t", (idle,)).of("g").oldest_undelivered_age_s is None
    assert Backlog("t", (idle, part("0"))).of("g").oldest_undelivered_age_s == 3.0


async def test_partitions_cost_no_round_trips(url, redis, monkeypatch):
    async with Bus.connect(url, topics=[Topic("broad", partitions=130)]) as bus:
        for partition in range(130):
            await add(redis, [1, 2, 3], keys.stream("broad", partition))
            await group(redis, stream=keys.stream("broad", partition))
        await redis.xreadgroup("index", "me", {keys.stream("broad", 129): ">"}, count=1)
        writes = []
        look = bus.store.archive.look

        async def watched(commands):
            writes.append(len(commands))
            return await look(commands)

        monkeypatch.setattr(bus.store.archive, "look", watched)
        backlog = await bus.backlog("broad")
        assert backlog.of("index").undelivered == 3 * 130 - 1
        assert len(writes) == 3 * 3  # 64 streams a write


# --- who holds the stream


async def test_the_group_that_needs_the_oldest_entry_pins_it(bus, redis):
    await add(redis, range(1_700_000_000_000, 1_700_000_000_030))
    await group(redis, "index", read=10)
    await group(redis, "audit", read=20)
    stream = await one(bus)
    assert stream.pinned_by == "index"
    assert stream.pinned_since == datetime.fromtimestamp(1_700_000_000.010, UTC)
    await redis.xreadgroup("audit", "me", {S: ">"}, count=5)
    await take(redis, 20, "index")
    stream = await one(bus)  # what audit has pending is older than what it was not given
    assert stream.pinned_by == "audit"
    assert stream.pinned_since == datetime.fromtimestamp(1_700_000_000.020, UTC)
    await redis.xack(S, "audit", *range(1_700_000_000_020, 1_700_000_000_025))
    assert (await one(bus)).pinned_since == datetime.fromtimestamp(1_700_000_000.025, UTC)
    await take(redis, 5, "audit")
    stream = await one(bus)
    assert (stream.pinned_by, stream.pinned_since, stream.full_in_s) == (None, None, None)


async def test_nobody_pins_a_stream_without_groups(bus, redis):
    await add(redis, range(1, 11))
    stream = await one(bus)
    assert (stream.length, stream.room, stream.groups, stream.pinned_by) == (10, 99_990, (), None)


@pytest.mark.parametrize("gone", ["1-0", "8-0"])
async def test_a_ghost_pins_nothing(bus, redis, gone):
    """A pending id whose entry is gone, from the front or from the middle."""
    await add(redis, range(1, 21))
    await group(redis, "index")
    await redis.xreadgroup("index", "me", {S: ">"}, count=10)
    await redis.xack(S, "index", *(f"{n}-0" for n in range(1, 11) if f"{n}-0" != gone))
    await redis.xdel(S, gone)
    await group(redis, "audit", read=8)  # up to 9-0
    stream = await one(bus)
    assert (stream.pinned_by, stream.pinned_since.timestamp()) == ("audit", 0.010)
    assert (await bus.backlog("queue")).of("index").pending == 1


async def test_many_ghosts_are_passed_over_ten_at_a_time(bus, redis):
    await add(redis, range(1, 41))
    await group(redis, "index")
    await redis.xreadgroup("index", "me", {S: ">"}, count=30)
    await redis.xdel(S, *(f"{n}-0" for n in range(2, 10)))
    await redis.xack(S, "index", "1-0")
    assert (await one(bus)).pinned_since.timestamp() == 0.010
    await redis.xdel(S, *(f"{n}-0" for n in range(10, 29)))
    assert (
        await one(bus)
    ).pinned_since.timestamp() == 0.011  # the tenth, until an append clears it


async def test_what_was_trimmed_from_the_front_is_passed_over_however_much(bus, redis):
    await add(redis, range(1, 41))
    await group(redis, "index")
    await redis.xreadgroup("index", "me", {S: ">"}, count=30)
    await redis.xtrim(S, minid="26-0", approximate=False)
    stream = await one(bus)
    assert (stream.pinned_since.timestamp(), stream.groups[0].pending) == (0.026, 30)


async def test_the_share_of_the_room(bus, redis):
    """What a group pins beyond keep, of what lies between keep and maxlen."""
    bus.topics.declare(Topic("marked", maxlen=1_100, keep=100))
    stream = keys.stream("marked", 0)
    await add(redis, range(1, 601), stream)
    for name, read in (("slow", 50), ("middle", 300), ("fast", 550), ("done", 600)):
        await group(redis, name, read, stream)
    await group(redis, "unserved", stream=stream)
    await group(redis, "busy", 300, stream)
    await redis.xreadgroup("busy", "me", {stream: ">"}, count=100)
    backlog = await bus.backlog("marked")
    shares = {g.group: g.share for g in backlog.groups}
    assert shares == {
        "unserved": 0.5,
        "slow": 0.45,
        "middle": 0.2,
        "busy": 0.2,  # what it has pending counts as what it was not given
        "fast": 0,
        "done": 0,
    }
    assert (backlog.streams[0].room, backlog.streams[0].pinned_by) == (500, "unserved")


async def test_one_entry_left_behind_pins_all_that_follows(bus, redis):
    bus.topics.declare(Topic("marked", maxlen=1_100, keep=100))
    stream = keys.stream("marked", 0)
    await add(redis, range(1, 1_001), stream)
    await group(redis, stream=stream)
    await redis.xreadgroup("index", "me", {stream: ">"}, count=1_000)
    await redis.xack(stream, "index", *(f"{n}-0" for n in range(1, 1_001) if n != 201))
    found = (await bus.backlog("marked")).of("index")
    assert (found.pending, found.undelivered, found.share) == (1, 0, 0.7)


async def test_a_long_backlog_pins_more_than_can_be_counted(bus, redis):
    """The share is found from the front, so it is exact on a server without counters, too."""
    bus.topics.declare(Topic("marked", maxlen=20_000, keep=1_000))
    stream = keys.stream("marked", 0)
    await add(redis, range(1, 15_501), stream)
    await group(redis, read=5, stream=stream)
    assert (await bus.backlog("marked")).of("index").share == (15_495 - 1_000) / 19_000


async def test_below_keep_nobody_takes_any_room(bus, redis):
    await add(redis, range(1, 101))
    await group(redis)
    assert (await bus.backlog("queue")).of("index").share == 0


# --- when publishers will feel it


@pytest.fixture
async def small(bus: Bus) -> str:
    bus.topics.declare(Topic("small", maxlen=1_000, keep=100))
    return keys.stream("small", 0)


async def test_a_steady_rate_tells_when_it_is_full(bus, redis, small):
    now = await now_ms(redis)
    await add(redis, range(now - 400_000, now, 2_000), small)  # 200 entries, one in 2 s
    assert (await bus.backlog("small")).streams[0].full_in_s is None  # nobody pins it
    await group(redis, stream=small)
    (stream,) = (await bus.backlog("small")).streams
    assert stream.room == 800
    assert stream.full_in_s == pytest.approx(1600, rel=0.1)


async def test_the_newest_entries_tell_the_rate(bus, redis, small):
    now = await now_ms(redis)
    await add(redis, range(now - 90_000_000, now - 1_000_000, 300_000), small)
    await add(redis, range(now - 50_500, now, 500), small)  # 101 entries, two a second
    await group(redis, stream=small)
    (stream,) = (await bus.backlog("small")).streams
    assert stream.full_in_s == pytest.approx(stream.room / 2, rel=0.1)


async def test_an_idle_stream_does_not_fill(bus, redis, small):
    now = await now_ms(redis)
    await add(redis, range(now - 700_000, now - 600_500, 1_000), small)
    await group(redis, stream=small)
    (stream,) = (await bus.backlog("small")).streams
    assert (stream.pinned_by, stream.full_in_s) == ("index", None)


@pytest.mark.parametrize("length", [1_000, 1_050])
async def test_a_full_stream_is_full_now(bus, redis, small, length):
    """Also one in the reserve, and one that nobody publishes to."""
    await add(redis, range(1, length + 1), small)
    await group(redis, stream=small)
    (stream,) = (await bus.backlog("small")).streams
    assert (stream.length, stream.room, stream.full_in_s) == (length, 0, 0)
    assert stream.groups[0].share == (length - 100) / 900
    assert "room for 0 of 1,000, full" in str(await bus.backlog("small"))


# --- what is not there, and what should not be


async def test_a_topic_that_never_was_is_unknown(bus, server):
    with pytest.raises(UnknownTopic, match="no topic queu: did you mean queue"):
        await bus.backlog("queu")
    assert ask(server, "EXISTS", "bus:topics", "bus:{queu:0}") == b":0\r\n"


async def test_a_topic_is_known_by_its_groups_before_anything_was_published(bus, redis):
    """A worker's janitor names who is left alone, also where nobody has recorded the topic."""
    await group(redis, stream="bus:{waited:0}")
    assert [g.group for g in (await bus.backlog("waited")).groups] == ["index"]
    assert (await bus.inspect(["waited"])).topic("waited").group("index").total == 0


async def test_a_topic_that_was_only_declared(bus, server):
    backlog = await bus.backlog("queue")
    stream = StreamBacklog("bus:{queue:0}", 0, 100_000, 100, 100_000, (), None, None, None)
    assert backlog == Backlog("queue", (stream,))
    assert ask(server, "EXISTS", "bus:topics", "bus:{queue:0}") == b":0\r\n"
    assert str(backlog) == "queue: 0 entries in 1 stream"


async def test_a_stream_of_groups_without_entries(bus, redis):
    await group(redis)
    assert (await one(bus)).groups == (GroupBacklog("index", 0, False, 0, 0, None, 0.0),)


@pytest.mark.parametrize("topic", ["", "a b", S, None, TOPIC], ids=str)
async def test_bad_topic_names_are_refused(bus, topic):
    with pytest.raises(DeclarationError, match=r"topic name .* is not valid"):
        await bus.backlog(topic)


async def test_keys_of_other_types_are_told(bus, redis):
    await group(redis)
    await redis.set(keys.inbox(S, "index"), "precious")
    with pytest.raises(WrongKeyType, match=r"bus:\{queue:0\}:inbox:index"):
        await bus.backlog("queue")
    await redis.set(S, "precious")
    with pytest.raises(WrongKeyType, match=r"bus:\{queue:0\} "):
        await bus.backlog("queue")


async def test_groups_that_others_named_are_shown_as_well_as_can_be(bus, redis):
    await redis.xgroup_create(S, b"caf\xff", "0", mkstream=True)
    await add(redis, [1, 2])
    await redis.xadd(b"bus:{queue:0}:inbox:caf\xff", {"n": "1"})
    await redis.xreadgroup(b"caf\xff", "me", {S: ">"}, count=1)
    backlog = await bus.backlog("queue")
    assert backlog.of("caf\\xff") == backlog.groups[0]
    assert (backlog.groups[0].pending, backlog.groups[0].inbox) == (1, 1)
    str(backlog).encode()


async def test_looking_disturbs_no_group(bus, redis, server):
    await add(redis, range(1, 301))
    await group(redis, read=20)
    await redis.xreadgroup("index", "me", {S: ">"}, count=5)
    before = ask(server, "XINFO", "GROUPS", S)
    await bus.backlog("queue")
    assert ask(server, "XINFO", "GROUPS", S) == before


# --- with the bus's own groups, and to be read


async def test_a_handlers_backlog_rises_and_falls(bus, redis):
    hold = asyncio.Event()

    @event_handler(Queued, group="held", concurrency=2)
    async def wait(event: Queued) -> None:
        await hold.wait()

    @event_handler(Queued, group="newcomer", start="now")
    async def arrive(event: Queued) -> None: ...

    await bus.publish_many(Queued(who="w", n=n) for n in range(150))
    async with Worker(bus, handlers=[wait, arrive]) as worker:

        async def begun() -> Backlog | None:
            backlog = await bus.backlog("queue")
            return backlog if backlog.of("held").pending else None

        backlog = await eventually(begun)
        held = backlog.of("held")
        assert held.pending + held.undelivered == 150
        assert backlog.of("newcomer").total == 0
        assert backlog.streams[0].pinned_by == "held"
        hold.set()
        await worker.drained(10)
        backlog = await bus.backlog("queue")
        assert [(g.group, g.total) for g in backlog.groups] == [("held", 0), ("newcomer", 0)]
        assert backlog.streams[0].pinned_by is None


async def test_a_group_that_starts_now_is_counted_exactly(bus, redis, counts, monkeypatch):
    """Made at `$` by hand it would have to be counted until it has read to the end."""
    bus.topics.declare(WIDE)
    await add(redis, range(1, 301), W)
    await bus.store.create_groups([(W, "late", "$")])
    await add(redis, range(301, 601), W)
    await take(redis, 50, "late", W)
    if counts:
        refuse_to_count(bus, monkeypatch)
    assert (await bus.backlog("wide")).of("late").undelivered == 250


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (GroupBacklog("g", 0, False, 0, 0, None, 0.0), "nothing to do"),
        (
            GroupBacklog("g", 10_000, True, 12, 0, 185.0, 0.0),
            "12 pending, at least 10,000 undelivered, oldest 3 min",
        ),
        (GroupBacklog("g", 1, False, 0, 2, 0.4, 0.0), "1 undelivered, 2 in its inbox, oldest 0 s"),
        (GroupBacklog("g", 1, False, 0, 0, 7_200.0, 0.0), "1 undelivered, oldest 2 h"),
        (GroupBacklog("g", 1, False, 0, 0, 200_000.0, 0.0), "1 undelivered, oldest 2 d"),
    ],
)
def test_a_line_says_what_a_group_has_to_do(group, text):
    assert str(group) == text


async def test_a_backlog_can_be_printed(bus, redis):
    await add(redis, range(1_700_000_000_000, 1_700_000_000_030))
    await group(redis, "index", read=10)
    await redis.xreadgroup("index", "me", {S: ">"}, count=5)
    await group(redis, "housekeeping", read=30)
    first, housekeeping, index, pin = str(await bus.backlog("queue")).split("\n")
    assert first == "queue: 30 entries in 1 stream"
    assert housekeeping == "  housekeeping  nothing to do"
    assert index.startswith("  index         5 pending, 15 undelivered, oldest ")
    assert pin == (
        "  bus:{queue:0} is pinned by index since 2023-11-14 22:13:20Z, room for 99,970 of 100,000"
    )
