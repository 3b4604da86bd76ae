"""Batches: when one starts, what it holds, and what becomes of each of its deliveries."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    AlreadySettled,
    Backoff,
    Breaker,
    Bus,
    DeclarationError,
    Delivery,
    Event,
    Topic,
    Worker,
    event_handler,
)
from bus.config import READ_COUNT, WAITED_S
from bus.worker import reclaimer
from bus.worker.batches import BatchConsumer
from bus.worker.pace import Pace
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from bus.worker.hand import Hand
    from tests.guarantees.backend import Backend

AGAIN = Backoff(base_s=0.01, factor=1.0, jitter=0.0)
LONG_MS = 10_000  # what nobody waits for in a test
Batch = list[Delivery[Asked]]


class Wondered(Event, type="work.wondered"):
    """Nobody asks for these, and they lie in the same stream."""

    n: int


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)


def ns(batch: Batch) -> list[int]:
    return [d.event.n for d in batch]


def asked(*numbers: int) -> list[Asked]:
    return [Asked(n=n) for n in numbers]


async def passed(seconds: float) -> None:
    """Wait until what must not happen would have happened."""
    over = time.monotonic() + seconds
    await eventually(lambda: time.monotonic() > over)


# --- when one starts


async def test_a_full_batch_starts_at_once(bus: Bus) -> None:
    calls: list[list[int]] = []

    @event_handler(Asked, group="g", batch=10, batch_wait_ms=LONG_MS)
    async def read(deliveries: Batch) -> None:
        calls.append(ns(deliveries))

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(*range(30)))
        await worker.drained(timeout_s=LONG_MS / 1000 / 2)
    assert sorted(calls) == [list(range(i, i + 10)) for i in (0, 10, 20)]


async def test_a_partial_batch_starts_when_its_time_has_come_and_not_before(bus: Bus) -> None:
    calls: list[tuple[float, list[int]]] = []

    @event_handler(Asked, group="g", batch=10, batch_wait_ms=300)
    async def read(deliveries: Batch) -> None:
        calls.append((time.monotonic(), ns(deliveries)))

    async with Worker(bus, [read]) as worker:
        published = time.monotonic()
        for event in asked(1, 2, 3):
            await bus.publish(event)
        await worker.drained()
    ((at, read_ns),) = calls
    assert read_ns == [1, 2, 3], "no idle slot keeps one for itself"
    assert 0.299 <= at - published < 5


async def test_the_oldest_does_not_wait_for_those_that_keep_coming(bus: Bus) -> None:
    calls: list[list[int]] = []

    @event_handler(Asked, group="g", batch=5_000, batch_wait_ms=400)
    async def read(deliveries: Batch) -> None:
        calls.append(ns(deliveries))

    async with Worker(bus, [read]) as worker:
        n = 0
        while not calls:
            await bus.publish(Asked(n=n))
            n += 1
            assert n < 5_000
            await asyncio.sleep(0.02)
        assert calls[0][0] == 0
        await worker.drained()


async def test_without_a_wait_a_call_takes_what_is_there(bus: Bus) -> None:
    calls: list[list[int]] = []
    release = asyncio.Event()

    @event_handler(Asked, group="g", batch=10, batch_wait_ms=0, concurrency=1)
    async def read(deliveries: Batch) -> None:
        calls.append(ns(deliveries))
        await release.wait()

    async with Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=0))
        await eventually(lambda: calls)
        await bus.publish_many(asked(1, 2, 3))
        release.set()
        await worker.drained()
    assert calls == [[0], [1, 2, 3]]


async def test_no_more_calls_run_than_concurrency(bus: Bus) -> None:
    running = most = 0
    sizes: Counter[int] = Counter()

    @event_handler(Asked, group="g", concurrency=3, batch=10, batch_wait_ms=20)
    async def read(deliveries: Batch) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        sizes[len(deliveries)] += 1
        await asyncio.sleep(0.005)
        running -= 1

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(*range(500)))
        await worker.drained()
    assert most == 3
    assert max(sizes) == 10
    assert sum(size * calls for size, calls in sizes.items()) == 500
    assert sizes[10] >= 45, "a backlog comes in full batches"


async def test_what_nobody_asked_for_takes_no_place_in_a_batch(bus: Bus, witness: Witness) -> None:
    calls: list[list[int]] = []

    @event_handler(Asked, group="g", batch=10, batch_wait_ms=LONG_MS)
    async def read(deliveries: Batch) -> None:
        calls.append(ns(deliveries))

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(
            [event for n in range(20) for event in (Wondered(n=n), Wondered(n=n), Asked(n=n))]
        )
        await worker.drained(timeout_s=LONG_MS / 1000 / 2)
    assert sorted(n for call in calls for n in call) == list(range(20))
    assert [len(call) for call in calls] == [10, 10]
    assert witness.total("delivery.skipped") == 40


async def test_a_batch_of_such_calls_nobody(bus: Bus, witness: Witness) -> None:
    calls: list[int] = []

    @event_handler(Asked, group="g", batch=5, batch_wait_ms=20)
    async def read(deliveries: Batch) -> None:
        calls.append(len(deliveries))

    async with Worker(bus, [read]) as worker:
        await bus.publish_many([Wondered(n=n) for n in range(12)])
        await worker.drained()
    assert calls == []
    assert witness.total("delivery.skipped") == 12


async def test_an_undecodable_one_goes_alone_and_holds_nothing_up(
    bus: Bus, backend: Backend
) -> None:
    """Its on_dead waits here until the call with its neighbours has ended."""
    handled = asyncio.Event()
    calls: list[list[int]] = []
    told: list[bool] = []

    async def on_dead(dead: Any, bus: Any) -> None:
        async with asyncio.timeout(5):
            await handled.wait()
        told.append(True)

    @event_handler(Asked, group="g", concurrency=2, batch=4, batch_wait_ms=200, on_dead=on_dead)
    async def read(deliveries: Batch) -> None:
        calls.append(ns(deliveries))
        handled.set()

    await bus.publish_many(asked(0, 1))
    await backend.add(STREAM, {"id": "x", "type": "work.asked", "data": "what is this"})
    await bus.publish(Asked(n=2))
    async with Worker(bus, [read]) as worker:
        await worker.drained()
    assert (calls, told) == ([[0, 1, 2]], [True])
    (letter,) = await backend.dead(STREAM, "g")
    assert letter["deadreason"] == b"undecodable"


async def test_the_whole_list_may_be_taken_apart(bus: Bus) -> None:
    @event_handler(Asked, group="g", batch=10, batch_wait_ms=20)
    async def read(deliveries: Batch) -> None:
        while deliveries:
            deliveries.pop()

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(*range(10)))
        await worker.drained()


async def test_a_class_handles_batches_too(bus: Bus) -> None:
    seen: list[int] = []

    class Reader:
        async def handle(self, deliveries: Batch) -> None:
            seen.extend(ns(deliveries))

    read = event_handler(Asked, group="g", batch=10, batch_wait_ms=20)(Reader)
    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(1, 2, 3))
        await worker.drained()
    assert seen == [1, 2, 3]


# --- settling single ones


async def test_nothing_is_settled_twice_nor_after_the_call(bus: Bus, witness: Witness) -> None:
    errors: list[AlreadySettled] = []
    kept: Batch = []

    @event_handler(Asked, group="g", batch=4, batch_wait_ms=LONG_MS, max_attempts=1, breaker=None)
    async def read(deliveries: Batch) -> None:
        first = deliveries[0]
        first.reject("once is enough")
        for again in (
            lambda: first.fail(ValueError("a secret")),
            lambda: first.reject("again"),
            lambda: first.retry_later(1),
        ):
            with pytest.raises(AlreadySettled, match="settled before, by Reject") as caught:
                again()
            errors.append(caught.value)
        deliveries[1].fail(KeyError("k"))
        kept.extend(deliveries)

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(0, 1, 2, 3))
        await worker.drained()
    assert len(errors) == 3
    assert witness.total("delivery.acked") == 2
    told = {t["reason"]: t["error"] for t in witness.of("delivery.dead_lettered")}
    assert told == {"rejected": "once is enough", "failed": "'k'"}
    for delivery in kept:
        with pytest.raises(AlreadySettled, match="when the call of its batch ended"):
            delivery.fail(ValueError())


async def test_an_ordinary_handler_is_told_to_raise_instead(bus: Bus) -> None:
    texts: list[str] = []

    @event_handler(Asked, group="g", breaker=None)
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        for settle in (
            lambda: delivery.fail(ValueError()),
            lambda: delivery.reject("no"),
            lambda: delivery.retry_later(1),
        ):
            with pytest.raises(DeclarationError) as caught:
                settle()
            texts.append(str(caught.value))

    async with Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert [
        ("raise the error instead" in texts[0]),
        ("raise Reject(reason) instead" in texts[1]),
        ("raise RetryLater(delay_s) instead" in texts[2]),
    ] == [True] * 3


@pytest.mark.parametrize("no_error", ["too late", None, ValueError])
async def test_fail_takes_an_exception_and_nothing_else(bus: Bus, no_error: Any) -> None:
    said: list[str] = []

    @event_handler(Asked, group="g", batch=4, batch_wait_ms=20)
    async def read(deliveries: Batch) -> None:
        with pytest.raises(TypeError, match=r"delivery.fail takes an exception, not") as caught:
            deliveries[0].fail(no_error)
        said.append(str(caught.value))
        with pytest.raises(ValueError, match="RetryLater takes"):
            deliveries[0].retry_later(-1)

    async with Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert "delivery.reject('why')" in said[0], "and what was refused has settled nothing"


async def test_too_late_fails_those_that_were_not_settled(bus: Bus, witness: Witness) -> None:
    attempts: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"timeout_s": 0.1, "max_attempts": 2, "backoff": AGAIN}

    @event_handler(Asked, group="g", batch=3, batch_wait_ms=20, breaker=None, **settings)
    async def read(deliveries: Batch) -> None:
        attempts.extend((d.event.n, d.attempt) for d in deliveries)
        if deliveries[0].attempt == 1:
            deliveries[0].reject("decided")
            await asyncio.sleep(30)

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(0, 1, 2))
        await worker.drained()
    assert sorted(attempts) == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert [t["error_type"] for t in witness.of("delivery.retried")] == ["TimeoutError"] * 2
    (dead,) = witness.of("delivery.dead_lettered")
    assert (dead["reason"], dead["error"]) == ("rejected", "decided")


async def test_shutdown_hands_back_what_was_not_settled(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    running = asyncio.Event()

    @event_handler(Asked, group="g", batch=3, batch_wait_ms=20, max_attempts=5, breaker=None)
    async def read(deliveries: Batch) -> None:
        deliveries[0].fail(ValueError("decided"))
        running.set()
        await asyncio.sleep(30)

    async with Worker(bus, [read], grace_s=0.05):
        await bus.publish_many(asked(0, 1, 2))
        await running.wait()
    pending = await backend.pending(STREAM, "g")
    assert [(p.owner, p.deliveries) for p in pending[1:]] == [("parked:0", 0)] * 2
    assert pending[0].deliveries == 1
    assert pending[0].owner != "parked:0", "but waits for its backoff"
    assert witness.total("delivery.handed_back") == 2


async def test_a_worker_that_stops_does_not_wait_for_fuller_batches(
    bus: Bus, backend: Backend
) -> None:
    attempts: Counter[int] = Counter()

    @event_handler(Asked, group="g", batch=100, batch_wait_ms=LONG_MS)
    async def read(deliveries: Batch) -> None:
        attempts.update(d.attempt for d in deliveries)

    began = time.monotonic()
    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(*range(7)))
        await eventually(lambda: _in_hand(worker) == 7)
    assert time.monotonic() - began < LONG_MS / 1000 / 2
    left = await backend.pending(STREAM, "g")
    assert all((p.owner, p.deliveries) == ("parked:0", 0) for p in left)
    assert sum(attempts.values()) + len(left) == 7


def _in_hand(worker: Worker) -> int:
    return sum(c.holding.held for c in worker._consumers)


async def test_dead_letters_of_a_cancelled_call_keep_nobody_waiting(
    bus: Bus, backend: Backend
) -> None:
    """After the grace period no row of on_dead calls begins; whoever comes next tells them."""
    running = asyncio.Event()
    told: list[int] = []

    async def on_dead(dead: Any, bus: Any) -> None:
        told.append(dead.event.n)

    @event_handler(Asked, group="g", batch=3, batch_wait_ms=20, on_dead=on_dead)
    async def read(deliveries: Batch) -> None:
        deliveries[0].reject("decided")
        running.set()
        await asyncio.sleep(30)

    async with Worker(bus, [read], grace_s=0.05):
        await bus.publish_many(asked(0, 1, 2))
        await running.wait()
    assert told == []
    assert [p.owner for p in await backend.pending(STREAM, "g")] == ["parked:0"] * 3


async def test_a_slot_gives_way_between_thousands_of_failures(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = 0
    give_way = BatchConsumer._give_way

    async def counted(self: Any, slot: Any, *, has_run: bool) -> None:
        nonlocal ways
        ways += 1
        await give_way(self, slot, has_run=has_run)

    @event_handler(Asked, group="g", batch=1_000, batch_wait_ms=LONG_MS, concurrency=1)
    async def read(deliveries: Batch) -> None:
        nonlocal ways
        if deliveries[0].attempt == 1:
            for delivery in deliveries:
                try:
                    {}[delivery.event.n]
                except KeyError as error:
                    delivery.fail(error)
            ways = 0
            monkeypatch.setattr(BatchConsumer, "_give_way", counted)

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(*range(1_000)))
        await eventually(lambda: worker._consumers[0]._calls == 1)  # type: ignore[attr-defined]
        await eventually(lambda: not _in_hand(worker))
    assert ways >= 3, "describing a thousand failures takes several turns"


# --- what goes alone


async def leave_behind(backend: Backend, count: int) -> None:
    """Let a worker that is dead by now have read `count` entries."""
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "dead", {STREAM: ">"}, count=count)
    await backend.redis.sadd(f"{STREAM}:workers", "dead")


async def test_reclaimed_ones_go_alone_and_at_once(bus: Bus, backend: Backend) -> None:
    calls: list[list[int]] = []
    attempts: Counter[int] = Counter()

    @event_handler(Asked, group="g", concurrency=2, batch=10, batch_wait_ms=LONG_MS)
    async def read(deliveries: Batch) -> None:
        calls.append(ns(deliveries))
        attempts.update(d.attempt for d in deliveries)

    await bus.publish_many(asked(*range(20)))
    await leave_behind(backend, 10)
    async with Worker(bus, [read]) as worker:
        await worker.drained(timeout_s=LONG_MS / 1000 / 2)
    assert sorted(calls) == [*([n] for n in range(10)), list(range(10, 20))]
    assert attempts == {2: 10, 1: 10}


async def test_one_that_comes_in_behind_others_does_not_wait_with_them(bus: Bus) -> None:
    consumer = _consumer(bus, batch=4, batch_wait_ms=LONG_MS)
    now = asyncio.get_running_loop().time()
    a, b, alone, c, d = (_delivery(consumer, n, now) for n in range(5))
    alone.reclaimed = True
    consumer.holding.buffer.extend([a, b, alone, c, d])
    assert consumer._take(now) == [a, b, c, d], "the others go on without it"
    assert consumer._is_ready(now)
    assert consumer._take(now) == [alone]
    consumer.holding.buffer.extend([a, b, alone, c])
    assert consumer._is_ready(now)
    assert consumer._take(now) == [], "too few for a batch, but it comes first now"
    assert list(consumer.holding.buffer) == [alone, a, b, c]
    assert consumer._is_ready(now)
    assert consumer._take(now) == [alone]
    assert not consumer._is_ready(now)


async def test_one_that_lay_unread_for_long_is_checked_with_all_before_they_run(bus: Bus) -> None:
    """Also when it lies behind younger ones: `Holding.check` looks at the first."""
    consumer = _consumer(bus, batch=3, batch_wait_ms=0)
    now = asyncio.get_running_loop().time()
    fresh, stale, last = (_delivery(consumer, n, now) for n in range(3))
    stale.checked_at = now - 1_000
    consumer.holding.buffer.extend([fresh, stale, last])
    assert consumer._take(now) == []
    assert list(consumer.holding.buffer) == [stale, fresh, last]


async def test_what_is_put_back_is_not_decoded_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = _consumer(bus, batch=3, batch_wait_ms=LONG_MS)
    now = asyncio.get_running_loop().time()
    triage = consumer.executor.triage
    looked_at: list[Delivery[Any]] = []

    def counted(delivery: Delivery[Any]) -> Any:
        looked_at.append(delivery)
        return triage(delivery)

    monkeypatch.setattr(consumer.executor, "triage", counted)
    first, second, third = (_delivery(consumer, n, now) for n in range(3))
    consumer.holding.buffer.extend([first, second])
    assert consumer._take(now) == []
    consumer.holding.buffer.append(third)
    assert consumer._take(now) == [first, second, third] == looked_at


async def test_what_comes_back_while_stopping_does_not_wait(bus: Bus) -> None:
    """Nothing more will come to keep it company, and at the end its slot would go without it."""
    consumer = _consumer(bus, batch=3, batch_wait_ms=LONG_MS)
    now = asyncio.get_running_loop().time()
    delivery = _delivery(consumer, 1, now)
    consumer.holding.buffer.append(delivery)
    assert not consumer._is_ready(now)
    consumer._stopping = True
    assert consumer._is_ready(now)
    assert consumer._take(now) == [delivery]


async def test_what_another_worker_has_by_now_is_not_in_the_batch(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    calls: list[list[int]] = []

    @event_handler(Asked, group="g", batch=10, batch_wait_ms=700)
    async def read(deliveries: Batch) -> None:
        calls.append(ns(deliveries))

    async with Worker(bus, [read]) as worker:
        worker._consumers[0]._unchecked_s = 0.1
        receipts = await bus.publish_many(asked(*range(5)))
        await eventually(lambda: _in_hand(worker) == 5)
        await backend.redis.xclaim(STREAM, "g", "thief", 0, [receipts[2].entry_id])
        await eventually(lambda: calls, timeout_s=4)  # sooner than the lease is renewed
    assert calls == [[0, 1, 3, 4]]
    assert witness.total("delivery.dropped") == 1


async def test_reclaimed_ones_are_taken_as_slots_are_free(bus: Bus, backend: Backend) -> None:
    """What goes alone would lie here for long; others have slots, too."""
    release = asyncio.Event()
    handled: list[int] = []

    @event_handler(Asked, group="g", concurrency=2, batch=100, batch_wait_ms=LONG_MS)
    async def read(deliveries: Batch) -> None:
        handled.extend(ns(deliveries))
        await release.wait()

    await bus.publish_many(asked(*range(30)))
    await leave_behind(backend, 30)
    async with Worker(bus, [read]) as worker:
        await eventually(lambda: len(handled) == 2)
        await passed(0.3)  # several sweeps
        assert _in_hand(worker) == 2
        release.set()
        await worker.drained()
    assert sorted(handled) == list(range(30))


# --- how much is asked for


async def test_reading_goes_on_while_a_call_runs(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls have to be full: more is read for the second as soon as the first is taken."""
    monkeypatch.setattr(reclaimer, "SWEEP_S", 60.0)  # its end makes a worker read, too
    both = asyncio.Barrier(2)

    @event_handler(Asked, group="g", concurrency=2, batch=600, batch_wait_ms=LONG_MS)
    async def read(deliveries: Batch) -> None:
        async with asyncio.timeout(5):
            await both.wait()

    await bus.publish_many(asked(*range(1_200)))
    async with Worker(bus, [read]) as worker:
        await worker.drained(timeout_s=LONG_MS / 1000 / 2)
        assert worker._consumers[0]._calls_so_far == 2, "the pace is that of calls"


