"""Starting, waiting and draining a worker inside a program."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Breaker, Bus, BusError, DeclarationError, Delivery, Worker, event_handler
from bus.streams.answers import Taken
from bus.worker import reclaimer
from bus.worker.consumer import Consumer
from tests.faults.proxy import Proxy
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from bus.embedded import EmbeddedServer
    from tests.guarantees.backend import Backend


@event_handler(Asked, group="quiet")
async def quiet(event: Asked) -> None: ...


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"only": ["nobody"]}, "no handler has the group nobody; there are: quiet"),
        ({"concurrency": 0}, "concurrency must be a whole number"),
        ({"concurrency": 2.5}, "concurrency must be a whole number"),
        ({"grace_s": -1}, "grace_s must be a number"),
        ({"lease_s": 0}, "lease_s must be a number"),
        ({"lease_s": float("nan")}, "lease_s must be a number"),
        ({"name": "parked:0"}, "worker name 'parked:0' is not valid"),
        ({"name": "a b"}, "worker name 'a b' is not valid"),
    ],
)
async def test_a_wrong_setting_is_refused_with_its_name(
    bus: Bus, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(DeclarationError, match=words):
        Worker(bus, [quiet], **settings)


async def test_a_worker_without_handlers_is_refused(bus: Bus) -> None:
    with pytest.raises(DeclarationError, match="at least one handler"):
        Worker(bus, [])


async def test_what_is_no_handler_is_refused(bus: Bus) -> None:
    async def forgotten(event: Asked) -> None: ...

    with pytest.raises(DeclarationError, match="decorate it with @event_handler"):
        Worker(bus, [forgotten])  # type: ignore[list-item]


async def test_only_runs_the_groups_it_names(bus: Bus, backend: Backend) -> None:
    @event_handler(Asked, group="other")
    async def other(event: Asked) -> None: ...

    async with Worker(bus, [quiet, other], only=["quiet"]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
        groups = await backend.redis.xinfo_groups(STREAM)
        assert [g["name"] for g in groups] == [b"quiet"]


async def test_workers_get_names_that_differ(bus: Bus) -> None:
    names = {Worker(bus, [quiet]).name for _ in range(50)}
    assert len(names) == 50


async def test_wait_needs_a_started_worker(bus: Bus) -> None:
    with pytest.raises(BusError, match="has not been started"):
        await Worker(bus, [quiet]).wait()


async def test_drained_outlives_the_loss_of_its_connection(server: EmbeddedServer) -> None:
    """It looks over the connection of the verdicts, which carry on by themselves."""
    async with (
        Proxy(server.port) as proxy,
        Bus.connect(proxy.url) as bus,
        Worker(bus, [quiet]) as worker,
    ):
        await bus.publish(Asked(n=1))
        await worker.drained()
        proxy.lose(b"XINFO", 3)
        await worker.drained()
        assert proxy.lost == 3


async def test_drained_says_what_is_left(bus: Bus, backend: Backend) -> None:
    release = asyncio.Event()

    @event_handler(Asked, group="slow")
    async def slow(event: Asked) -> None:
        await release.wait()

    async with Worker(bus, [slow]) as worker:
        await bus.publish(Asked(n=1))
        with pytest.raises(TimeoutError, match=r"not drained after 0.1 s: slow (is at work|has)"):
            await worker.drained(timeout_s=0.1)
        release.set()
        await worker.drained()
        await backend.redis.xgroup_create(STREAM, "x", "0")
        await bus.publish(Asked(n=2))
        await worker.drained()


async def test_a_bug_of_ours_is_told_and_raised_not_swallowed(
    bus: Bus, witness: Witness, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, now: float) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Consumer, "look_after", broken)
    async with Worker(bus, [quiet]) as worker:
        with pytest.raises(ZeroDivisionError):
            await worker.wait()
        (told,) = witness.of("worker.failed")
        assert told["error_type"] == "ZeroDivisionError"
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


async def test_stop_lets_what_runs_finish_and_hands_back_the_rest(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    release = asyncio.Event()
    handled: list[int] = []

    @event_handler(Asked, group="g", concurrency=2)
    async def read(event: Asked) -> None:
        if event.n >= 500:
            await release.wait()
        handled.append(event.n)

    worker = Worker(bus, [read])
    await worker.start()
    await bus.publish_many([Asked(n=n) for n in range(500)])
    await bus.publish_many([Asked(n=n) for n in range(500, 520)])
    await eventually(lambda: len(handled) == 500)
    await eventually(lambda: _running(backend, 2))
    stopping = asyncio.create_task(worker.stop())
    await eventually(lambda: witness.of("worker.stopping"))
    await bus.publish(Asked(n=520))
    release.set()
    await stopping
    assert sorted(handled) == list(range(502)), "nothing new was started"
    assert all(p.owner == "parked:0" for p in await backend.pending(STREAM, "g"))
    assert all(p.deliveries == 0 for p in await backend.pending(STREAM, "g"))
    (told,) = witness.of("worker.stopped")
    assert told["cancelled"] == 0
    # Whoever comes next finds them all, as first attempts.
    attempts: list[tuple[int, int]] = []

    @event_handler(Asked, group="g")
    async def next_one(event: Asked, delivery: Delivery[Asked]) -> None:
        attempts.append((event.n, delivery.attempt))

    async with Worker(bus, [next_one]) as heir:
        await heir.drained()
    assert sorted(attempts) == [(n, 1) for n in range(502, 521)]


async def _running(backend: Backend, count: int) -> bool:
    return len(await backend.pending(STREAM, "g")) >= count


async def test_a_worker_that_stops_takes_nothing_from_the_lanes_either(
    bus: Bus, backend: Backend, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sweep would take back what it has just handed back, and count an attempt for it."""
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.05)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)
    release = asyncio.Event()
    started: list[int] = []

    @event_handler(Asked, group="g", concurrency=4)
    async def read(event: Asked) -> None:
        started.append(event.n)
        await release.wait()

    loop = asyncio.get_running_loop()
    worker = Worker(bus, [read])
    await worker.start()
    await bus.publish(Asked(n=1))
    await eventually(lambda: started)
    stopping = asyncio.create_task(worker.stop())
    await eventually(lambda: witness.of("worker.stopping"))
    over = loop.time() + 0.3  # the read has ended by then
    await eventually(lambda: loop.time() > over)
    receipt = await bus.publish(Asked(n=2))
    await backend.redis.xreadgroup("g", "other", {STREAM: ">"})
    await backend.redis.xclaim(
        STREAM, "g", "parked:0", 0, [receipt.entry_id], retrycount=0, justid=True
    )
    over = loop.time() + 0.5
    await eventually(lambda: loop.time() > over)
    release.set()
    await stopping
    assert started == [1]
    assert await backend.pending(STREAM, "g") == [(receipt.entry_id, "parked:0", 0)]


