"""A key of another Redis type where a stream should be: told, left out, taken up when mended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bus import Event, Worker, event_handler
from tests.guarantees.events import STREAM, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

OTHER = "bus:{vow:0}"


class Vowed(Event, type="vow.taken"):
    n: int


async def test_a_broken_stream_leaves_the_others_alone_and_is_mended_later(
    backend: Backend, quick_chores: None
) -> None:
    handled: list[object] = []

    @event_handler(Made, Vowed, group="both")
    async def read(event: Made | Vowed) -> None:
        handled.append(event)

    await backend.redis.set(OTHER, "I am a string")
    async with backend.bus() as (bus, witness), Worker(bus, [read], lease_s=0.6) as worker:
        await bus.publish(Made(n=1))
        await eventually(lambda: handled == [Made(n=1)])
        (told,) = witness.of("stream.broken")
        assert told["stream"] == OTHER
        assert "string" in told["error"]
        assert await backend.redis.get(OTHER) == b"I am a string", "never deleted by us"
        await worker.drained()
        await backend.redis.rename(OTHER, "elsewhere")
        await eventually(lambda: witness.of("stream.mended"))
        await bus.publish(Vowed(n=2))
        await eventually(lambda: handled == [Made(n=1), Vowed(n=2)])
        await worker.drained()


async def test_a_stream_that_breaks_under_a_running_worker(
    backend: Backend, quick_chores: None
) -> None:
    handled: list[object] = []

    @event_handler(Made, Vowed, group="both")
    async def read(event: Made | Vowed) -> None:
        handled.append(event)

    async with backend.bus() as (bus, witness), Worker(bus, [read], lease_s=0.6) as worker:
        await bus.publish(Vowed(n=1))
        await worker.drained()
        await backend.redis.set(OTHER, "overwritten")
        await eventually(lambda: witness.of("stream.broken"))
        for n in range(2, 12):
            await bus.publish(Made(n=n))
        await eventually(lambda: len(handled) == 11)
        warnings = witness.counts()["read.failed"]
        assert warnings < 10, "no hot loop"
        await backend.redis.delete(OTHER)
        await eventually(lambda: witness.of("stream.mended"))
        await bus.publish(Vowed(n=12))
        await eventually(lambda: handled[-1] == Vowed(n=12))


async def test_a_worker_whose_only_stream_is_broken_waits_for_it(
    backend: Backend, quick_chores: None
) -> None:
    """Its inbox is sound, and read meanwhile."""
    handled: list[object] = []

    @event_handler(Made, group="g")
    async def read(event: Made) -> None:
        handled.append(event)

    await backend.redis.set(STREAM, "I am a string")
    entry = {"id": "e1", "type": "promise.made", "data": b'{"n":1}'}
    async with backend.bus() as (bus, witness), Worker(bus, [read]):
        await backend.add(f"{STREAM}:inbox:g", entry)
        await eventually(lambda: handled == [Made(n=1)])
        assert witness.of("worker.failed") == []
        await backend.redis.delete(STREAM)
        await eventually(lambda: witness.of("stream.mended"))
        await bus.publish(Made(n=2))
        await eventually(lambda: handled == [Made(n=1), Made(n=2)])


async def test_a_broken_dead_letter_key_keeps_the_entry(backend: Backend) -> None:
    """Nothing is told as lost that is not lost: the verdict waits until the key is mended."""
    release = asyncio.Event()

    @event_handler(Made, group="g", max_attempts=1, breaker=None)
    async def fail(event: Made) -> None:
        await release.wait()
        raise ValueError("why")

    dead_key = f"{STREAM}:dead:g"
    async with backend.bus() as (bus, witness), Worker(bus, [fail], grace_s=0.5) as worker:
        await backend.redis.set(dead_key, "I am a string")
        receipt = await bus.publish(Made(n=1))
        release.set()
        await eventually(lambda: witness.of("verdict.failed") or witness.of("delivery.lost"))
        assert witness.of("delivery.lost") == []
        assert [p.entry_id for p in await backend.pending(STREAM, "g")] == [receipt.entry_id]
        await backend.redis.delete(dead_key)
        await worker.drained(timeout_s=10)
        (letter,) = await backend.dead(STREAM, "g")
        assert letter["deadentry"].decode() == receipt.entry_id
