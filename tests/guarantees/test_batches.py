"""Batch handlers: every way one delivery of many can end, and what then stands on the server."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Breaker, Delivery, Reject, RetryLater, Worker, event_handler
from tests.guarantees.events import STREAM, Kept, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

pytestmark = pytest.mark.usefixtures("quick_sweeps")

SOON = Backoff(base_s=0.02, factor=1.0, jitter=0.0)
MADE = b"promise.made"
Batch = list[Delivery[Made]]


async def test_every_event_is_handled_once_and_acked(backend: Backend) -> None:
    handled: list[int] = []
    sizes: Counter[int] = Counter()

    @event_handler(Made, group="stats", batch=100, batch_wait_ms=50)
    async def count(deliveries: Batch) -> None:
        await asyncio.sleep(0)
        sizes[len(deliveries)] += 1
        handled.extend(d.event.n for d in deliveries)

    async with backend.bus() as (bus, witness), Worker(bus, [count]) as worker:
        await bus.publish_many([Made(n=n) for n in range(1_050)])
        await worker.drained()
        assert sorted(handled) == list(range(1_050))
        assert max(sizes) == 100
        assert sizes[100] >= 9
        assert await backend.pending(STREAM, "stats") == []
        assert witness.total("delivery.acked") == 1_050


async def test_each_may_end_in_a_way_of_its_own(backend: Backend) -> None:
    """One fails until it is dead, one is rejected, one postponed, one forgotten; others go on."""
    attempts: defaultdict[int, list[int]] = defaultdict(list)

    @event_handler(
        Made, group="mixed", batch=10, batch_wait_ms=30, backoff=SOON, max_attempts=2, breaker=None
    )
    async def mix(deliveries: Batch) -> None:
        for delivery in deliveries:
            attempts[delivery.event.n].append(delivery.attempt)
            match delivery.event.n:
                case 0:
                    delivery.fail(LookupError("no such shelf"))
                case 1:
                    delivery.reject("too old to matter")
                case 2 if len(attempts[2]) < 4:
                    delivery.retry_later(0.1)
                case 3 if delivery.attempt == 1:
                    delivery.fail(ValueError("not yet"))

    async with backend.bus() as (bus, witness), Worker(bus, [mix]) as worker:
        await bus.publish_many([Made(n=n) for n in range(10)])
        await worker.drained()
        again = {0: [1, 2], 2: [1, 1, 1, 1], 3: [1, 2]}
        assert attempts == {n: [1] for n in range(10)} | again
        letters = {x["deadreason"]: x for x in await backend.dead(STREAM, "mixed")}
        assert letters[b"failed"]["deaderror"] == b"LookupError: no such shelf"
        assert letters[b"failed"]["deadattempts"] == b"2"
        assert letters[b"rejected"]["deaderror"] == b"Reject: too old to matter"
        assert letters[b"rejected"]["deadattempts"] == b"1"
        assert len(letters) == 2
        assert witness.total("delivery.acked") == 8
        assert len(witness.of("delivery.postponed")) == 3
        assert await backend.pending(STREAM, "mixed") == []


async def test_raising_fails_all_that_were_not_settled(backend: Backend) -> None:
    attempts: Counter[tuple[int, int]] = Counter()

    @event_handler(
        Made, group="broken", batch=5, batch_wait_ms=30, backoff=SOON, max_attempts=2, breaker=None
    )
    async def fail(deliveries: Batch) -> None:
        attempts.update((d.event.n, d.attempt) for d in deliveries)
        if deliveries[0].attempt == 1:
            deliveries[0].reject("decided")
        raise ConnectionError("gone")

    async with backend.bus() as (bus, _), Worker(bus, [fail]) as worker:
        await bus.publish_many([Made(n=n) for n in range(5)])
        await worker.drained()
        assert attempts == {(n, a): 1 for n in range(5) for a in (1, 2) if (n, a) != (0, 2)}
        letters = await backend.dead(STREAM, "broken")
        assert Counter((x["deadreason"], x["deaderror"]) for x in letters) == {
            (b"rejected", b"Reject: decided"): 1,
            (b"failed", b"ConnectionError: gone"): 4,
        }
        failed = next(x for x in letters if x["deadreason"] == b"failed")
        trace = failed["deadtraceback"].decode()
        assert 'raise ConnectionError("gone")' in trace
        assert "bus/worker" not in trace


@pytest.mark.parametrize("error", [Reject("all of them"), RetryLater(0.1)], ids=["reject", "later"])
async def test_what_is_raised_for_all_has_its_meaning_for_each(
    backend: Backend, error: Exception
) -> None:
    attempts: list[int] = []

    @event_handler(
        Made, group="all", batch=3, batch_wait_ms=30, max_attempts=1, backoff=SOON, breaker=None
    )
    async def end(deliveries: Batch) -> None:
        attempts.extend(d.attempt for d in deliveries)
        if len(attempts) <= 3:
            raise error

    async with backend.bus() as (bus, witness), Worker(bus, [end]) as worker:
        await bus.publish_many([Made(n=n) for n in range(3)])
        await worker.drained()
        letters = await backend.dead(STREAM, "all")
        if isinstance(error, Reject):
            assert [x["deadreason"] for x in letters] == [b"rejected"] * 3
            assert attempts == [1] * 3
        else:
            assert letters == []
            assert attempts == [1] * 6
            assert len(witness.of("delivery.postponed")) == 3


async def test_a_bad_entry_in_a_batch_gets_its_end_and_stops_nobody(backend: Backend) -> None:
    handled: list[int] = []

    @event_handler(Made, "promise.unheard_of", group="sound", batch=6, batch_wait_ms=100)
    async def read(deliveries: Batch) -> None:
        handled.extend(d.event.n for d in deliveries)

    async with backend.bus() as (bus, witness):
        await bus.publish(Made(n=1))
        await backend.add(STREAM, {"id": "a", "type": "promise.made", "data": '{"n":"one"}'})
        await bus.publish(Kept(n=2))
        await backend.add(STREAM, {"id": "b", "type": "promise.unheard_of", "data": "{}"})
        await bus.publish_many([Made(n=3), Made(n=4)])
        async with Worker(bus, [read]):
            await eventually(lambda: sorted(handled) == [1, 3, 4])
            await eventually(lambda: witness.total("delivery.acked") == 4)
            (letter,) = await backend.dead(STREAM, "sound")
            assert letter["deadreason"] == b"undecodable"
            assert witness.total("delivery.skipped") == 1
            (waiting,) = await backend.pending(STREAM, "sound")
            assert waiting.owner.startswith("parked:"), "for the deployment that brings its class"


async def test_an_outage_dead_letters_nothing_of_a_batch(backend: Backend) -> None:
    up = asyncio.Event()
    answered: Counter[int] = Counter()

    @event_handler(
        Made,
        group="caller",
        batch=20,
        batch_wait_ms=20,
        backoff=SOON,
        max_attempts=2,
        breaker=Breaker(min_calls=10, window_s=0.5, probe_s=0.05),
    )
    async def call(deliveries: Batch) -> None:
        if not up.is_set():
            raise ConnectionError("nobody answers")
        answered.update(d.event.n for d in deliveries)

    async with backend.bus() as (bus, witness), Worker(bus, [call]) as worker:
        await bus.publish_many([Made(n=n) for n in range(100)])
        await eventually(lambda: len(witness.of("breaker.probed", outcome="failed")) >= 3)
        up.set()
        await eventually(lambda: len(answered) == 100)
        await worker.drained()
        assert set(answered.values()) == {1}
        assert await backend.dead(STREAM, "caller") == []


async def test_two_workers_share_a_stream_in_batches(backend: Backend) -> None:
    handled: Counter[int] = Counter()
    by: Counter[str] = Counter()

    def reader(name: str) -> Any:
        @event_handler(Made, group="shared", batch=10, batch_wait_ms=20, concurrency=1)
        async def read(deliveries: Batch) -> None:
            await asyncio.sleep(0.01)
            by[name] += 1
            handled.update(d.event.n for d in deliveries)

        return read

    async with (
        backend.bus() as (bus, _),
        Worker(bus, [reader("a")]) as worker,
        Worker(bus, [reader("b")]),
    ):
        await bus.publish_many([Made(n=n) for n in range(600)])
        await worker.drained()
    assert handled == dict.fromkeys(range(600), 1)
    assert min(by["a"], by["b"]) >= 10


async def test_effects_take_place_for_those_that_were_handled_and_no_others(
    backend: Backend,
) -> None:
    @event_handler(Made, group="sums", batch=4, batch_wait_ms=30, backoff=SOON, breaker=None)
    async def add(deliveries: Batch) -> None:
        for delivery in deliveries:
            delivery.effects.incrby("sum", 10**delivery.event.n)
            delivery.effects.publish(Kept(n=delivery.event.n))
            if delivery.event.n == 1:
                delivery.reject("not this one")
            if delivery.event.n == 3 and delivery.attempt == 1:
                delivery.fail(ValueError("not yet"))

    async with backend.bus() as (bus, _), Worker(bus, [add]) as worker:
        receipts = await bus.publish_many([Made(n=n) for n in range(4)])
        await worker.drained()
        assert await backend.redis.get("sum") == b"1101"
        published = [e for e in (await backend.entries(STREAM)).values() if e["type"] != MADE]
        assert Counter(e["causationid"].decode() for e in published) == {
            receipts[n].event_id: 1 for n in (0, 2, 3)
        }
        assert len(await backend.dead(STREAM, "sums")) == 1


async def test_with_once_a_batch_has_each_event_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when both deliveries of it lie in one batch, or the first one comes alone."""
    monkeypatch.setattr("bus.worker.once.ONCE_BUSY_PARK_S", 0.1)
    handled: list[tuple[int, str]] = []

    @event_handler(
        Made, group="once", batch=10, batch_wait_ms=30, backoff=SOON, once=timedelta(hours=1)
    )
    async def read(deliveries: Batch) -> None:
        for delivery in deliveries:
            if delivery.event.n == 3 and delivery.attempt == 1:
                delivery.fail(ValueError("not yet"))
            else:
                handled.append((delivery.event.n, delivery.event.text))

    async with backend.bus() as (bus, witness), Worker(bus, [read]) as worker:
        for n in range(5):
            await bus.publish(Made(n=n, text="first"), event_id=f"e-{n}")
        for n in range(2, 5):
            await bus.publish(Made(n=n, text="again"), event_id=f"e-{n}")
        await worker.drained()
        assert sorted(n for n, _ in handled) == [0, 1, 2, 3, 4]
        await bus.publish(Made(n=0, text="late"), event_id="e-0")
        await worker.drained()
        assert len(handled) == 5
        assert len(witness.of("delivery.duplicate")) == 4
        assert await backend.dead(STREAM, "once") == []
