"""Channels: what a run says, once and in order, from any id to the end; and what cannot come."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import tracemalloc
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    BusClosed,
    ChannelEnded,
    ChannelGap,
    DeclarationError,
    Event,
    EventTooLarge,
    InvalidEvent,
    PublishTimeout,
    WrongKeyType,
)
from bus.history import hub
from bus.streams.answers import Appended, Limits
from bus.streams.forms import unit_of
from tests.eyes import eyes_of, eyes_on
from tests.proxy import Proxy
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Channel, ChannelTail
    from bus.embedded import EmbeddedServer

pytestmark = pytest.mark.everywhere
SHORT = timedelta(seconds=1)


class Token(Event, type="channels.token"):
    n: int
    text: str = ""


class Packed(Event, type="channels.packed", encoding="msgpack", version=2, key="n"):
    n: int


class Fake(Event, type="bus.channel_ended"):
    pass


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url) as bus:
        yield bus


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


async def say(channel: Channel, *numbers: int) -> list[str]:
    """Publish tokens at the same time; return their entry ids."""
    receipts = await asyncio.gather(*(channel.publish(Token(n=n)) for n in numbers))
    return [receipt.entry_id for receipt in receipts]


async def heard(tail: ChannelTail) -> list[int]:
    """Return the numbers of all that comes until the end."""
    return [envelope.event.n async for envelope in tail]  # type: ignore[attr-defined]


async def some(tail: ChannelTail, count: int) -> list[int]:
    return [(await anext(tail)).event.n for _ in range(count)]  # type: ignore[attr-defined]


def clients(server: EmbeddedServer) -> int:
    return len(re.findall(rb"(?m)^(?:\$\d+\r\n)?id=", ask(server, "CLIENT", "LIST"))) - 1


def readers(server: EmbeddedServer) -> int:
    """How many connections wait for what is appended to streams."""
    return ask(server, "CLIENT", "LIST").count(b"cmd=xread ")


def calls(server: EmbeddedServer, command: str) -> int:
    found = re.search(
        rb"cmdstat_%b:calls=(\d+)" % command.encode(), ask(server, "INFO", "commandstats")
    )
    return int(found[1]) if found else 0


# --- to the end, from anywhere


async def test_what_was_and_what_comes_is_heard_once_in_order_to_the_end(bus: Bus) -> None:
    channel = bus.channel("run-42")
    await say(channel, *range(5))
    early = asyncio.create_task(heard(channel.tail()))
    late = channel.tail()
    assert await some(late, 3) == [0, 1, 2]
    await say(channel, 5, 6)
    await channel.end()
    assert await early == list(range(7))
    assert await heard(late) == [3, 4, 5, 6]
    assert late.ended
    assert await heard(channel.tail()) == list(range(7)), "after the end, too"
    assert await heard(late) == []


async def test_a_reader_goes_on_behind_any_id(bus: Bus) -> None:
    channel = bus.channel("run")
    ids = await say(channel, *range(10))
    for n in (0, 4, 8):
        assert await some(channel.tail(ids[n]), 9 - n) == list(range(n + 1, 10))
    live = channel.tail(ids[9])
    waiting = asyncio.create_task(heard(live))
    await say(channel, 10)
    await channel.end()
    assert await waiting == [10]
    assert live.position is not None
    assert await heard(channel.tail(ids[9])) == [10]
    ended = channel.tail(live.position)
    assert await heard(ended) == []
    assert ended.ended


async def test_a_channel_that_nobody_has_begun_is_waited_for(bus: Bus) -> None:
    channel = bus.channel("run")
    waiting = asyncio.create_task(heard(channel.tail()))
    await eventually(lambda: bus._hub._followed)
    await say(channel, 1)
    await channel.end()
    assert await waiting == [1]


async def test_a_run_that_says_nothing_ends_as_well(bus: Bus) -> None:
    channel = bus.channel("run")
    waiting = asyncio.create_task(heard(channel.tail()))
    await channel.end()
    assert await waiting == []


async def test_an_ended_channel_takes_nothing_more_from_anybody(bus: Bus, url: str) -> None:
    channel, witness = bus.channel("run"), Witness(bus)
    await say(channel, 1)
    await channel.end()
    await channel.end()
    await bus.channel("run").end()
    assert not witness.of("publish.failed"), "it is what was wanted"
    with pytest.raises(ChannelEnded, match=r"channel run was ended.*another name"):
        await channel.publish(Token(n=2))
    async with Bus.connect(url) as other:
        with pytest.raises(ChannelEnded, match="channel run was ended"):
            await other.channel("run").publish(Token(n=2))
        await other.channel("run").end()
    assert await heard(channel.tail()) == [1]
    assert await eyes_of(bus).xlen(channel.key) == 2
    await eyes_of(bus).delete(channel.key)
    with pytest.raises(ChannelEnded):  # who has ended it begins no other by mistake
        await channel.publish(Token(n=2))


async def test_the_end_comes_behind_what_was_being_published_and_before_what_came_later(
    bus: Bus,
) -> None:
    channel = bus.channel("run")
    before = [asyncio.create_task(channel.publish(Token(n=n))) for n in range(3)]
    end = asyncio.create_task(channel.end())
    behind = [asyncio.create_task(channel.publish(Token(n=n))) for n in range(3, 5)]
    await asyncio.gather(*before, end)
    for late in behind:
        with pytest.raises(ChannelEnded):
            await late
    assert await heard(channel.tail()) == [0, 1, 2]


async def test_all_objects_of_a_channel_publish_in_one_order_and_none_behind_the_end(
    bus: Bus,
) -> None:
    plain, short = bus.channel("run"), bus.channel("run", ttl=timedelta(minutes=1))
    small = bus.channel("run", maxlen=200)
    objects = [plain, short, small]
    await asyncio.gather(*(objects[n % 3].publish(Token(n=n)) for n in range(100)))
    last = [plain.publish(Token(n=100)), short.end(), small.publish(Token(n=101))]
    *_, late = await asyncio.gather(*last, return_exceptions=True)
    assert isinstance(late, ChannelEnded)
    assert await heard(plain.tail()) == list(range(101))


async def test_a_channel_lives_as_long_and_is_as_long_as_was_said_last(valkey: Bus) -> None:
    long, short = valkey.channel("run"), valkey.channel("run", ttl=timedelta(minutes=1), maxlen=100)
    for of, ttl_ms, length in ((long, 3_600_000, 1000), (short, 60_000, 200), (long, 3_600_000, 1)):
        await asyncio.gather(*(of.publish(Token(n=n)) for n in range(1000 if of is long else 1)))
        left_ms = await eyes_of(valkey).pttl(of.key)
        assert ttl_ms - 5_000 < left_ms <= ttl_ms
        found = await eyes_of(valkey).xlen(of.key)
        assert found <= length if of is short else found >= length


async def test_entries_have_the_wire_format_of_all_others(bus: Bus) -> None:
    channel = bus.channel("run")
    receipt = await channel.publish(Token(n=1, text="ä"))
    packed = await channel.publish(Packed(n=2))
    await channel.end()
    (first, plain), (second, other), (_, end) = await eyes_of(bus).xrange("bus:channel:{run}")
    assert (first, second) == (receipt.entry_id.encode(), packed.entry_id.encode())
    assert list(plain) == [b"id", b"type", b"data"]
    assert plain[b"id"] == receipt.event_id.encode()
    assert json.loads(plain[b"data"]) == {"n": 1, "text": "ä"}
    assert other[b"v"] == b"2"
    assert other[b"datacontenttype"] == b"application/msgpack"
    assert other[b"partitionkey"] == b"2"
    assert end[b"type"] == b"bus.channel_ended"
    assert end[b"data"] == b"{}"
    envelopes = [envelope async for envelope in channel.tail()]
    assert [e.event for e in envelopes] == [Token(n=1, text="ä"), Packed(n=2)]
    assert [e.entry_id for e in envelopes] == [receipt.entry_id, packed.entry_id]


async def test_what_another_client_wrote_by_hand_is_read_and_ends_it(bus: Bus) -> None:
    channel = bus.channel("run")
    fields: Any = {"type": "channels.token", "id": "x", "data": '{"n": 7}'}
    await eyes_of(bus).xadd(channel.key, fields)
    await eyes_of(bus).xadd(channel.key, {"id": "y", "type": "bus.channel_ended", "data": "{}"})
    assert await heard(channel.tail()) == [7]
    with pytest.raises(ChannelEnded):
        await channel.publish(Token(n=8))


# --- what cannot come


async def test_a_trimmed_id_is_told_once_and_the_rest_comes(bus: Bus) -> None:
    channel = bus.channel("run", maxlen=100)
    (first, *_) = await say(channel, *range(50))
    for start in range(50, 1000, 50):
        await say(channel, *range(start, start + 50))
    assert 100 <= await eyes_of(bus).xlen(channel.key) <= 250
    await channel.end()
    tail = channel.tail(first)
    with pytest.raises(ChannelGap, match=r"channel run after .* were dropped") as told:
        await anext(tail)
    numbers = await heard(tail)
    assert numbers == list(range(numbers[0], 1000))
    oldest = (await eyes_of(bus).xrange(channel.key, count=1))[0][0].decode()
    assert (told.value.reason, told.value.after) == ("trimmed", first)
    assert told.value.first == oldest


async def test_a_reader_that_falls_behind_sees_a_gap_and_holds_up_nobody(valkey: Bus) -> None:
    channel = valkey.channel("run", maxlen=2_000)
    slow, quick = channel.tail(), channel.tail()
    heard_at_once: list[int] = []

    async def listen() -> None:
        async for envelope in quick:
            heard_at_once.append(envelope.event.n)  # type: ignore[attr-defined] # noqa: PERF401

    reading = asyncio.create_task(listen())
    await say(channel, 0)
    assert await some(slow, 1) == [0]
    for start in range(1, 10_001, 500):
        await say(channel, *range(start, start + 500))
        await eventually(lambda: len(heard_at_once) == start + 500)  # noqa: B023
    await channel.end()
    await reading
    assert heard_at_once == list(range(10_001))
    seen, reasons = list[int](), list[str]()
    while not slow.ended:
        try:
            seen += await heard(slow)
        except ChannelGap as gap:
            reasons.append(gap.reason)
            seen.append(-1)
    assert reasons == ["trimmed"]
    at = seen.index(-1)
    assert seen[:at] == list(range(1, at + 1))
    assert seen[at + 1 :] == list(range(seen[at + 1], 10_001))
    assert seen[at + 1] > at + 1


async def test_a_beginning_that_was_dropped_is_told(valkey: Bus) -> None:
    channel = valkey.channel("run", maxlen=100)
    for start in range(0, 1000, 100):
        await say(channel, *range(start, start + 100))
    await channel.end()
    tail = channel.tail()
    with pytest.raises(ChannelGap) as told:
        await anext(tail)
    assert (told.value.reason, told.value.after) == ("trimmed", None)
    numbers = await heard(tail)
    assert numbers[0] > 0
    assert numbers == list(range(numbers[0], 1000))


async def test_a_beginning_that_was_dropped_before_it_could_be_read_is_told(valkey: Bus) -> None:
    channel = valkey.channel("run", maxlen=100)
    tail = channel.tail()
    waiting = asyncio.create_task(anext(tail))
    await eventually(lambda: valkey._hub._followed)
    await say(channel, *range(500))  # in one script call
    with pytest.raises(ChannelGap) as told:
        await waiting
    assert (told.value.reason, told.value.after) == ("trimmed", None)
    (first,) = await some(tail, 1)
    assert first > 0


async def test_the_id_before_all_is_the_beginning(valkey: Bus) -> None:
    begun, new = valkey.channel("begun", maxlen=100), valkey.channel("new")
    for start in range(0, 1000, 100):
        await say(begun, *range(start, start + 100))
    tail = begun.tail("0-0")
    with pytest.raises(ChannelGap) as told:
        await anext(tail)
    assert (told.value.reason, told.value.after) == ("trimmed", None)
    assert (await some(tail, 1))[0] > 0
    waiting = asyncio.create_task(anext(new.tail("00-0")))
    await eventually(lambda: new.key in valkey._hub._followed)
    await say(new, 1)
    assert (await waiting).entry_id


async def _later(bus: Bus, entry_id: str) -> bool:
    """Whether the ids that are given now are beyond this one, also in a key that is new."""
    seconds, microseconds = await eyes_of(bus).time()
    return seconds * 1000 + microseconds // 1000 > int(entry_id.partition("-")[0])


async def test_a_channel_begun_anew_is_told_from_one_that_has_dropped_entries(valkey: Bus) -> None:
    channel = valkey.channel("run", maxlen=100)
    *_, last = await say(channel, 1, 2, 3)
    await eyes_of(valkey).delete(channel.key)
    await eventually(lambda: _later(valkey, last))
    first, _ = await say(channel, 4, 5)
    tail = channel.tail(last)
    with pytest.raises(ChannelGap, match="does not reach to") as told:
        await anext(tail)
    assert (told.value.reason, told.value.after, told.value.first) == ("restarted", last, first)
    assert await some(tail, 2) == [4, 5]


async def test_a_channel_begun_anew_under_a_tail_that_waits_is_told_where_it_was(
    valkey: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes is given at once, and the gap says that it was before it."""
    monkeypatch.setattr(hub, "BLOCK_MS", 50)
    channel = valkey.channel("run")
    tail = channel.tail()
    waiting = asyncio.create_task(some(tail, 2))
    await eventually(lambda: valkey._hub._followed)
    (last,) = await say(channel, 1)
    await eventually(lambda: tail.position == last)
    await eyes_of(valkey).delete(channel.key)
    await eventually(lambda: _later(valkey, last))
    (first,) = await say(channel, 2)
    assert await waiting == [1, 2]
    with pytest.raises(ChannelGap, match=f"does not reach to {last}") as told:
        await anext(tail)
    assert (told.value.reason, told.value.after, told.value.first) == ("restarted", last, first)
    await say(channel, 3)
    assert await some(tail, 1) == [3]


