"""State and events in one atomic step: whole or not at all, once, and waiting for room in turn."""

from __future__ import annotations

import asyncio
import json
import re
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import (
    Backoff,
    Bus,
    Delivery,
    EffectsClosed,
    Event,
    InvalidEffect,
    InvalidEvent,
    PermissionDenied,
    PublishUnknown,
    Receipt,
    ServerUnreachable,
    StreamFull,
    Topic,
    Worker,
    WrongKeyType,
    event_handler,
)
from bus.streams import stream as verbs
from bus.streams.connection import ConnectionLost
from bus.streams.replies import ReplyError
from tests.eyes import eyes_of, eyes_on, verbs_of
from tests.faults.proxy import Proxy, digest
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.everywhere

STREAM, GROUP = "bus:{shop:0}", "slow"


class Sold(Event, type="shop.sold"):
    n: int


class Shipped(Event, type="cargo.shipped"):
    n: int


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Any]:
    async with eyes_on(url) as redis:
        yield redis


def shop(on_full: Any = "block", maxlen: int = 10, keep: int = 2) -> Topic:
    return Topic("shop", maxlen=maxlen, keep=keep, on_full=on_full)


async def commit(bus: Bus, collect: Callable[[Any], Any]) -> Any:
    async with bus.transaction() as change:
        collect(change)
    return change


async def sell(bus: Bus, n: int, events: int = 1) -> Any:
    """Count one, and publish that many events."""

    def collect(change: Any) -> None:
        change.incrby("sold")
        for _ in range(events):
            change.publish(Sold(n=n))

    return await commit(bus, collect)


async def numbers(redis: Any) -> list[int]:
    return [json.loads(fields[b"data"])["n"] for _, fields in await redis.xrange(STREAM)]


async def pinned(redis: Any) -> None:
    """Let a group need all that is in the stream, until `let_go`."""
    await redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)


async def let_go(redis: Any, until: str = "$") -> None:
    await redis.xgroup_setid(STREAM, GROUP, until)


async def asked(server: Any, times: int) -> None:
    """Wait until somebody has looked for room that often."""
    ask(server, "CONFIG", "RESETSTAT")
    await eventually(lambda: script_calls(server) >= times)


def script_calls(server: Any) -> int:
    stats = ask(server, "INFO", "commandstats")
    return sum(int(n) for n in re.findall(rb"cmdstat_evalsha:calls=(\d+)", stats))


# --- whole, and once


async def test_fifty_at_a_time_count_exactly_and_tell_each_number_once(url, redis):
    async with Bus.connect(url) as bus:
        witness = Witness(bus)

        async def count() -> int:
            async with bus.transaction() as change:
                total = change.incrby("total")
                change.publish(Sold(n=1), when=total.at_most(200))
            return total.value

        totals: list[int] = []
        for _ in range(5):
            totals += await asyncio.gather(*(count() for _ in range(50)))
        assert sorted(totals) == list(range(1, 251))
        assert (await redis.get("total"), await redis.xlen(STREAM)) == (b"250", 200)
        assert witness.counts()["transaction.committed"] == 250
        assert witness.total("effects.published", stream=STREAM) == 200
        assert {f["commands"] for f in witness.of("transaction.committed")} == {2}
        memories = [k async for k in redis.scan_iter("bus:tx:*", count=1000)]
        assert len(memories) == 50, "one for each of those at a time, and no more"
        assert 0 < await redis.ttl(memories[0]) <= 600


async def test_one_after_the_other_needs_one_memory(url, redis):
    async with Bus.connect(url) as bus:
        for n in range(20):
            await sell(bus, n)
        assert len(await redis.keys("bus:tx:*")) == 1


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_block_that_raises_sends_nothing(url, redis, server):
    async def fail(bus: Bus) -> None:
        async with bus.transaction() as change:
            change.incrby("sold")
            change.publish(Sold(n=1))
            raise LookupError("changed my mind")

    async with Bus.connect(url) as bus:
        await bus.publish(Sold(n=0))
        ask(server, "CONFIG", "RESETSTAT")
        with pytest.raises(LookupError):
            await fail(bus)
        assert script_calls(server) == 0
    assert (await redis.exists("sold"), await numbers(redis)) == (0, [0])


