"""on_dead of effects that failed half way: it is told when the dead letter is there already."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Delivery, Worker, event_handler
from bus.delivery import DeadLetter, Failure
from bus.streams.codec import envelope_of
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.consumer import Consumer
from bus.worker.executor import Executor
from bus.worker.hand import Hand
from bus.worker.on_dead import OnDead
from bus.worker.slots import Slots
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from bus import Handler
    from tests.guarantees.backend import Backend

GROUP = "g"


class Mourner:
    """An on_dead that takes as long as it is told to, of a handler whose effects fail half way."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.takes_s = 0.0
        self.running = self.most = 0
        self.told: Counter[int] = Counter()

    async def on_dead(self, dead: Any, bus: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
            await asyncio.sleep(self.takes_s)
            self.told[dead.event.n] += 1
        finally:
            self.running -= 1

    def handler(self, **settings: Any) -> Handler[...]:
        @event_handler(Asked, group=GROUP, on_dead=self.on_dead, breaker=None, **settings)
        async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
            delivery.effects.incrby("done")
            delivery.effects.incrby("words")

        return handle


@pytest.fixture
async def mourner(backend: Backend) -> Mourner:
    await backend.redis.set("words", "many")
    return Mourner()


async def all_are_dead(backend: Backend, count: int) -> None:
    async def there() -> bool:
        return len(await backend.dead(STREAM, GROUP)) == count

    await eventually(there)


async def test_no_more_run_at_a_time_than_there_are_slots_and_it_counts_as_work(
    bus: Bus, backend: Backend, mourner: Mourner
) -> None:
    async with Worker(bus, [mourner.handler(concurrency=3)]) as worker:
        await bus.publish_many([Asked(n=n) for n in range(30)])
        await all_are_dead(backend, 30)
        await eventually(lambda: mourner.running == 3)
        assert worker._consumers[0].busy
        with pytest.raises(TimeoutError, match="g is at work"):
            await worker.drained(0.1)
        assert (mourner.most, mourner.told) == (3, {})
        mourner.go.set()
        await worker.drained()
    assert mourner.most == 3
    assert mourner.told == Counter(range(30))


async def test_a_stop_lets_them_run_within_the_grace(
    bus: Bus, backend: Backend, mourner: Mourner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that is: what verdicts get at the end is another matter."""
    monkeypatch.setattr("bus.worker.supervisor._FLUSH_S", 0.05)
    witness = Witness(bus)
    async with Worker(bus, [mourner.handler(concurrency=2)], grace_s=10):
        await bus.publish_many([Asked(n=n) for n in range(6)])
        await all_are_dead(backend, 6)
        mourner.takes_s = 0.1
        mourner.go.set()
    assert mourner.told == Counter(range(6))
    assert (mourner.most, witness.of("on_dead.failed")) == (2, [])
    assert witness.of("worker.stopped")[0]["cancelled"] == 0


async def test_what_fails_only_as_the_worker_stops_is_told_within_the_grace(
    bus: Bus, mourner: Mourner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As late as can be: all handlers have ended, and the last verdicts are applied."""
    witness = Witness(bus)
    running, go_on, applying = asyncio.Event(), asyncio.Event(), asyncio.Event()
    commit, verdicts_applied = StreamStore.commit, Consumer.verdicts_applied

    async def late(*args: Any) -> Any:
        await applying.wait()
        return await commit(*args)

    async def noted(consumer: Consumer) -> None:
        applying.set()
        await verdicts_applied(consumer)

    monkeypatch.setattr(StreamStore, "commit", late)
    monkeypatch.setattr(Consumer, "verdicts_applied", noted)

    @event_handler(Asked, group=GROUP, on_dead=mourner.on_dead, breaker=None)
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        running.set()
        await go_on.wait()
        delivery.effects.incrby("done")
        delivery.effects.incrby("words")

    worker = Worker(bus, [handle], grace_s=10)
    async with worker:
        await bus.publish(Asked(n=1))
        await running.wait()
        stopping = asyncio.create_task(worker.stop())
        await eventually(lambda: worker._consumers[0]._stopping)
        mourner.takes_s = 0.2
        mourner.go.set()
        go_on.set()
        await stopping
    assert mourner.told == {1: 1}
    assert witness.of("on_dead.failed") == []


async def test_those_for_which_the_grace_was_too_short_are_told_of(
    bus: Bus, backend: Backend, mourner: Mourner
) -> None:
    witness = Witness(bus)
    async with Worker(bus, [mourner.handler(concurrency=2)], grace_s=0.05) as worker:
        await bus.publish_many([Asked(n=n) for n in range(5)])
        await all_are_dead(backend, 5)
        await eventually(lambda: mourner.running == 2)
    assert mourner.told == {}
    told = Counter(f["error"] for f in witness.of("on_dead.failed"))
    assert told == {
        "cut off: the worker stopped": 2,
        "not called: the worker stopped first": 3,
    }
    assert all("the worker stopped" in f["where"] for f in witness.of("on_dead.failed"))
    assert len({f["entry_id"] for f in witness.of("on_dead.failed")}) == 5
    assert not worker.stuck


async def test_what_fails_after_the_grace_is_not_begun(
    bus: Bus, backend: Backend, mourner: Mourner
) -> None:
    """The handler outlived its grace and swallowed the cancellation."""
    witness = Witness(bus)
    running = asyncio.Event()

    @event_handler(Asked, group=GROUP, on_dead=mourner.on_dead, breaker=None)
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:  # the fault under test
            delivery.effects.incrby("done")
            delivery.effects.incrby("words")

    async with Worker(bus, [handle], grace_s=0.05):
        await bus.publish(Asked(n=1))
        await running.wait()
    assert len(await backend.dead(STREAM, GROUP)) == 1
    (told,) = witness.of("on_dead.failed")
    assert told["error"] == "not called: the worker stopped first"


async def test_one_that_ignores_its_cancellation_is_left_behind(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.worker.supervisor._STUCK_S", 0.2)
    witness = Witness(bus)
    release = asyncio.Event()
    tasks: list[asyncio.Task[Any] | None] = []

    async def on_dead(dead: Any, bus: Any) -> None:
        tasks.append(asyncio.current_task())
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:  # the fault under test
                continue

    @event_handler(Asked, group=GROUP, on_dead=on_dead, breaker=None, timeout_s=0.1)
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        delivery.effects.incrby("done")
        delivery.effects.incrby("words")

    await backend.redis.set("words", "many")
    worker = Worker(bus, [handle], grace_s=0.5)
    await worker.start()
    await bus.publish(Asked(n=1))
    await eventually(lambda: witness.of("handler.stuck"))
    async with asyncio.timeout(10):
        await worker.stop()
    assert worker.stuck
    (told,) = witness.of("on_dead.failed")
    assert "left behind" in told["error"]
    release.set()
    (task,) = tasks
    assert task is not None
    await task
    assert not worker.stuck


async def test_nothing_more_is_read_while_too_many_wait(
    bus: Bus, backend: Backend, mourner: Mourner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.worker.on_dead.READ_COUNT", 5)
    monkeypatch.setattr("bus.worker.reclaimer.SWEEP_S", 60)  # which would have it look again, too
    async with Worker(bus, [mourner.handler(concurrency=2)]) as worker:
        (consumer,) = worker._consumers
        await bus.publish_many([Asked(n=n) for n in range(3_000)])

        def is_full() -> bool:
            rests = consumer.intake.waits and not consumer.holding.held
            return rests and not consumer._settler.has_work

        await eventually(is_full)
        waiting = len(await backend.dead(STREAM, GROUP))
        assert 5 < waiting < 3_000
        mourner.go.set()
        await worker.drained()
    assert mourner.told == Counter(range(3_000))


async def test_one_that_is_cut_off_before_its_first_step_is_told_of() -> None:
    mourner, telemetry = Mourner(), Telemetry()
    told: list[str] = []
    telemetry.attach("on_dead.failed", lambda _, fields: told.append(fields["error"]))
    handler = mourner.handler()
    slots = Slots(GROUP, 0, None, telemetry)
    nobody: Any = None
    on_dead = OnDead(
        handler, Executor(handler), nobody, slots, nobody, telemetry, lambda: None, most_late=2
    )
    hand = Hand(GROUP, STREAM, STREAM, nobody, envelope_of)
    for n in range(3):
        delivery: Delivery[Any] = Delivery(hand, b"%d-0" % n, [], 1, 0.0)
        on_dead.tell_late(delivery, DeadLetter("effects-failed", Failure("EffectsFailed", "why")))
    on_dead.give_up()
    assert slots.cancel_calls() == 2
    await eventually(lambda: not on_dead.runs_late)
    assert told == ["not called: the worker stopped first"] * 3
