"""Entries trimmed or deleted by hand while a group still had them: acked, counted, told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bus import Backoff, Delivery, Worker, event_handler
from tests.guarantees.events import STREAM, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend


async def test_a_parked_entry_that_was_deleted_is_told_as_lost(
    backend: Backend, quick_sweeps: None
) -> None:
    attempts: list[tuple[int, int]] = []

    @event_handler(Made, group="g", backoff=Backoff(base_s=0.4, jitter=0))
    async def once_more(event: Made, delivery: Delivery[Made]) -> None:
        attempts.append((event.n, delivery.attempt))
        if delivery.attempt < 2:
            raise ValueError

    async with backend.bus() as (bus, witness), Worker(bus, [once_more]) as worker:
        gone, kept = await bus.publish_many([Made(n=1), Made(n=2)])
        await eventually(lambda: len(witness.of("delivery.retried")) == 2)
        await backend.redis.xdel(STREAM, gone.entry_id)
        await worker.drained()
        assert attempts == [(1, 1), (2, 1), (2, 2)]
        (told,) = witness.of("delivery.lost")
        assert (told["count"], told["entry_ids"]) == (1, [gone.entry_id])
        assert await backend.pending(STREAM, "g") == []
        assert kept.entry_id in await backend.entries(STREAM)


async def test_what_a_dead_worker_held_and_was_trimmed_is_told_as_lost(
    backend: Backend, quick_sweeps: None
) -> None:
    handled: list[int] = []

    @event_handler(Made, group="g", visibility_s=0.5)
    async def read(event: Made) -> None:
        handled.append(event.n)

    async with backend.bus() as (bus, witness):
        receipts = await bus.publish_many([Made(n=n) for n in range(5)])
        await backend.redis.xgroup_create(STREAM, "g", "0")
        await backend.redis.xreadgroup("g", "dead", {STREAM: ">"}, count=5)
        await backend.redis.xtrim(STREAM, maxlen=2, approximate=False)
        async with Worker(bus, [read], lease_s=0.5) as worker:
            await worker.drained()
        assert sorted(handled) == [3, 4]
        lost = [i for told in witness.of("delivery.lost") for i in told["entry_ids"]]
        assert sorted(lost) == [r.entry_id for r in receipts[:3]]
        assert await backend.pending(STREAM, "g") == []


async def test_an_entry_deleted_under_its_running_handler_is_told_by_the_renewal(
    backend: Backend, server_kind: str
) -> None:
    """Redis 6.2 claims what is not there with JUSTID: there it is handled and acked instead."""
    release = asyncio.Event()
    running = asyncio.Event()

    @event_handler(Made, group="g", visibility_s=0.5)
    async def hold(event: Made) -> None:
        running.set()
        await release.wait()

    async with backend.bus() as (bus, witness), Worker(bus, [hold], lease_s=0.5) as worker:
        receipt = await bus.publish(Made(n=1))
        await running.wait()
        await backend.redis.xdel(STREAM, receipt.entry_id)
        told = []
        if server_kind != "redis-6.2":
            told = [[receipt.entry_id]]
            await eventually(lambda: witness.of("delivery.lost"))
            assert await backend.pending(STREAM, "g") == []
        release.set()
        await worker.drained()
        assert await backend.pending(STREAM, "g") == []
        assert [t["entry_ids"] for t in witness.of("delivery.lost")] == told, "told once"


async def test_a_deleted_entry_whose_last_attempt_fails_is_still_a_full_dead_letter(
    backend: Backend,
) -> None:
    """The body comes from the worker's memory."""
    running = asyncio.Event()
    release = asyncio.Event()

    @event_handler(Made, group="g", max_attempts=1, breaker=None)
    async def fail(event: Made) -> None:
        running.set()
        await release.wait()
        raise ValueError("after all")

    async with backend.bus() as (bus, _), Worker(bus, [fail]) as worker:
        receipt = await bus.publish(Made(n=1, text="precious"))
        await running.wait()
        await backend.redis.xdel(STREAM, receipt.entry_id)
        release.set()
        await worker.drained()
        (letter,) = await backend.dead(STREAM, "g")
        assert b"precious" in letter["data"]
        assert letter["deadentry"].decode() == receipt.entry_id


async def test_parking_an_entry_that_is_gone_tells_it_as_lost(backend: Backend) -> None:
    running = asyncio.Event()
    release = asyncio.Event()

    @event_handler(Made, group="g")
    async def fail(event: Made) -> None:
        running.set()
        await release.wait()
        raise ValueError("later")

    async with backend.bus() as (bus, witness), Worker(bus, [fail]) as worker:
        receipt = await bus.publish(Made(n=1))
        await running.wait()
        await backend.redis.xdel(STREAM, receipt.entry_id)
        release.set()
        await worker.drained(timeout_s=5)
        (told,) = witness.of("delivery.lost")
        assert told["entry_ids"] == [receipt.entry_id]
        assert await backend.pending(STREAM, "g") == []
