"""Handlers at the cap: what they publish never waits, and what is removed by hand stops nobody."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from bus import Delivery, Event, StreamFull, Topic, Worker, event_handler
from bus.streams.memory.log import Log
from tests.eyes import MemoryEyes, length_of
from tests.witness import eventually

if TYPE_CHECKING:
    from bus import Bus
    from tests.guarantees.backend import Backend

POND, LAKE = "bus:{pond:0}", "bus:{lake:0}"


class Dropped(Event, type="pond.dropped"):
    n: int
    generation: int = 0


class Rippled(Event, type="pond.rippled"):
    n: int


class Flowed(Event, type="lake.flowed"):
    n: int


def watch(url: str, stream: str, stop: threading.Event, seen: Counter[int]) -> None:
    """Look at a stream's length as fast as one can."""
    with length_of(url, stream) as length:
        while not stop.is_set():
            seen[length()] += 1
            time.sleep(0)  # the others are perhaps in this process


@pytest.fixture
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five entries, and a short wait for what finds even those taken."""
    monkeypatch.setattr("bus.streams.topics.RESERVE", 5)
    monkeypatch.setattr("bus.worker.executor.NOT_PUBLISHED_PARK_S", 0.05)


async def test_a_handler_publishes_at_once_while_those_outside_wait(backend: Backend) -> None:
    """Inside, the stream is above its cap; outside, nobody may use what lies above it."""
    release = asyncio.Event()
    inside: list[tuple[int, int]] = []

    @event_handler(Dropped, group="ripples", concurrency=1)
    async def ripple(event: Dropped, delivery: Delivery[Dropped]) -> None:
        await release.wait()
        if event.n < 3:
            async with asyncio.timeout(5):
                await delivery.bus.publish(Rippled(n=event.n))
            done = sum(t.done() for t in outside)
            inside.append((await backend.redis.xlen(POND), done))

    topic = Topic("pond", maxlen=10, keep=2)
    async with backend.bus(topics=[topic]) as (bus, witness), Worker(bus, [ripple]) as worker:
        await asyncio.gather(*(bus.publish(Dropped(n=n)) for n in range(10)))
        outside = [asyncio.create_task(bus.publish(Dropped(n=n))) for n in range(10, 15)]
        await eventually(lambda: witness.of("publish.full"))
        release.set()
        await asyncio.gather(*outside)
        await worker.drained()
        assert inside[0] == (11, 0), "the first one while nothing has been acked yet"
        assert len(inside) == 3
        assert witness.of("delivery.postponed") == []
        assert await backend.redis.xlen(POND) <= 10 + 3


async def test_where_even_the_reserve_is_full_the_delivery_waits_without_an_attempt(
    backend: Backend, small_reserve: None, quick_sweeps: None
) -> None:
    attempts: dict[int, list[int]] = {}
    refused: list[StreamFull] = []

    @event_handler(Dropped, group="drains", max_attempts=2)
    async def drain(event: Dropped, delivery: Delivery[Dropped]) -> None:
        attempts.setdefault(event.n, []).append(delivery.attempt)
        try:
            await delivery.bus.publish(Flowed(n=event.n))
        except StreamFull as error:
            refused.append(error)
            raise

    lake = Topic("lake", maxlen=10, keep=2)
    stop, lengths = threading.Event(), Counter[int]()
    async with backend.bus(topics=[lake]) as (bus, witness), Worker(bus, [drain]) as worker:
        await backend.redis.xgroup_create(LAKE, "sloth", "0", mkstream=True)
        watching = asyncio.create_task(asyncio.to_thread(watch, backend.url, LAKE, stop, lengths))
        try:
            await asyncio.gather(*(bus.publish(Flowed(n=-n)) for n in range(1, 9)))
            await bus.publish_many([Dropped(n=n) for n in range(30)])
            await eventually(lambda: any(len(a) >= 4 for a in attempts.values()))
            assert await backend.redis.xlen(LAKE) == 15
            told = witness.of("delivery.postponed")
            assert {(t["group"], t["delay_s"], t["attempt"]) for t in told} == {("drains", 0.05, 1)}
            assert all("bus:{lake:0} is full (15 entries)" in t["reason"] for t in told)
            assert all((e.group, e.stream) == ("sloth", LAKE) for e in refused)
            seen = await let_go(backend, LAKE, "sloth", 38)
            await worker.drained()
        finally:
            stop.set()
            await watching
        assert sorted(seen) == sorted([*range(-8, 0), *range(30)]), "each once: no attempt failed"
        assert max(lengths) == 15, "nothing ever goes above maxlen + reserve"
        assert {a for all_of in attempts.values() for a in all_of} == {1}
        assert witness.of("delivery.retried") == []
        assert await backend.dead(POND, "drains") == []
        assert await backend.pending(POND, "drains") == []


async def let_go(backend: Backend, stream: str, group: str, count: int) -> list[int]:
    """Read and ack as the group until it has seen `count`; return their numbers."""
    seen: list[int] = []

    async def some() -> bool:
        reply = await backend.redis.xreadgroup(group, "me", {stream: ">"}, count=10)
        for entry_id, fields in reply[0][1] if reply else []:
            seen.append(int(fields[b"data"].partition(b":")[2].rstrip(b"}")))
            await backend.redis.xack(stream, group, entry_id)
        return len(seen) >= count

    await eventually(some, f"{count} entries for {group}")
    return seen


async def test_outside_publishers_cannot_use_the_reserve(
    backend: Backend, small_reserve: None
) -> None:
    """Nor a handler's own task, once the handler has ended."""
    later: list[Any] = []
    go = asyncio.Event()

    @event_handler(Dropped, group="late")
    async def leave(event: Dropped, delivery: Delivery[Dropped]) -> None:
        async def afterwards() -> None:
            await go.wait()
            await delivery.bus.publish(Flowed(n=event.n))

        later.append(asyncio.create_task(afterwards()))

    lake = Topic("lake", maxlen=10, keep=2)
    async with (
        backend.bus(topics=[lake], publish_timeout_s=0.3) as (bus, _),
        Worker(bus, [leave]) as worker,
    ):
        await backend.redis.xgroup_create(LAKE, "sloth", "0", mkstream=True)
        await asyncio.gather(*(bus.publish(Flowed(n=n)) for n in range(10)))
        await bus.publish(Dropped(n=10))
        await worker.drained()
        go.set()
        with pytest.raises(StreamFull, match=r"full \(10 entries\)"):
            await later[0]
        with pytest.raises(StreamFull):
            await bus.publish(Flowed(n=11))
        assert await backend.redis.xlen(LAKE) == 10


