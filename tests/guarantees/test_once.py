"""`once=`: an event that was published twice is handled by one of its deliveries."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import Backoff, Bus, Delivery, Event, Reject, Worker, event_handler
from bus.streams import keys
from tests.eyes import eyes_of
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from bus import Handler

STREAM = "bus:{parcel:0}"
GROUP = "deliver"
HOUR = timedelta(hours=1)


class Parcel(Event, type="parcel.sent", key="house"):
    house: str
    how: str = "well"


class Returned(Event, type="parcel.returned", key="house"):
    house: str


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bus.worker.once.ONCE_BUSY_PARK_S", 0.1)


def delivering(ran: list[tuple[str, int]], **settings: Any) -> Handler[...]:
    settings = {
        "group": GROUP,
        "once": HOUR,
        "breaker": None,
        "max_attempts": 2,
        "backoff": Backoff(base_s=0.05, factor=1.0, jitter=0.0),
        **settings,
    }

    @event_handler(Parcel, **settings)
    async def deliver(parcel: Parcel, delivery: Delivery[Parcel]) -> None:
        ran.append((delivery.entry_id.decode(), delivery.attempt))
        if parcel.how == "second time" and delivery.attempt == 1:
            raise ValueError("nobody at home")
        if parcel.how == "never":
            raise Reject("no such house")
        delivery.effects.incrby(f"parcels:{parcel.house}")

    return deliver


async def marks(bus: Bus) -> dict[str, bytes]:
    found = [k async for k in eyes_of(bus).scan_iter(match=f"{STREAM}:once:*")]
    return {k.decode(): await eyes_of(bus).get(k) for k in found}


async def test_an_event_published_twice_is_handled_once(url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(url) as bus:
        told = Witness(bus)
        for _ in range(3):
            await bus.publish(Parcel(house="a"), event_id="one")
        await bus.publish(Parcel(house="a"), event_id="two")
        async with Worker(bus, [delivering(ran)]) as worker:
            await worker.drained(20)
            assert len(ran) == 2
            assert await eyes_of(bus).get("parcels:a") == b"2"
            assert len(told.of("delivery.duplicate")) == 2
            await bus.publish(Parcel(house="a"), event_id="one")  # later, too
            await worker.drained(20)
        assert len(ran) == 2
        assert await marks(bus) == {
            f"{STREAM}:once:{GROUP}::parcel.sent:one": b"done",
            f"{STREAM}:once:{GROUP}::parcel.sent:two": b"done",
        }


async def test_without_once_it_is_handled_as_often_as_it_was_published(valkey_url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        for _ in range(3):
            await bus.publish(Parcel(house="a"), event_id="one")
        async with Worker(bus, [delivering(ran, once=None)]) as worker:
            await worker.drained(20)
    assert len(ran) == 3


async def test_two_deliveries_of_one_event_never_run_at_a_time(url: str) -> None:
    going = asyncio.Event()
    running = most = calls = 0

    @event_handler(Parcel, group=GROUP, once=HOUR)
    async def deliver(_: Parcel) -> None:
        nonlocal running, most, calls
        calls += 1
        running += 1
        most = max(most, running)
        await going.wait()
        running -= 1

    async with Bus.connect(url) as bus, Bus.connect(url) as other:
        told = Witness(bus)
        for _ in range(4):
            await bus.publish(Parcel(house="a"), event_id="one")
        async with Worker(bus, [deliver]) as worker, Worker(other, [deliver]):
            second = Witness(other)
            await eventually(lambda: (told.counts() + second.counts())["delivery.postponed"] >= 3)
            going.set()
            await worker.drained(20)
        assert (most, calls) == (1, 1)
        assert (await eyes_of(bus).xpending(STREAM, GROUP))["pending"] == 0


async def test_a_retry_is_no_second_event(valkey_url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Parcel(house="a", how="second time"), event_id="one")
        await bus.publish(Parcel(house="a", how="second time"), event_id="one")
        async with Worker(bus, [delivering(ran)]) as worker:
            await worker.drained(20)
        assert [attempt for _, attempt in ran] == [1, 2]
        assert len({entry_id for entry_id, _ in ran}) == 1, "while it is parked, nobody overtakes"
        assert await eyes_of(bus).get("parcels:a") == b"1"


async def test_after_one_delivery_died_the_other_one_is_tried(valkey_url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        for _ in range(2):
            await bus.publish(Parcel(house="a", how="never"), event_id="one")
        async with Worker(bus, [delivering(ran)]) as worker:
            await worker.drained(20)
        assert len({entry_id for entry_id, _ in ran}) == 2
        assert await eyes_of(bus).xlen(keys.dead(STREAM, GROUP)) == 2


async def test_a_delivery_that_crashed_goes_on_by_itself(valkey_url: str) -> None:
    """Its worker is gone, its name is still in the mark."""
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        receipt = await bus.publish(Parcel(house="a"), event_id="one")
        await eyes_of(bus).xgroup_create(STREAM, GROUP, id="0")
        await eyes_of(bus).xreadgroup(GROUP, "gone", {STREAM: ">"})
        claimed = await bus.store.claim(
            keys.once(STREAM, GROUP, b"", b"parcel.sent", b"one"),
            STREAM,
            STREAM,
            GROUP,
            receipt.entry_id.encode(),
            9,
        )
        assert claimed == 1
        async with Worker(bus, [delivering(ran, visibility_s=0.3)]) as worker:
            await worker.drained(20)
        assert ran == [(receipt.entry_id, 2)]
        assert await eyes_of(bus).get("parcels:a") == b"1"


async def test_the_mark_is_put_by_the_script_that_acks_and_not_without_it(valkey_url: str) -> None:
    """A zombie marks nothing: another worker has the entry by now, and has yet to handle it."""
    going, there = asyncio.Event(), asyncio.Event()

    @event_handler(Parcel, group=GROUP, once=HOUR)
    async def deliver(_: Parcel) -> None:
        there.set()
        await going.wait()

    async with Bus.connect(valkey_url) as bus:
        told = Witness(bus)
        receipt = await bus.publish(Parcel(house="a"), event_id="one")
        async with Worker(bus, [deliver]):
            await there.wait()
            await eyes_of(bus).xclaim(STREAM, GROUP, "thief", 0, [receipt.entry_id])
            going.set()
            await eventually(lambda: told.of("delivery.refused"))
        assert list((await marks(bus)).values()) == [f"s {receipt.entry_id}".encode()]


async def test_a_replay_and_a_redrive_run_again_on_purpose(valkey_url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        receipt = await bus.publish(Parcel(house="a"), event_id="one")
        async with Worker(bus, [delivering(ran)]) as worker:
            await worker.drained(20)
            ((_, fields),) = await eyes_of(bus).xrange(STREAM)
            for run in ("replay-1", "replay-1", "replay-2"):
                put = {**fields, b"origentry": receipt.entry_id, b"run": run}
                await eyes_of(bus).xadd(keys.inbox(STREAM, GROUP), put)
            await eventually(lambda: len(ran) >= 3)
            await worker.drained(20)
        assert len(ran) == 3, "once as it was, and once for each run"
        assert await eyes_of(bus).xlen(keys.inbox(STREAM, GROUP)) == 0


async def test_each_group_handles_it(valkey_url: str) -> None:
    first: list[tuple[str, int]] = []
    second: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        for _ in range(2):
            await bus.publish(Parcel(house="a"), event_id="one")
        handlers = [delivering(first), delivering(second, group="count")]
        async with Worker(bus, handlers) as worker:
            await worker.drained(20)
    assert (len(first), len(second)) == (1, 1)


@pytest.mark.parametrize("event_id", ["i" * 5_000, "with spaces: and {braces}", "äöü"])
async def test_any_event_id_will_do(valkey_url: str, event_id: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        for _ in range(2):
            await bus.publish(Parcel(house="a"), event_id=event_id)
        async with Worker(bus, [delivering(ran)]) as worker:
            await worker.drained(20)
        assert len(ran) == 1
        assert all(len(key) < 200 for key in await marks(bus))


@pytest.mark.parametrize("batch", [None, 10])
async def test_events_of_two_types_are_two_events(url: str, batch: int | None) -> None:
    """Whoever takes an order's number for the id of all that befalls it loses none of it."""
    ran: list[str] = []

    @event_handler("parcel.*", group=GROUP, once=HOUR)
    async def deliver(_: Event, delivery: Delivery[Any]) -> None:
        ran.append(delivery.envelope.type)

    @event_handler("parcel.*", group=GROUP, once=HOUR, batch=10, batch_wait_ms=10)
    async def deliver_many(deliveries: list[Delivery[Any]]) -> None:
        ran.extend(d.envelope.type for d in deliveries)

    async with Bus.connect(url) as bus:
        for _ in range(2):
            await bus.publish(Parcel(house="a"), event_id="order-1")
            await bus.publish(Returned(house="a"), event_id="order-1")
        async with Worker(bus, [deliver if batch is None else deliver_many]) as worker:
            await worker.drained(20)
        assert sorted(ran) == ["parcel.returned", "parcel.sent"]
        assert sorted(await marks(bus)) == [
            f"{STREAM}:once:{GROUP}::parcel.returned:order-1",
            f"{STREAM}:once:{GROUP}::parcel.sent:order-1",
        ]


