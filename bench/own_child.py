"""One timed run of one system in a process of its own: `python -m bench.own_child SYSTEM TEST ...`.

Prints one JSON line. Counts are checked here, before a rate exists.
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvloop

from bench.systems.bus_ import TOPIC, DocumentCreated
from bench.work import LANES, make_fields, peak_rss_mb
from bus import Bus, Delivery, Event, Topic, Worker, event_handler
from bus.agents import ModelContentBlockDelta
from bus.streams.topics import Record

STREAM = "bus:{bench:0}"
STANDINGS = ("below", "keep", "pinned")  # where a stream stands that is published into
QUOTA_STREAM = "bus:{bench-quota:0}"
QUOTAS = ("quota", "quota-event")  # handlers with effects: a counter, and an event if it crosses
OBSERVERS = 10
BURST = 100  # events that are told before anybody looks whether they were seen
NODE = 100  # entries of a node of a stream: less is not trimmed while there is room


class QuotaExceeded(Event, type="bench.quota_exceeded", topic="bench-quota", key="quota"):
    """What a handler with effects publishes, seldom."""

    quota: str
    used: int


def quota_of(event: DocumentCreated) -> str:
    """Return which of a hundred quotas an event counts on."""
    return f"quota-{event.tokens % 100}"


def make_events(count: int) -> list[DocumentCreated]:
    """Return `count` distinct events, the same in every process."""
    return [DocumentCreated(**fields) for fields in make_fields(count)]


async def consume_bus(
    url: str, group: str, count: int, handler: Callable[..., Awaitable[None]]
) -> float:
    """Run a Worker with all its parts until `count` entries are acked."""
    times: dict[str, float] = {}
    acked = 0
    done = asyncio.Event()

    def listen(name: str, fields: dict[str, Any]) -> None:
        nonlocal acked
        if name == "worker.started":
            times["start"] = time.perf_counter()
        else:
            acked += fields["count"]
            if acked >= count:
                times["end"] = time.perf_counter()
                done.set()

    async with Bus.connect(url, topics=[TOPIC]) as bus:
        bus.telemetry.attach("worker.started", listen)
        bus.telemetry.attach("delivery.acked", listen)
        decorated = event_handler(DocumentCreated, group=group)(handler)
        async with Worker(bus, handlers=[decorated]):
            await done.wait()
    return times["end"] - times["start"]


async def consume(system: str, url: str, group: str, count: int) -> dict[str, Any]:
    """Drain `count` entries with a no-op handler; check that each was handled and acked."""
    handled = 0

    async def handler(_: DocumentCreated) -> None:
        nonlocal handled
        handled += 1

    cpu = time.process_time()
    seconds = await consume_bus(url, group, count, handler)
    cpu = time.process_time() - cpu
    async with Bus.connect(url) as bus:
        pending = (await bus.redis.xpending(STREAM, group))["pending"]
    if handled != count or pending:
        raise SystemExit(f"{system}: handled {handled} of {count}, {pending} pending")
    return {"rate": count / seconds, "cpu_us": cpu / count * 1e6, "rss_mb": peak_rss_mb()}


async def consume_with_effects(system: str, url: str, group: str, count: int) -> dict[str, Any]:
    """Drain `count` entries with a handler that deducts from quotas; check them to the token.

    "quota" deducts and nothing else; "quota-event" publishes an event, too, if that crossed zero.
    """
    tells = system == "quota-event"

    async def handler(event: DocumentCreated, delivery: Delivery[DocumentCreated]) -> None:
        quota, used = quota_of(event), event.tokens
        left = delivery.effects.hincrby(f"{group}:{quota}", "tokens", -used)
        if tells:
            crossed = left.between(-used, -1)
            delivery.effects.publish(QuotaExceeded(quota=quota, used=used), when=crossed)

    cpu = time.process_time()
    seconds = await consume_bus(url, group, count, handler)
    cpu = time.process_time() - cpu
    used: Counter[str] = Counter()
    for event in make_events(count):
        used[quota_of(event)] += event.tokens
    async with Bus.connect(url) as bus:
        pending = (await bus.redis.xpending(STREAM, group))["pending"]
        left = {q: int(await bus.redis.hget(f"{group}:{q}", "tokens") or 0) for q in used}
        told = await bus.redis.xlen(QUOTA_STREAM) if tells else 0
        await bus.redis.delete(QUOTA_STREAM)
    if left != {q: -n for q, n in used.items()} or pending or told != (len(used) if tells else 0):
        raise SystemExit(f"{system}: the quotas are off, {pending} pending, {told} events")
    return {"rate": count / seconds, "cpu_us": cpu / count * 1e6}


async def look_back(url: str, count: int) -> dict[str, Any]:
    """Go through the history, events decoded, by type, and backwards; check each event's place."""
    events = make_events(count)
    rates = {}
    async with Bus.connect(url) as bus:
        for reverse in (False, True):
            seen = 0
            expected = reversed(events) if reverse else iter(events)
            past = bus.history(TOPIC.name, types=[DocumentCreated], reverse=reverse)
            started = time.perf_counter()
            async for envelope in past:
                seen += envelope.event == next(expected)
            rates[reverse] = seen / (time.perf_counter() - started)
            if seen != count:
                raise SystemExit(f"history: {seen} of {count} events are what was published")
    return {"rate": rates[False], "backwards": rates[True], "rss_mb": peak_rss_mb()}


