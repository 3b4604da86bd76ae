"""Dead workers are forgotten, but never with what they still own, and never strangers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bus import Bus, Event, Worker, event_handler
from bus.worker import supervisor
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend


@pytest.fixture(autouse=True)
def quick_chores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "JANITOR_S", 0.1)


async def test_only_a_dead_worker_with_nothing_pending_is_forgotten(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    @event_handler(Asked, group="g", visibility_s=3_600)
    async def read(event: Asked) -> None: ...

    await bus.publish(Asked(n=1))
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "stranger-with-entry", {STREAM: ">"})
    for name in ("dead", "alive", "stranger"):
        await backend.redis.xgroup_createconsumer(STREAM, "g", name)
    await backend.redis.sadd(f"{STREAM}:workers", "dead", "alive", "never-read")
    await backend.redis.set(f"{STREAM}:lease:alive", "g", ex=100)
    async with Worker(bus, [read], name="me"):
        await eventually(lambda: _workers(backend, {b"me", b"alive"}))
        assert await backend.consumers(STREAM, "g") >= {"alive", "stranger", "stranger-with-entry"}
        assert "dead" not in await backend.consumers(STREAM, "g")
        assert [t["consumer"] for t in witness.of("consumer.forgotten")] == ["dead"]
        (pending,) = await backend.pending(STREAM, "g")
        assert pending.owner == "stranger-with-entry"


async def _workers(backend: Backend, names: set[bytes]) -> bool:
    return bool(await backend.redis.smembers(f"{STREAM}:workers") == names)


async def test_an_error_of_the_janitor_is_told_and_does_not_end_the_worker(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    handled: list[int] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        handled.append(event.n)

    async with Worker(bus, [read]) as worker:
        await backend.redis.delete(f"{STREAM}:workers")
        await backend.redis.set(f"{STREAM}:workers", "no set")
        await eventually(lambda: witness.of("janitor.failed"))
        await backend.redis.delete(f"{STREAM}:workers")
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert handled == [1]


async def test_a_topic_of_a_class_that_is_declared_later_is_read_from_then_on(
    bus: Bus, backend: Backend
) -> None:
    """A pattern's topics are those of the classes known now; a module imported late adds some."""
    handled: list[object] = []

    @event_handler("work.*", "*.late", group="g")
    async def read(event: Event) -> None:
        handled.append(event)

    async with Worker(bus, [read], lease_s=0.6):

        class Latecomer(Event, type="tardy.late"):
            n: int

        await bus.publish(Latecomer(n=1))
        await eventually(lambda: handled == [Latecomer(n=1)])
