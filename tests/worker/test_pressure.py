"""A stream that fills up is relieved before publishers feel it, also while nothing is published."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from bus import Backoff, Bus, Topic, Worker, event_handler
from bus.streams.topics import Record
from bus.worker import supervisor
from bus.worker.pressure import share_used
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.guarantees.backend import Backend

MAXLEN, KEEP = 400, 40


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PRESSURE_S", 0.05)


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url, topics=[Topic("work", maxlen=MAXLEN, keep=KEEP)]) as bus:
        yield bus


@pytest.mark.parametrize(("length", "share"), [(40, 0.0), (220, 0.5), (400, 1.0), (436, 1.1)])
def test_the_share_counts_what_lies_between_keep_and_maxlen(length: int, share: float) -> None:
    assert share_used(Record(1, MAXLEN, KEEP), length) == pytest.approx(share)


async def test_what_is_done_with_goes_although_nobody_publishes(bus: Bus, backend: Backend) -> None:
    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    await bus.publish_many([Asked(n=n) for n in range(350)])
    async with Worker(bus, [read]) as worker:
        await worker.drained()
        # Whole nodes of 100 go: what is left is keep and less than a node.
        await eventually(lambda: _length_below(backend, KEEP + 100))
        assert await backend.redis.xlen(STREAM) >= KEEP


async def _length_below(backend: Backend, length: int) -> bool:
    return bool(await backend.redis.xlen(STREAM) < length)


async def test_what_runs_is_not_moved_nor_what_lies_behind_it(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    release = asyncio.Event()

    @event_handler(Asked, group="g", backoff=Backoff(base_s=60), breaker=None)
    async def read(event: Asked) -> None:
        if event.n == 0:
            await release.wait()
        elif event.n == 1:
            raise ValueError

    async with Worker(bus, [read]):
        await bus.publish_many([Asked(n=0), Asked(n=1)])
        await eventually(lambda: witness.of("delivery.retried"))
        await bus.publish_many([Asked(n=n) for n in range(2, 360)])
        # Looked at, seen to be nearly full, and left alone: the first entry runs.
        await eventually(lambda: backend.redis.exists(f"{STREAM}:chore:room"))
        await eventually(lambda: witness.total("delivery.acked") == 358)
        assert witness.of("delivery.moved") == []
        release.set()
        await eventually(lambda: witness.total("delivery.moved") == 1)
        await backend.redis.xtrim(f"{STREAM}:inbox:g", maxlen=0, approximate=False)
        await eventually(lambda: _length_below(backend, KEEP + 100))


async def test_below_the_mark_parked_entries_stay_where_they_are(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    """80 % of the room between keep and maxlen, not of maxlen."""

    @event_handler(Asked, group="g", backoff=Backoff(base_s=60), breaker=None)
    async def read(event: Asked) -> None:
        if event.n == 0:
            raise ValueError

    async with Worker(bus, [read]):
        await bus.publish_many([Asked(n=n) for n in range(KEEP + 288)])  # 80 % exactly
        await eventually(lambda: witness.of("delivery.retried"))
        await eventually(lambda: backend.redis.exists(f"{STREAM}:chore:room"))
        await backend.redis.delete(f"{STREAM}:chore:room")
        await eventually(lambda: backend.redis.exists(f"{STREAM}:chore:room"))
        assert witness.of("delivery.moved") == []
        await bus.publish(Asked(n=1_000))
        await eventually(lambda: witness.total("delivery.moved") == 1)


async def test_trouble_is_told_and_ends_nothing(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    handled: list[int] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        handled.append(event.n)

    await backend.redis.rpush(f"{STREAM}:inbox:g", "no stream")
    await backend.redis.xadd(STREAM, {"a": "b"})
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "me", {STREAM: ">"})
    await backend.redis.xclaim(
        *(STREAM, "g", "parked:99999999999999", 0),
        [row["message_id"] for row in await backend.redis.xpending_range(STREAM, "g", "-", "+", 1)],
    )
    async with Worker(bus, [read]):
        await bus.publish_many([Asked(n=n) for n in range(350)])
        await eventually(lambda: witness.of("janitor.failed", error_type="ReplyError"))
        await eventually(lambda: len(handled) == 350)
        await backend.redis.delete(f"{STREAM}:inbox:g")
        await eventually(lambda: witness.total("delivery.moved") == 1)
