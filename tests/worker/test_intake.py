"""The read loop: bounded reads, what it does after an error, and when it gives up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Delivery, Topic, Worker, event_handler
from bus.config import READ_COUNT
from bus.streams.connection import ConnectionLost
from bus.streams.reader import Reader
from bus.streams.replies import ReplyError
from bus.worker.intake import pause
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    inner = Reader.read

    async def read(
        self: Any, group: Any, consumer: Any, streams: Any, count: int, *rest: Any
    ) -> Any:
        counts.append(count)
        return await inner(self, group, consumer, streams, count, *rest)

    monkeypatch.setattr(Reader, "read", read)
    return counts


async def test_a_read_asks_for_what_can_be_run(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = spy_on_reads(monkeypatch)

    @event_handler(Asked, group="g", concurrency=7)
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read]) as worker:
        assert await eventually(lambda: counts) == [7]
        await bus.publish(Asked(n=1))
        await worker.drained()


async def test_a_read_never_asks_for_more_than_the_bound(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = spy_on_reads(monkeypatch)

    @event_handler(Asked, group="g", concurrency=2_000)
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read]) as worker:
        await bus.publish_many([Asked(n=n) for n in range(3_000)])
        await worker.drained()
    assert max(counts) <= READ_COUNT


async def test_slots_that_need_longer_to_wake_than_a_turn_lasts_do_their_work(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of them, or a slow machine: the time of a turn is not that of waking them."""
    monkeypatch.setattr("bus.worker.turn.SLOT_TURN_S", 1e-6)
    monkeypatch.setattr("bus.worker.turn.SLOT_WAKE_S", 0.0)

    @event_handler(Asked, group="g", concurrency=50)
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read]) as worker:
        await bus.publish_many([Asked(n=n) for n in range(200)])
        await worker.drained()


@pytest.mark.parametrize("settings", [{}, {"batch": 2, "batch_wait_ms": 0}], ids=["one", "batch"])
async def test_the_loop_goes_round_while_quick_handlers_run(
    bus: Bus, settings: dict[str, Any]
) -> None:
    """Acks and reads leave in between, so that the server works while the handler does."""
    turns, seen = 0, []

    async def look_around() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    @event_handler(Asked, group="g", **settings)
    async def compute(_: Any) -> None:
        seen.append(turns)
        until = time.perf_counter() + 50e-6
        while time.perf_counter() < until:
            pass

    await bus.publish_many([Asked(n=n) for n in range(2_000)])
    async with Worker(bus, [compute]) as worker:
        looking = asyncio.create_task(look_around())
        await worker.drained()
        looking.cancel()
    # A turn of theirs takes ten calls; beside other work, and where the process is not let run,
    # some are as long as what they had to wait for.
    assert len(set(seen)) > 50, "in so many turns of the loop they ran"


async def test_one_that_never_suspends_has_its_share_beside_busy_ones_that_do(bus: Bus) -> None:
    """Sixteen calls of the other run in each round of the loop; its own turn is as long then."""
    calls: Counter[str] = Counter()

    def compute(name: str) -> None:
        calls[name] += 1
        until = time.perf_counter() + 200e-6
        while time.perf_counter() < until:
            pass

    @event_handler(Asked, group="suspends", concurrency=16)
    async def suspends(_: Asked) -> None:
        await asyncio.sleep(0)
        compute("suspends")

    @event_handler(Asked, group="plain", concurrency=1)
    async def plain(_: Asked) -> None:
        compute("plain")

    for _ in range(20):
        await bus.publish_many([Asked(n=n) for n in range(500)])
    async with Worker(bus, [suspends, plain], grace_s=0.1):
        await eventually(lambda: calls.total() >= 3_000)
        assert calls["plain"] > calls["suspends"] / 6


async def test_the_wanted_number_is_shared_by_the_streams(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = spy_on_reads(monkeypatch)
    bus.topics.declare(Topic("work", partitions=4))

    @event_handler(Asked, group="g", concurrency=16)
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read]):
        assert await eventually(lambda: counts) == [4]


