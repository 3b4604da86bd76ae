"""Pausing groups: what an operator is told, what is written, and when publishers will feel it."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, DeclarationError, Topic, UnknownGroup, UnknownTopic
from bus.admin.pauses import MOST_S
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.embedded import EmbeddedServer

TOPICS = [Topic("desk", partitions=2, maxlen=1_000, keep=100), Topic("shop")]
S, SECOND, SHOP, G = "bus:{desk:0}", "bus:{desk:1}", "bus:{shop:0}", "index"


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=TOPICS) as bus:
        await prepare(bus)
        yield bus


async def prepare(bus: Bus) -> None:
    for topic in TOPICS:
        await bus.topics.record(topic.name)
    for stream in (S, SECOND, SHOP):
        await bus.redis.xgroup_create(stream, G, "0", mkstream=True)
    await bus.redis.xgroup_create(SHOP, "audit", "0")


async def now(bus: Bus) -> datetime:
    seconds, micros = await bus.redis.time()
    return datetime.fromtimestamp(seconds + micros / 1e6, UTC)


async def stands(bus: Bus) -> dict[str, Any]:
    rows = await bus.redis.hgetall("bus:paused")
    return {k.decode(): json.loads(v) for k, v in rows.items()}


async def add(bus: Bus, count: int, stream: str = S, over_s: float = 100) -> None:
    """Add entries as they would have come evenly in the last seconds."""
    now_ms = (await now(bus)).timestamp() * 1000
    async with bus.redis.pipeline(transaction=False) as pipe:
        for n in range(count):
            pipe.xadd(stream, {"n": "1"}, id=f"{int(now_ms - over_s * 1000 * (1 - n / count))}-{n}")
        await pipe.execute()


async def test_a_group_is_paused_where_it_is_and_what_stands_is_told(bus: Bus) -> None:
    before = await now(bus)
    desk, shop = await bus.admin.pause_group(G, why="bad deploy")
    assert [(p.group, p.topic) for p in (desk, shop)] == [(G, "desk"), (G, "shop")]
    assert before - timedelta(milliseconds=1) <= desk.paused.since <= await now(bus)
    assert (desk.paused.until, desk.paused.why) == (None, "bad deploy")
    assert [s.stream for s in (*desk.streams, *shop.streams)] == [S, SECOND, SHOP]
    since_ms = round(desk.paused.since.timestamp() * 1000)
    value = {"since_ms": since_ms, "until_ms": None, "why": "bad deploy"}
    assert await stands(bus) == {"desk:index": value, "shop:index": value}


async def test_of_one_topic_alone(bus: Bus) -> None:
    (shop,) = await bus.admin.pause_group(G, "shop")
    assert shop.topic == "shop"
    assert list(await stands(bus)) == ["shop:index"]
    snapshot = await bus.inspect()
    assert snapshot.topic("shop").group(G).paused is not None
    assert snapshot.topic("shop").group("audit").paused is None
    assert snapshot.topic("desk").group(G).paused is None


async def test_a_pause_that_is_over_begins_anew_and_is_none_to_resume(bus: Bus) -> None:
    now_ms = round((await now(bus)).timestamp() * 1000)
    over = {"since_ms": now_ms - 9_000, "until_ms": now_ms - 5_000, "why": "old"}
    await bus.redis.hset("bus:paused", "shop:index", json.dumps(over))
    assert await bus.admin.paused_topics(G) == frozenset()
    (shop,) = await bus.admin.pause_group(G, "shop")
    assert shop.paused.since is not None
    assert (shop.paused.since.timestamp() * 1000 >= now_ms, shop.paused.why) == (True, "")
    assert await bus.admin.paused_topics(G) == {"shop"}
    await bus.redis.hset("bus:paused", "shop:index", json.dumps(over))
    assert await bus.admin.resume_group(G, "shop") == ()
    assert await bus.redis.hexists("bus:paused", "shop:index") is False


async def test_it_ends_after_a_time_or_at_one(bus: Bus) -> None:
    (shop,) = await bus.admin.pause_group(G, "shop", until=timedelta(minutes=5))
    assert shop.paused.until == shop.paused.since + timedelta(minutes=5)
    until = (await now(bus) + timedelta(hours=2)).replace(microsecond=0)
    (shop,) = await bus.admin.pause_group(G, "shop", until=until, why="again")
    assert (shop.paused.until, shop.paused.why) == (until, "again")
    assert (await stands(bus))["shop:index"]["until_ms"] == until.timestamp() * 1000
    since = shop.paused.since
    (shop,) = await bus.admin.pause_group(G, "shop")
    assert (shop.paused.until, shop.paused.why) == (None, "again"), "what is not said stays"
    assert shop.paused.since == since, "it is the same pause"


@pytest.mark.parametrize(
    ("until", "message"),
    [
        (timedelta(0), "the time until then, in seconds, must be a number from 0.001"),
        (timedelta(seconds=-5), "the time until then"),
        (timedelta(seconds=MOST_S + 1), "the time until then"),
        (timedelta.max, "the time until then"),
        (datetime(2020, 1, 1, tzinfo=UTC), "the time until then"),
        (datetime.max.replace(tzinfo=UTC), "the time until then"),
        (datetime(2999, 1, 1), "until has no time zone"),  # noqa: DTZ001 - that is the mistake
        (300, "until is a datetime or a timedelta, not 300"),
        ("5m", "until is a datetime or a timedelta, not '5m'"),
    ],
)
async def test_an_end_that_cannot_be_meant_pauses_nothing(
    valkey_url: str, until: Any, message: str
) -> None:
    async with Bus.connect(valkey_url, topics=TOPICS) as bus:
        await prepare(bus)
        with pytest.raises(DeclarationError, match=message):
            await bus.admin.pause_group(G, until=until)
        assert await stands(bus) == {}


async def test_groups_and_topics_that_nobody_knows_are_errors(bus: Bus) -> None:
    for verb in (bus.admin.pause_group, bus.admin.resume_group):
        with pytest.raises(UnknownGroup, match=r"did you mean index\?"):
            await verb("indx")
        with pytest.raises(UnknownGroup, match="topic desk has no group audit"):
            await verb("audit", "desk")
        with pytest.raises(UnknownTopic, match=r"did you mean desk\?"):
            await verb(G, "disk")
    assert await stands(bus) == {}


async def test_resuming_says_what_was_paused(bus: Bus) -> None:
    assert await bus.admin.resume_group(G) == ()
    await bus.admin.pause_group(G)
    await bus.admin.pause_group("audit")
    assert await bus.admin.resume_group(G, "shop") == ("shop",)
    assert await bus.admin.resume_group(G, "shop") == ()
    assert await bus.admin.resume_group(G) == ("desk",)
    assert list(await stands(bus)) == ["shop:audit"]


async def test_a_pause_that_is_left_of_a_group_that_is_gone_can_be_ended(bus: Bus) -> None:
    await bus.admin.pause_group(G, "shop")
    await bus.redis.xgroup_destroy(SHOP, G)
    assert await bus.admin.resume_group(G, "shop") == ("shop",)


async def test_who_is_paused_is_seen_until_it_is_over(bus: Bus) -> None:
    await bus.admin.pause_group(G, "shop", why="why not")
    group = (await bus.inspect()).topic("shop").group(G)
    assert group.paused is not None
    assert (group.paused.why, group.paused.until) == ("why not", None)
    assert "not served, paused" in str(await bus.inspect(["shop"]))
    await bus.redis.hset("bus:paused", "shop:index", json.dumps({"since_ms": 5, "until_ms": 6}))
    assert (await bus.inspect()).topic("shop").group(G).paused is None
    await bus.redis.hset("bus:paused", "shop:index", "")
    group = (await bus.inspect()).topic("shop").group(G)
    assert group.paused is not None
    assert group.paused.why == "what stands there says neither since when nor why"


async def test_it_says_what_the_group_holds_and_when_publishers_will_feel_it(bus: Bus) -> None:
    """Ten entries a second into a stream that takes a thousand."""
    await add(bus, 400, over_s=40)
    await bus.redis.xreadgroup(G, "me", {S: ">"}, count=300)
    ids = [i for i, _ in await bus.redis.xrange(S, count=280)]
    await bus.redis.xack(S, G, *ids)
    (desk,) = await bus.admin.pause_group(G, "desk")
    busy, idle = desk.streams
    assert (busy.stream, busy.needed, busy.maxlen) == (S, 100 + 20, 1_000)
    assert busy.appends_per_s == pytest.approx(10, rel=0.2)
    assert busy.full_in_s == pytest.approx((1_000 - 120) / 10, rel=0.2)
    assert (idle.stream, idle.needed, idle.full_in_s) == (SECOND, 0, None)
    assert desk.full_in_s == busy.full_in_s
    # Another group that is further behind holds what this one is done with.
    await bus.redis.xgroup_create(S, "behind", "0")
    (desk,) = await bus.admin.pause_group(G, "desk")
    assert desk.streams[0].needed == 120
    assert desk.full_in_s == pytest.approx((1_000 - 400) / 10, rel=0.2)


async def test_a_stream_that_is_full_is_felt_at_once(bus: Bus) -> None:
    await add(bus, 1_000, over_s=10)
    (desk,) = await bus.admin.pause_group(G, "desk")
    assert desk.full_in_s == 0


async def test_where_nothing_comes_nobody_will_feel_it(bus: Bus) -> None:
    (desk,) = await bus.admin.pause_group(G, "desk")
    assert desk.full_in_s is None


async def test_of_two_operators_the_last_word_counts(bus: Bus) -> None:
    await asyncio.gather(*(bus.admin.pause_group(G, why=str(n)) for n in range(5)))
    whys = {value["why"] for value in (await stands(bus)).values()}
    assert whys <= set("01234")
    ended = await asyncio.gather(*(bus.admin.resume_group(G) for _ in range(5)))
    assert sorted(t for topics in ended for t in topics) == ["desk", "shop"]
    assert await stands(bus) == {}


async def test_words_that_are_no_text_are_written_as_far_as_they_are(bus: Bus) -> None:
    """A terminal may send any bytes."""
    (shop,) = await bus.admin.pause_group(G, "shop", why="caf\udce9")
    assert shop.paused.why == "caf?"
    assert (await stands(bus))["shop:index"]["why"] == "caf?"


async def test_lost_answers_change_nothing(url: str, server: EmbeddedServer) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=TOPICS) as bus:
        await prepare(bus)
        proxy.lose(b"HSET", 2)
        assert len(await bus.admin.pause_group(G)) == 2
        assert set(await stands(bus)) == {"desk:index", "shop:index"}
        proxy.lose(b"HDEL", 2)
        assert await bus.admin.resume_group(G) == ("desk", "shop")
        assert proxy.lost == 4
        assert await stands(bus) == {}