def _topic(standing: str, length: int) -> Topic:
    """Return the marks that make `length` entries stand where `standing` says."""
    keep = {"below": 100 * length, "keep": length, "pinned": length // 2}[standing]
    return Topic(TOPIC.name, keep=keep, maxlen=keep + 10 * length)


async def _prefill(bus: Bus, standing: str, length: int) -> None:
    """Publish `length` events that two groups are done with, and one has hardly begun if pinned."""
    groups = ["done-1", "done-2", *(["slow"] if standing == "pinned" else [])]
    for group in groups:
        await bus.redis.xgroup_create(STREAM, group, id="0", mkstream=True)
    events = make_events(1000)
    for _ in range(length // 1000):
        await bus.publish_many(events)
    for group in groups[:2]:
        # Without pending entries, as when all has been acked.
        while await bus.redis.xreadgroup(group, "c", {STREAM: ">"}, count=5000, noack=True):
            pass
    if standing == "pinned":
        await bus.redis.xreadgroup("slow", "c", {STREAM: ">"}, count=100)


async def publish_standing(standing: str, url: str, count: int) -> dict[str, Any]:
    """Publish into a stream far below `keep`, at it, or above it with a slow group that pins it.

    The stream is as long in all three when it begins, and twice as long as what is published: so
    at `keep` there is always something that the two groups are done with, and nobody has to read
    meanwhile. First `count` events by 100 callers, then a fifth of that by one.
    """
    length = 2000 * -(-count // 1000)
    topic = _topic(standing, length)
    events = make_events(count)
    figures: dict[str, Any] = {}
    receipts = set()
    async with Bus.connect(url, topics=[topic]) as bus:
        await _prefill(bus, standing, length)

        async def lane(waiting: Iterator[DocumentCreated]) -> None:
            for event in waiting:
                receipts.add((await bus.publish(event)).entry_id)

        gc.collect()
        gc.freeze()
        for lanes, amount in ((LANES, count), (1, count // 5)):
            waiting = iter(events[:amount])
            started = time.perf_counter()
            await asyncio.gather(*(lane(waiting) for _ in range(lanes)))
            figures[f"rate_{lanes}"] = amount / (time.perf_counter() - started)
        stands = await bus.redis.xlen(STREAM)
    published = count + count // 5
    most = topic.keep + Record.of(topic).slack + NODE
    right = topic.keep <= stands <= most if standing == "keep" else stands == length + published
    if len(receipts) != published or not right:
        raise SystemExit(
            f"{standing}: {len(receipts)} receipts for {published} events, {stands} entries"
            f" after {length}, keep is {topic.keep}"
        )
    return figures


async def tell_observers(count: int) -> dict[str, Any]:
    """Tell ten observers of events, in bursts that they can hold; check that each has seen all.

    tell_us: what it costs whoever publishes, per observer. seen_us: with what the observers do.
    """
    events = make_events(count)
    seen = [0] * OBSERVERS
    expected = 0
    burst_seen = asyncio.Event()

    def observe(number: int) -> Callable[[Event], None]:
        def look(_: Event) -> None:
            seen[number] += 1
            if min(seen) == expected:
                burst_seen.set()

        return look

    bus = Bus.connect("redis://localhost:1")  # never asked
    observers = [bus.observe(DocumentCreated, observe(n)) for n in range(OBSERVERS)]
    telling = 0.0
    gc.collect()
    started = time.perf_counter()
    for start in range(0, count, BURST):
        burst = events[start : start + BURST]
        expected += len(burst)
        burst_seen.clear()
        before = time.perf_counter()
        for event in burst:
            bus.emit(event)
        telling += time.perf_counter() - before
        await burst_seen.wait()
    took = time.perf_counter() - started
    await bus.close()
    dropped = sum(observer.dropped + observer.failed for observer in observers)
    if seen != [count] * OBSERVERS or dropped:
        raise SystemExit(f"observers: {seen} of {count} events were seen, {dropped} lost or failed")
    per_observer = 1e6 / (count * OBSERVERS)
    return {"tell_us": telling * per_observer, "seen_us": took * per_observer}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """What an event is compared with: the same fields in a frozen, slotted dataclass."""

    run_id: str
    message_id: str
    index: int
    text: str


def create_events(count: int) -> dict[str, Any]:
    """Create events, and as many dataclasses of the same fields; check that all are there."""

    def us_each(create: Callable[..., Any]) -> float:
        gc.collect()
        started = time.perf_counter()
        made = [create(run_id="r", message_id="m", index=n, text="t") for n in range(count)]
        took = time.perf_counter() - started
        if [m.index for m in made] != list(range(count)) or len(set(made)) != count:
            raise SystemExit(f"creation: not {count} different {create.__name__}")
        return took / count * 1e6

    plain, event = us_each(Plain), us_each(ModelContentBlockDelta)
    size = sys.getsizeof(ModelContentBlockDelta(run_id="r", message_id="m", index=0, text="t"))
    return {"event_us": event, "dataclass_us": plain, "bytes": size}


def main() -> None:
    """Run one test and print its figures."""
    p = argparse.ArgumentParser()
    systems = ("bus", "history", *STANDINGS, *QUOTAS, "observers", "creation")
    p.add_argument("system", choices=systems)
    p.add_argument("test", choices=("beside", "publish-standing", "local"))
    p.add_argument("--url", default="")
    p.add_argument("--group", default="g")
    p.add_argument("--count", type=int, required=True)
    a = p.parse_args()
    if a.test == "publish-standing":
        figures = uvloop.run(publish_standing(a.system, a.url, a.count))
    elif a.system == "observers":
        figures = uvloop.run(tell_observers(a.count))
    elif a.system == "creation":
        figures = create_events(a.count)
    elif a.system == "history":
        figures = uvloop.run(look_back(a.url, a.count))
    else:
        run = consume if a.system == "bus" else consume_with_effects
        figures = uvloop.run(run(a.system, a.url, a.group, a.count))
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
