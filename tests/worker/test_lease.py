"""A worker is alive as long as its lease; what it holds is renewed as long as it is held."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bus import Bus, Topic, Worker, event_handler
from bus.worker import reclaimer
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    import pytest

    from tests.guarantees.backend import Backend


async def test_the_lease_is_kept_while_the_worker_runs_and_given_up_at_its_end(
    bus: Bus, backend: Backend
) -> None:
    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read], name="w", lease_s=0.3) as worker:
        lease = f"{STREAM}:lease:w"
        assert await backend.redis.get(lease) == b"g"
        assert 0 < await backend.redis.pttl(lease) <= 300
        assert await backend.redis.smembers(f"{STREAM}:workers") == {b"w"}
        await backend.redis.delete(lease)
        await eventually(lambda: backend.redis.exists(lease), "beaten again")
        await worker.drained()
    assert await backend.redis.exists(lease) == 0
    assert await backend.redis.exists(f"{STREAM}:workers") == 0


async def test_every_stream_has_a_lease_in_its_own_slot(bus: Bus, backend: Backend) -> None:
    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    bus.topics.declare(Topic("work", partitions=3))
    async with Worker(bus, [read], name="w"):
        keys = {k.decode() async for k in backend.redis.scan_iter(match="*:lease:w")}
        assert keys == {f"bus:{{work:{p}}}:lease:w" for p in range(3)}


async def test_the_lease_names_every_group_served(bus: Bus, backend: Backend) -> None:
    @event_handler(Asked, group="one")
    async def one(event: Asked) -> None: ...

    @event_handler(Asked, group="two")
    async def two(event: Asked) -> None: ...

    async with Worker(bus, [one, two], name="w"):
        assert await backend.redis.get(f"{STREAM}:lease:w") == b"one,two"


async def test_what_runs_long_is_renewed_and_nobody_takes_it(
    bus: Bus,
    backend: Backend,
    witness: Witness,
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five visibility times long, with a second worker looking for idle entries all the while.

    The owner has no free slot, so it does not sweep: nothing but renewal keeps the entry its own.
    """
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    runs: list[str] = []
    over = asyncio.get_running_loop().time() + 2.0

    @event_handler(Asked, group="g", visibility_s=0.4)
    async def read(event: Asked) -> None:
        runs.append("run")
        await eventually(lambda: asyncio.get_running_loop().time() > over)

    async with Bus.connect(valkey_url) as other_bus:
        await bus.publish(Asked(n=1))
        async with Worker(bus, [read], lease_s=0.4, concurrency=1) as worker:
            await eventually(lambda: runs)
            async with Worker(other_bus, [read], lease_s=0.4):
                await worker.drained()
    assert runs == ["run"]
    assert witness.total("delivery.acked") == 1


async def test_a_running_delivery_that_was_taken_over_ends_refused(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    release = asyncio.Event()
    running = asyncio.Event()

    @event_handler(Asked, group="g", visibility_s=0.3)
    async def read(event: Asked) -> None:
        running.set()
        await release.wait()

    async with Worker(bus, [read], lease_s=0.3) as worker:
        receipt = await bus.publish(Asked(n=1))
        await running.wait()
        await backend.redis.xclaim(STREAM, "g", "thief", 0, [receipt.entry_id])
        release.set()
        await eventually(lambda: witness.of("delivery.refused", verb="ack", count=1))
        assert [p.owner for p in await backend.pending(STREAM, "g")] == ["thief"]
        await backend.redis.xack(STREAM, "g", receipt.entry_id)
        await worker.drained()