async def test_a_topic_at_its_cap_that_feeds_itself_drains_by_itself(backend: Backend) -> None:
    """Its only handler publishes one event per event into the topic it reads."""
    handled: Counter[tuple[int, int]] = Counter()

    @event_handler(Dropped, group="echo", max_attempts=1)
    async def echo(event: Dropped, delivery: Delivery[Dropped]) -> None:
        handled[event.n, event.generation] += 1
        if event.generation < 3:
            await delivery.bus.publish(Dropped(n=event.n, generation=event.generation + 1))

    topic = Topic("pond", maxlen=20, keep=2)
    async with backend.bus(topics=[topic]) as (bus, witness):
        await backend.redis.xgroup_create(POND, "echo", "0", mkstream=True)
        outside = [asyncio.create_task(bus.publish(Dropped(n=n))) for n in range(100)]
        await eventually(lambda: witness.of("publish.full"))
        assert await backend.redis.xlen(POND) == 20
        async with Worker(bus, [echo]) as worker:
            await asyncio.gather(*outside)
            await worker.drained()
        assert handled == Counter({(n, g): 1 for n in range(100) for g in range(4)})
        assert await backend.dead(POND, "echo") == []
        assert witness.of("delivery.retried") == []
        assert await backend.redis.xlen(POND) <= 20 + 100


async def test_a_topic_of_small_reserve_that_feeds_itself_drains_too(
    backend: Backend, small_reserve: None
) -> None:
    """One at a time, the oldest is always the one that runs: five entries are plenty."""
    handled: Counter[tuple[int, int]] = Counter()

    @event_handler(Dropped, group="echo", max_attempts=1, concurrency=1)
    async def echo(event: Dropped, delivery: Delivery[Dropped]) -> None:
        handled[event.n, event.generation] += 1
        if event.generation < 1:
            await delivery.bus.publish(Dropped(n=event.n, generation=1))

    stop, lengths = threading.Event(), Counter[int]()
    topic = Topic("pond", maxlen=10, keep=2)
    async with backend.bus(topics=[topic]) as (bus, witness), Worker(bus, [echo]) as worker:
        watching = asyncio.create_task(asyncio.to_thread(watch, backend.url, POND, stop, lengths))
        try:
            await asyncio.gather(*(bus.publish(Dropped(n=n)) for n in range(40)))
            await worker.drained()
        finally:
            stop.set()
            await watching
        assert handled == Counter({(n, g): 1 for n in range(40) for g in range(2)})
        assert max(lengths) <= 15
        assert witness.of("delivery.dead_lettered") == []