def _consumer(bus: Bus, **settings: Any) -> BatchConsumer:
    @event_handler(Asked, group="g", **settings)
    async def read(deliveries: Batch) -> None: ...

    (consumer,) = Worker(bus, [read])._consumers
    assert isinstance(consumer, BatchConsumer)
    consumer.serve([STREAM], None)
    return consumer


def _delivery(consumer: BatchConsumer, n: int, received_at: float) -> Delivery[Any]:
    hand: Hand = consumer.hands[STREAM]
    fields = [b"id", b"e", b"type", b"work.asked", b"data", b'{"n":%d}' % n]
    delivery: Delivery[Any] = Delivery(hand, b"%d-0" % n, fields, 1, received_at, received_at)
    hand.held[delivery.entry_id] = delivery
    return delivery


@pytest.mark.parametrize(
    ("batch", "concurrency", "wanted"),
    [(100, 2, 200), (5, 2, 10), (100, 100, 2 * READ_COUNT), (5_000, 2, 5_000), (1, 2_000, 2_000)],
)
async def test_as_much_is_asked_for_as_fills_the_next_batches(
    bus: Bus, batch: int, concurrency: int, wanted: int
) -> None:
    demand = _consumer(bus, batch=batch, concurrency=concurrency)._demand
    assert demand.new() == demand.parked() == wanted
    demand.running = concurrency
    assert demand.new() == demand.parked() == 0


