"""Slots: how many run, what runs first, and that nothing a handler does ends one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Breaker, Bus, Delivery, Worker, event_handler
from bus.worker import reclaimer
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.guarantees.backend import Backend


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)


AGAIN = Backoff(base_s=0.01, factor=1.0, jitter=0.0)


async def test_no_more_handlers_run_than_concurrency(bus: Bus) -> None:
    running = most = 0

    @event_handler(Asked, group="g", concurrency=3)
    async def read(event: Asked) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    async with Worker(bus, [read]) as worker:
        await bus.publish_many([Asked(n=n) for n in range(100)])
        await worker.drained()
    assert most == 3


async def test_the_workers_concurrency_overrides_the_handlers(bus: Bus) -> None:
    running = most = 0

    @event_handler(Asked, group="g", concurrency=3)
    async def read(event: Asked) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    async with Worker(bus, [read], concurrency=7) as worker:
        await bus.publish_many([Asked(n=n) for n in range(100)])
        await worker.drained()
    assert most == 7


async def cancel_own_task() -> None:
    asyncio.current_task().cancel()  # type: ignore[union-attr]
    await asyncio.sleep(0)


async def cancel_own_task_and_return() -> None:
    asyncio.current_task().cancel()  # type: ignore[union-attr]


async def cancelled_by_a_timer() -> None:
    """A home-made timeout: the loop's callback cancels the task that it was given."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.001, task.cancel)
    await asyncio.sleep(1)


async def cancelled_by_a_child() -> None:
    parent = asyncio.current_task()

    async def rebel() -> None:
        assert parent is not None
        parent.cancel()

    child = asyncio.create_task(rebel())
    try:
        await asyncio.sleep(1)
    finally:
        await child


async def cancel_twice() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    task.cancel()
    await asyncio.sleep(0)


async def swallow_and_go_on() -> None:
    asyncio.current_task().cancel()  # type: ignore[union-attr]
    try:
        await asyncio.sleep(1)
    except asyncio.CancelledError:  # the fault under test
        await asyncio.sleep(0)


async def generator_exit() -> None:
    await asyncio.sleep(0)
    raise GeneratorExit


async def system_exit() -> None:
    await asyncio.sleep(0)
    raise SystemExit(7)


async def expired_timeout() -> None:
    async with asyncio.timeout(0.001):
        await asyncio.sleep(1)


async def failing_task_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(generator_exit_free_failure())
        await asyncio.sleep(1)


async def generator_exit_free_failure() -> None:
    raise OSError("child")


TRICKS: list[Callable[[], Awaitable[None]]] = [
    cancel_own_task,
    cancel_own_task_and_return,
    cancelled_by_a_timer,
    cancelled_by_a_child,
    cancel_twice,
    swallow_and_go_on,
    generator_exit,
    system_exit,
    expired_timeout,
    failing_task_group,
]


@pytest.mark.parametrize("trick", TRICKS, ids=lambda f: f.__name__)
async def test_nothing_a_handler_does_to_its_task_ends_a_slot(
    bus: Bus, witness: Witness, trick: Callable[[], Awaitable[None]]
) -> None:
    """Two slots, ten such handlers, then ten good ones: all are settled, and both slots run."""
    tricked: Counter[int] = Counter()
    handled: list[int] = []
    running = most = 0

    @event_handler(Asked, group="g", concurrency=2, backoff=AGAIN, max_attempts=2, breaker=None)
    async def read(event: Asked) -> None:
        nonlocal running, most
        if event.n < 10:
            tricked[event.n] += 1
            await trick()
            return
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        handled.append(event.n)

    async with Worker(bus, [read], grace_s=1.0) as worker:
        await bus.publish_many([Asked(n=n) for n in range(20)])
        await worker.drained(timeout_s=5)
    assert sorted(handled) == list(range(10, 20))
    assert most == 2
    assert set(tricked) == set(range(10))
    assert max(tricked.values()) <= 2, "each attempt counts"
    assert witness.of("worker.failed") == []


async def test_a_slot_gives_way_to_the_loop(bus: Bus) -> None:
    """Handlers that never suspend must not starve the rest of the program."""
    longest = 0.0

    @event_handler(Asked, group="g", concurrency=4)
    async def read(event: Asked) -> None:
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass

    async def beat() -> None:
        nonlocal longest
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    await bus.publish_many([Asked(n=n) for n in range(600)])
    async with Worker(bus, [read]) as worker:
        beating = asyncio.create_task(beat())
        await worker.drained()
        beating.cancel()
    assert longest < 0.3, "of 0.6 s of work in a row"


