"""What a type checker must accept: never run, checked by mypy --strict (test_typing.py)."""

import sys
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Literal, assert_type

from bus import (
    Backlog,
    Backoff,
    Breaker,
    Bus,
    Channel,
    ChannelGap,
    ChannelTail,
    DeadLettered,
    DeadLetters,
    Delivery,
    Envelope,
    Event,
    Handler,
    Hook,
    HookRejected,
    Letter,
    Observed,
    Observer,
    Purged,
    Receipt,
    Redriven,
    Registry,
    Reject,
    Replayed,
    RetryLater,
    Snapshot,
    Tail,
    Topic,
    Worker,
    event_handler,
    upcast,
)
from bus.testing import drained, published


class Base(Event, topic="typing", key="shelf"):
    """A base without a type, for events of one topic."""

    shelf: str


class BookAdded(Base, type="typing.book_added", version=2, encoding="msgpack"):
    """Adds fields to its base."""

    title: str
    pages: int = 0
    tags: tuple[str, ...] = ()


@upcast(BookAdded, from_version=1)
def name_becomes_title(data: dict[str, Any]) -> dict[str, Any]:
    """Take the data of version 1."""
    return {**data, "title": data["name"]}


assert_type(name_becomes_title({})["title"], Any)
event = BookAdded(shelf="s", title="t")
assert_type(event, BookAdded)
assert_type(BookAdded(title="t", shelf="s", pages=3, tags=("a",)).pages, int)
assert_type(event.tags, tuple[str, ...])
assert_type(hash(event), int)

topic = Topic("typing", partitions=4)
steady = Backoff(base_s=1, factor=1.0, max_s=60, jitter=0)
patient = Breaker(failure_ratio=0.9, window_s=30, min_calls=5, probe_s=1)


async def tell(dead: DeadLettered, bus: Bus) -> None:
    """Are told of dead letters."""
    assert_type(dead.event, Event)
    assert_type(dead.envelope, Envelope)
    assert_type(dead.reason, str)
    await bus.publish(event)


@event_handler(
    BookAdded,
    "typing.*",
    group="shelve",
    backoff=steady,
    breaker=patient,
    timeout_s=2,
    start="now",
    on_dead=tell,
)
async def shelve(event: BookAdded, delivery: Delivery[BookAdded]) -> None:
    """Take the event and its delivery."""
    assert_type(delivery.event, BookAdded)
    assert_type(delivery.attempt, int)
    assert_type(delivery.envelope.event_id, str)
    if event.pages < 0:
        raise Reject("a book has pages")
    if not event.title:
        raise RetryLater(5)
    delivery.logger.info("shelved")


@event_handler(BookAdded, group="count")
async def count(event: BookAdded) -> int:
    """Take the event alone."""
    return event.pages


@event_handler(BookAdded, group="stats", batch=100, batch_wait_ms=20)
async def count_all(deliveries: list[Delivery[BookAdded]]) -> None:
    """Take many at once."""
    for delivery in deliveries:
        assert_type(delivery.event, BookAdded)
        delivery.fail(ValueError("no pages"))
        delivery.reject("a book has pages")
        delivery.retry_later(5)


assert_type(count_all.batch, int | None)


class Librarian:
    """Take many as a class."""

    async def handle(self, deliveries: list[Delivery[Event]]) -> None:
        """Take any events."""


catalogue = event_handler("typing.*", group="catalogue", topics=["typing"], batch=9)(Librarian)


class Auditor:
    """Handle as a class."""

    async def handle(self, event: Event, delivery: Delivery[Event]) -> None:
        """Take any event."""


# As @event_handler(...) above the class it works too, but mypy takes no notice of what a decorator
# makes of a class, and would see Auditor in the list below.
audit = event_handler("typing.*", group="audit", topics=["typing"])(Auditor)

assert_type(audit, Handler[...])
assert_type(shelve.group, str)
handlers: list[Handler[...]] = [shelve, count, audit, count_all, catalogue]
registry = Registry([shelve, count, audit], topics=[topic])


async def call_them(delivery: Delivery[BookAdded]) -> None:
    """Call handlers as the functions they were."""
    await shelve(event, delivery)
    await count(event)
    await audit(event, delivery)
    await count_all([delivery])
    waiting: Awaitable[object] = count(event)
    await waiting


def call_it(event: BookAdded) -> None:
    """Take an event of a replay, without being a handler."""


async def follow(bus: Bus) -> None:
    """Go on from where another tail stood."""
    tail = bus.tail(["typing", "other"], after={"bus:{typing:0}": "5-0"}, types=BookAdded)
    assert_type(tail, Tail)
    await tail.ready()
    async for envelope in tail:
        assert_type(envelope, Envelope)
        position = tail.position
        assert_type(position, dict[str, str])
        assert_type(tail.gaps, int)
        bus.tail("typing", after=position, key="b", where=lambda e: e.version > 1)
        break
    await tail.aclose()
    async with bus.tail("typing", after="@-2h") as tail:
        assert_type(await anext(tail), Envelope)