async def test_one_that_goes_alone_takes_the_room_of_a_whole_batch(bus: Bus) -> None:
    consumer = _consumer(bus, batch=100, concurrency=3)
    now = asyncio.get_running_loop().time()
    for n in range(10):
        consumer.holding.buffer.append(_delivery(consumer, n, now))
    assert consumer._demand.parked() == 290
    consumer.holding.buffer[3].reclaimed = consumer.holding.buffer[4].reclaimed = True
    assert consumer._demand.parked() == 300 - 8 - 200


def test_what_is_read_ahead_of_batches_is_counted_in_calls() -> None:
    pace = Pace(100)
    pace.measure(0.0, 0)
    for second in range(1, 30):  # a call a second: what is read ahead would wait for one
        pace.measure(float(second), second)
    assert (pace.ahead, pace.low_water) == (0, 0)
    for tick in range(1, 30):
        pace.measure(30 + tick / 200, 30 + tick)
    assert pace.ahead == 300
    assert pace.low_water == 150
    assert Pace(5_000).ahead == 0


async def test_what_waits_for_company_is_not_handed_back_as_if_it_waited_for_a_slot(
    bus: Bus,
) -> None:
    consumer = _consumer(bus, batch=100, batch_wait_ms=3_000, concurrency=1)
    now = asyncio.get_running_loop().time()
    consumer.holding.buffer.append(_delivery(consumer, 1, now))
    consumer._demand.running = 1
    consumer.look_after(now + 3 + WAITED_S - 0.1)
    assert len(consumer.holding.buffer) == 1
    consumer.look_after(now + 3 + WAITED_S + 0.1)
    assert len(consumer.holding.buffer) == 0