@pytest.mark.servers_only("it asks a server about itself")
async def test_an_empty_one_sends_nothing(url, server):
    async with Bus.connect(url) as bus:
        ask(server, "CONFIG", "RESETSTAT")
        async with bus.transaction() as change:
            pass
        assert (len(change), change.receipts, script_calls(server)) == (0, [], 0)


async def test_one_is_used_once(valkey_url):
    async with Bus.connect(valkey_url) as bus:
        change = bus.transaction()
        with pytest.raises(EffectsClosed, match="inside `async with"):
            change.incrby("k")
        async with change:
            change.incrby("k")
            with pytest.raises(InvalidEffect, match="used once"):
                await change.__aenter__()
        with pytest.raises(EffectsClosed, match="is over"):
            change.incrby("k")
        with pytest.raises(InvalidEffect, match="used once"):
            await change.__aenter__()
        unused = bus.transaction()
        async with unused:
            pass
        with pytest.raises(InvalidEffect, match="used once"):
            await unused.__aenter__()
        assert await eyes_of(bus).get("k") == b"1"


async def test_one_has_no_stream_beside_which_a_key_could_lie(valkey_url):
    async with Bus.connect(valkey_url) as bus, bus.transaction() as change:
        with pytest.raises(InvalidEffect, match="name the key yourself"):
            change.key("total")


async def test_two_at_a_time_are_two(valkey_url):
    async with Bus.connect(valkey_url) as bus:
        async with bus.transaction() as outer:
            first = outer.incrby("k")
            async with bus.transaction() as inner:
                second = inner.incrby("k")
            with pytest.raises(InvalidEffect, match="same effects"):
                outer.incrby("other", when=second.present())
        assert (first.value, second.value) == (2, 1)


@pytest.mark.servers_only("it takes an access list")
async def test_a_user_who_may_not_is_told_at_once_and_nothing_is_done(private_server, server_kind):
    server = private_server(server_kind)
    rules = "on >pw ~bus:* ~mine:* +@all -hincrby"
    ask(server, "ACL", "SETUSER", "clerk", *rules.split())
    url = server.url.replace("redis://", "redis://clerk:pw@")
    async with Bus.connect(url, publish_timeout_s=20) as bus, asyncio.timeout(5):
        for collect in (
            lambda e: e.incrby("theirs"),
            lambda e: [e.hincrby("mine:h", "f"), e.incrby("mine:k")],
            lambda e: [e.get("mine:k"), e.hincrby("mine:h", "f")],
        ):
            with pytest.raises(PermissionDenied, match=r"docs/wire\.md"):
                await commit(bus, collect)
        await commit(bus, lambda e: e.incrby("mine:k"))
        assert await eyes_of(bus).get("mine:k") == b"1"


async def test_a_memory_of_another_type_is_named(valkey_url):
    async with Bus.connect(valkey_url) as bus:
        await commit(bus, lambda e: e.incrby("k"))
        (memory,) = await eyes_of(bus).keys("bus:tx:*")
        await eyes_of(bus).delete(memory)
        await eyes_of(bus).sadd(memory, "a")
        with pytest.raises(WrongKeyType, match=memory.decode()):
            await commit(bus, lambda e: e.incrby("k"))


async def test_of_two_with_one_ticket_the_older_comes_too_late(url, redis, monkeypatch):
    """A request that hung somewhere must not be applied when its ticket is another's by now."""
    sent: list[tuple[Any, ...]] = []
    inner = verbs_of(url).commit

    async def noted(self: Any, *args: Any) -> Any:
        sent.append(args)
        return await inner(self, *args)

    monkeypatch.setattr(verbs_of(url), "commit", noted)
    async with Bus.connect(url) as bus:
        first = await sell(bus, 1)
        again = await inner(bus.store, *sent[0])
        assert again[0][0].replies[0] == (True, 1)
        assert again[0][0].replies[1][1].decode() == first.receipts[0].entry_id
        await sell(bus, 2)
        assert sent[0][0] == sent[1][0], "the same ticket"
        with pytest.raises(Exception, match="STALE"):
            await inner(bus.store, *sent[0])
    assert (await redis.get("sold"), await numbers(redis)) == (b"2", [1, 2])


