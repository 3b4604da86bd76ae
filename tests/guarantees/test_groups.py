"""Groups, and the workers that share one: who gets what, from where on, and with what state."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from bus import (
    Backoff,
    DeclarationError,
    Delivery,
    Event,
    Registry,
    Topic,
    TopicMismatch,
    Worker,
    event_handler,
)
from tests.guarantees.events import STREAM, Kept, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.guarantees.backend import Backend


class Spread(Event, type="spread.out", key="key"):
    key: str
    n: int


async def test_every_group_gets_every_event(backend: Backend) -> None:
    first: list[int] = []
    second: list[int] = []

    @event_handler(Made, group="first")
    async def one(event: Made) -> None:
        first.append(event.n)

    @event_handler(Made, group="second")
    async def two(event: Made) -> None:
        second.append(event.n)

    async with backend.bus() as (bus, _), Worker(bus, [one, two]) as worker:
        await bus.publish_many([Made(n=n) for n in range(50)])
        await worker.drained()
        assert sorted(first) == sorted(second) == list(range(50))


async def test_a_failing_group_costs_the_others_nothing(backend: Backend) -> None:
    handled: list[int] = []

    @event_handler(Made, group="broken", max_attempts=1, breaker=None)
    async def broken(event: Made) -> None:
        raise SystemExit("this handler is a disaster")

    @event_handler(Made, group="stuck", concurrency=1)
    async def stuck(event: Made) -> None:
        await release.wait()

    @event_handler(Made, group="sound", concurrency=2)
    async def sound(event: Made) -> None:
        handled.append(event.n)

    release = asyncio.Event()
    async with backend.bus() as (bus, _), Worker(bus, [broken, stuck, sound]) as worker:
        await bus.publish_many([Made(n=n) for n in range(60)])
        await eventually(lambda: sorted(handled) == list(range(60)))
        await eventually(lambda: _dead_letters(backend, 60))
        release.set()
        await worker.drained()


async def _dead_letters(backend: Backend, count: int) -> bool:
    return len(await backend.dead(STREAM, "broken")) == count


async def test_workers_of_one_group_share_its_entries(backend: Backend) -> None:
    handled: list[tuple[str, int]] = []

    def as_worker(name: str) -> Any:
        @event_handler(Made, group="crew", concurrency=4)
        async def work(event: Made) -> None:
            await asyncio.sleep(0.005)
            handled.append((name, event.n))

        return work

    async with (
        backend.bus() as (bus, _),
        backend.bus() as (other_bus, _),
        Worker(bus, [as_worker("a")]) as worker,
        Worker(other_bus, [as_worker("b")]) as other,
    ):
        await bus.publish_many([Made(n=n) for n in range(200)])
        await worker.drained()
        await other.drained()
    assert sorted(n for _, n in handled) == list(range(200)), "each exactly once"
    assert {name for name, _ in handled} == {"a", "b"}


async def test_a_new_group_starts_at_the_beginning_unless_told_otherwise(backend: Backend) -> None:
    seen: dict[str, list[int]] = {"historian": [], "newcomer": []}

    @event_handler(Made, group="historian")
    async def old(event: Made) -> None:
        seen["historian"].append(event.n)

    @event_handler(Made, group="newcomer", start="now")
    async def new(event: Made) -> None:
        seen["newcomer"].append(event.n)

    async with backend.bus() as (bus, _):
        await bus.publish(Made(n=1))
        async with Worker(bus, [old, new]) as worker:
            await bus.publish(Made(n=2))
            await worker.drained()
        await bus.publish(Made(n=3))  # between two runs: nobody misses it
        async with Worker(bus, [old, new]) as worker:
            await worker.drained()
    assert seen == {"historian": [1, 2, 3], "newcomer": [2, 3]}


async def test_patterns_choose_types(backend: Backend) -> None:
    seen: dict[str, list[str]] = {"family": [], "verb": [], "everything": []}

    def listener(pattern: str, group: str, **settings: Any) -> Any:
        @event_handler(pattern, group=group, **settings)
        async def listen(event: Any, delivery: Delivery[Any]) -> None:
            seen[group].append(delivery.envelope.type)

        return listen

    handlers = [
        listener("promise.*", "family"),
        listener("*.kept", "verb"),
        listener("*", "everything", topics=["promise"]),
    ]
    async with backend.bus() as (bus, _), Worker(bus, handlers) as worker:
        await bus.publish(Made(n=1))
        await bus.publish(Kept(n=2))
        await worker.drained()
    assert seen == {
        "family": ["promise.made", "promise.kept"],
        "verb": ["promise.kept"],
        "everything": ["promise.made", "promise.kept"],
    }


async def test_a_class_is_a_handler_with_state_of_its_own(backend: Backend) -> None:
    @event_handler(Made, group="counter", concurrency=1)
    class Counter:
        totals: ClassVar[list[int]] = []

        def __init__(self) -> None:
            self.total = 0

        async def handle(self, event: Made, delivery: Delivery[Made]) -> None:
            self.total += event.n
            self.totals.append(self.total)
            assert delivery.group == "counter"

    async with backend.bus() as (bus, _), Worker(bus, [Counter]) as worker:
        await bus.publish_many([Made(n=n) for n in (1, 2, 3)])
        await worker.drained()
    assert Counter.call.__self__.totals == [1, 3, 6]  # type: ignore[attr-defined]


async def test_lifespan_gives_state_for_as_long_as_the_worker_runs(backend: Backend) -> None:
    story: list[str] = []

    @asynccontextmanager
    async def lifespan(bus: Any) -> AsyncIterator[str]:
        story.append(f"open, {await bus.store.lengths([STREAM])} entries")
        yield "the state"
        story.append("close")

    @event_handler(Made, group="stateful")
    async def use(event: Made, delivery: Delivery[Made]) -> None:
        story.append(f"{delivery.state} for {event.n}")

    registry = Registry([use], lifespan=lifespan)
    async with backend.bus() as (bus, _), Worker(bus, registry) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        assert "close" not in story
    assert story == ["open, [0] entries", "the state for 1", "close"]


async def test_a_lifespan_that_fails_starts_nothing(backend: Backend) -> None:
    @asynccontextmanager
    async def lifespan(bus: Any) -> AsyncIterator[None]:
        raise ConnectionError("no database")
        yield

    @event_handler(Made, group="stateful")
    async def use(event: Made) -> None: ...

    async with backend.bus() as (bus, _):
        with pytest.raises(ConnectionError, match="no database"):
            await Worker(bus, [use], lifespan=lifespan).start()
        assert not await backend.redis.exists(STREAM)


async def test_a_delivery_says_what_it_is(backend: Backend) -> None:
    got: list[Delivery[Made]] = []

    @event_handler(Made, group="curious")
    async def look(event: Made, delivery: Delivery[Made]) -> None:
        got.append(delivery)
        assert delivery.bus is bus

    async with backend.bus(source="/tests") as (bus, _), Worker(bus, [look]) as worker:
        receipt = await bus.publish(Made(n=1, text="hi"), event_id="e-1", correlation_id="c-1")
        await worker.drained()
        (delivery,) = got
        envelope = delivery.envelope
        assert (delivery.attempt, delivery.group) == (1, "curious")
        assert delivery.event == envelope.event == Made(n=1, text="hi")
        assert (envelope.event_id, envelope.type, envelope.version) == ("e-1", "promise.made", 1)
        assert (envelope.stream, envelope.entry_id) == (receipt.stream, receipt.entry_id)
        assert (envelope.source, envelope.correlation_id) == ("/tests", "c-1")


async def test_what_a_handler_publishes_is_the_same_event_on_every_attempt(
    backend: Backend,
) -> None:
    @event_handler(Made, group="chain", backoff=Backoff(base_s=0.02, jitter=0))
    async def go_on(event: Made, delivery: Delivery[Made]) -> None:
        await delivery.bus.publish(Kept(n=event.n))
        if delivery.attempt < 2:
            raise ValueError

    async with backend.bus() as (bus, _), Worker(bus, [go_on]) as worker:
        await bus.publish(Made(n=1), event_id="cause")
        await worker.drained()
        made, *kept = (await backend.entries(STREAM)).values()
        assert [k["causationid"] for k in kept] == [b"cause", b"cause"]
        assert len({k["id"] for k in kept}) == 1, "a repeat is recognisable"
        assert made["id"] == b"cause"


async def test_partitions_are_all_read_and_keep_a_key_together(backend: Backend) -> None:
    handled: list[tuple[str, int]] = []

    @event_handler(Spread, group="wide", concurrency=1)
    async def note(event: Spread) -> None:
        handled.append((event.key, event.n))

    topics = [Topic("spread", partitions=4)]
    async with backend.bus(topics=topics) as (bus, _), Worker(bus, [note]) as worker:
        events = [Spread(key=f"k{n % 10}", n=n) for n in range(200)]
        receipts = await bus.publish_many(events)
        await worker.drained()
    assert sorted(handled) == sorted((e.key, e.n) for e in events)
    streams: dict[str, set[str]] = {}
    for event, receipt in zip(events, receipts, strict=True):
        streams.setdefault(event.key, set()).add(receipt.stream)
    assert all(len(s) == 1 for s in streams.values())
    assert len(set.union(*streams.values())) > 1
    for key in streams:
        assert [n for k, n in handled if k == key] == [e.n for e in events if e.key == key]


async def test_a_worker_that_disagrees_about_partitions_does_not_start(backend: Backend) -> None:
    @event_handler(Spread, group="wide")
    async def note(event: Spread) -> None: ...

    async with backend.bus(topics=[Topic("spread", partitions=2)]) as (bus, _):
        await bus.publish(Spread(key="a", n=1))
    async with backend.bus() as (bus, _):
        registry = Registry([note], [Topic("spread", partitions=3)])
        with pytest.raises(TopicMismatch, match=r"3 partitions here and recorded with 2"):
            await Worker(bus, registry).start()


def test_two_handlers_with_one_group_are_refused() -> None:
    @event_handler(Made, group="same")
    async def one(event: Made) -> None: ...

    @event_handler(Kept, group="same")
    async def two(event: Kept) -> None: ...

    with pytest.raises(
        DeclarationError, match=r"two handlers have the group 'same': .*one and .*two"
    ):
        Registry([one, two])


async def test_a_group_that_nobody_serves_is_named_at_start(backend: Backend) -> None:
    @event_handler(Made, group="here")
    async def here(event: Made) -> None: ...

    @event_handler(Made, group="elsewhere")
    async def elsewhere(event: Made) -> None: ...

    async with backend.bus() as (bus, witness):
        await backend.redis.xgroup_create(STREAM, "abandoned", "0", mkstream=True)
        async with (
            backend.bus() as (other_bus, _),
            Worker(other_bus, [elsewhere]),
            Worker(bus, [here]),
        ):
            assert [t["group"] for t in witness.of("group.unserved")] == ["abandoned"]


async def test_a_stranger_in_the_group_shares_its_entries(
    backend: Backend, quick_sweeps: None
) -> None:
    """A reader in another language: its acks count, what it forgets is reclaimed when idle."""
    handled: list[tuple[int, int]] = []

    @event_handler(Made, group="mixed", visibility_s=0.6)
    async def read(event: Made, delivery: Delivery[Made]) -> None:
        handled.append((event.n, delivery.attempt))

    async with backend.bus() as (bus, witness):
        await bus.publish_many([Made(n=n) for n in range(6)])
        await backend.redis.xgroup_create(STREAM, "mixed", "0")
        ((_, rows),) = await backend.redis.xreadgroup("mixed", "stranger", {STREAM: ">"}, count=4)
        await backend.redis.xack(STREAM, "mixed", rows[0][0], rows[1][0])
        async with Worker(bus, [read], lease_s=0.6) as worker:
            await worker.drained()
        assert sorted(handled) == [(2, 2), (3, 2), (4, 1), (5, 1)]
        (told,) = witness.of("delivery.reclaimed")
        assert (told["owner"], told["count"]) == ("stranger", 2)
        assert "stranger" in await backend.consumers(STREAM, "mixed"), (
            "its name is not ours to drop"
        )