# --- the breaker


async def test_what_worked_in_a_call_is_counted_before_what_failed(
    bus: Bus, witness: Witness
) -> None:
    """Else a minority of failures in the first batch would look like an outage of all."""
    breaker = Breaker(min_calls=10, probe_s=0.1)

    @event_handler(
        Asked, group="g", batch=100, batch_wait_ms=LONG_MS, backoff=AGAIN, breaker=breaker
    )
    async def read(deliveries: Batch) -> None:
        for delivery in deliveries:
            if delivery.event.n < 30 and delivery.attempt == 1:
                delivery.fail(ValueError())

    async with Worker(bus, [read]):
        await bus.publish_many(asked(*range(100)))
        await eventually(lambda: witness.total("delivery.acked") == 70)
        await eventually(lambda: len(witness.of("delivery.retried")) == 30)
    assert witness.of("breaker.opened") == []


async def test_a_probe_is_one_event(bus: Bus, witness: Witness, backend: Backend) -> None:
    up = False
    calls: list[int] = []
    breaker = Breaker(min_calls=10, window_s=0.5, probe_s=0.1)

    @event_handler(
        Asked, group="g", batch=20, batch_wait_ms=LONG_MS, backoff=AGAIN, breaker=breaker
    )
    async def read(deliveries: Batch) -> None:
        calls.append(len(deliveries))
        if not up:
            raise ConnectionError

    async with Worker(bus, [read]):
        await bus.publish_many(asked(*range(40)))
        await eventually(lambda: len(witness.of("breaker.probed", outcome="failed")) >= 2)
        opened = len(calls)
        await eventually(lambda: len(calls) >= opened + 2)
        assert set(calls[opened:]) == {1}
        up = True
        await eventually(lambda: witness.of("breaker.closed"))
        await eventually(lambda: witness.total("delivery.acked") >= 1)
    assert witness.of("delivery.dead_lettered") == []


