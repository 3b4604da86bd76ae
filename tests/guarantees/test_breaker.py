"""An outage of what a handler calls dead-letters nothing; poison still dies.

The defaults are shrunk a hundredfold or so: a window of a few tenths of a second instead of ten.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Breaker, DeadLettered, Delivery, Reject, RetryLater, Worker, event_handler
from bus.streams.connection import ConnectionLost
from bus.worker.refunds import Refunds
from tests.guarantees.backend import Backend
from tests.guarantees.events import STREAM, Made
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Handler

pytestmark = pytest.mark.usefixtures("quick_sweeps")

GROUP = "caller"
SOON = Backoff(base_s=0.02, factor=1.0, jitter=0.0)
NEVER = Backoff(base_s=3_000.0, jitter=0.0)
NEVER_S = 3_600.0


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Backend]:
    """One kind of server, for what does not depend on it."""
    backend = Backend(valkey_url)
    yield backend
    await backend.close()


class Service:
    """What the handler calls. `up`: whether it answers; `bad`: events it cannot digest, ever."""

    def __init__(self, *, up: bool = False, bad: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.up = up
        self.bad = bad
        self.called: list[tuple[float, int, int]] = []  # time, n, attempt
        self.answered: Counter[int] = Counter()

    def handler(self, **settings: Any) -> Handler[...]:
        settings = {"group": GROUP, "backoff": SOON, "concurrency": 8, **settings}

        @event_handler(Made, **settings)
        async def call(event: Made, delivery: Delivery[Made]) -> None:
            self.called.append((time.monotonic(), event.n, delivery.attempt))
            if not self.up or event.n in self.bad:
                raise ConnectionError("nobody answers")
            self.answered[event.n] += 1

        return call

    @property
    def ns(self) -> list[int]:
        return [n for _, n, _ in self.called]


async def passed(seconds: float) -> None:
    """Wait until what must not happen would have happened."""
    over = time.monotonic() + seconds
    await eventually(lambda: time.monotonic() > over)


async def all_parked_with(backend: Backend, counts: Counter[int]) -> bool:
    """Whether everything pending lies in lanes, with these delivery counts."""
    pending = await backend.pending(STREAM, GROUP)
    return Counter(p.deliveries for p in pending) == counts and all(
        p.owner.startswith("parked:") for p in pending
    )


# --- while open


async def leave_behind(backend: Backend, count: int) -> None:
    """Let a worker that is dead by now have read `count` entries."""
    await backend.redis.xreadgroup(GROUP, "dead", {STREAM: ">"}, count=count)
    await backend.redis.sadd(f"{STREAM}:workers", "dead")


@pytest.mark.parametrize("kind", ["new", "parked", "reclaimed"])
async def test_while_open_nothing_starts(backend: Backend, kind: str) -> None:
    service = Service()
    backoff = SOON if kind == "parked" else NEVER
    breaker = Breaker(min_calls=5, probe_s=NEVER_S)
    async with backend.bus() as (bus, witness):
        async with Worker(bus, [service.handler(breaker=breaker, backoff=backoff)]):
            await bus.publish_many([Made(n=n) for n in range(8)])
            await eventually(lambda: witness.of("breaker.opened"))
            await eventually(lambda: witness.of("breaker.refunded"))
            called = len(service.called)
            assert called <= 8
            if kind == "reclaimed":  # 8 at most, or the worker would not ask for any
                await bus.publish_many([Made(n=n) for n in range(100, 103)])
                await leave_behind(backend, 3)
            if kind == "new":
                await bus.publish_many([Made(n=n) for n in range(100, 200)])
            await passed(1.0 if kind == "parked" else 0.5)  # several sweeps, and all lanes due
            assert len(service.called) == called
            assert witness.of("breaker.closed") == []
            pending = await backend.pending(STREAM, GROUP)
            own = [p for p in pending if not p.owner.startswith("parked:")]
            assert {p.owner for p in own} <= {"dead"}, "nothing is kept from healthy workers"
            assert len(pending) <= 8 + 8, "one read was on its way as it opened, and no more"
        assert await backend.dead(STREAM, GROUP) == []


async def test_what_waited_in_the_buffer_is_handed_back(valkey: Backend) -> None:
    """Read ahead for the slots, and in flight when it opened: others may have it."""
    gate = asyncio.Event()

    @event_handler(
        Made, group=GROUP, concurrency=30, backoff=NEVER, breaker=Breaker(min_calls=5, probe_s=60)
    )
    async def call(event: Made) -> None:
        if event.n >= 20:
            await gate.wait()
            return
        raise ConnectionError("nobody answers")

    async with valkey.bus() as (bus, witness), Worker(bus, [call], concurrency=5) as worker:
        await bus.publish_many([Made(n=n) for n in range(20, 22)])
        await eventually(lambda: _owned(valkey, worker.name, 2))
        await bus.publish_many([Made(n=n) for n in range(20)])
        await eventually(lambda: witness.of("breaker.opened"))
        await eventually(lambda: _owned(valkey, worker.name, 2))
        gate.set()
        # What ran before it opened and works now says nothing of the outage, and is acked.
        await eventually(lambda: witness.total("delivery.acked") == 2)
        assert witness.of("breaker.closed") == []
        await eventually(lambda: _owned(valkey, worker.name, 0))


async def _owned(backend: Backend, owner: str, count: int) -> bool:
    pending = await backend.pending(STREAM, GROUP)
    return sum(p.owner == owner for p in pending) == count


@pytest.mark.parametrize("kind", ["new", "parked", "reclaimed"])
async def test_one_probe_at_a_time_new_parked_or_reclaimed(backend: Backend, kind: str) -> None:
    service = Service()
    breaker = Breaker(min_calls=5, probe_s=0.2)
    backoff = SOON if kind == "parked" else NEVER
    async with backend.bus() as (bus, witness):
        async with Worker(bus, [service.handler(breaker=breaker, backoff=backoff)]):
            await bus.publish_many([Made(n=n) for n in range(8)])
            await eventually(lambda: witness.of("breaker.opened"))
            if kind == "new":
                await bus.publish_many([Made(n=n) for n in range(100, 120)])
            if kind == "reclaimed":
                await bus.publish_many([Made(n=n) for n in range(100, 103)])
                await leave_behind(backend, 3)
            await eventually(lambda: len(witness.of("breaker.probed", outcome="failed")) >= 4)
        probes = service.called[-len(witness.of("breaker.probed")) :]
        assert all(b[0] - a[0] > 0.1 for a, b in pairwise(probes))
        if kind == "parked":
            assert {n for _, n, _ in probes} <= set(range(8))
        else:
            assert any(n >= 100 for _, n, _ in probes)
        assert {attempt for _, _, attempt in probes} <= {1, 2}, "failed probes use no attempt"
        assert await backend.dead(STREAM, GROUP) == []


async def test_a_probe_that_hangs_does_not_keep_it_open(valkey: Backend) -> None:
    """No timeout_s, and the first probe meets a black hole: the next ones find the service up."""
    hung: list[int] = []
    answered: list[int] = []
    up = asyncio.Event()
    never = asyncio.Event()

    @event_handler(
        Made,
        group=GROUP,
        concurrency=8,
        backoff=SOON,
        breaker=Breaker(min_calls=5, probe_s=0.1),
    )
    async def call(event: Made) -> None:
        if up.is_set():
            answered.append(event.n)
        elif event.n >= 100:
            hung.append(event.n)
            await never.wait()
        else:
            raise ConnectionError("nobody answers")

    async with valkey.bus() as (bus, witness):
        async with Worker(bus, [call], grace_s=0.1):
            await bus.publish_many([Made(n=n) for n in range(8)])
            await eventually(lambda: witness.of("breaker.opened"))
            await bus.publish_many([Made(n=n) for n in range(100, 120)])
            await eventually(lambda: hung)
            up.set()
            await eventually(lambda: witness.of("breaker.closed"))
            await eventually(lambda: len(set(answered)) == 28 - len(hung))
        assert await valkey.dead(STREAM, GROUP) == []


async def test_what_was_reclaimed_stays_in_hand_for_the_probes(backend: Backend) -> None:
    """Its count says how often it was started, so it cannot be handed back; nor does it start.

    A sweep takes half of the free slots, so the fifth failure finds three more on their way.
    """
    service = Service()
    breaker = Breaker(min_calls=5, probe_s=0.2)
    handler = service.handler(breaker=breaker, backoff=NEVER)
    async with backend.bus() as (bus, witness):
        await bus.publish_many([Made(n=n) for n in range(10)])
        await backend.redis.xgroup_create(STREAM, GROUP, "0")
        await leave_behind(backend, 10)
        async with Worker(bus, [handler]):
            await eventually(lambda: len(service.called) == 10)
            (told,) = witness.of("breaker.opened")
            assert told["calls"] == 5
            probes = service.called[4:]
            assert all(b[0] - a[0] > 0.1 for a, b in pairwise(probes)), "counted, then called"
            await eventually(lambda: all_parked_with(backend, Counter({1: 10})))


# --- attempts


async def test_failures_in_the_window_use_no_attempt(backend: Backend) -> None:
    """Ten events that fail three times each open it at the thirtieth failure."""
    service = Service()
    breaker = Breaker(min_calls=30, probe_s=NEVER_S)
    handler = service.handler(breaker=breaker, max_attempts=50)
    async with backend.bus() as (bus, witness), Worker(bus, [handler]):
        await bus.publish_many([Made(n=n) for n in range(10)])
        await eventually(lambda: witness.of("breaker.opened"))
        assert max(attempt for _, _, attempt in service.called) >= 3
        await eventually(lambda: all_parked_with(backend, Counter({0: 10})))
        assert sum(t["missed"] for t in witness.of("breaker.refunded")) == 0


async def test_what_is_in_hand_again_gets_its_attempts_back_too(backend: Backend) -> None:
    """They failed once, run again as it opens, and fail after that."""
    gate = asyncio.Event()
    again: list[int] = []

    @event_handler(
        Made,
        group=GROUP,
        concurrency=20,
        backoff=SOON,
        breaker=Breaker(min_calls=12, probe_s=NEVER_S),
    )
    async def call(event: Made, delivery: Delivery[Made]) -> None:
        if event.n < 4 and delivery.attempt == 2:
            again.append(event.n)
            await gate.wait()
        raise ConnectionError("nobody answers")

    async with backend.bus() as (bus, witness), Worker(bus, [call]) as worker:
        await bus.publish_many([Made(n=n) for n in range(4)])
        await eventually(lambda: len(again) == 4)
        await bus.publish_many([Made(n=n) for n in range(4, 12)])
        await eventually(lambda: witness.of("breaker.opened"))
        await eventually(lambda: _owned(backend, worker.name, 4))
        gate.set()
        await eventually(lambda: all_parked_with(backend, Counter({0: 12})))


async def test_failures_before_the_window_keep_their_attempt(backend: Backend) -> None:
    service = Service()
    breaker = Breaker(min_calls=8, window_s=0.2, probe_s=NEVER_S)
    handler = service.handler(breaker=breaker, backoff=NEVER)
    async with backend.bus() as (bus, witness), Worker(bus, [handler]):
        await bus.publish_many([Made(n=n) for n in range(3)])
        await eventually(lambda: all_parked_with(backend, Counter({1: 3})))
        await passed(0.5)
        await bus.publish_many([Made(n=n) for n in range(10, 18)])
        await eventually(lambda: witness.of("breaker.opened"))
        await eventually(lambda: all_parked_with(backend, Counter({1: 3, 0: 8})))


async def test_refunds_are_tried_until_the_server_takes_them(
    valkey: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = valkey.verbs.refund
    calls = 0

    async def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= 3:
            if calls == 3:
                await inner(*args, **kwargs)  # done, and the reply is lost
            raise ConnectionLost("connection lost: by the test", sent=True)
        return await inner(*args, **kwargs)

    monkeypatch.setattr(valkey.verbs, "refund", broken)
    service = Service()
    handler = service.handler(breaker=Breaker(min_calls=20, probe_s=NEVER_S), backoff=NEVER)
    async with valkey.bus() as (bus, witness), Worker(bus, [handler]):
        await bus.publish_many([Made(n=n) for n in range(20)])
        await eventually(lambda: witness.of("breaker.refunded"))
        await eventually(lambda: all_parked_with(valkey, Counter({0: 20})))
        assert len(witness.of("breaker.refund_failed", error_type="ConnectionLost")) == 3


async def test_refunds_that_are_owed_at_the_end_are_given_at_the_end(
    valkey: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdicts of the window are still on their way as the worker stops, and no tick comes."""
    gate = asyncio.Event()
    inner = valkey.verbs.park

    async def late(*args: Any, **kwargs: Any) -> Any:
        await gate.wait()
        return await inner(*args, **kwargs)

    monkeypatch.setattr(valkey.verbs, "park", late)
    monkeypatch.setattr(Refunds, "look_after", lambda refunds, now: None)
    service = Service()
    handler = service.handler(breaker=Breaker(min_calls=8, probe_s=NEVER_S), backoff=NEVER)
    async with valkey.bus() as (bus, witness):
        async with Worker(bus, [handler]) as worker:
            await bus.publish_many([Made(n=n) for n in range(8)])
            await eventually(lambda: witness.of("breaker.opened"))
            stopping = asyncio.create_task(worker.stop())
            await eventually(lambda: witness.of("worker.stopping"))
            gate.set()
            await stopping
        assert await all_parked_with(valkey, Counter({0: 8}))