async def test_what_waits_too_long_behind_slow_handlers_is_handed_back(
    bus: Bus, witness: Witness, backend: Backend
) -> None:
    """Read ahead for quick handlers, then they turn slow: another worker may have the rest."""
    release = asyncio.Event()
    handled: list[tuple[int, int]] = []

    @event_handler(Asked, group="g", concurrency=1)
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        if event.n >= 2_000:
            await release.wait()
        handled.append((event.n, delivery.attempt))

    async with Worker(bus, [read], grace_s=1.0) as worker:
        await bus.publish_many([Asked(n=n) for n in range(2_000)])
        await bus.publish_many([Asked(n=n) for n in range(2_000, 2_050)])
        await eventually(lambda: witness.total("delivery.handed_back") > 0)
        # The buffer shrinks to the free slots: it keeps the one that runs.
        await eventually(lambda: _holds(backend, worker.name, 1))
        await eventually(lambda: _holds(backend, "parked:0", 1))
        release.set()
        await worker.drained()
    assert sorted(handled) == [(n, 1) for n in range(2_050)], "no attempt used up by waiting"


async def _holds(backend: Backend, owner: str, least: int) -> bool:
    owners = Counter(p.owner for p in await backend.pending(STREAM, "g"))
    return owners[owner] == least if not owner.startswith("parked:") else owners[owner] >= least


async def test_suspects_run_one_at_a_time(bus: Bus, backend: Backend, witness: Witness) -> None:
    """What was started when its worker died may have killed it; what was never started did not."""
    running: set[int] = set()
    together: set[frozenset[int]] = set()

    @event_handler(Asked, group="g", concurrency=8, visibility_s=0.3)
    async def read(event: Asked) -> None:
        running.add(event.n)
        together.add(frozenset(running))
        await asyncio.sleep(0.01)
        running.discard(event.n)

    receipts = await bus.publish_many([Asked(n=n) for n in range(12)])
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "dead", {STREAM: ">"}, count=12)
    started = [r.entry_id for r in receipts[:6]]
    await backend.redis.xclaim(STREAM, "g", "dead", 0, started, retrycount=2, justid=True)
    await backend.redis.sadd(f"{STREAM}:workers", "dead")
    async with Worker(bus, [read]) as worker:
        await worker.drained()
    suspects = frozenset(range(6))
    assert max(len(s & suspects) for s in together) == 1
    assert max(len(s - suspects) for s in together) > 1, "the others are not held up"
    assert frozenset().union(*together) == set(range(12))


async def test_room_that_was_kept_for_a_sweep_is_gone_once_the_circuit_is_open(bus: Bus) -> None:
    """Reclaimed entries cannot be handed back: those of a sweep to come are for healthy workers."""

    @event_handler(Asked, group="g", concurrency=16, breaker=Breaker(min_calls=1))
    async def read(event: Asked) -> None: ...

    (consumer,) = Worker(bus, [read])._consumers
    assert consumer.reserve() == 8
    assert consumer._circuit.failed(0.0, 0.0, 0)
    consumer.shut()
    assert (consumer.reserve(), consumer.wanted()) == (0, 0)
    consumer._circuit.allow_probe(10.0)
    assert consumer.reserve() == 1


async def test_a_reclaimed_entry_above_its_attempts_is_dead_lettered_unseen(
    bus: Bus, backend: Backend
) -> None:
    handled: list[int] = []

    @event_handler(Asked, group="g", max_attempts=3)
    async def read(event: Asked) -> None:
        handled.append(event.n)

    receipts = await bus.publish_many([Asked(n=1), Asked(n=2)])
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "dead", {STREAM: ">"})
    for receipt, count in zip(receipts, (4, 3), strict=True):
        await backend.redis.xclaim(
            STREAM, "g", "dead", 0, [receipt.entry_id], retrycount=count, justid=True
        )
    await backend.redis.sadd(f"{STREAM}:workers", "dead")
    async with Worker(bus, [read]) as worker:
        await worker.drained()
    (letter,) = await backend.dead(STREAM, "g")
    assert (letter["deadreason"], letter["deadattempts"]) == (b"crashed", b"4")
    assert b"died or hung 4 times" in letter["deaderror"]
    assert handled == [2], "at max_attempts it still runs once"


async def test_what_a_handler_publishes_after_its_end_belongs_to_nobody(
    bus: Bus, backend: Backend
) -> None:
    """A task that outlives its delivery has no delivery any more."""
    release = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    async def later() -> None:
        await release.wait()
        await bus.publish(Asked(n=100))

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        if event.n < 100:
            tasks.append(asyncio.create_task(later()))

    async with Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
        release.set()
        await asyncio.gather(*tasks)
        await worker.drained()
    _, late = (await backend.entries(STREAM)).values()
    assert "causationid" not in late