# --- what is published in the body


class Told(Event, type="work-told.told"):
    n: int


async def test_what_a_batch_publishes_belongs_to_no_single_event(
    bus: Bus, backend: Backend
) -> None:
    @event_handler(Asked, group="g", batch=3, batch_wait_ms=100)
    async def read(deliveries: Batch) -> None:
        for delivery in deliveries:
            await delivery.bus.publish(Told(n=delivery.event.n))
        await bus.publish(Told(n=100), correlation_id="given")

    async with Worker(bus, [read]) as worker:
        await bus.publish_many(asked(1, 2, 3))
        await worker.drained()
        *each, given = (await backend.entries("bus:{work-told:0}")).values()
        assert not any("causationid" in e or "correlationid" in e for e in each)
        assert len({e["id"] for e in each}) == 3
        assert (given["correlationid"], "causationid" in given) == (b"given", False)
        (receipt,) = await bus.publish_many(asked(4))
        await worker.drained()
        *_, of_one, last = (await backend.entries("bus:{work-told:0}")).values()
        assert of_one["causationid"] == receipt.event_id.encode(), "one delivery is a cause"
        assert last["causationid"] == receipt.event_id.encode()


async def test_what_a_batch_publishes_may_use_the_reserve(valkey_url: str) -> None:
    topic = Topic("work-told", maxlen=10, keep=2)

    @event_handler(Told, group="g", batch=10, batch_wait_ms=LONG_MS)
    async def read(deliveries: list[Delivery[Told]]) -> None:
        if deliveries[0].event.n < 10:
            async with asyncio.timeout(5):
                await bus.publish_many([Told(n=n) for n in range(10, 15)])
                await bus.publish_many([Told(n=n) for n in range(15, 20)])

    async with Bus.connect(valkey_url, topics=[topic]) as bus, Worker(bus, [read]) as worker:
        await asyncio.gather(*(bus.publish(Told(n=n)) for n in range(10)))
        await worker.drained(timeout_s=LONG_MS / 1000 / 2)