async def test_what_outlives_the_grace_is_cancelled_and_handed_back_uncounted(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    running = asyncio.Event()
    cancelled: list[bool] = []

    @event_handler(Asked, group="g", max_attempts=1, breaker=None)
    async def read(event: Asked) -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    async with Worker(bus, [read], grace_s=0.05):
        receipt = await bus.publish(Asked(n=1))
        await running.wait()
    assert cancelled == [True]
    assert await backend.pending(STREAM, "g") == [(receipt.entry_id, "parked:0", 0)]
    assert await backend.dead(STREAM, "g") == []
    assert witness.of("worker.stopped")[0]["cancelled"] == 1


async def test_a_handler_that_ignores_the_end_of_the_grace_cannot_hang_the_stop(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.worker.supervisor._FLUSH_S", 0.2)
    running = asyncio.Event()
    release = asyncio.Event()

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        running.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:  # the fault under test
                continue

    worker = Worker(bus, [read], grace_s=0.05)
    await worker.start()
    await bus.publish(Asked(n=1))
    await running.wait()
    await asyncio.wait_for(worker.stop(), 10)
    assert len(await backend.pending(STREAM, "g")) == 1, "it is left to be reclaimed"
    release.set()


@pytest.mark.parametrize("breaker", [None, Breaker()], ids=["no breaker", "breaker"])
async def test_what_fails_only_as_its_verdict_is_applied_is_handed_back_at_a_stop(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch, breaker: Breaker | None
) -> None:
    """Effects of which none took place, at the last attempt: no slot tells on_dead any more."""
    running, go_on = asyncio.Event(), asyncio.Event()
    told: list[int] = []

    async def on_dead(dead: Any, bus: Any) -> None:
        await asyncio.sleep(1)
        told.append(dead.event.n)

    @event_handler(Asked, group="g", max_attempts=1, on_dead=on_dead, breaker=breaker)
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        running.set()
        await go_on.wait()
        delivery.effects.incrby("words")

    await backend.redis.set("words", "many")
    worker = Worker(bus, [handle], grace_s=10)
    async with worker:
        await bus.publish(Asked(n=1))
        await running.wait()
        stopping = asyncio.create_task(worker.stop())
        await eventually(lambda: worker._consumers[0]._stopping)
        go_on.set()
        await stopping
    (pending,) = await backend.pending(STREAM, "g")
    assert (pending.owner, pending.deliveries) == ("parked:0", 0)
    assert told == []
    assert await backend.dead(STREAM, "g") == []


@pytest.mark.parametrize("kind", ["new", "reclaimed"])
async def test_what_comes_in_while_the_last_verdicts_are_applied_is_not_begun(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A reply that was given up, say; a reclaimed one is left to be reclaimed by others."""
    ran: list[int] = []

    @event_handler(Asked, group="g")
    async def handle(event: Asked) -> None:
        ran.append(event.n)

    apply = Consumer.verdicts_applied

    async def something_comes_in(consumer: Consumer) -> None:
        taken = Taken([(receipt.entry_id.encode(), 1, fields)], [])
        now = asyncio.get_running_loop().time()
        consumer.deliver(consumer.hands[STREAM], taken, now, reclaimed=kind == "reclaimed")
        await apply(consumer)

    worker = Worker(bus, [handle])
    async with worker:
        await worker.drained()
        await worker._consumers[0].intake.stop(worker._intakes[worker._consumers[0]])
        receipt = await bus.publish(Asked(n=1))
        ((_, rows),) = await backend.redis.xreadgroup("g", worker.name, {STREAM: ">"})
        fields = [part for pair in rows[0][1].items() for part in pair]
        monkeypatch.setattr(Consumer, "verdicts_applied", something_comes_in)
    (pending,) = await backend.pending(STREAM, "g")
    handed_back = ("parked:0", 0)
    assert (pending.owner, pending.deliveries) == (
        handed_back if kind == "new" else (worker.name, 1)
    )
    assert ran == []


async def test_stopping_twice_is_stopping_once(bus: Bus, witness: Witness) -> None:
    worker = Worker(bus, [quiet])
    await worker.start()
    await worker.stop()
    await worker.stop()
    assert len(witness.of("worker.stopped")) == 1


async def test_an_idle_worker_stops_promptly(bus: Bus) -> None:
    """CLIENT UNBLOCK ends the read that waits; its BLOCK is 2 s."""
    async with Worker(bus, [quiet]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
        stopping = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - stopping < 1.5