# --- dead letters


async def test_a_last_attempt_that_fails_in_an_outage_is_no_dead_letter(backend: Backend) -> None:
    told: list[DeadLettered] = []

    async def on_dead(dead: DeadLettered, bus: Any) -> None:
        told.append(dead)

    service = Service()
    breaker = Breaker(window_s=0.5, probe_s=0.1)
    handler = service.handler(breaker=breaker, max_attempts=1, on_dead=on_dead)
    async with backend.bus() as (bus, witness), Worker(bus, [handler]) as worker:
        await bus.publish_many([Made(n=n) for n in range(40)])
        await eventually(lambda: witness.of("breaker.opened"))
        await eventually(lambda: len(witness.of("breaker.probed")) >= 3)
        await passed(0.6)  # what was held would be let go by now
        assert (told, await backend.dead(STREAM, GROUP)) == ([], [])
        service.up = True
        await worker.drained()
        assert service.answered == Counter(range(40)), "each once, and none is missing"
        assert (told, await backend.dead(STREAM, GROUP)) == ([], [])
        assert {attempt for _, _, attempt in service.called} == {1}


async def test_poison_among_healthy_events_still_dies_of_its_attempts(backend: Backend) -> None:
    service = Service(up=True, bad={7, 23})
    lasted_s: dict[int, float] = {}

    async def on_dead(dead: DeadLettered, bus: Any) -> None:
        n = dead.event.n  # type: ignore[attr-defined]
        lasted_s[n] = time.monotonic() - max(t for t, m, _ in service.called if m == n)

    handler = service.handler(
        breaker=Breaker(min_calls=2, window_s=0.4), max_attempts=2, on_dead=on_dead
    )
    async with backend.bus() as (bus, witness), Worker(bus, [handler]) as worker:
        await bus.publish_many([Made(n=n) for n in range(40)])
        await worker.drained()
        letters = await backend.dead(STREAM, GROUP)
        assert [(x["deadreason"], x["deadattempts"]) for x in letters] == [(b"failed", b"2")] * 2
        assert {x["deaderror"] for x in letters} == {b"ConnectionError: nobody answers"}
        assert sorted(lasted_s) == [7, 23]
        assert all(0.35 < s < 5 for s in lasted_s.values()), "held until no outage is in sight"
        assert service.answered == Counter(set(range(40)) - {7, 23})
        assert witness.of("breaker.opened") == []
        assert Counter(service.ns)[7] == 2