async def test_leaving_the_bus_waits_for_transactions(url, redis):
    bus = Bus.connect(url, publish_timeout_s=5)
    async with bus:
        await bus.publish(Sold(n=0))
        going = [asyncio.create_task(sell(bus, n)) for n in range(20)]
        await asyncio.sleep(0)
    await asyncio.gather(*going)
    assert await redis.get("sold") == b"20"


async def test_a_cancelled_caller_leaves_it_whole_or_undone(url, redis):
    async with Bus.connect(url) as bus:
        await sell(bus, 0)
        for n in range(1, 30):
            going = asyncio.create_task(sell(bus, n))
            for _ in range(n % 4):
                await asyncio.sleep(0)
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
        await sell(bus, 30)
    assert int(await redis.get("sold")) == len(await numbers(redis))


# --- room


async def test_where_callers_are_refused_one_is_refused_at_once_and_whole(url, redis):
    async with Bus.connect(url, topics=[shop("reject")], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(9):
            await sell(bus, n)
        async with asyncio.timeout(5):
            with pytest.raises(StreamFull, match=r"10 entries.*Group slow still needs") as raised:
                await sell(bus, 9, events=2)
        assert (raised.value.stream, raised.value.group) == (STREAM, GROUP)
        assert await redis.get("sold") == b"9"
        await sell(bus, 9)
        assert await numbers(redis) == list(range(10))
        with pytest.raises(StreamFull):
            await sell(bus, 10)
        await let_go(redis)
        await sell(bus, 10)
        names = [n for n, _ in witness.seen if n in ("publish.full", "publish.resumed")]
        assert names == ["publish.full", "publish.resumed"] * 2, "each time once"


@pytest.mark.servers_only("it counts what a server was asked")
async def test_one_that_waits_goes_on_within_100_ms_of_room(url, redis, server):
    """The median of ten; one of them may be held up by whatever else the machine does."""
    took_s = []
    async with Bus.connect(url, topics=[shop()], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        for n in range(10):
            witness.forget()
            waiting = asyncio.create_task(sell(bus, 10 + n))
            await eventually(lambda: witness.of("publish.full"))
            await asked(server, times=4)  # its pauses are at their longest
            assert await redis.get("sold") == b"%d" % (10 + n)
            (entry_id, _) = (await redis.xrange(STREAM, count=1))[0]
            started = time.perf_counter()
            await let_go(redis, entry_id)
            await waiting
            took_s.append(time.perf_counter() - started)
            assert witness.counts()["publish.resumed"] == 1
    assert await redis.xlen(STREAM) == 10
    assert median(took_s) < 0.1, took_s


@pytest.mark.servers_only("it counts what a server was asked")
async def test_those_who_wait_go_in_their_order_large_ones_too(url, redis, server):
    async with Bus.connect(url, topics=[shop()], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        waiting = []
        for n, events in ((10, 1), (11, 5), (12, 1), (13, 2)):
            waiting.append(asyncio.create_task(sell(bus, n, events)))
            await eventually(lambda: witness.of("publish.full"))
        for entry_id, _ in (await redis.xrange(STREAM))[:-1]:
            await let_go(redis, entry_id)
            before = script_calls(server)
            await eventually(  # nobody asks any more once all have found room
                lambda n=before: script_calls(server) >= n + 2 or all(t.done() for t in waiting)
            )
        await let_go(redis)
        await asyncio.gather(*waiting)
        assert (await numbers(redis))[-9:] == [10, *[11] * 5, 12, 13, 13]
        assert await redis.xlen(STREAM) <= 10


@pytest.mark.servers_only("it counts what a server was asked")
async def test_who_comes_later_does_not_take_what_a_larger_one_waits_for(url, redis, server):
    async with Bus.connect(url, topics=[shop()], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        large = asyncio.create_task(sell(bus, 10, events=5))
        await eventually(lambda: witness.of("publish.full"))
        (entry_id, _) = (await redis.xrange(STREAM, count=3))[-1]
        await let_go(redis, entry_id)
        small = asyncio.create_task(sell(bus, 11))
        await asked(server, times=4)
        assert (large.done(), small.done()) == (False, False)
        await let_go(redis)
        await asyncio.gather(large, small)
    assert (await numbers(redis))[-6:] == [10] * 5 + [11]


@pytest.mark.servers_only("it counts what a server was asked")
async def test_one_that_was_robbed_of_its_room_is_still_the_first(url, redis, server, monkeypatch):
    """A publisher elsewhere was quicker than it, between its look and its events."""
    inner = verbs_of(url).commit
    robbed: list[int] = []

    async def rob(self: Any, *args: Any) -> Any:
        if not robbed:
            robbed.append(1)
            await redis.xadd(STREAM, {"id": "t", "type": "shop.sold", "data": '{"n":-1}'})
        return await inner(self, *args)

    async with Bus.connect(url, topics=[shop()], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        large = asyncio.create_task(sell(bus, 10, events=2))
        await eventually(lambda: witness.of("publish.full"))
        small = asyncio.create_task(sell(bus, 11))
        monkeypatch.setattr(verbs_of(url), "commit", rob)
        (entry_id, _) = (await redis.xrange(STREAM, count=2))[-1]
        await let_go(redis, entry_id)
        await eventually(lambda: robbed)
        await asked(server, times=4)
        assert (large.done(), small.done()) == (False, False)
        await let_go(redis)
        await asyncio.gather(large, small)
    assert (await numbers(redis))[-3:] == [10, 10, 11]


async def test_one_whose_time_is_up_names_who_holds_it_up(url, redis):
    async with Bus.connect(url, topics=[shop()], publish_timeout_s=0.3) as bus:
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        results = await asyncio.gather(*(sell(bus, n) for n in range(3)), return_exceptions=True)
        assert [type(r) for r in results] == [StreamFull] * 3
        assert {r.group for r in results} == {GROUP}  # type: ignore[union-attr]
        assert "was not published" in str(results[0])
        assert await redis.get("sold") == b"10"
        await let_go(redis)
        await sell(bus, 10)


async def test_one_that_cannot_get_at_the_server_is_not_told_that_the_stream_is_full(
    private_server,
):
    server = private_server()
    async with (
        Redis.from_url(server.url) as redis,
        Bus.connect(server.url, topics=[shop()], publish_timeout_s=1) as bus,
    ):
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        waiting = asyncio.create_task(sell(bus, 10))
        await eventually(lambda: witness.of("publish.full"))
        server.kill()
        with pytest.raises(Exception, match="nothing of it was done") as raised:
            await waiting
        assert type(raised.value).__name__ == "PublishTimeout"


async def test_others_are_not_held_up_by_those_who_wait(url, redis):
    """Not those of other streams, and not a handler, which may use the reserve."""
    shipped = asyncio.Event()

    @event_handler(Sold, group="ships", backoff=Backoff(base_s=0.02))
    async def ship(event: Sold, delivery: Delivery[Sold]) -> None:
        await shipped.wait()
        async with asyncio.timeout(5), delivery.bus.transaction() as change:
            change.incrby("shipped")
            change.publish(Sold(n=-1), when=change.get("never").present())

    async with Bus.connect(url, topics=[shop()], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        async with Worker(bus, [ship]) as worker:
            for n in range(10):
                await sell(bus, n)
            waiting = asyncio.create_task(sell(bus, 10))
            await eventually(lambda: witness.of("publish.full"))
            async with asyncio.timeout(5):
                await commit(bus, lambda e: e.publish(Shipped(n=1)))
            shipped.set()
            await waiting
            await worker.drained()
            assert witness.of("delivery.postponed") == []
    assert await redis.get("shipped") == b"11"


async def test_one_in_a_handler_that_finds_even_the_reserve_full_parks_its_delivery(
    url, redis, monkeypatch
):
    monkeypatch.setattr("bus.streams.topics.RESERVE", 3)
    monkeypatch.setattr("bus.worker.executor.NOT_PUBLISHED_PARK_S", 0.05)
    attempts: list[int] = []

    @event_handler(Shipped, group="sells", max_attempts=2, concurrency=1)
    async def handle(event: Shipped, delivery: Delivery[Shipped]) -> None:
        attempts.append(delivery.attempt)
        await sell(delivery.bus, event.n, events=2)

    async with Bus.connect(url, topics=[shop()], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        async with Worker(bus, [handle]) as worker:
            await bus.publish_many([Shipped(n=n) for n in (10, 11)])
            await eventually(lambda: len(witness.of("delivery.postponed")) >= 3)
            assert await redis.xlen(STREAM) == 12
            await let_go(redis)
            await worker.drained()
    assert set(attempts) == {1}
    assert sorted(await numbers(redis))[-4:] == [10, 10, 11, 11]
    assert await redis.get("sold") == b"12"


async def test_two_full_streams_are_waited_for_in_turn(url, redis):
    async with Bus.connect(
        url, topics=[shop(), Topic("cargo", maxlen=4, keep=1)], publish_timeout_s=20
    ) as bus:
        witness = Witness(bus)
        await pinned(redis)
        await redis.xgroup_create("bus:{cargo:0}", GROUP, "0", mkstream=True)
        await bus.publish_many([Sold(n=n) for n in range(8)])
        await bus.publish_many([Sold(n=n) for n in range(2)])
        for _ in range(4):
            await bus.publish(Shipped(n=0))
        waiting = asyncio.create_task(
            commit(bus, lambda e: [e.incrby("k"), e.publish(Sold(n=1)), e.publish(Shipped(n=1))])
        )
        await eventually(lambda: witness.of("publish.full"))
        first = witness.of("publish.full")[0]["stream"]
        await redis.xgroup_setid(first, GROUP, "$")
        await eventually(lambda: len(witness.of("publish.full")) == 2)
        second = witness.of("publish.full")[1]["stream"]
        assert {first, second} == {STREAM, "bus:{cargo:0}"}
        assert not await redis.exists("k")
        await redis.xgroup_setid(second, GROUP, "$")
        change = await waiting
    assert [r.stream for r in change.receipts] == [STREAM, "bus:{cargo:0}"]


@pytest.mark.servers_only("it counts what a server was asked")
async def test_one_of_a_stream_that_refuses_is_refused_for_that_stream_alone(url, redis, server):
    """Somebody waits for room in the other one: that is no reason to call this one full."""
    topics = [shop(), Topic("cargo", maxlen=4, keep=1, on_full="reject")]
    async with Bus.connect(url, topics=topics, publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        waiting = asyncio.create_task(sell(bus, 10))
        await eventually(lambda: witness.of("publish.full"))
        both = asyncio.create_task(
            commit(bus, lambda e: [e.publish(Shipped(n=1)), e.publish(Sold(n=11))])
        )
        await asked(server, times=3)
        assert not both.done()
        await let_go(redis)
        await asyncio.gather(waiting, both)


@pytest.mark.parametrize("on_full", ["block", "reject", "drop_oldest"])
async def test_more_events_than_ever_fit_are_refused_at_once(url, redis, on_full):
    async with Bus.connect(url, topics=[shop(on_full)], publish_timeout_s=20) as bus:
        async with asyncio.timeout(5):
            with pytest.raises(InvalidEvent, match="room for 8 between keep and maxlen"):
                await sell(bus, 1, events=9)
        assert not await redis.exists("sold")
        await sell(bus, 1, events=8)
        assert (await redis.get("sold"), await redis.xlen(STREAM)) == (b"1", 8)


async def test_dropping_the_oldest_makes_room_at_once(url, redis):
    async with Bus.connect(url, topics=[shop("drop_oldest")], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(30):
            await sell(bus, n)
    assert await numbers(redis) == list(range(20, 30))
    assert witness.total("delivery.overrun", group=GROUP) == 20
    assert await redis.hget(f"{STREAM}:overrun", GROUP) == b"20"


async def test_many_of_them_trim_down_to_keep(url, redis):
    async with Bus.connect(url, topics=[shop(maxlen=200, keep=20)]) as bus:
        for n in range(100):
            await sell(bus, n, events=10)
    assert 20 <= await redis.xlen(STREAM) < 20 + 18 + 100 + 10


async def test_receipts_are_those_of_what_was_published(url, redis):
    async with Bus.connect(url, topics=[Topic("shop", partitions=1)]) as bus:
        async with bus.transaction() as change:
            skipped = change.publish(Sold(n=0), when=change.get("none").present())
            taken = change.publish(Sold(n=1), event_id="mine")
        assert (skipped.value, skipped.skipped) == (None, True)
        ((entry_id, _),) = await redis.xrange(STREAM)
        assert change.receipts == [taken.value]
        assert taken.value == Receipt("mine", STREAM, entry_id.decode())


AFTERWARDS = {
    "gone": lambda: ServerUnreachable("nobody answers"),
    "without memory": lambda: ReplyError("OOM", "OOM command not allowed"),
    "without rights": lambda: ReplyError("NOPERM", "NOPERM"),
}


@pytest.mark.parametrize("trouble", AFTERWARDS)
async def test_what_may_have_been_sent_stays_unknown_whatever_comes_after(
    url, monkeypatch, trouble
):
    """A lost answer first: what the server says or does not say then is about the repeats."""
    inner = verbs_of(url).commit
    calls: list[int] = []

    async def lost(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            await inner(self, *args)
            raise ConnectionLost("connection lost: by the test", sent=True)
        error = AFTERWARDS[trouble]()
        raise error

    async with Bus.connect(url, publish_timeout_s=0.3) as bus:
        monkeypatch.setattr(verbs_of(url), "commit", lost)
        with pytest.raises(PublishUnknown):
            await sell(bus, 1)
        assert len(calls) > 1
        assert await eyes_of(bus).get("sold") == b"1"


async def test_a_caller_told_unknown_may_look_at_the_state(url, monkeypatch):
    """The example of what PublishUnknown asks for."""
    inner = verbs_of(url).commit

    async def hangs(self: Any, *args: Any) -> Any:
        await inner(self, *args)
        await asyncio.Event().wait()

    async with Bus.connect(url, publish_timeout_s=0.3) as bus:
        monkeypatch.setattr(verbs_of(url), "commit", hangs)
        with pytest.raises(PublishUnknown, match="whole or not"):
            await sell(bus, 1)
        monkeypatch.undo()
        assert await eyes_of(bus).get("sold") == b"1"


@pytest.mark.servers_only("there is no server that it would be kept on")
async def test_what_was_read_is_not_kept_on_the_server(url, redis):
    """The memory is there to recognise a repeat, not to hold megabytes for ten minutes."""
    await redis.set("large", "x" * 1_000_000)
    async with Bus.connect(url) as bus:
        async with bus.transaction() as change:
            large = change.get("large")
        assert len(large.value) == 1_000_000
        assert await redis.keys("bus:tx:*") == [], "nothing was written: nothing to repeat"
        async with bus.transaction() as change:
            large = change.get("large")
            change.incrby("k")
        assert len(large.value) == 1_000_000
        (memory,) = await redis.keys("bus:tx:*")
        assert await redis.strlen(memory) < 200


@pytest.mark.servers_only("an answer is lost with a connection")
async def test_a_repeat_reads_again_what_was_too_long_to_be_kept(server, redis):
    await redis.set("large", "x" * 10_000)
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as bus:
        proxy.lose(digest(verbs._commit), 2)
        async with bus.transaction() as change:
            large = change.get("large")
            short = change.incrby("k")
            told = change.hget("none", "such")
        assert proxy.lost == 2
        assert (large.value, short.value, told.value) == (b"x" * 10_000, 1, None)
    assert await redis.get("k") == b"1"


@pytest.mark.servers_only("it counts what a server was asked")
async def test_one_whose_events_have_a_condition_waits_as_any_other(
    url, redis, server, monkeypatch
):
    """It asks for room without its events; it does not try again and again whether they fit."""
    sent: list[int] = []
    inner = verbs_of(url).commit

    async def counted(self: Any, *args: Any) -> Any:
        sent.append(1)
        return await inner(self, *args)

    async with Bus.connect(url, topics=[shop()], publish_timeout_s=20) as bus:
        witness = Witness(bus)
        await pinned(redis)
        for n in range(10):
            await sell(bus, n)
        monkeypatch.setattr(verbs_of(url), "commit", counted)

        async def rename() -> list[Receipt]:
            async with bus.transaction() as change:
                there = change.exists("no such shop").equals(0)
                for n in (10, 11):
                    change.publish(Sold(n=n), when=there)
            return change.receipts

        waiting = asyncio.create_task(rename())
        await eventually(lambda: witness.of("publish.full"))
        await asked(server, times=12)
        assert (len(sent), waiting.done()) == (1, False)
        await let_go(redis)
        assert len(await waiting) == 2
        assert len(sent) == 2