async def test_what_is_dropped_between_the_look_and_the_first_read_is_told(valkey: Bus) -> None:
    channel = valkey.channel("run")
    ids = await say(channel, *range(10))
    tail = channel.tail()
    await tail._begin()
    await eyes_of(valkey).xtrim(channel.key, minid=ids[5], approximate=False)
    with pytest.raises(ChannelGap) as told:
        await anext(tail)
    assert (told.value.reason, told.value.first) == ("trimmed", ids[5])
    assert await some(tail, 5) == [5, 6, 7, 8, 9]


async def test_an_expired_channel_is_gone_for_those_who_come_back(bus: Bus) -> None:
    channel = bus.channel("run")
    (first, _) = await say(channel, 1, 2)
    await eyes_of(bus).delete(channel.key)
    tail = channel.tail(first)
    with pytest.raises(ChannelGap, match="channel run has expired") as told:
        await anext(tail)
    assert (told.value.reason, told.value.after, told.value.first) == ("gone", first, None)
    assert await heard(tail) == [], "after that it is over"


async def test_a_channel_that_expires_without_an_end_is_told_to_those_who_wait(bus: Bus) -> None:
    channel = bus.channel("run", ttl=SHORT)
    begun_before, begun_after = channel.tail(), channel.tail()
    waiting = asyncio.create_task(some(begun_before, 2))
    await eventually(lambda: bus._hub._followed)
    (first,) = await say(channel, 1)
    assert await some(begun_after, 1) == [1]
    for reading in (waiting, anext(begun_after), anext(channel.tail(first))):
        with pytest.raises(ChannelGap) as told:
            await reading
        assert (told.value.reason, told.value.after) == ("gone", first)