async def test_large_entries_are_read_in_smaller_numbers(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 1 MiB a read, by the running mean of what came so far."""
    counts = spy_on_reads(monkeypatch)

    @event_handler(Asked, group="g", concurrency=400)
    async def read(event: Asked) -> None: ...

    fields = {"id": "x", "type": "other.thing", "data": b"x" * 200_000}
    async with Worker(bus, [read]) as worker:
        for _ in range(30):
            await backend.add(STREAM, fields)
        await worker.drained()
        await eventually(lambda: counts[-1] < 40)
    assert counts[0] == 400


async def test_after_a_lost_read_comes_recovery_and_then_the_next_read(
    bus: Bus, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Reader.read
    lost: list[int] = []

    async def broken(*args: Any, **kwargs: Any) -> Any:
        result = await inner(*args, **kwargs)
        if result and len(lost) < 2:
            lost.append(sum(len(entries) for _, entries in result))
            raise ConnectionLost("connection lost: by the test", sent=True)
        return result

    monkeypatch.setattr(Reader, "read", broken)
    handled: list[tuple[int, int]] = []

    @event_handler(Asked, group="g", concurrency=4)
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        handled.append((event.n, delivery.attempt))

    await bus.publish_many([Asked(n=n) for n in range(20)])
    async with Worker(bus, [read], concurrency=4) as worker:
        await worker.drained()
    assert sorted(handled) == [(n, 1) for n in range(20)]
    assert handled[:4] == [(n, 1) for n in range(4)], "what came first runs first"
    assert len(lost) == 2
    assert witness.total("delivery.recovered") == sum(lost)


async def test_recovery_takes_up_more_than_one_page(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything pending for this name and not held, in pages of 500."""
    handled: list[tuple[int, int]] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        handled.append((event.n, delivery.attempt))

    await bus.publish_many([Asked(n=n) for n in range(1_203)])
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "me", {STREAM: ">"}, count=2_000)
    worker = Worker(bus, [read], name="me")
    (consumer,) = worker._consumers
    consumer.intake.unseen = True
    async with worker:
        await worker.drained()
    assert sorted(handled) == [(n, 1) for n in range(1_203)]


async def test_an_error_that_time_does_not_heal_is_raised_by_the_worker(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, witness: Witness
) -> None:
    async def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise ReplyError("NOPERM", "this user has no permissions")

    monkeypatch.setattr(Reader, "read", forbidden)

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read]) as worker:
        with pytest.raises(ReplyError):
            await worker.wait()
        assert len(witness.of("read.failed")) == 1, "not tried again and again"
        (told,) = witness.of("worker.failed")
        assert told["part"] == "g intake"
        await bus.publish(Asked(n=1))
        with pytest.raises(ReplyError):
            await worker.drained()


async def test_a_stop_while_the_server_is_away_does_not_wait_for_it(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, witness: Witness
) -> None:
    async def lost(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        raise ConnectionLost("connection lost: by the test", sent=False)

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read]):
        monkeypatch.setattr(Reader, "read", lost)
        await eventually(lambda: len(witness.of("read.failed")) > 5)
        stopping = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - stopping < 2


async def test_pause_ends_early_when_told() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_soon(stop.set)
    await pause(stop, 3_600)
    await pause(asyncio.Event(), 0.01)


async def test_inboxes_that_were_empty_are_listed_seldom_by_reads_that_do_not_block(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one per partition: listed by every quick read they would cost more than all else."""
    listed: list[tuple[float, int, bool]] = []
    inner = Reader.read

    async def read_all(
        self: Any, group: Any, consumer: Any, streams: Any, count: Any, block_ms: int
    ) -> Any:
        now = asyncio.get_running_loop().time()
        listed.append((now, block_ms, any(":inbox:" in s for s in streams)))
        return await inner(self, group, consumer, streams, count, block_ms)

    monkeypatch.setattr(Reader, "read", read_all)
    bus.topics.declare(Topic("work", partitions=64))

    @event_handler(Asked, group="g", concurrency=2)
    async def read(event: Asked) -> None:
        await asyncio.sleep(0.002)

    await bus.publish_many([Asked(n=n) for n in range(400)])
    async with Worker(bus, [read]) as worker:
        await worker.drained()
    assert all(inboxes for _, block_ms, inboxes in listed if block_ms)
    quick = [(at, inboxes) for at, block_ms, inboxes in listed if not block_ms]
    with_inboxes = [at for at, inboxes in quick if inboxes]
    assert len(with_inboxes) < len(quick) / 2
    assert all(b - a >= 0.04 for a, b in pairwise(with_inboxes))