async def test_one_id_from_two_sources_is_one_event(valkey_url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        for source in ("shop", "depot"):
            await bus.publish(Parcel(house="a"), event_id="one", source=source)
        async with Worker(bus, [delivering(ran)]) as worker:
            await worker.drained(20)
    assert len(ran) == 1


async def test_the_mark_expires(valkey_url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Parcel(house="a"), event_id="one")
        async with Worker(bus, [delivering(ran, once=timedelta(seconds=30))]) as worker:
            await worker.drained(20)
            (mark,) = await marks(bus)
            assert 0 < await eyes_of(bus).pttl(mark) <= 30_000
            await eyes_of(bus).delete(mark)  # as after 30 s
            await bus.publish(Parcel(house="a"), event_id="one")
            await worker.drained(20)
    assert len(ran) == 2


async def test_what_failed_half_way_is_done_as_far_as_duplicates_go(valkey_url: str) -> None:
    """Its part is applied, and it is a dead letter: another entry of it must not add to that."""

    @event_handler(Parcel, group=GROUP, once=HOUR, breaker=None)
    async def deliver(_: Parcel, delivery: Delivery[Parcel]) -> None:
        delivery.effects.incrby("written")
        delivery.effects.incrby("words")

    async with Bus.connect(valkey_url) as bus:
        await eyes_of(bus).set("words", "many")
        for _ in range(3):
            await bus.publish(Parcel(house="a"), event_id="one")
        async with Worker(bus, [deliver]) as worker:
            await worker.drained(20)
        assert await eyes_of(bus).get("written") == b"1"
        ((_, letter),) = await eyes_of(bus).xrange(keys.dead(STREAM, GROUP))
        assert letter[b"deadapplied"] == b"INCRBY written"
        assert list((await marks(bus)).values()) == [b"done"]


async def test_a_mark_of_another_type_is_waited_for_not_handled_twice(valkey_url: str) -> None:
    ran: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus:
        told = Witness(bus)
        mark = keys.once(STREAM, GROUP, b"", b"parcel.sent", b"one")
        await eyes_of(bus).sadd(mark, "not a string")
        await bus.publish(Parcel(house="a"), event_id="one")
        async with Worker(bus, [delivering(ran)]) as worker:
            await eventually(lambda: len(told.of("delivery.postponed")) >= 2)
            assert ran == []
            await eyes_of(bus).delete(mark)
            await worker.drained(20)
    assert len(ran) == 1


IDS = 400


async def cut_connections(
    url: str, dice: random.Random, cut: list[str], until: asyncio.Event
) -> None:
    """Cut one or two of all connections but our own, again and again; note which in `cut`.

    Until it is told: redis-py may swallow a cancellation.
    """
    async with Redis.from_url(url, single_connection_client=True) as redis:
        me = await redis.client_id()
        while not until.is_set():
            others = [c["id"] for c in await redis.client_list() if int(c["id"]) != me]
            for victim in dice.sample(others, min(2, len(others))):
                await redis.client_kill_filter(_id=victim)
                cut.append(victim)
            await asyncio.sleep(dice.uniform(0.02, 0.08))


@pytest.mark.servers_only("the storm is of connections that are cut")
@pytest.mark.parametrize("batch", [None, 20], ids=["single", "batch"])
async def test_in_a_storm_each_event_takes_effect_once(url: str, batch: int | None) -> None:
    """Two workers, duplicates all over, calls that fail, connections that are cut."""
    dice = random.Random(f"{url} {batch}")
    running: set[str] = set()
    twice: list[str] = []
    calls: Counter[str] = Counter()

    async def run(deliveries: list[Delivery[Any]]) -> None:
        """Do what a handler does, for all of them; some of the calls fail."""
        ids = [d.envelope.event_id for d in deliveries]
        calls.update(ids)
        twice.extend(i for i in ids if i in running)
        running.update(ids)
        try:
            for delivery, event_id in zip(deliveries, ids, strict=True):
                delivery.effects.hincrby("runs", event_id)
            await asyncio.sleep(dice.uniform(0, 0.01))
            if dice.random() < 0.2:
                raise ValueError("nobody at home")
        finally:
            running.difference_update(ids)

    settings: dict[str, Any] = {
        "group": GROUP,
        "once": HOUR,
        "concurrency": 8,
        "breaker": None,
        "max_attempts": 100,
        "backoff": Backoff(base_s=0.02, factor=1.0, jitter=0.5),
    }

    @event_handler(Parcel, **settings)
    async def deliver(_: Parcel, delivery: Delivery[Parcel]) -> None:
        await run([delivery])

    @event_handler(Parcel, **settings, batch=20, batch_wait_ms=5)
    async def deliver_many(deliveries: list[Delivery[Any]]) -> None:
        await run(deliveries)

    handler = deliver if batch is None else deliver_many
    ids = [f"id-{n}" for n in range(IDS)]
    published = [*ids, *dice.choices(ids, k=IDS + 10)]
    dice.shuffle(published)
    parts = [published[n : n + 20] for n in range(0, len(published), 20)]
    cut: list[str] = []

    async def there_are_more_cuts_than(count: int) -> None:
        await eventually(lambda: len(cut) > count)

    async with Bus.connect(url) as bus, Bus.connect(url) as other:
        async with Worker(bus, [handler]) as worker, Worker(other, [handler]) as second:
            enough = asyncio.Event()
            cutting = asyncio.create_task(cut_connections(url, dice, cut, enough))
            for n, part in enumerate(parts):
                await asyncio.gather(
                    *(bus.publish(Parcel(house="a"), event_id=event_id) for event_id in part)
                )
                await there_are_more_cuts_than(2 * n)
            enough.set()
            await cutting
            await worker.drained()
            await second.drained()
        redis = eyes_of(bus)
        runs = {k.decode(): int(n) for k, n in (await redis.hgetall("runs")).items()}
        assert runs == dict.fromkeys(ids, 1)
        assert twice == []
        assert calls.total() > len(runs), "some have failed at first"
        assert await eyes_of(bus).xlen(keys.dead(STREAM, GROUP)) == 0
