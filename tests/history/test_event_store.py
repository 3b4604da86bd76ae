"""Looking back: every entry once, in the order of ids, over all partitions."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import aclosing
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from bus import (
    Bus,
    DeclarationError,
    Event,
    ServerUnreachable,
    Topic,
    Undecodable,
    UnknownEventType,
    UnknownTopic,
    WrongKeyType,
)
from bus.history import event_store
from bus.streams import keys
from bus.streams.connection import Connection, ConnectionLost
from bus.streams.replies import ReplyError
from tests.eyes import eyes_on
from tests.proxy import Proxy
from tests.servers import ask
from tests.witness import Witness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Envelope

pytestmark = pytest.mark.everywhere

ROOT = Path(__file__).parents[2]
TOPIC = Topic("past", partitions=4)


class Sown(Event, type="past.sown", key="field"):
    field: str
    n: int = 0


class Reaped(Event, type="past.reaped", key="field"):
    field: str
    n: int = 0


class Ground(Event, type="past.mill.ground", key="field"):
    field: str
    n: int = 0


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        yield bus


async def told(envelopes: AsyncIterator[Envelope]) -> list[Envelope]:
    return [envelope async for envelope in envelopes]


def order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))


async def test_everything_comes_once_and_in_the_order_of_ids(bus):
    receipts = [await bus.publish(Sown(field=f"f{n % 7}", n=n)) for n in range(100)]
    past = await told(bus.history("past"))
    assert Counter((e.stream, e.entry_id) for e in past) == Counter(
        (r.stream, r.entry_id) for r in receipts
    )
    assert [order(e.entry_id) for e in past] == sorted(order(e.entry_id) for e in past)
    assert len({e.stream for e in past}) == 4
    assert sorted(e.event.n for e in past) == list(range(100))
    assert [e.event_id for e in past if e.key == "f3"] == [
        r.event_id for n, r in enumerate(receipts) if n % 7 == 3
    ]


async def test_an_envelope_holds_the_event_and_its_place(bus):
    receipt = await bus.publish(Sown(field="f", n=3), source="/farm")
    (envelope,) = await told(bus.history("past"))
    assert envelope.event == Sown(field="f", n=3)
    assert (envelope.event_id, envelope.entry_id) == (receipt.event_id, receipt.entry_id)
    assert (envelope.type, envelope.version, envelope.key) == ("past.sown", 1, "f")
    assert envelope.source == "/farm"
    assert envelope.time.timestamp() * 1000 == pytest.approx(order(receipt.entry_id)[0])


async def with_ids(url: str, *rows: tuple[int, str, str]) -> None:
    """Write entries by hand: (partition, id, type)."""
    async with eyes_on(url) as redis:
        for n, (partition, entry_id, kind) in enumerate(rows):
            fields: dict[Any, Any] = {"id": f"e{n}", "type": kind, "data": '{"field":"f"}'}
            await redis.xadd(f"bus:{{past:{partition}}}", fields, id=entry_id)


async def test_ids_are_compared_as_numbers(bus, url):
    await with_ids(
        url,
        *((0, "9-0", "past.sown"), (0, "10-2", "past.sown"), (1, "10-1", "past.sown")),
        *((1, "10-10", "past.sown"), (2, "100-0", "past.sown"), (3, "10-2", "past.sown")),
    )
    await bus.publish(Sown(field="f"))
    ids = [e.entry_id for e in await told(bus.history("past"))][:6]
    assert ids == ["9-0", "10-1", "10-2", "10-2", "10-10", "100-0"]


@pytest.fixture
async def dated(bus, url) -> Bus:
    """Six entries over the partitions, with ids 1000-0, 2000-0, 2000-1, 3000-0, 4000-0, 5000-0."""
    await with_ids(
        url,
        *((0, "1000-0", "past.sown"), (1, "2000-0", "past.reaped"), (2, "2000-1", "past.sown")),
        *((0, "3000-0", "past.mill.ground"), (3, "4000-0", "past.sown")),
        (1, "5000-0", "past.reaped"),
    )
    return bus


@pytest.mark.parametrize(
    ("since", "until", "ids"),
    [
        (None, None, ["1000-0", "2000-0", "2000-1", "3000-0", "4000-0", "5000-0"]),
        ("start", "end", ["1000-0", "2000-0", "2000-1", "3000-0", "4000-0", "5000-0"]),
        (2000, 4000, ["2000-0", "2000-1", "3000-0", "4000-0"]),
        ("2000-1", "3000-0", ["2000-1", "3000-0"]),
        (2001, None, ["3000-0", "4000-0", "5000-0"]),
        (None, "1970-01-01T00:00:02Z", ["1000-0", "2000-0", "2000-1"]),
        ("1970-01-01T00:00:05", None, ["5000-0"]),
        ("@-1h", None, []),
        (None, "@-1h", ["1000-0", "2000-0", "2000-1", "3000-0", "4000-0", "5000-0"]),
        (4000, 2000, []),
        (6000, None, []),
    ],
)
async def test_since_and_until_are_both_included(dated, since, until, ids):
    assert [e.entry_id for e in await told(dated.history("past", since, until))] == ids


async def test_an_entry_can_be_fetched_by_its_time(bus):
    receipt = await bus.publish(Sown(field="f"))
    (envelope,) = await told(bus.history("past"))
    at = envelope.time
    assert len(await told(bus.history("past", since=at, until=at))) == 1
    ms = timedelta(milliseconds=1)
    assert await told(bus.history("past", since=at + ms)) == []
    assert await told(bus.history("past", until=at - ms)) == []
    assert receipt.entry_id == envelope.entry_id


@pytest.mark.parametrize(
    ("types", "ids"),
    [
        ([Sown], ["1000-0", "2000-1", "4000-0"]),
        (["past.reaped"], ["2000-0", "5000-0"]),
        ([Reaped, "past.mill.*"], ["2000-0", "3000-0", "5000-0"]),
        (["*.reaped"], ["2000-0", "5000-0"]),
        (["past.*"], ["1000-0", "2000-0", "2000-1", "3000-0", "4000-0", "5000-0"]),
        (["no.such"], []),
        ([], []),
    ],
)
async def test_types_are_classes_names_or_patterns(dated, types, ids):
    assert [e.entry_id for e in await told(dated.history("past", types=types))] == ids


async def test_pages_join_without_a_seam(bus):
    """A page holds 500 entries; entries of one millisecond may lie on both sides of its end."""
    witness = Witness(bus)
    numbers = list(range(2600))
    await bus.publish_many(Sown(field=f"f{n}", n=n) for n in numbers)
    past = await told(bus.history("past"))
    assert sorted(e.event.n for e in past) == numbers
    assert [order(e.entry_id) for e in past] == sorted(order(e.entry_id) for e in past)
    one = await bus.publish_many(Reaped(field="same", n=n) for n in range(1000))
    again = await told(bus.history("past", types=[Reaped]))
    assert [e.entry_id for e in again] == [r.entry_id for r in one]
    assert [e.event.n for e in again] == list(range(1000))
    assert witness.of("history.gap") == []


async def test_what_is_published_meanwhile_comes_too_and_harms_nothing(bus):
    await bus.publish_many(Sown(field="f", n=n) for n in range(600))
    seen = []
    async for envelope in bus.history("past", types=[Sown]):
        if not seen:
            await bus.publish(Sown(field="f", n=600))
        seen.append(envelope.event.n)
    assert seen == list(range(601))


async def test_leaving_early_is_no_harm(bus):
    await bus.publish_many(Sown(field=f"f{n}", n=n) for n in range(2000))
    past = bus.history("past")
    async for _ in past:
        break
    await past.aclose()
    assert len(await told(bus.history("past"))) == 2000


async def test_entries_that_cannot_be_decoded_are_among_them(bus, server):
    await bus.publish(Sown(field="f", n=1))
    stream = "bus:{past:0}"
    ask(server, "XADD", stream, "*", "hello", "world")
    ask(server, "XADD", stream, "*", "id", "i2", "type", "past.sown", "data", "not JSON")
    ask(server, "XADD", stream, "*", "id", "i3", "type", "past.unheard", "data", "{}")
    ask(server, "XADD", stream, "*", "id", b"\xff", "type", b"past.\xfe", "data", b"\x00")
    ask(server, "XADD", stream, "*", "id", "i5", "type", "past.sown", "data", "{}", "v", "x")
    await bus.publish(Sown(field="f", n=2))
    past = await told(bus.history("past"))
    errors = []
    for envelope in past:
        try:
            assert isinstance(envelope.event, Sown)
        except Undecodable as error:
            errors.append(type(error))
    assert errors == [Undecodable, Undecodable, UnknownEventType, Undecodable, Undecodable]
    assert len(past) == 7
    assert len(await told(bus.history("past", types=[Sown]))) == 4


@pytest.mark.parametrize(
    "bad", [{"since": "yesterday"}, {"until": -1}, {"types": ["a b"]}], ids=str
)
async def test_bad_positions_and_types_are_refused_before_anything_is_read(bus, bad):
    with pytest.raises(DeclarationError, match=r"is no position|type pattern 'a b' is not valid"):
        await told(bus.history("past", **bad))


@pytest.mark.parametrize("topic", ["", "a b", "bus:{past:0}", None, TOPIC], ids=str)
async def test_bad_topic_names_are_refused(bus, topic):
    with pytest.raises(DeclarationError, match=r"topic name .* is not valid"):
        await told(bus.history(topic))


async def test_a_topic_that_never_was_is_an_error_that_says_what_there_is(bus, server):
    await bus.publish(Sown(field="f"))
    with pytest.raises(UnknownTopic, match=r"no topic pest: did you mean past\? known .*: past\."):
        await told(bus.history("pest"))
    with pytest.raises(UnknownTopic, match=r"topics=\[Topic\('never'\)\]"):
        await told(bus.history("never"))
    assert ask(server, "EXISTS", "bus:{never:0}", "bus:{pest:0}") == b":0\r\n"


async def test_a_process_that_declared_nothing_sees_all_partitions(bus, url):
    await bus.publish_many(Sown(field=f"f{n}", n=n) for n in range(50))
    async with Bus.connect(url) as other:
        assert len(await told(other.history("past"))) == 50


async def test_a_key_of_another_type_is_told(bus, server):
    ask(server, "SET", "bus:{past:1}", "precious")
    with pytest.raises(WrongKeyType, match=r"bus:\{past:1\}"):
        await told(bus.history("past"))


async def test_looking_back_disturbs_no_group(bus, server):
    await bus.publish(Sown(field="f"))
    ask(server, "XGROUP", "CREATE", "bus:{past:0}", "g", "0", "MKSTREAM")
    before = ask(server, "XINFO", "GROUPS", "bus:{past:0}")
    await told(bus.history("past"))
    assert ask(server, "XINFO", "GROUPS", "bus:{past:0}") == before


async def test_a_server_that_goes_away_is_an_error_of_the_bus(private_server, monkeypatch):
    monkeypatch.setitem(event_store.merged.__kwdefaults__, "patience_s", 0.5)
    server = private_server()
    async with Bus.connect(server.url) as bus:
        await bus.publish_many(Sown(field="f", n=n) for n in range(600))
        past = bus.history("past")
        await anext(past)
        await asyncio.to_thread(server.kill)
        with pytest.raises(ServerUnreachable):
            await told(past)


# --- what is asked for


async def sown(bus: Bus, count: int = 60) -> None:
    for first in range(0, count, 10):
        await bus.publish_many(
            [(Sown if n % 3 else Reaped)(field=f"f{n % 7}", n=n) for n in range(first, first + 10)]
        )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, lambda e: True),
        ({"key": "f3"}, lambda e: e.event.field == "f3"),
        ({"key": "f3", "types": Reaped}, lambda e: e.event.field == "f3" and e.event.n % 3 == 0),
        ({"where": lambda e: e.event.n > 40}, lambda e: e.event.n > 40),
        ({"types": "*.reaped", "where": lambda e: e.event.n < 9}, lambda e: e.event.n in {0, 3, 6}),
        ({"key": "nobody"}, lambda e: False),
    ],
    ids=["all", "key", "key-and-type", "where", "type-and-where", "nothing"],
)
async def test_key_and_predicate_choose_and_both_directions_agree(bus, asked, wanted, reverse):
    await sown(bus)
    everything = await told(bus.history("past"))
    expected = [(e.stream, e.entry_id) for e in everything if wanted(e)]
    found = await told(bus.history("past", **asked, reverse=reverse))
    assert [order(e.entry_id) for e in found] == sorted(
        [order(e.entry_id) for e in found], reverse=reverse
    )
    assert sorted((e.stream, e.entry_id) for e in found) == sorted(expected)


async def test_backwards_joins_pages_without_a_seam(bus):
    for first in range(0, 2_600, 100):
        await bus.publish_many(Sown(field=f"f{n}", n=n) for n in range(first, first + 100))
    back = await told(bus.history("past", reverse=True))
    forth = await told(bus.history("past"))
    assert [order(e.entry_id) for e in back] == [order(e.entry_id) for e in forth][::-1]
    assert sorted(e.event.n for e in back) == list(range(2_600))
    middle = forth[1_000].entry_id
    until_middle = await told(bus.history("past", until=middle, reverse=True))
    assert order(until_middle[0].entry_id) == order(middle)


@pytest.mark.parametrize("limit", [0, 1, 7, 60, 61])
async def test_a_limit_ends_it(bus, limit):
    await sown(bus)
    everything = await told(bus.history("past"))
    found = await told(bus.history("past", limit=limit))
    assert len(found) == min(limit, 60)
    assert [order(e.entry_id) for e in found] == [order(e.entry_id) for e in everything[:limit]]
    newest = await told(bus.history("past", limit=limit, reverse=True, types=Reaped))
    assert len(newest) == min(limit, 20)


async def test_a_key_reads_its_partition_alone(bus, server):
    await sown(bus)
    ((stream, *_),) = {(e.stream,) for e in await told(bus.history("past", key="f3"))}
    for partition in range(4):
        if f"bus:{{past:{partition}}}" != stream:
            ask(server, "DEL", f"bus:{{past:{partition}}}")
            ask(server, "SET", f"bus:{{past:{partition}}}", "of another type")
    assert len(await told(bus.history("past", key="f3"))) == 9


async def test_what_a_predicate_cannot_decode_is_left_out_and_what_it_raises_is_told(bus, server):
    await bus.publish(Sown(field="f", n=1))
    ask(server, "XADD", "bus:{past:0}", "*", "id", "i", "type", "past.sown", "data", "no JSON")
    assert len(await told(bus.history("past", where=lambda e: e.event.n >= 0))) == 1
    with pytest.raises(ZeroDivisionError):
        await told(bus.history("past", where=lambda e: 1 / 0))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"limit": -1}, "limit must be a whole number"),
        ({"limit": "5"}, "limit must be a whole number"),
        ({"key": 7}, "key is the partition key as text"),
        ({"where": True}, "where is a function of an envelope"),
        ({"types": [7]}, "has no type"),
    ],
    ids=str,
)
async def test_bad_choices_are_refused(bus, bad, says):
    with pytest.raises(DeclarationError, match=says):
        await told(bus.history("past", **bad))


async def test_ids_beyond_all_times_are_shown(bus, server):
    """An id may be any number; a datetime ends with the year 9999."""
    last = f"{2**64 - 1}-{2**64 - 2}"
    ask(
        server,
        "XADD",
        "bus:{past:1}",
        last,
        "id",
        "i",
        "type",
        "past.sown",
        "data",
        '{"field":"f"}',
    )
    (envelope,) = await told(bus.history("past"))
    assert (envelope.entry_id, envelope.time.year) == (last, 9999)
    assert envelope.event == Sown(field="f")


async def test_large_entries_come_in_small_pages(bus, monkeypatch):
    """The first page is of 32 entries; from then on one is about a MiB, whatever they are."""
    ask_for = bus.store.archive.range
    pages: list[int] = []

    async def watched(*args, **kwargs):
        page = await ask_for(*args, **kwargs)
        pages.append(sum(len(word) for _, fields in page for word in fields))
        return page

    monkeypatch.setattr(bus.store.archive, "range", watched)
    for n in range(120):
        await bus.publish(Sown(field="f" * 50_000, n=n))
    past = bus.history("past")
    assert [e.event.n async for e in past] == list(range(120))
    assert sorted(pages)[-2] < 1_300_000


@pytest.mark.servers_only("connections break")
async def test_a_connection_that_drops_is_no_harm(bus, server):
    await bus.publish_many(Sown(field=f"f{n}", n=n) for n in range(3_000))
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as other:
        seen = []
        async for envelope in other.history("past"):
            seen.append(envelope.event.n)
            if len(seen) % 700 == 0:
                proxy.lose_replies = 1
        assert proxy.lost >= 3
        assert sorted(seen) == list(range(3_000))


# --- entries trimmed ahead of who reads


async def test_what_was_trimmed_ahead_is_told(bus, server):
    witness = Witness(bus)
    receipts = await bus.publish_many(Sown(field="f", n=n) for n in range(2_000))
    stream = receipts[0].stream
    seen = []
    async for envelope in bus.history("past"):
        seen.append(envelope)
        if len(seen) == 100:
            ask(server, "XTRIM", stream, "MAXLEN", "=", "300")
    ((before, after),) = [(a, b) for a, b in pairwise(seen) if b.event.n != a.event.n + 1]
    assert after.event.n == 1_700
    assert witness.of("history.gap") == [
        {"stream": stream, "after": before.entry_id, "first": after.entry_id}
    ]
    assert seen[-1].event.n == 1_999


async def test_a_stream_trimmed_to_its_end_is_told_too(bus, server):
    """What followed may have been there: nobody can tell."""
    witness = Witness(bus)
    receipts = await bus.publish_many(Sown(field="f", n=n) for n in range(2_000))
    seen = []
    async for envelope in bus.history("past", until=receipts[-1].entry_id):
        seen.append(envelope)
        if len(seen) == 100:
            ask(server, "XTRIM", receipts[0].stream, "MAXLEN", "=", "0")
    assert witness.of("history.gap") == [
        {"stream": receipts[0].stream, "after": seen[-1].entry_id, "first": ""}
    ]


@pytest.mark.parametrize("reverse", [False, True])
async def test_what_was_trimmed_behind_is_no_gap(bus, server, monkeypatch, reverse):
    """What was read may go, as long as the last of it is there, or there was nothing more."""
    witness = Witness(bus)
    receipts = await bus.publish_many(Sown(field="f", n=n) for n in range(160))
    ids = [r.entry_id for r in receipts]
    stream = receipts[0].stream
    ask_for = bus.store.archive.range

    async def trimming(*args, **kwargs):
        page = await ask_for(*args, **kwargs)
        read = [entry_id.decode() for entry_id, _ in page]
        ask(server, "XDEL", stream, "0-1", *read[: None if read[-1:] == ids[-1:] else -1])
        return page

    monkeypatch.setattr(bus.store.archive, "range", trimming)
    # 32 in the first page and 128 in the second: it ends with the range, and a page is full.
    found = await told(bus.history("past", until=ids[-1], reverse=reverse))
    assert len(found) == 160
    assert witness.of("history.gap") == []


async def test_letters_that_are_redriven_while_they_are_listed_are_no_gap(bus, server):
    """A dead letter goes when it is redriven or purged, and is not history."""
    witness = Witness(bus)
    await bus.publish(Sown(field="f"))
    dead = "bus:{past:0}:dead:g"
    for n in range(200):
        own = ("id", f"e{n}", "type", "past.sown", "data", '{"field":"f"}')
        ask(server, "XADD", dead, f"{n + 1}-0", *own, "deadreason", "failed", "deadentry", "1-0")
    seen = 0
    async for letter in bus.dead_letters("g"):
        seen += 1
        ask(server, "XDEL", dead, letter.id.rpartition("/")[2])
    assert seen == 200
    assert witness.of("history.gap") == []


# --- how it reads


async def test_pages_grow_and_are_asked_for_ahead(bus, monkeypatch):
    ask_for = bus.store.archive.range
    counts = []

    def watched(stream, first, last, count, **kwargs):
        counts.append(count)
        return ask_for(stream, first, last, count, **kwargs)

    monkeypatch.setattr(bus.store.archive, "range", watched)
    await bus.publish_many(Sown(field="f", n=n) for n in range(2_000))
    async with aclosing(bus.history("past", key="f")) as past:
        await anext(past)
        await asyncio.sleep(0)
        assert len(counts) == 2  # the second, while the first is looked at
        assert len([e async for e in past]) == 1_999
    # One more than the page: the last that was read comes again, and shows that it is there.
    assert counts == [32, 129, 501, 501, 501, 501]
    counts.clear()
    assert len(await told(bus.history("past", key="f", reverse=True))) == 2_000
    assert counts[:3] == [32, 128, 500]


async def test_what_was_asked_for_ahead_is_given_up_with_the_rest(bus, monkeypatch):
    await bus.publish_many(Sown(field=f"f{n}", n=n) for n in range(2_000))
    ask_for = bus.store.archive.range

    async def slow_ahead(stream, first, last, count, **kwargs):
        if count > 32:
            await asyncio.sleep(3_600)
        return await ask_for(stream, first, last, count, **kwargs)

    before = asyncio.all_tasks()
    monkeypatch.setattr(bus.store.archive, "range", slow_ahead)
    past = bus.history("past")
    await anext(past)
    assert len(asyncio.all_tasks() - before) == 4
    await past.aclose()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() - before == set()


@pytest.mark.parametrize("failure", ["away", "refuses"])
async def test_what_failed_ahead_is_asked_again_when_it_is_wanted(bus, monkeypatch, failure):
    """The caller may have taken an hour for a page; the outage is over since."""
    monkeypatch.setitem(event_store.merged.__kwdefaults__, "patience_s", 0.05)
    await bus.publish_many(Sown(field="f", n=n) for n in range(100))
    ask_for = bus.store.archive.range
    out = True

    async def away(stream, first, last, count, **kwargs):
        if count > 32 and out:
            if failure == "away":
                raise ConnectionLost("cut", sent=True)
            raise ReplyError("LOADING", "LOADING ...")
        return await ask_for(stream, first, last, count, **kwargs)

    monkeypatch.setattr(bus.store.archive, "range", away)
    before = asyncio.all_tasks()
    async with aclosing(bus.history("past", key="f")) as past:
        assert (await anext(past)).event.n == 0
        (ahead,) = asyncio.all_tasks() - before
        await asyncio.wait([ahead])
        out = False
        assert [e.event.n async for e in past] == list(range(1, 100))


async def test_an_error_ahead_that_nobody_came_to_is_not_complained_of(bus, monkeypatch):
    await bus.publish_many(Sown(field="f", n=n) for n in range(2_000))
    ask_for = bus.store.archive.range

    async def broken_ahead(stream, first, last, count, **kwargs):
        if count > 32:
            raise WrongKeyType("somebody was here")
        return await ask_for(stream, first, last, count, **kwargs)

    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    monkeypatch.setattr(bus.store.archive, "range", broken_ahead)
    before = asyncio.all_tasks()
    past = bus.history("past", key="f")
    await anext(past)
    ahead = asyncio.all_tasks() - before
    assert len(ahead) == 1
    await asyncio.wait(ahead)
    await past.aclose()
    del past, ahead
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def numbered(url: str, partitions: int, each: int, topic: str, size: int = 0) -> None:
    """Fill a topic by hand: ids go round, three of each millisecond over all partitions."""
    async with eyes_on(url) as redis:
        await redis.hset("bus:topics", topic, f'{{"partitions": {partitions}}}')
        for first in range(0, partitions * each, 1_000):
            pipeline = redis.pipeline(transaction=False)
            for n in range(first, min(first + 1_000, partitions * each)):
                fields = {"id": f"e{n}", "type": "past.sown", "data": '{"field":"f"}'}
                pipeline.xadd(
                    f"bus:{{{topic}:{n % partitions}}}",
                    {**fields, "more": "x" * size} if size else fields,
                    id=f"{1_000 + n // 3}-{n % 3}",
                )
            await pipeline.execute()


@pytest.mark.parametrize("reverse", [False, True])
async def test_many_partitions_are_read_in_order_and_soon(valkey_url, reverse):
    await numbered(valkey_url, 256, 40, "wide")
    async with Bus.connect(valkey_url) as bus:
        started_s = time.process_time()
        past = [order(e.entry_id) async for e in bus.history("wide", reverse=reverse)]
        assert time.process_time() - started_s < 5  # 0.4 s, usually
    assert past == sorted(past, reverse=reverse)
    assert len(past) == len(set(past)) == 256 * 40


async def test_large_entries_in_many_partitions_come_few_at_a_time(valkey_url, monkeypatch):
    await numbered(valkey_url, 64, 5, "broad", size=60_000)
    async with Bus.connect(valkey_url) as bus:
        ask_for = bus.store.archive.range
        counts = []

        def watched(stream, first, last, count, **kwargs):
            counts.append(count)
            return ask_for(stream, first, last, count, **kwargs)

        monkeypatch.setattr(bus.store.archive, "range", watched)
        assert len(await told(bus.history("broad"))) == 320
    assert sum(counts[:64]) <= 4 * 32  # nobody knows yet how large they are
    assert max(counts[64:]) == 3  # 128 KiB, and the last one again


async def test_equal_ids_in_several_partitions_come_whole_both_ways(bus, url):
    """Over page ends, which are at other places in each; each stream keeps its own order."""
    async with eyes_on(url) as redis:
        for partition, step in enumerate((1, 2, 3, 50)):
            pipeline = redis.pipeline(transaction=False)
            for n in range(0, 600, step):
                fields = {"id": "i", "type": "past.sown", "data": f'{{"field":"f","n":{n}}}'}
                pipeline.xadd(f"bus:{{past:{partition}}}", fields, id=f"{100 + n // 5}-{n % 5}")
            await pipeline.execute()
    await bus.publish(Sown(field="f"))
    forth = [(order(e.entry_id), e.stream) for e in await told(bus.history("past"))]
    back = [(order(e.entry_id), e.stream) for e in await told(bus.history("past", reverse=True))]
    assert len(forth) == 600 + 300 + 200 + 12 + 1
    assert forth == sorted(forth)
    assert [i for i, _ in back] == [i for i, _ in forth[::-1]]
    assert sorted(back) == forth


async def test_the_first_of_two_partition_keys_counts(bus, server):
    one, other = [k for k in map(str, range(99)) if keys.partition_of(k, 4) == 0][:2]
    fields = ("id", "i", "type", "past.sown", "data", '{"field":"f"}')
    twice = ("partitionkey", one, "partitionkey", other)
    ask(server, "XADD", "bus:{past:0}", "*", *fields, *twice)
    assert [e.key for e in await told(bus.history("past", key=one))] == [one]
    assert await told(bus.history("past", key=other)) == []


# --- those who take their time


async def starved(work):
    """How long others had to wait for a turn while `work` went on, in seconds of this thread."""
    longest = 0.0

    async def beat():
        nonlocal longest
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now

    beating = asyncio.create_task(beat())
    try:
        await work
    finally:
        beating.cancel()
    return longest


def busy(*_):
    """Work for 2 ms, of this thread: however slow the machine is."""
    until = time.thread_time() + 0.002
    while time.thread_time() < until:
        pass
    return False


async def each(envelopes, call):
    async for envelope in envelopes:
        call(envelope)


@pytest.mark.parametrize("how", ["body", "where", "replay where", "replay to"])
async def test_others_get_their_turn(bus, how):
    await bus.publish_many(Sown(field=f"f{n}", n=n) for n in range(300))
    work = {
        "body": lambda: each(bus.history("past"), busy),
        "where": lambda: each(bus.history("past", where=busy), busy),
        "replay where": lambda: bus.replay("past", to=print, where=busy),
        "replay to": lambda: bus.replay("past", to=lambda event: busy()),
    }[how]
    assert await starved(work()) < 0.05


@pytest.mark.servers_only("there is none")
@pytest.mark.parametrize("how", ["body", "where", "replay where", "replay to"])
async def test_who_works_without_a_pause_loses_no_connection(valkey_url, monkeypatch, how):
    """The replies of 4 partitions must get in between: a reply that takes too long is given up."""
    monkeypatch.setattr(Connection.submit, "__defaults__", (1, 1.0))
    monkeypatch.setitem(Connection.call.__kwdefaults__, "timeout_s", 1.0)
    seen = []

    def work(_):
        seen.append(1)
        time.sleep(0.003)  # not `busy`: the reply's time is that of the clock
        return False

    async with Bus.connect(valkey_url, topics=[TOPIC]) as bus:
        for first in range(0, 1_200, 400):
            await bus.publish_many(
                Sown(field=f"f{n % 97}{'x' * 700}", n=n) for n in range(first, first + 400)
            )
        witness = Witness(bus)
        if how == "body":
            await each(bus.history("past"), work)
        elif how == "where":
            await each(bus.history("past", where=work), print)
        elif how == "replay where":
            await bus.replay("past", to=print, where=work)
        else:
            await bus.replay("past", to=work)
    assert len(seen) == 1_200
    assert witness.of("connection.lost") == []


async def test_errors_of_what_cannot_be_read_go_with_it(bus, server):
    """An error's traceback leads to the envelope: a cycle, if the envelope led to the error."""
    for _ in range(50):
        ask(server, "XADD", "bus:{past:0}", "*", "note", "x")
    await bus.publish(Sown(field="f"))

    refused = 0
    async for envelope in bus.history("past"):
        try:
            assert envelope.event
        except Undecodable:
            refused += 1
    assert refused == 50
    del envelope
    gc.collect()
    assert [o for o in gc.get_objects() if type(o) is Undecodable] == []