# --- entries removed for room, and by hand


async def test_dropping_the_oldest_under_a_running_worker_costs_just_those(
    backend: Backend, quick_sweeps: None
) -> None:
    """What it held is no longer its own: its verdicts come too late; the rest it handles."""
    release = asyncio.Event()
    handled: list[int] = []

    @event_handler(Dropped, group="g", concurrency=1)
    async def handle(event: Dropped) -> None:
        await release.wait()
        handled.append(event.n)

    topic = Topic("pond", maxlen=20, keep=2, on_full="drop_oldest")
    async with backend.bus(topics=[topic]) as (bus, witness), Worker(bus, [handle]) as worker:
        await bus.publish(Dropped(n=0))
        await eventually(lambda: witness.of("read.received"))
        async with asyncio.timeout(5):
            for n in range(1, 100):
                await bus.publish(Dropped(n=n))
        # Told at once, and then once a second.
        await eventually(lambda: witness.total("delivery.overrun", group="g", stream=POND) == 80)
        release.set()
        await worker.drained()
        assert set(handled) >= {0, *range(80, 100)}, "what ran, and all that is left"
        assert len(handled) == len(set(handled))
        assert witness.total("delivery.acked") == 20
        assert witness.total("delivery.refused") >= 1
        assert await backend.pending(POND, "g") == []
        assert await backend.dead(POND, "g") == []


SCRIPTS = {
    "trim": """
    local ids = {}
    local oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', ARGV[1])
    for i, e in ipairs(oldest) do ids[i] = e[2][6] end
    redis.call('XTRIM', KEYS[1], 'MAXLEN', redis.call('XLEN', KEYS[1]) - #ids)
    return ids
""",
    "delete": """
    local entries = redis.call('XRANGE', KEYS[1], '-', '+')
    if #entries == 0 then return {} end
    local entry = entries[ARGV[1] % #entries + 1]
    redis.call('XDEL', KEYS[1], entry[1])
    return {entry[2][6]}
""",
}


async def remove(backend: Backend, how: str, number: int) -> list[bytes]:
    """Remove entries in one step: the oldest, or one of them; return their data."""
    if not isinstance(backend.redis, MemoryEyes):
        return await backend.redis.eval(SCRIPTS[how], 1, POND, number)
    log = backend.redis.place.log(POND.encode()) or Log()
    if how == "trim":
        gone = log.ids[:number]
        data = [log.entries[i][5] for i in gone]
        log.trim(len(gone))
    else:
        gone = log.ids[number % len(log) :][:1] if len(log) else []
        data = [log.entries[i][5] for i in gone]
        for entry_id in gone:
            log.delete(entry_id)
    return data


@pytest.mark.parametrize("how", ["trim", "delete"])
async def test_entries_removed_by_hand_under_running_workers_stop_nobody(
    backend: Backend, quick_sweeps: None, how: str
) -> None:
    """What was not handled is among what was removed, and nothing stays pending."""
    rnd = random.Random(7)
    handled: set[int] = set()
    removed: set[int] = set()
    total = 300

    @event_handler(Dropped, group="g", concurrency=8, visibility_s=0.5)
    async def handle(event: Dropped) -> None:
        await asyncio.sleep(0.002)
        handled.add(event.n)

    async def publish(bus: Bus) -> None:
        for start in range(0, total, 10):
            await asyncio.gather(*(bus.publish(Dropped(n=n)) for n in range(start, start + 10)))

    topic = Topic("pond", maxlen=40, keep=5)
    async with backend.bus(topics=[topic]) as (bus, _):
        async with Worker(bus, [handle], lease_s=0.5) as worker:
            publishing = asyncio.create_task(publish(bus))
            while not publishing.done():
                rows = await remove(backend, how, rnd.randrange(1, 12))
                removed |= {int(r.partition(b":")[2].partition(b",")[0]) for r in rows}
                await asyncio.wait([publishing], timeout=0.01)
            await publishing
            await worker.drained()
        assert removed
        assert set(range(total)) - handled <= removed
        assert await backend.pending(POND, "g") == []
        assert len(handled) > total / 4, "and most of the work was done"
        assert await backend.dead(POND, "g") == []