async def stream(bus: Bus, app: object) -> None:
    """Publish to a channel, and follow it to its end or beyond a gap."""
    channel = bus.channel("run", ttl=timedelta(hours=1), maxlen=100)
    assert_type(channel, Channel)
    assert_type(await channel.publish(event), Receipt)
    await channel.end()
    tail = channel.tail(after="5-0")
    assert_type(tail, ChannelTail)
    try:
        async for envelope in tail:
            assert_type(envelope, Envelope)
    except ChannelGap as gap:
        assert_type(gap.reason, Literal["trimmed", "restarted", "gone"])
        assert_type(gap.first, str | None)
    assert_type(tail.position, str | None)
    async with bus.lifespan(app) as state:
        assert_type(state, dict[str, Any])


async def inside(bus: Bus) -> None:
    """Observe, ask and publish from a thread."""

    @bus.observe("typing.*", maxlen=5)
    def look(event: BookAdded, receipt: Receipt | None) -> int:
        return event.pages

    assert_type(look(event, None), int)
    assert_type(look.dropped + look.failed, int)
    observer = bus.observe(BookAdded, count)
    observer.close()
    observers: list[Observer[..., Any]] = [look, observer, bus.observe("*", lambda event: None)]
    assert_type(observers, list[Observer[..., Any]])
    async with bus.observed("typing.*") as events:
        assert_type(events, Observed)
        async for seen in events:
            assert_type(seen, Event)
    bus.emit(event)

    @bus.hook("hook.*", types=[BookAdded, "typing.*"], order=-1)
    async def check(event: BookAdded) -> BookAdded | None:
        if event.pages < 0:
            raise HookRejected("a book has pages")
        return None

    assert_type(await check(event), BookAdded | None)
    hook = bus.hook("hook.publish", lambda _, point: None, types=BookAdded)
    assert_type(hook, Hook[..., Any])
    hook.close()
    assert_type(await bus.intervene("hook.before_adding", event), BookAdded)
    assert_type(bus.publish_soon(event, event_id="e", source="s"), Future[Receipt])


async def live() -> None:
    """Use the whole surface once."""
    async with Bus.connect("redis://localhost", topics=[topic], publish_timeout_s=5) as bus:
        assert_type(bus, Bus)
        receipt = await bus.publish(event, event_id="e", source="here", correlation_id="c")
        assert_type(receipt, Receipt)
        assert_type(receipt.entry_id, str)
        assert_type(await bus.publish_many(event for _ in range(3)), list[Receipt])
        past = bus.history("typing", since="@-2h", types=[BookAdded, "typing.*"])
        assert_type(past, AsyncGenerator[Envelope, None])
        async for envelope in past:
            assert_type(envelope.event, Event)
            assert_type(envelope.key, str | None)
        bus.history("typing", key="b", where=lambda e: e.version > 1, limit=5, reverse=True)
        done = await bus.replay(
            "typing", to="shelve", rate=5.5, checkpoint="file", progress=lambda p: None
        )
        assert_type(done, Replayed)
        assert_type(done.sample, tuple[Envelope, ...])
        await bus.replay("typing", to=shelve, types=BookAdded, dry_run=True)
        await bus.replay("typing", to=call_it, limit=3, since="@-1h", until=5)
        await bus.replay("typing", to=bus)
        backlog = await bus.backlog("typing")
        assert_type(backlog, Backlog)
        assert_type(backlog.of("shelve").oldest_undelivered_age_s, float | None)
        assert_type([s.pinned_by for s in backlog.streams], list[str | None])
        snapshot = await bus.inspect(["typing"])
        assert_type(snapshot, Snapshot)
        assert_type(snapshot.topic("typing").group("shelve").oldest_age_s, float | None)
        assert_type([s.error for t in snapshot.topics for s in t.streams], list[str | None])
        letters = bus.dead_letters(
            "shelve", "typing", types=BookAdded, since="@-2h", reason="failed"
        )
        assert_type(letters, DeadLetters)
        async for letter in letters:
            assert_type(letter, Letter)
            assert_type(letter.event, Event)
            assert_type(letter.as_json(), dict[str, Any])
        assert_type(await letters.get("1-0"), Letter)
        assert_type(await letters.count(), int)
        assert_type(await letters.redrive(edit={"pages": 1}, rate=5, progress=print), Redriven)
        await letters.redrive(edit=lambda letter: event if letter.attempts > 1 else None)
        await letters.redrive(edit=lambda _: {"pages": 1}, limit=1, dry_run=True)
        assert_type(await letters.purge(limit=1), Purged)
        assert_type(await letters.export(sys.stdout), int)
        assert_type(await letters.export("letters.jsonl"), int)
        async with Worker(bus, handlers=[shelve, audit], only=["shelve"]) as worker:
            await worker.drained(timedelta(seconds=5).total_seconds())
        await bus.redis.get("key")
        assert_type(await published(bus, BookAdded), list[BookAdded])
        assert_type(await published(bus, "typing.*", BookAdded), list[Event])
        assert_type(await drained(bus, shelve, audit, dead=True), list[Letter])