@pytest.mark.servers_only("it fills a server")
@pytest.mark.timeout(120)
def test_many_entries_take_a_flat_memory(valkey_url, tmp_path):
    """3e5 entries, 200 MB in Python, in a process of its own: its peak stays below 80 MB."""
    with redis.Redis.from_url(valkey_url) as client:
        for first in range(0, 300_000, 50_000):
            client.eval(FILL, 2, "bus:{plain:0}", "bus:{plain:1}", first, first + 49_999)
        client.hset("bus:topics", "plain", '{"partitions": 2}')
    program = tmp_path / "reads.py"
    program.write_text(READS)
    done = subprocess.run(
        [sys.executable, program, valkey_url],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    count, total, peak_mb = map(float, done.stdout.split())
    assert (count, total) == (300_000, 300_000 * 299_999 / 2)
    assert peak_mb < 80


FILL = """
for n = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  redis.call('XADD', KEYS[1 + n % 2], '*', 'id', 'e' .. n, 'type', 'plain.grown', 'data',
    '{"field":"f","n":' .. n .. ',"text":"' .. string.rep('x', 120) .. '"}', 'partitionkey', 'f')
end
"""
READS = """
import asyncio, sys
from pathlib import Path
from bus import Bus, Event

class Grown(Event, type="plain.grown", key="field"):
    field: str
    n: int
    text: str

async def main(url):
    count = total = 0
    async with Bus.connect(url) as bus:
        async for envelope in bus.history("plain"):
            count += 1
            total += envelope.event.n
    # Not ru_maxrss: that begins with what the parent had.
    status = Path("/proc/self/status").read_text()
    print(count, total, int(status.partition("VmHWM:")[2].split()[0]) / 1024)

asyncio.run(main(*sys.argv[1:]))
"""
