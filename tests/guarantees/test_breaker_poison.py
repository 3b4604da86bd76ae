"""Events that always fail are no outage: they die, the others go on, and nothing stays shut."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from bus import Backoff, Breaker, Delivery, Topic, Worker, event_handler
from bus.worker import supervisor
from tests.guarantees.events import STREAM, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

pytestmark = pytest.mark.usefixtures("quick_sweeps")

SOON = Backoff(base_s=0.05, factor=1.0, jitter=0.0)


async def test_a_quarter_that_always_fails_shuts_nothing_and_dies(backend: Backend) -> None:
    """By its calls, each bad event tried five times, more than half of all fail."""
    handled: set[int] = set()

    @event_handler(
        Made, group="g", backoff=SOON, breaker=Breaker(window_s=2, min_calls=20, probe_s=0.1)
    )
    async def handle(event: Made) -> None:
        if event.n < 200 and event.n % 4 == 3:
            raise ValueError
        handled.add(event.n)

    async with backend.bus() as (bus, witness):
        await bus.publish_many([Made(n=n) for n in range(200)])
        async with Worker(bus, [handle]) as worker:
            n = 200
            while len(await backend.dead(STREAM, "g")) < 50:
                await bus.publish_many([Made(n=m) for m in range(n, n + 5)])
                n += 5
                await asyncio.sleep(0.01)  # the traffic of a living system
                assert n < 10_000, "they never die"
            await worker.drained()
        assert witness.of("breaker.opened") == []
    assert len(handled) == n - 50
    dead = await backend.dead(STREAM, "g")
    assert Counter(d["deadattempts"] for d in dead) == {b"5": 50}


async def test_after_many_that_always_fail_the_others_are_handled_and_those_die(
    backend: Backend,
) -> None:
    """Thirty in a row look like an outage. It ends with the first that works, and stays ended."""
    handled: set[int] = set()

    @event_handler(
        Made,
        group="g",
        backoff=SOON,
        max_attempts=3,
        breaker=Breaker(window_s=1, min_calls=10, probe_s=0.1),
    )
    async def handle(event: Made) -> None:
        await asyncio.sleep(0.005)
        if event.n < 30:
            raise ValueError
        handled.add(event.n)

    async with backend.bus() as (bus, witness):
        await bus.publish_many([Made(n=n) for n in range(30)])
        async with Worker(bus, [handle]) as worker:
            await eventually(lambda: witness.of("breaker.opened"))
            n = 30
            while len(await backend.dead(STREAM, "g")) < 30:
                await bus.publish_many([Made(n=m) for m in range(n, n + 5)])
                n += 5
                await asyncio.sleep(0.01)  # the traffic of a living system
                assert n < 10_000, "they never die"
            await worker.drained()
        assert len(witness.of("breaker.opened")) <= 3
    assert handled == set(range(30, n))


async def test_a_held_dead_letter_does_not_hold_up_a_stream_that_fills(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "PRESSURE_S", 0.05)

    @event_handler(
        Made, group="g", max_attempts=1, backoff=Backoff(base_s=60), breaker=Breaker(window_s=600)
    )
    async def handle(event: Made) -> None:
        if event.n == 0:
            raise ValueError

    topic = Topic("promise", maxlen=100, keep=10)
    async with backend.bus(topics=[topic]) as (bus, witness), Worker(bus, [handle]):
        for n in range(500):
            await bus.publish(Made(n=n))
        await eventually(lambda: witness.total("delivery.acked") == 499)
        assert witness.of("delivery.dead_lettered") == []
        (told,) = witness.of("delivery.moved")
        assert told["count"] == 1


async def test_calls_that_hang_longer_than_the_window_are_seen(backend: Backend) -> None:
    attempts: list[int] = []

    @event_handler(
        Made,
        group="g",
        concurrency=4,
        max_attempts=1,
        timeout_s=0.5,
        breaker=Breaker(window_s=0.2, min_calls=8, probe_s=60),
    )
    async def handle(_: Made, delivery: Delivery[Made]) -> None:
        attempts.append(delivery.attempt)
        await asyncio.sleep(60)

    async with backend.bus() as (bus, witness):
        await bus.publish_many([Made(n=n) for n in range(30)])
        async with Worker(bus, [handle], grace_s=0):
            await eventually(lambda: witness.of("breaker.opened"))
    assert witness.of("delivery.dead_lettered") == []
    assert await backend.dead(STREAM, "g") == []