async def test_a_channel_that_expires_as_its_first_entry_comes_is_told(valkey: Bus) -> None:
    channel = valkey.channel("run")
    tail = channel.tail()
    waiting = asyncio.create_task(anext(tail))
    await eventually(lambda: valkey._hub._followed)
    waiting.cancel()
    await asyncio.wait([waiting])
    (first,) = await say(channel, 1)
    await eventually(lambda: tail._pursuit._seat.queue)
    await eyes_of(valkey).delete(channel.key)
    assert await some(tail, 1) == [1]
    with pytest.raises(ChannelGap) as told:
        await anext(tail)
    assert (told.value.reason, told.value.after) == ("gone", first)


async def test_a_channel_that_has_lost_its_end_is_told_to_who_had_read_it(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart with older data; here somebody has begun another by hand."""
    monkeypatch.setattr(hub, "BLOCK_MS", 50)
    monkeypatch.setattr(hub, "_LOOK_EVERY_S", 0.05)
    channel = bus.channel("run")
    tail = channel.tail()
    waiting = asyncio.create_task(some(tail, 3))
    await eventually(lambda: bus._hub._followed)
    *_, last = await say(channel, 1, 2, 3)
    assert await waiting == [1, 2, 3]
    fields: Any = {"id": "x", "type": "channels.token", "data": '{"n": 7}'}
    async with eyes_of(bus).pipeline() as change:
        change.delete(channel.key)
        change.xadd(channel.key, fields, id="5-1")
        await change.execute()
    with pytest.raises(ChannelGap, match="lost its end") as told:
        await anext(tail)
    assert (told.value.reason, told.value.after) == ("restarted", last)
    await eyes_of(bus).xadd(channel.key, {**fields, "data": '{"n": 8}'}, id="6-1")
    assert await some(tail, 1) == [8]


async def test_each_publish_and_the_end_put_off_the_expiry(bus: Bus) -> None:
    channel = bus.channel("run", ttl=timedelta(seconds=100))

    async def left_ms() -> int:
        return await eyes_of(bus).pttl(channel.key)

    for speak in (
        lambda: channel.publish(Token(n=1)),
        lambda: channel.publish(Token(n=2)),
        channel.end,
    ):
        await eyes_of(bus).persist(channel.key)
        await speak()
        assert 99_000 < await left_ms() <= 100_000
    await eyes_of(bus).pexpire(channel.key, 1)
    await eventually(lambda: _gone(bus, channel))
    again = bus.channel("run")
    await again.publish(Token(n=3))
    assert await some(again.tail(), 1) == [3], "the name is free again"


async def _gone(bus: Bus, channel: Channel) -> bool:
    return not await eyes_of(bus).exists(channel.key)


async def test_a_silent_channel_that_lives_on_is_not_told_to_be_gone(bus: Bus) -> None:
    channel = bus.channel("run", ttl=SHORT)
    tail = channel.tail()
    await say(channel, 1)
    assert await some(tail, 1) == [1]
    waiting = asyncio.create_task(heard(tail))
    await eyes_of(bus).pexpire(channel.key, 60_000)
    looks = asyncio.get_running_loop().time() + 1.2
    await eventually(lambda: asyncio.get_running_loop().time() > looks)
    assert not waiting.done()
    await channel.end()
    assert await waiting == []


async def test_an_id_of_another_life_of_the_channel_is_told_and_all_comes(bus: Bus) -> None:
    channel = bus.channel("run")
    (first, _) = await say(channel, 1, 2)
    await channel.end()
    tail = channel.tail("9999999999999-7")
    with pytest.raises(ChannelGap, match="has begun anew") as told:
        await anext(tail)
    assert (told.value.reason, told.value.after) == ("restarted", "9999999999999-7")
    assert told.value.first == first
    assert await heard(tail) == [1, 2]


# --- what goes wrong


@pytest.mark.parametrize("name", ["", "a b", "{x}", "run:1", "-x", "x" * 101, 7, "ä"])
async def test_a_bad_name_is_refused_at_once(valkey: Bus, name: Any) -> None:
    with pytest.raises(DeclarationError, match="channel name"):
        valkey.channel(name)


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(days=31), 60, None])
async def test_a_bad_ttl_is_refused_at_once(valkey: Bus, ttl: Any) -> None:
    with pytest.raises(DeclarationError, match="ttl must be a timedelta"):
        valkey.channel("run", ttl=ttl)


@pytest.mark.parametrize("maxlen", [0, 1, 2_000_000, 2.5])
async def test_a_bad_cap_is_refused_at_once(valkey: Bus, maxlen: Any) -> None:
    with pytest.raises(DeclarationError, match="maxlen"):
        valkey.channel("run", maxlen=maxlen)


@pytest.mark.parametrize(
    "after", ["", "1", "1-", "-", "+", "$", "1-2-3", "1-" + "9" * 20, 5, "x" * 9999]
)
async def test_what_is_no_id_is_refused_at_once(valkey: Bus, after: Any) -> None:
    with pytest.raises(DeclarationError, match="after is the id of an entry") as told:
        valkey.channel("run").tail(after)
    assert len(str(told.value)) < 200


async def test_bad_events_are_refused_and_nothing_is_sent(valkey: Bus) -> None:
    channel = valkey.channel("run")
    with pytest.raises(InvalidEvent, match="only events"):
        await channel.publish("text")  # type: ignore[arg-type]
    with pytest.raises(EventTooLarge):
        await channel.publish(Token(n=1, text="x" * 300_000))
    with pytest.raises(InvalidEvent, match=r"call end\(\)"):
        await channel.publish(Fake())
    assert not await eyes_of(valkey).exists(channel.key)


async def test_a_key_of_another_type_is_told_and_left_alone(bus: Bus) -> None:
    channel = bus.channel("run")
    await eyes_of(bus).set(channel.key, "mine")
    with pytest.raises(WrongKeyType):
        await channel.publish(Token(n=1))
    with pytest.raises(WrongKeyType):
        await anext(channel.tail())
    assert await eyes_of(bus).get(channel.key) == b"mine"


async def test_a_batch_that_is_in_already_is_found_and_answered_as_before(bus: Bus) -> None:
    appends, limits = bus.store.channels.appends(60_000), Limits(1, 1, 1_000)

    async def append(*names: str) -> Appended:
        units = [unit_of(["id", n, "type", f"a.{n}", "data", "{}"]) for n in names]
        return await appends.append(
            "bus:channel:{run}", "p", 1, units, len(units), limits, 5, again_ms=1
        )

    first, second = await append("a", "b", "c"), await append("d")
    again = await append("a", "b", "c")
    assert (again.ms, again.sequence, again.events) == (first.ms, first.sequence, 3)
    assert (first.repeated, second.repeated, again.repeated) == (False, False, True)
    assert await eyes_of(bus).xlen("bus:channel:{run}") == 4


@pytest.mark.servers_only("it loses answers on the wire")
async def test_a_lost_answer_repeats_nothing(bus: Bus, server: EmbeddedServer) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as shaky:
        channel = shaky.channel("run")
        await say(channel, 0)
        for start in range(1, 31, 3):
            lost = asyncio.create_task(proxy.lose_one())
            await asyncio.sleep(0)
            ids = await say(channel, *range(start, start + 3))
            await lost
            entries = await eyes_of(bus).xrange(channel.key, ids[0], ids[-1])
            assert [entry[0].decode() for entry in entries] == ids
        lost = asyncio.create_task(proxy.lose_one())
        await asyncio.sleep(0)
        await channel.end()
        await lost
        assert proxy.lost == 11
    assert await heard(bus.channel("run").tail()) == list(range(31))
    assert await eyes_of(bus).xlen("bus:channel:{run}") == 32


@pytest.mark.servers_only("it loses answers on the wire")
async def test_a_lost_answer_is_found_behind_what_others_added(
    bus: Bus, server: EmbeddedServer
) -> None:
    """The script is asked again after more entries than one page of its search."""
    others = bus.channel("run")
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as shaky:
        channel = shaky.channel("run")
        await say(channel, 0)
        lost = asyncio.create_task(proxy.lose_one())
        await asyncio.sleep(0)
        unsure = asyncio.create_task(say(channel, 1, 2))
        await lost
        await say(others, *range(100, 350))
        await unsure
    await others.end()
    numbers = await heard(others.tail())
    assert sorted(numbers) == [0, 1, 2, *range(100, 350)]


async def test_readers_and_writers_outlive_cut_connections_and_a_restart(private_server) -> None:
    server = private_server(aof=True)
    async with Bus.connect(server.url) as bus:
        channel = bus.channel("run")
        reading = [asyncio.create_task(heard(channel.tail())) for _ in range(5)]
        await say(channel, 0)
        ask(server, "CLIENT", "KILL", "TYPE", "normal")
        await say(channel, 1)
        server.kill()
        speaking = asyncio.create_task(say(channel, 2, 3))
        await asyncio.to_thread(server.start)
        await speaking
        await channel.end()
        for numbers in await asyncio.gather(*reading):
            assert numbers == [0, 1, 2, 3]


async def test_a_publish_that_cannot_be_sent_says_so_in_time(private_server) -> None:
    server = private_server()
    async with Bus.connect(server.url, publish_timeout_s=0.3) as bus:
        channel = bus.channel("run")
        await say(channel, 0)
        server.kill()
        with pytest.raises(PublishTimeout, match="not published"):
            await channel.publish(Token(n=1))


async def test_a_closed_bus_tells_readers_and_writers(valkey_url: str) -> None:
    bus = Bus.connect(valkey_url)
    channel = bus.channel("run")
    waiting = asyncio.create_task(heard(channel.tail()))
    await eventually(lambda: bus._hub._followed)
    last = asyncio.create_task(say(channel, *range(3_000)))
    await asyncio.sleep(0)
    await bus.close()
    assert len(set(await last)) == 3_000, "what is being published is waited for"
    with pytest.raises(BusClosed):
        await channel.publish(Token(n=2))
    with pytest.raises(BusClosed):
        await waiting


async def test_a_cancelled_wait_loses_nothing(bus: Bus) -> None:
    channel = bus.channel("run")
    tail = channel.tail()
    seen: list[int] = []
    speaking = asyncio.create_task(_speak(channel, 200))
    while not tail.ended:
        waiting = asyncio.create_task(anext(tail))
        for _ in range(len(seen) % 7):
            await asyncio.sleep(0)
        waiting.cancel()
        try:
            seen.append((await waiting).event.n)  # type: ignore[attr-defined]
        except (asyncio.CancelledError, StopAsyncIteration):
            await asyncio.sleep(0)
            seen += [] if tail.ended else await some_now(tail)
    await speaking
    assert seen == list(range(200))


async def some_now(tail: ChannelTail) -> list[int]:
    try:
        return await some(tail, 1)
    except StopAsyncIteration:
        return []


async def _speak(channel: Channel, count: int) -> None:
    for n in range(count):
        await channel.publish(Token(n=n))
    await channel.end()


# --- what it costs


@pytest.mark.servers_only("it counts what a server was asked")
async def test_publishes_at_the_same_time_share_calls_and_writes(
    valkey: Bus, shared_server
) -> None:
    server = shared_server("valkey-9.1")
    one, others = valkey.channel("one"), [valkey.channel(f"c{n}") for n in range(50)]
    await say(one, 0)
    ask(server, "CONFIG", "RESETSTAT")
    await say(one, *range(1, 400))
    assert calls(server, "evalsha") == 1
    before = _reads(server)
    await asyncio.gather(*(say(c, 0, 1) for c in others))
    assert calls(server, "evalsha") == 51
    assert _reads(server) - before <= 10, "in one write"


def _reads(server: EmbeddedServer) -> int:
    found = re.search(rb"total_reads_processed:(\d+)", ask(server, "INFO", "stats"))
    assert found
    return int(found[1])


@pytest.mark.servers_only("it counts connections")
async def test_a_thousand_readers_of_a_channel_cost_one_read(valkey: Bus, shared_server) -> None:
    server = shared_server("valkey-9.1")
    channel = valkey.channel("run")
    reading = [asyncio.create_task(heard(channel.tail())) for _ in range(1000)]
    await eventually(lambda: sum(1 for s in valkey._hub._seats if s.streams) == 1000)
    await eventually(lambda: readers(server) == 1)
    ask(server, "CONFIG", "RESETSTAT")
    for start in (0, 50):
        await say(channel, *range(start, start + 50))
    await channel.end()
    assert all(seen == list(range(100)) for seen in await asyncio.gather(*reading))
    assert calls(server, "xread") <= 6
    assert readers(server) <= 1
    assert not valkey._hub._seats


async def test_a_dropped_reader_costs_nothing_any_more(valkey: Bus) -> None:
    channel = valkey.channel("run")
    await say(channel, 1)
    tail = channel.tail()
    assert await some(tail, 1) == [1]
    async for _ in channel.tail():
        break
    assert valkey._hub._seats
    del tail
    await eventually(lambda: not valkey._hub._seats)
    assert valkey._hub._followed == {}


@pytest.mark.servers_only("it counts connections")
async def test_two_thousand_channels_need_no_more_connections_than_two(
    valkey, shared_server
) -> None:
    """On the server each takes a node of a stream, 4.3 KB, and beyond that what its entries do.

    `python -m bench channels` does the same with 10,000.
    """
    server = shared_server("valkey-9.1")
    two = [valkey.channel("first"), valkey.channel("second")]
    listening = [asyncio.create_task(heard(c.tail())) for c in two]
    await eventually(lambda: len(valkey._hub._followed) == 2)
    await valkey._hub._follower.unblock()  # as those do who join while it reads
    for channel in two:
        await say(channel, 0, 1, 2)
        await channel.end()
    assert await asyncio.gather(*listening) == [[0, 1, 2]] * 2
    connections, used = clients(server), _memory(server)

    channels = [valkey.channel(f"run-{n}") for n in range(2_000)]
    hundreds = [channels[n : n + 500] for n in range(0, 2_000, 500)]
    reading: list[asyncio.Task[list[int]]] = []
    for some_channels in hundreds:
        await asyncio.gather(*(say(c, 0, 1, 2) for c in some_channels))
        reading += [asyncio.create_task(heard(c.tail())) for c in some_channels]
        await eventually(lambda: len(valkey._hub._followed) == len(reading))  # noqa: B023
    assert clients(server) == connections + 1, "the one that reads for all of them"
    assert (_memory(server) - used) / 2_000 < 5_000
    for some_channels in hundreds:
        await asyncio.gather(*(say(c, 3) for c in some_channels))
        await asyncio.gather(*(c.end() for c in some_channels))
    assert await asyncio.gather(*reading) == [[0, 1, 2, 3]] * 2_000
    assert clients(server) == connections
    assert len(valkey._channels.senders._lines) <= 64


async def test_a_channel_costs_a_process_little_and_unused_nearly_nothing(valkey: Bus) -> None:
    async def followed(channels: list[Channel]) -> list[asyncio.Task[list[int]]]:
        await asyncio.gather(*(say(c, 0, 1, 2) for c in channels))
        reading = [asyncio.create_task(heard(c.tail())) for c in channels]
        await eventually(lambda: all(c.key in valkey._hub._followed for c in channels))
        return reading

    reading = await followed([valkey.channel(f"warm-{n}") for n in range(10)])
    gc.collect()
    tracemalloc.start()
    channels = [valkey.channel(f"run-{n}") for n in range(200)]
    unused_bytes = tracemalloc.get_traced_memory()[0] / 200
    reading += await followed(channels)
    gc.collect()
    followed_bytes = tracemalloc.get_traced_memory()[0] / 200
    tracemalloc.stop()
    for task in reading:
        task.cancel()
    await asyncio.wait(reading)
    assert unused_bytes < 600
    assert followed_bytes < 12_000, "its sender, its tail, and a task that waits"


def _memory(server: EmbeddedServer) -> int:
    found = re.search(rb"used_memory_dataset:(\d+)", ask(server, "INFO", "memory"))
    assert found
    return int(found[1])


async def test_channels_that_are_not_written_to_any_more_leave_nothing(valkey: Bus) -> None:
    senders = valkey._channels.senders._lines
    for n in range(300):
        await say(valkey.channel(f"run-{n}"), 0)
        assert len(senders) <= 64
    channel = valkey.channel("run")
    await say(channel, 0)
    assert channel.key in senders
    await channel.end()
    assert channel.key not in senders


async def test_handlers_and_topics_know_nothing_of_channels(bus: Bus) -> None:
    witness = Witness(bus)
    await say(bus.channel("run"), 1)
    assert await eyes_of(bus).exists("bus:topics") == 0
    assert (await bus.inspect()).topics == ()
    assert [name for name, _ in witness.seen if name.startswith("publish")] == ["publish.appended"]


async def test_the_first_publish_connects(valkey_url: str) -> None:
    """A bus that was never entered connects when it is used."""
    bus = Bus.connect(valkey_url)
    try:
        receipt = await bus.channel("run").publish(Token(n=1))
        topical = await bus.publish(Token(n=2))
    finally:
        await bus.close()
    async with eyes_on(valkey_url) as eyes:
        assert await eyes.exists(receipt.stream, topical.stream) == 2
