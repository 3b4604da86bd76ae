"""Looking back: every entry once, in the order of ids, over all partitions."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from redis.asyncio import Redis

from bus import (
    Bus,
    BusError,
    DeclarationError,
    Event,
    Topic,
    Undecodable,
    UnknownEventType,
    UnknownTopic,
    WrongKeyType,
)
from tests.proxy import Proxy
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Envelope

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
    async with Redis.from_url(url) as redis:
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
    numbers = list(range(2600))
    await bus.publish_many(Sown(field=f"f{n}", n=n) for n in numbers)
    past = await told(bus.history("past"))
    assert sorted(e.event.n for e in past) == numbers
    assert [order(e.entry_id) for e in past] == sorted(order(e.entry_id) for e in past)
    one = await bus.publish_many(Reaped(field="same", n=n) for n in range(1000))
    again = await told(bus.history("past", types=[Reaped]))
    assert [e.entry_id for e in again] == [r.entry_id for r in one]
    assert [e.event.n for e in again] == list(range(1000))


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


async def test_a_server_that_goes_away_is_an_error_of_the_bus(private_server):
    server = private_server()
    async with Bus.connect(server.url) as bus:
        await bus.publish_many(Sown(field="f", n=n) for n in range(600))
        past = bus.history("past")
        await anext(past)
        await asyncio.to_thread(server.kill)
        with pytest.raises(BusError):
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


@pytest.mark.timeout(120)
def test_a_million_entries_take_a_flat_memory(valkey_url, tmp_path):
    """1e6 entries, decoded, in a process of its own: its peak stays below 80 MB."""
    with redis.Redis.from_url(valkey_url) as client:
        for first in range(0, 1_000_000, 50_000):
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
    assert (count, total) == (1_000_000, 1_000_000 * 999_999 / 2)
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