async def test_a_held_dead_letter_waits_for_its_slot(valkey: Backend) -> None:
    """What waits long behind slow calls is handed back; this has been handled, and is not."""
    gate = asyncio.Event()
    called: list[int] = []

    @event_handler(Made, group=GROUP, concurrency=1, max_attempts=1, breaker=Breaker(window_s=1.2))
    async def call(event: Made) -> None:
        called.append(event.n)
        if event.n == 1:
            raise ConnectionError("nobody answers")
        await gate.wait()

    async with valkey.bus() as (bus, witness), Worker(bus, [call]) as worker:
        await bus.publish_many([Made(n=1), Made(n=2)])
        await eventually(lambda: called == [1, 2])
        await passed(1.5)
        assert await _owned(valkey, worker.name, 2)
        gate.set()
        await worker.drained()
        assert called == [1, 2]
        assert len(await valkey.dead(STREAM, GROUP)) == 1
        assert witness.of("delivery.handed_back") == []


async def test_with_the_breaker_off_dead_letters_are_not_held(valkey: Backend) -> None:
    service = Service()
    handler = service.handler(breaker=None, max_attempts=1)
    started = time.monotonic()
    async with valkey.bus() as (bus, witness), Worker(bus, [handler]) as worker:
        await bus.publish_many([Made(n=n) for n in range(40)])
        await worker.drained()
        assert len(await valkey.dead(STREAM, GROUP)) == 40
        assert witness.of("breaker.opened") == []
    assert time.monotonic() - started < 5


