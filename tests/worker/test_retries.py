"""Prompt retries: to the millisecond where there is room, and the lane where there is none."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bus import Backoff, Bus, Delivery, RetryLater, Worker, event_handler
from bus.streams.connection import ConnectionLost
from bus.streams.stream import StreamStore
from bus.worker import reclaimer
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    import pytest

    from tests.guarantees.backend import Backend

NEVER_S = 3_600.0


async def test_a_retry_needs_no_sweep(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaimer, "SWEEP_S", NEVER_S)
    times: list[float] = []

    @event_handler(Asked, group="g", backoff=Backoff(base_s=0.1, jitter=0, factor=1))
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        times.append(asyncio.get_running_loop().time())
        if delivery.attempt < 3:
            raise ValueError

    async with Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
        waits = [b - a for a, b in pairwise(times)]
        assert all(w >= 0.1 for w in waits), "never before its time"
        assert await backend.consumers(STREAM, "g") == {worker.name}, "and the lane is gone"


async def test_without_a_free_slot_it_stays_in_its_lane_for_the_sweep(
    bus: Bus, backend: Backend, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)
    release = asyncio.Event()
    attempts: list[tuple[int, int]] = []

    @event_handler(Asked, group="g", concurrency=1, backoff=Backoff(base_s=0.05, jitter=0))
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        attempts.append((event.n, delivery.attempt))
        if event.n == 1 and delivery.attempt == 1:
            raise ValueError
        if event.n == 2:
            await release.wait()

    async with Worker(bus, [read]) as worker:
        await bus.publish_many([Asked(n=1), Asked(n=2)])
        await eventually(lambda: witness.of("delivery.retried"))
        await eventually(lambda: (2, 1) in attempts)
        over = asyncio.get_running_loop().time() + 0.2  # its time comes while the slot is taken
        await eventually(lambda: asyncio.get_running_loop().time() > over)
        (parked,) = [p for p in await backend.pending(STREAM, "g") if p.owner != worker.name]
        assert parked.owner.startswith("parked:")
        assert (1, 2) not in attempts
        release.set()
        await worker.drained()
    assert attempts == [(1, 1), (2, 1), (1, 2)]


async def test_an_entry_that_left_its_lane_is_not_taken_again(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    """Somebody else was quicker: the timer finds nothing and takes nothing."""
    attempts: list[int] = []

    @event_handler(Asked, group="g", backoff=Backoff(base_s=0.3, jitter=0))
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        attempts.append(delivery.attempt)
        raise ValueError

    async with Worker(bus, [read]):
        receipt = await bus.publish(Asked(n=1))
        await eventually(lambda: witness.of("delivery.retried"))
        await backend.redis.xclaim(STREAM, "g", "other", 0, [receipt.entry_id], justid=True)
        await eventually(lambda: witness.of("delivery.taken", count=0))
        assert [p.owner for p in await backend.pending(STREAM, "g")] == ["other"]
        assert attempts == [1]


async def test_timers_are_bounded_and_the_sweep_takes_the_rest(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.worker.retries.PROMPT_RETRIES", 5)
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)
    attempts: list[tuple[int, int]] = []

    @event_handler(Asked, group="g", concurrency=50)
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        attempts.append((event.n, delivery.attempt))
        if attempts.count((event.n, 1)) == 1:
            raise RetryLater(0.1)

    async with Worker(bus, [read], concurrency=50) as worker:
        await bus.publish_many([Asked(n=n) for n in range(40)])
        await worker.drained()
    assert sorted(attempts) == sorted([(n, 1) for n in range(40)] * 2)


async def test_a_lost_answer_is_recovered_without_another_attempt(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, witness: Witness
) -> None:
    inner = StreamStore.take_parked
    lost: list[bool] = []

    async def broken(*args: Any, **kwargs: Any) -> Any:
        taken = await inner(*args, **kwargs)
        if not lost:
            lost.append(True)
            raise ConnectionLost("connection lost: by the test", sent=True)
        return taken

    monkeypatch.setattr(StreamStore, "take_parked", broken)
    attempts: list[int] = []

    @event_handler(Asked, group="g", backoff=Backoff(base_s=0.05, jitter=0))
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        attempts.append(delivery.attempt)
        if delivery.attempt == 1:
            raise ValueError

    async with Worker(bus, [read], lease_s=0.6) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert lost
    assert attempts == [1, 2]
    assert witness.total("delivery.recovered") == 1
