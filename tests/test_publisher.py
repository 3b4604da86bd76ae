"""The way in: receipts, coalescing, order, and each event at most once whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Backoff,
    Bus,
    DeclarationError,
    Delivery,
    Event,
    EventTooLarge,
    InvalidEvent,
    PermissionDenied,
    PublishTimeout,
    PublishUnknown,
    Topic,
    Worker,
    WrongKeyType,
    event_handler,
)
from bus.config import UNIT_BYTES, UNIT_EVENTS
from tests.eyes import eyes_of, eyes_on
from tests.proxy import Proxy
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.everywhere

STREAM = "bus:{pub:0}"
CANARY = "s3cret-payload"


class Noted(Event, type="pub.noted"):
    n: int
    text: str = ""


class Keyed(Event, type="pub.keyed", topic="spread", key="key"):
    key: str
    n: int = 0


class Following(Event, type="pub.following", topic="following", key="key"):
    key: str
    n: int = 0


class Typeless(Event):
    pass


async def entries(url: str, stream: str = STREAM) -> list[tuple[str, dict[str, Any]]]:
    """Return (entry id, fields with the event decoded) of a stream, as the server has it."""
    async with eyes_on(url) as redis:
        rows = await redis.xrange(stream)
    found = []
    for entry_id, fields in rows:
        text: dict[str, Any] = {k.decode(): v.decode() for k, v in fields.items()}
        text["data"] = json.loads(text["data"])
        found.append((entry_id.decode(), text))
    return found


async def numbers(url: str, stream: str = STREAM) -> list[int]:
    return [fields["data"]["n"] for _, fields in await entries(url, stream)]


def script_calls(server) -> int:
    """How often a script ran since the statistics were reset."""
    stats = ask(server, "INFO", "commandstats")
    return sum(int(n) for n in re.findall(rb"cmdstat_evalsha:calls=(\d+)", stats))


class Told(list[tuple[str, dict[str, Any]]]):
    """What telemetry said: (name, fields)."""

    def __init__(self) -> None:
        self._awaited: dict[str, asyncio.Event] = {}

    def hear(self, name: str, fields: dict[str, Any]) -> None:
        self.append((name, fields))
        self._awaited.setdefault(name, asyncio.Event()).set()

    async def until(self, name: str) -> None:
        """Wait until it has said `name`."""
        await self._awaited.setdefault(name, asyncio.Event()).wait()


@asynccontextmanager
async def telling(url: str, **settings: Any) -> AsyncIterator[tuple[Bus, Told]]:
    told = Told()
    async with Bus.connect(url, **settings) as bus:
        bus.telemetry.attach("*", told.hear)
        yield bus, told


# --- receipts


async def test_a_receipt_points_at_the_entry(url):
    async with Bus.connect(url, source="/here") as bus:
        receipt = await bus.publish(Noted(n=7, text="hello"))
    ((entry_id, fields),) = await entries(url)
    assert (receipt.stream, receipt.entry_id, receipt.event_id) == (STREAM, entry_id, fields["id"])
    assert fields == {
        "id": receipt.event_id,
        "type": "pub.noted",
        "data": {"n": 7, "text": "hello"},
        "source": "/here",
    }


async def test_headers_travel(url):
    when = datetime(2026, 1, 1, tzinfo=UTC)
    async with Bus.connect(url, source="/here") as bus:
        receipt = await bus.publish(
            Noted(n=1),
            event_id="my-own",
            time=when,
            source="/there",
            correlation_id="c",
            causation_id="b",
            traceparent="tp",
            tracestate="ts",
        )
        assert receipt.event_id == "my-own"
        (envelope,) = [e async for e in bus.history("pub")]
    assert (envelope.event_id, envelope.time, envelope.source) == ("my-own", when, "/there")
    assert (envelope.correlation_id, envelope.causation_id) == ("c", "b")
    assert (envelope.traceparent, envelope.tracestate) == ("tp", "ts")


async def test_event_ids_are_unique_and_sort_in_the_order_of_publishing(valkey_url):
    async with Bus.connect(valkey_url) as bus:
        receipts = [await bus.publish(Noted(n=n)) for n in range(20)]
        receipts += await bus.publish_many(Noted(n=n) for n in range(50))
    ids = [r.event_id for r in receipts]
    assert len(set(ids)) == 70
    assert sorted(ids) == ids
    assert all(re.fullmatch(r"[0-9a-z]{25}", i) for i in ids)


async def test_events_of_one_key_share_a_partition(url):
    topic = Topic("spread", partitions=4)
    async with Bus.connect(url, topics=[topic]) as bus:
        receipts = {}
        for n in range(60):
            receipt = await bus.publish(Keyed(key=f"k{n % 20}", n=n))
            receipts.setdefault(f"k{n % 20}", set()).add(receipt.stream)
    assert all(len(streams) == 1 for streams in receipts.values())
    assert len({s for streams in receipts.values() for s in streams}) == 4


# --- coalescing and order


@pytest.mark.servers_only("it asks a server about itself")
async def test_publishes_at_the_same_time_share_script_calls(url, server):
    async with Bus.connect(url) as bus:
        await bus.publish(Noted(n=-1))
        ask(server, "CONFIG", "RESETSTAT")
        receipts = await asyncio.gather(*(bus.publish(Noted(n=n)) for n in range(1000)))
        assert script_calls(server) <= 5
    found = await entries(url)
    assert [e for e, _ in found][1:] == [r.entry_id for r in receipts]
    assert [f["data"]["n"] for _, f in found] == list(range(-1, 1000))


async def test_one_caller_after_the_other_keeps_its_order(url):
    async with Bus.connect(url) as bus:

        async def caller(base: int) -> None:
            for n in range(50):
                await bus.publish(Noted(n=base + n))

        await asyncio.gather(*(caller(base) for base in range(0, 1000, 100)))
    found = await numbers(url)
    for base in range(0, 1000, 100):
        assert [n for n in found if base <= n < base + 100] == list(range(base, base + 50))


async def test_the_first_publishes_of_a_topic_keep_their_order_too(url):
    """They wait for the topic's record; one that comes later must not overtake them."""
    async with Bus.connect(url) as bus:
        tasks = [asyncio.create_task(bus.publish(Noted(n=n))) for n in range(20)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await bus.publish(Noted(n=20))
        await asyncio.gather(*tasks)
    assert await numbers(url) == list(range(21))


async def test_publish_many_gives_receipts_in_order_over_partitions(url):
    async with Bus.connect(url, topics=[Topic("spread", partitions=4)]) as bus:
        events = [Keyed(key=f"k{n}", n=n) for n in range(100)]
        receipts = await bus.publish_many(events)
        found = {}
        for partition in range(4):
            stream = f"bus:{{spread:{partition}}}"
            rows = await entries(url, stream)
            found |= {(stream, entry_id): fields for entry_id, fields in rows}
            own = [fields["data"]["n"] for _, fields in rows]
            assert own == sorted(own)
        assert len(found) == 100
        for event, receipt in zip(events, receipts, strict=True):
            fields = found[receipt.stream, receipt.entry_id]
            assert (fields["id"], fields["data"]["n"]) == (receipt.event_id, event.n)


class Newer(Event, type="pub.newer", version=2, topic="spread", key="key"):
    key: str


class Packed(Event, type="pub.packed", topic="spread", encoding="msgpack"):
    key: str


KINDS: dict[str, list[Event]] = {
    "plain": [Noted(n=n) for n in range(4)],
    "keyed": [Keyed(key="a", n=n) for n in range(4)],
    "with umlauts": [Keyed(key="ä", n=n) for n in range(4)],
    "version 2": [Newer(key="a") for _ in range(3)],
    "msgpack": [Packed(key=k) for k in "abc"],
    "all sorts": [Keyed(key="a"), Newer(key="a"), Keyed(key="a"), Packed(key="b"), Newer(key="a")],
}


@pytest.mark.parametrize("source", [None, "shop"])
@pytest.mark.parametrize("kind", KINDS)
async def test_an_entry_is_the_same_published_singly_or_with_others(valkey_url, kind, source):
    """In order and field by field, but for the ids: what the script is sent differs."""
    async with Bus.connect(
        valkey_url, source=source, topics=[Topic("spread", partitions=1)]
    ) as bus:
        stream = "bus:{spread:0}" if kind != "plain" else STREAM
        singly = [await bus.publish(e) for e in KINDS[kind]]
        together = await bus.publish_many(KINDS[kind])
        rows = await eyes_of(bus).xrange(stream)
    fields = [[*f.items()] for _, f in rows]
    assert [dict(f)[b"id"].decode() for f in fields] == [r.event_id for r in (*singly, *together)]
    bodies = [[pair for pair in f if pair[0] != b"id"] for f in fields]
    assert bodies[: len(singly)] == bodies[len(singly) :]
    assert [f[0][0] for f in fields] == [b"id"] * len(rows)


async def test_publish_many_of_nothing(valkey_url):
    async with Bus.connect(valkey_url) as bus:
        assert await bus.publish_many([]) == []


async def test_a_list_is_not_torn_apart_by_what_others_publish(url):
    async with Bus.connect(url) as bus:
        await bus.publish(Noted(n=-1))
        lists = (bus.publish_many([Noted(n=i * 100 + n) for n in range(30)]) for i in range(40))
        singles = (bus.publish(Noted(n=10_000 + n)) for n in range(40))
        mixed = (c for pair in zip(lists, singles, strict=True) for c in pair)
        results = await asyncio.gather(*mixed)
    in_stream = await entries(url)
    found = [fields["data"]["n"] for _, fields in in_stream]
    assert len(found) == 1 + 40 * 31
    by_id = {entry_id: fields["id"] for entry_id, fields in in_stream}
    for result in results:
        for receipt in result if isinstance(result, list) else [result]:
            assert by_id[receipt.entry_id] == receipt.event_id
    for i in range(40):
        at = found.index(i * 100)
        assert found[at : at + 30] == list(range(i * 100, i * 100 + 30))


@pytest.mark.servers_only("it asks a server about itself")
async def test_units_larger_than_a_batch_go_whole_one_after_the_other(url, server):
    """16 callers at once, each with more events than the usual call takes."""
    async with Bus.connect(url) as bus:
        await bus.publish(Noted(n=-1))
        ask(server, "CONFIG", "RESETSTAT")
        lists = [[Noted(n=i * 1000 + n) for n in range(700)] for i in range(16)]
        results = await asyncio.gather(*(bus.publish_many(events) for events in lists))
        assert script_calls(server) == 16
    found = await entries(url)
    assert [f["data"]["n"] for _, f in found[1:]] == [e.n for events in lists for e in events]
    assert [r.entry_id for rs in results for r in rs] == [entry_id for entry_id, _ in found[1:]]


# --- what is refused, before anything is sent


async def nothing_was_sent(url: str) -> bool:
    return await entries(url) == []


async def test_a_list_above_the_limits_is_refused_whole(url):
    async with Bus.connect(url, max_event_bytes=UNIT_BYTES) as bus:
        with pytest.raises(InvalidEvent, match=r"takes 5,000 events or 8 MiB .*not 5,001 events"):
            await bus.publish_many(Noted(n=n) for n in range(UNIT_EVENTS + 1))
        large = Noted(n=0, text="x" * (UNIT_BYTES // 4))
        with pytest.raises(InvalidEvent, match=r"takes 5,000 events or 8 MiB .*split the list"):
            await bus.publish_many([Keyed(key="first"), *[large] * 4])
        assert await nothing_was_sent(url)
        assert await entries(url, "bus:{spread:0}") == []
        assert len(await bus.publish_many(Noted(n=n) for n in range(UNIT_EVENTS))) == UNIT_EVENTS


async def test_one_bad_event_in_a_list_sends_nothing(url):
    async with Bus.connect(url) as bus:
        for bad in (Noted(n="1"), Noted(n=1, text="\ud800"), Keyed(key=5), "text", Typeless()):
            with pytest.raises((InvalidEvent, DeclarationError)):
                await bus.publish_many([Noted(n=0), bad, Noted(n=2)])
        assert await nothing_was_sent(url)


async def test_an_event_above_the_size_limit_is_refused(url):
    async with Bus.connect(url, max_event_bytes=200) as bus:
        with pytest.raises(EventTooLarge, match="above max_event_bytes = 200"):
            await bus.publish(Noted(n=1, text="x" * 200))
        await bus.publish(Noted(n=2))
    assert await numbers(url) == [2]


@pytest.mark.parametrize("thing", [None, "text", b"", 5, {}, Noted, Event], ids=repr)
async def test_what_is_no_event_is_refused(valkey_url, thing):
    async with Bus.connect(valkey_url) as bus:
        with pytest.raises(InvalidEvent, match="only events can be published, not"):
            await bus.publish(thing)


async def test_an_event_without_a_type_is_refused(valkey_url):
    async with Bus.connect(valkey_url) as bus:
        with pytest.raises(DeclarationError, match="'Typeless' has no type"):
            await bus.publish(Typeless())


@pytest.mark.parametrize("event_id", [5, b"id", "\ud800"], ids=repr)
async def test_a_bad_event_id_is_refused(valkey_url, event_id):
    async with Bus.connect(valkey_url) as bus:
        with pytest.raises(InvalidEvent):
            await bus.publish(Noted(n=1), event_id=event_id)
    assert await nothing_was_sent(valkey_url)


# --- what the server refuses


async def test_a_key_of_another_type_is_told_at_once_and_left_alone(url, server):
    ask(server, "SET", STREAM, "precious")
    async with telling(url) as (bus, told):
        started = time.monotonic()
        with pytest.raises(WrongKeyType, match=re.escape(f"the key {STREAM} holds another Redis")):
            await bus.publish(Noted(n=1))
        assert time.monotonic() - started < 10
        assert ask(server, "GET", STREAM).endswith(b"precious\r\n")
        assert [n for n, _ in told if n.startswith("publish.")] == ["publish.failed"]
        ask(server, "DEL", STREAM)
        await bus.publish(Noted(n=2))
    assert await numbers(url) == [2]


async def test_one_stream_of_several_fails_and_the_error_says_what_is_in(url, server):
    ask(server, "SET", "bus:{spread:2}", "precious")
    async with Bus.connect(url, topics=[Topic("spread", partitions=4)]) as bus:
        events = [Keyed(key=f"k{n}", n=n) for n in range(40)]
        with pytest.raises(WrongKeyType) as raised:
            await bus.publish_many(events)
    lengths = [len(await entries(url, f"bus:{{spread:{p}}}")) for p in (0, 1, 3)]
    assert raised.value.__notes__ == [f"{sum(lengths)} of 40 events, of other streams, are in"]
    assert all(lengths)


@pytest.mark.servers_only("it takes an access list")
async def test_a_user_who_may_not_write_is_told_at_once(private_server, server_kind):
    server = private_server(server_kind)
    ask(server, "ACL", "SETUSER", "app", "on", ">pw", "~bus:*", "+@all")
    async with telling(server.url.replace("://", "://app:pw@")) as (bus, told):
        await bus.publish(Noted(n=1))
        for rules in (("-xadd",), ("+@all", "-@scripting"), ("+@all", "resetkeys", "~bus:probe")):
            ask(server, "ACL", "SETUSER", "app", *rules)
            with pytest.raises(PermissionDenied, match=re.escape(f"lacks a right on {STREAM}")):
                await bus.publish(Noted(n=2, text=CANARY))
    assert await numbers(server.url) == [1]
    assert CANARY not in str(told)


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_server_without_memory_is_waited_for(private_server, server_kind):
    server = private_server(server_kind)
    async with telling(server.url) as (bus, told):
        await bus.publish(Noted(n=1))
        ask(server, "CONFIG", "SET", "maxmemory", "1")
        waiting = asyncio.create_task(bus.publish(Noted(n=2, text=CANARY)))
        await told.until("publish.retried")
        ask(server, "CONFIG", "SET", "maxmemory", "0")
        await waiting
    assert await numbers(server.url) == [1, 2]
    assert {f["error"].split()[0] for n, f in told if n == "publish.retried"} == {"OOM"}
    assert CANARY not in str(told)


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_server_that_stays_without_memory_is_named_as_the_reason(private_server):
    server = private_server()
    async with Bus.connect(server.url, publish_timeout_s=0.3) as bus:
        await bus.publish(Noted(n=1))
        ask(server, "CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(PublishTimeout, match=r"OOM.*was not published"):
            await bus.publish(Noted(n=2))
        ask(server, "CONFIG", "SET", "maxmemory", "0")
        await bus.publish_many([Noted(n=3)])
    assert await numbers(server.url) == [1, 3]


# --- replies that get lost, servers that come and go


@pytest.mark.servers_only("connections break")
async def test_a_lost_reply_adds_nothing_twice(url, server):
    async with Proxy(server.port) as proxy, telling(proxy.url) as (bus, told):
        await bus.publish(Noted(n=0))
        for n in range(1, 6):
            proxy.lose_replies = 1
            receipt = await bus.publish(Noted(n=n))
            assert (await entries(url))[n][0] == receipt.entry_id
        proxy.lose_replies = 3
        receipts = await bus.publish_many(Noted(n=n) for n in range(6, 10))
        assert proxy.lost == 8
        assert [r.entry_id for r in receipts] == [e for e, _ in (await entries(url))[6:]]
    assert await numbers(url) == list(range(10))
    assert Counter(name for name, _ in told)["publish.retried"] == 8


@pytest.mark.servers_only("connections break")
async def test_lost_replies_among_many_callers(url, server):
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as bus:
        await bus.publish(Noted(n=0))

        async def caller(base: int) -> list[str]:
            return [(await bus.publish(Noted(n=base + n))).entry_id for n in range(10)]

        async def saboteur() -> None:
            for _ in range(10):
                await proxy.lose_one()

        losing = asyncio.create_task(saboteur())
        receipts = await asyncio.gather(*(caller(base) for base in range(100, 2000, 100)))
        losing.cancel()
    found = await entries(url)
    by_id = {entry_id: fields["data"]["n"] for entry_id, fields in found}
    assert len(found) == 1 + 19 * 10
    for base, ids in zip(range(100, 2000, 100), receipts, strict=True):
        assert [by_id[i] for i in ids] == list(range(base, base + 10))


async def test_a_server_that_hangs_with_the_request_leaves_it_unknown(private_server):
    server = private_server()
    async with Bus.connect(server.url, publish_timeout_s=0.3) as bus:
        await bus.publish(Noted(n=0))
        server.pause()
        with pytest.raises(PublishUnknown, match="may have been published") as raised:
            await bus.publish(Noted(n=1, text=CANARY))
        assert CANARY not in str(raised.value)
        server.resume()
    assert await numbers(server.url) in ([0], [0, 1])


async def test_what_queued_behind_a_hanging_request_was_certainly_not_published(private_server):
    server = private_server()
    async with Bus.connect(server.url, publish_timeout_s=0.5) as bus:
        await bus.publish(Noted(n=0))
        server.pause()
        first = asyncio.create_task(bus.publish(Noted(n=1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the first is on its way
        second = asyncio.create_task(bus.publish(Noted(n=2)))
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(r) for r in results] == [PublishUnknown, PublishTimeout]
        server.resume()
        await bus.publish(Noted(n=3))
    assert await numbers(server.url) in ([0, 3], [0, 1, 3])


async def test_a_server_that_is_down_the_whole_time_means_not_published(private_server):
    server = private_server(aof=True)
    async with telling(server.url, publish_timeout_s=0.3) as (bus, told):
        await bus.publish(Noted(n=0))
        await asyncio.to_thread(server.kill)
        # The old connection may take the request and only then turn out to be dead.
        with pytest.raises((PublishTimeout, PublishUnknown)):
            await bus.publish(Noted(n=1, text=CANARY))
        with pytest.raises(PublishTimeout, match="the event was not published") as raised:
            await bus.publish(Noted(n=2, text=CANARY))
        await asyncio.to_thread(server.restart)
        await bus.publish(Noted(n=3))
    assert await numbers(server.url) == [0, 3]
    assert CANARY not in str(raised.value) + str(told)


async def test_a_server_that_comes_back_in_time_gets_everything_once(private_server, server_kind):
    server = private_server(server_kind, aof=True)
    async with telling(server.url) as (bus, told):
        await bus.publish(Noted(n=0))
        await asyncio.to_thread(server.kill)
        waiting = [asyncio.create_task(bus.publish(Noted(n=n))) for n in range(1, 21)]
        await told.until("publish.retried")
        await asyncio.to_thread(server.restart)
        await asyncio.gather(*waiting)
    assert await numbers(server.url) == list(range(21))


async def test_the_first_event_of_a_topic_waits_for_the_server_too(private_server):
    """Its partition count has to be asked for before; that is no reason to fail at once."""
    server = private_server(aof=True)
    async with Bus.connect(server.url) as bus:
        await asyncio.to_thread(server.kill)
        waiting = asyncio.create_task(bus.publish(Noted(n=1)))
        await asyncio.wait([waiting], timeout=0.2)
        await asyncio.to_thread(server.restart)
        await waiting
    assert await numbers(server.url) == [1]


async def test_the_first_event_of_a_topic_ends_with_a_publish_error_too(private_server):
    server = private_server()
    async with Bus.connect(server.url, publish_timeout_s=0.3) as bus:
        await asyncio.to_thread(server.kill)
        with pytest.raises(PublishTimeout):
            await bus.publish(Noted(n=1))


async def test_a_topic_nobody_declared_is_asked_for_again_without_failing(
    private_server, monkeypatch
):
    """Its record may be replaced; while the server is away, the known count must do."""
    monkeypatch.setattr("bus.streams.topics.RECORD_TTL_S", 0)
    server = private_server(aof=True)
    async with Bus.connect(server.url) as bus:
        await bus.publish(Noted(n=0))
        bus._publisher._routes[Noted].stale_at = 0
        await asyncio.to_thread(server.kill)
        waiting = asyncio.create_task(bus.publish(Noted(n=1)))
        await asyncio.wait([waiting], timeout=0.2)
        await asyncio.to_thread(server.restart)
        await waiting
    assert await numbers(server.url) == [0, 1]


async def test_a_server_that_restarted_empty_begins_anew(private_server, server_kind):
    server = private_server(server_kind)
    async with Bus.connect(server.url) as bus:
        for n in range(3):
            await bus.publish(Noted(n=n))
        await asyncio.to_thread(server.restart)
        receipts = [await bus.publish(Noted(n=n)) for n in (3, 4)]
    assert await numbers(server.url) == [3, 4]
    assert [r.entry_id for r in receipts] == [e for e, _ in await entries(server.url)]


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_server_that_lost_its_scripts_is_given_them_again(url, server):
    async with Bus.connect(url) as bus:
        for n in range(3):
            await bus.publish(Noted(n=n))
            ask(server, "SCRIPT", "FLUSH")
    assert await numbers(url) == [0, 1, 2]


# --- callers that give up


async def test_a_cancelled_caller_disturbs_nobody(url, server):
    async with Bus.connect(url) as bus:
        await bus.publish(Noted(n=0))
        tasks = [asyncio.create_task(bus.publish(Noted(n=n))) for n in range(1, 101)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await bus.publish(Noted(n=101))
    found = await entries(url)
    published = [f["data"]["n"] for _, f in found]
    assert published == sorted(set(published))  # in order, nothing twice
    assert published[-1] == 101
    by_id = {entry_id: f["data"]["n"] for entry_id, f in found}
    for n, result in enumerate(results, 1):
        if not isinstance(result, BaseException):
            assert by_id[result.entry_id] == n


async def test_a_caller_cancelled_in_flight_leaves_its_batch_whole(private_server):
    server = private_server()
    async with Bus.connect(server.url) as bus:
        await bus.publish(Noted(n=0))
        server.pause()
        first = asyncio.create_task(bus.publish_many([Noted(n=n) for n in (1, 2, 3)]))
        other = asyncio.create_task(bus.publish(Noted(n=4)))
        for _ in range(5):
            await asyncio.sleep(0)
        later = asyncio.create_task(bus.publish(Noted(n=5)))
        await asyncio.sleep(0)
        first.cancel()
        server.resume()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.gather(other, later)
    assert await numbers(server.url) == list(range(6))


async def test_leaving_the_block_waits_for_what_is_in_flight(url):
    async with Bus.connect(url) as bus:
        await bus.publish(Noted(n=0))
        tasks = [asyncio.create_task(bus.publish(Noted(n=n))) for n in range(1, 50)]
        await asyncio.sleep(0)
    assert all(not isinstance(r, BaseException) for r in await asyncio.gather(*tasks))
    assert await numbers(url) == list(range(50))


async def test_a_closed_bus_says_so_at_once(valkey_url):
    bus = Bus.connect(valkey_url, publish_timeout_s=20)
    await bus.publish(Noted(n=0))
    await bus.close()
    async with asyncio.timeout(5):
        with pytest.raises(Exception, match="closed"):
            await bus.publish(Noted(n=1))


# --- fork


PROGRAM = """
import asyncio, os, sys

from bus import Bus, Event


class Forked(Event, type="fork.done"):
    who: str
    n: int


async def publish(bus, who, numbers):
    return [(await bus.publish(Forked(who=who, n=n))).event_id for n in numbers]


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


async def under_a_loop(url):
    bus = Bus.connect(url)
    await publish(bus, "parent", range(3))
    in_flight = asyncio.create_task(publish(bus, "parent", range(3, 6)))
    await asyncio.sleep(0)
    pids = [
        in_child(lambda: asyncio.run(publish(bus, f"child{i}", range(5)))) for i in range(2)
    ]
    await in_flight
    await publish(bus, "parent", range(6, 9))
    for pid in pids:
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert status == 0, status
    await publish(bus, "parent", range(9, 12))
    await bus.close()


def before_a_loop(url):
    bus = Bus.connect(url)  # as a preforking server does: made once, used by every child
    pids = [in_child(lambda: asyncio.run(publish(bus, f"child{i}", range(5)))) for i in range(2)]
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    asyncio.run(publish(bus, "parent", range(12)))


if sys.argv[1] == "under":
    asyncio.run(under_a_loop(sys.argv[2]))
else:
    before_a_loop(sys.argv[2])
"""


@pytest.mark.servers_only("a child has a memory of its own")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("when", ["under", "before"])
async def test_a_forked_child_publishes_as_itself_and_the_parent_goes_on(
    valkey_url, tmp_path, when
):
    program = tmp_path / "forking.py"
    program.write_text(PROGRAM)
    # Its own warnings are its own business: 3.12 warns of every fork under a running loop.
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(program), when, valkey_url],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = await entries(valkey_url, "bus:{fork:0}")
    by_who: dict[str, list[int]] = {}
    for _, fields in found:
        by_who.setdefault(fields["data"]["who"], []).append(fields["data"]["n"])
    assert by_who == {
        "parent": list(range(12)),
        "child0": list(range(5)),
        "child1": list(range(5)),
    }
    assert len({fields["id"] for _, fields in found}) == len(found)


# --- published while handling


async def test_what_a_handler_publishes_is_recognisable_on_every_attempt(url):
    """Same cause, same group, same type, same key, same ordinal: the same id."""
    attempts: list[list[str]] = []
    after: list[str] = []

    @event_handler(Keyed, group="chain", backoff=Backoff(0.01, max_s=0.01))
    async def chain(event: Keyed, delivery: Delivery[Keyed]) -> None:
        bus = delivery.bus
        receipts = [
            await bus.publish(Following(key="a")),
            await bus.publish(Following(key="b")),
            await bus.publish(Following(key="a")),
            *await bus.publish_many([Following(key="a"), Following(key="c")]),
            await bus.publish(Noted(n=1)),
        ]
        attempts.append([r.event_id for r in receipts])
        if delivery.attempt < 3:
            raise ValueError("once more")

    async with Bus.connect(url) as bus, Worker(bus, [chain]) as worker:
        cause = await bus.publish(Keyed(key="k"), correlation_id="whole-story")
        other = await bus.publish(Keyed(key="k"))
        await worker.drained(20)
        after.append((await bus.publish(Noted(n=2))).event_id)
    by_cause = Counter(map(tuple, attempts))
    assert sorted(by_cause.values()) == [3, 3]
    assert all(len(set(ids)) == 6 for ids in by_cause)
    assert len({i for ids in by_cause for i in ids}) == 12
    headers = {
        (f.get("causationid"), f.get("correlationid"))
        for _, f in await entries(url, "bus:{following:0}")
    }
    assert headers == {
        (cause.event_id, "whole-story"),
        (other.event_id, other.event_id),
    }
    ((_, outside),) = [e for e in await entries(url) if e[1]["id"] == after[0]]
    assert "causationid" not in outside


async def test_ids_differ_between_the_groups_that_react_to_one_event(valkey_url):
    made: dict[str, str] = {}

    def reacting(group: str):
        @event_handler(Keyed, group=group)
        async def react(event: Keyed, delivery: Delivery[Keyed]) -> None:
            made[group] = (await delivery.bus.publish(Noted(n=1))).event_id

        return react

    handlers = [reacting("one"), reacting("two")]
    async with Bus.connect(valkey_url) as bus, Worker(bus, handlers) as worker:
        await bus.publish(Keyed(key="k"))
        await worker.drained(20)
    assert made["one"] != made["two"]


async def test_what_a_handler_leaves_behind_is_no_longer_its_own(valkey_url):
    """A task that outlives its handler publishes on its own account."""
    late: list[asyncio.Task[Any]] = []
    go = asyncio.Event()

    @event_handler(Keyed, group="leaving")
    async def leave(event: Keyed, delivery: Delivery[Keyed]) -> None:
        async def afterwards():
            await go.wait()
            return await delivery.bus.publish(Noted(n=1))

        late.append(asyncio.create_task(afterwards()))

    async with Bus.connect(valkey_url) as bus, Worker(bus, [leave]) as worker:
        await bus.publish(Keyed(key="k"))
        await worker.drained(20)
        go.set()
        await late[0]
    ((_, fields),) = await entries(valkey_url)
    assert "causationid" not in fields


async def test_given_ids_and_headers_win_over_derived_ones(valkey_url):
    @event_handler(Keyed, group="given")
    async def give(event: Keyed, delivery: Delivery[Keyed]) -> None:
        await delivery.bus.publish(
            Noted(n=1), event_id="mine", correlation_id="c", causation_id="b"
        )

    async with Bus.connect(valkey_url) as bus, Worker(bus, [give]) as worker:
        await bus.publish(Keyed(key="k"))
        await worker.drained(20)
    ((_, fields),) = await entries(valkey_url)
    assert (fields["id"], fields["correlationid"], fields["causationid"]) == ("mine", "c", "b")


# --- what must not be said


@pytest.mark.servers_only("it asks a server about itself")
async def test_no_payload_in_logs_errors_or_telemetry(private_server, caplog):
    caplog.set_level("DEBUG")
    server = private_server()
    shown: list[str] = []
    async with telling(server.url, publish_timeout_s=0.3, max_event_bytes=5_000) as (bus, told):
        receipt = await bus.publish(Noted(n=0, text=CANARY))
        shown += [repr(receipt), repr(bus)]
        bad = [Noted(n=CANARY), Noted(n=1, text=CANARY + "\ud800"), Noted(n=1, text=CANARY * 999)]
        ask(server, "SET", "bus:{spread:0}", "a string")
        bad.append(Keyed(key=CANARY))
        for event in bad:
            with pytest.raises(Exception) as raised:  # noqa: PT011 - each is tested above
                await bus.publish(event)
            shown += [str(raised.value), repr(raised.value)]
        ask(server, "CONFIG", "SET", "maxmemory", "1")
        with suppress(PublishTimeout):
            await bus.publish(Noted(n=1, text=CANARY))
        server.pause()
        with suppress(PublishTimeout, PublishUnknown):
            await bus.publish(Noted(n=1, text=CANARY))
        server.resume()
    shown += [str(told), caplog.text]
    assert CANARY not in "\n".join(shown)