async def test_held_dead_letters_are_bounded(
    valkey: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.worker.guard.BREAKER_MEMORY", 3)
    service = Service()
    handler = service.handler(breaker=Breaker(window_s=600), max_attempts=1, backoff=NEVER)
    async with valkey.bus() as (bus, witness), Worker(bus, [handler]):
        await bus.publish_many([Made(n=n) for n in range(10)])
        await eventually(lambda: len(witness.of("delivery.retried")) >= 7)
        owners = Counter(p.owner[:7] for p in await valkey.pending(STREAM, GROUP))
        assert owners["parked:"] == 7, "tried once more, rather than dead or held"
        assert witness.of("delivery.dead_lettered") == []


async def test_a_held_dead_letter_is_handed_back_by_a_worker_that_stops(backend: Backend) -> None:
    service = Service()
    handler = service.handler(breaker=Breaker(window_s=600), max_attempts=3)
    async with backend.bus() as (bus, witness):
        async with Worker(bus, [handler]) as worker:
            await bus.publish(Made(n=1))
            await eventually(lambda: len(service.called) == 3)
            await passed(0.3)
            (held,) = await backend.pending(STREAM, GROUP)
            assert (held.owner, held.deliveries) == (worker.name, 3)
        (told,) = witness.of("worker.stopped")
        assert told["handed_back"] == 1
        assert await all_parked_with(backend, Counter({2: 1}))
        assert await backend.dead(STREAM, GROUP) == []


async def test_a_held_dead_letter_is_renewed_and_dropped_when_another_takes_it(
    backend: Backend,
) -> None:
    service = Service()
    handler = service.handler(breaker=Breaker(window_s=600), max_attempts=1, visibility_s=0.3)
    async with backend.bus() as (bus, witness), Worker(bus, [handler]) as worker:
        receipt = await bus.publish(Made(n=1))
        await eventually(lambda: len(service.called) == 1)
        await passed(1.0)  # several times the visibility
        assert [p.owner for p in await backend.pending(STREAM, GROUP)] == [worker.name]
        await backend.redis.xclaim(STREAM, GROUP, "other", 0, [receipt.entry_id], justid=True)
        await eventually(lambda: witness.total("delivery.dropped") == 1)
        assert len(service.called) == 1


# --- what does not count


@pytest.mark.parametrize("answer", [Reject("no"), RetryLater(0.2)], ids=["Reject", "RetryLater"])
async def test_answers_of_the_handler_open_nothing(backend: Backend, answer: Exception) -> None:
    answered: Counter[int] = Counter()

    @event_handler(Made, group=GROUP, breaker=Breaker(min_calls=5))
    async def call(event: Made) -> None:
        answered[event.n] += 1
        if answered[event.n] == 1:
            raise answer

    async with backend.bus() as (bus, witness), Worker(bus, [call]) as worker:
        await bus.publish_many([Made(n=n) for n in range(40)])
        await worker.drained()
        rejected = isinstance(answer, Reject)
        assert len(await backend.dead(STREAM, GROUP)) == (40 if rejected else 0)
        assert witness.of("breaker.opened") == []


async def test_a_probe_that_is_rejected_or_skipped_leaves_it_open(backend: Backend) -> None:
    """Nor does an entry that no handler ever sees use the probe up."""
    seen: list[int] = []

    @event_handler(*(Made,), group=GROUP, backoff=NEVER, breaker=Breaker(min_calls=5, probe_s=0.2))
    async def call(event: Made) -> None:
        seen.append(event.n)
        if event.n >= 100:
            raise Reject("no") if event.n == 100 else RetryLater(3_000)
        raise ConnectionError("nobody answers")

    async with backend.bus() as (bus, witness), Worker(bus, [call]):
        await bus.publish_many([Made(n=n) for n in range(5)])
        await eventually(lambda: witness.of("breaker.opened"))
        for _ in range(5):
            await backend.add(STREAM, {"id": "x", "type": "of.nobody", "data": "{}"})
        await backend.add(STREAM, {"id": "x", "type": "promise.made", "data": "no json"})
        await bus.publish_many([Made(n=100), Made(n=101)])
        await eventually(lambda: seen[5:] == [100, 101])
        await eventually(lambda: len(witness.of("breaker.probed", outcome="undecided")) == 2)
        assert witness.of("breaker.closed") == []
        await eventually(lambda: witness.total("delivery.skipped") == 5)
        await eventually(lambda: len(witness.of("delivery.dead_lettered")) == 2)
        reasons = {x["deadreason"] for x in await backend.dead(STREAM, GROUP)}
        assert reasons == {b"rejected", b"undecodable"}


# --- the whole outage


async def test_it_closes_by_itself_when_a_probe_works(backend: Backend) -> None:
    service = Service()
    breaker = Breaker(min_calls=5, probe_s=0.2)
    async with backend.bus() as (bus, witness):
        async with Worker(bus, [service.handler(breaker=breaker)]) as worker:
            await bus.publish_many([Made(n=n) for n in range(10)])
            (told,) = await eventually(lambda: witness.of("breaker.opened"))
            assert (told["group"], told["window_s"]) == (GROUP, 10.0)
            assert told["failures"] == told["calls"] >= 5
            service.up = True
            (told,) = await eventually(lambda: witness.of("breaker.closed"))
            assert told["group"] == GROUP
            assert 0.15 < told["open_s"] < 5
            assert witness.of("breaker.probed")[-1]["outcome"] == "worked"
            await bus.publish_many([Made(n=n) for n in range(10, 100)])
            await worker.drained()
        assert set(service.answered) == set(range(100))


async def test_five_minutes_of_outage_dead_letter_nothing(backend: Backend) -> None:
    """A hundredth of the defaults: 3 s with a window of 0.1 s, probes every 0.05 s, 5 attempts.

    Without the breaker the first event would be dead after 0.15 s.
    """
    service = Service(up=True)
    handler = service.handler(
        backoff=Backoff(base_s=0.01, max_s=6.0),
        breaker=Breaker(window_s=0.1, probe_s=0.05),
    )
    async with backend.bus() as (bus, witness), Worker(bus, [handler]) as worker:
        await bus.publish_many([Made(n=n) for n in range(50)])
        await eventually(lambda: len(service.answered) == 50)
        service.up = False
        published, ends = 50, time.monotonic() + 3.0
        while time.monotonic() < ends:
            await bus.publish_many([Made(n=published + n) for n in range(30)])
            published += 30
            await passed(0.05)
        outage = len(service.called) - 50
        assert await backend.dead(STREAM, GROUP) == []
        service.up = True
        await worker.drained()
        assert await backend.dead(STREAM, GROUP) == []
        assert service.answered == Counter(range(published)), "each once, and none is missing"
        assert outage < 400, "and the service was left in peace"
        assert witness.of("breaker.closed")
        assert max(attempt for _, _, attempt in service.called) <= 5


async def test_a_healthy_process_takes_what_the_other_gave_up(backend: Backend) -> None:
    """The state is each process's own: only one of them has lost its way to the service."""
    cut_off, healthy = Service(), Service(up=True)
    breaker = Breaker(min_calls=5, probe_s=NEVER_S)
    async with backend.bus() as (bus, witness), backend.bus() as (other, _):
        async with Worker(bus, [cut_off.handler(breaker=breaker)]):
            await bus.publish_many([Made(n=n) for n in range(60)])
            await eventually(lambda: witness.of("breaker.opened"))
            async with Worker(other, [healthy.handler(breaker=breaker)]):
                await bus.publish_many([Made(n=n) for n in range(60, 80)])
                await eventually(lambda: set(healthy.answered) == set(range(80)))
                await eventually(lambda: _pending_is(backend, 0))
        assert len(cut_off.called) < 20
        assert await backend.dead(STREAM, GROUP) == []


async def _pending_is(backend: Backend, count: int) -> bool:
    return len(await backend.pending(STREAM, GROUP)) == count


async def test_two_workers_live_through_an_outage(backend: Backend) -> None:
    """They pass failing events to each other until both are open; still nothing dies."""
    service = Service()
    settings: dict[str, Any] = {"breaker": Breaker(window_s=0.5, probe_s=0.1), "max_attempts": 2}
    async with backend.bus() as (bus, witness), backend.bus() as (other, second):
        one = Worker(bus, [service.handler(**settings)])
        two = Worker(other, [service.handler(**settings)])
        async with one, two:
            await bus.publish_many([Made(n=n) for n in range(100)])
            for seen in (witness, second):
                await _opened(seen)
            await passed(1.0)
            assert await backend.dead(STREAM, GROUP) == []
            service.up = True
            await one.drained()
            await two.drained()
        assert await backend.dead(STREAM, GROUP) == []
        assert service.answered == Counter(range(100))


async def _opened(witness: Witness) -> None:
    await eventually(lambda: witness.of("breaker.opened"))


async def test_a_worker_that_stops_while_open_loses_nothing(backend: Backend) -> None:
    service = Service()
    breaker = Breaker(min_calls=5, probe_s=0.05)
    async with backend.bus() as (bus, witness):
        async with Worker(bus, [service.handler(breaker=breaker, max_attempts=1)]):
            await bus.publish_many([Made(n=n) for n in range(60)])
            await eventually(lambda: len(witness.of("breaker.probed")) >= 2)
        pending = await backend.pending(STREAM, GROUP)
        assert {p.owner.partition(":")[0] for p in pending} == {"parked"}
        assert {p.deliveries for p in pending} == {0}
        service.up = True
        async with Worker(bus, [service.handler(breaker=breaker, max_attempts=1)]) as heir:
            await heir.drained()
        assert service.answered == Counter(range(60))
        assert await backend.dead(STREAM, GROUP) == []
