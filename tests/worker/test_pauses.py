"""While a group is paused nothing of it starts, by whatever way it comes; what runs goes on."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Bus, Delivery, Event, InUse, RetryLater, Topic, Worker, event_handler
from bus.streams import keys
from bus.streams.connection import ConnectionLost
from bus.worker import reclaimer, supervisor
from tests.faults.proxy import Proxy
from tests.guarantees.backend import Backend
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer

G = "g"
INBOX = keys.inbox(STREAM, G)
PLACE = f"work:{G}"
SOON = Backoff(base_s=0.2, factor=1, jitter=0)


class Told(Event, type="told.something"):
    n: int


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for pauses, and sweep, far more often than once a second."""
    monkeypatch.setattr(supervisor, "PAUSES_S", 0.03)
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.05)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 100)


@pytest.fixture
async def backend(url: str) -> AsyncIterator[Backend]:
    backend = Backend(url)
    yield backend
    await backend.close()


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[Topic("work"), Topic("told")]) as bus:
        for topic in ("work", "told"):
            await bus.topics.record(topic)
        yield bus


@pytest.fixture
def witness(bus: Bus) -> Witness:
    return Witness(bus)


def looks_of(bus: Bus) -> Callable[[], Awaitable[None]]:
    """Wait for some more looks and sweeps: whatever could start has had its chance."""
    looks, look = 0, bus.store.pauses.look

    async def looked() -> Any:
        nonlocal looks
        found = await look()
        looks += 1
        return found

    bus.store.pauses.look = looked  # type: ignore[method-assign]

    async def pass_by() -> None:
        enough = looks + 8
        await eventually(lambda: looks >= enough)

    return pass_by


@pytest.fixture
def a_while(bus: Bus) -> Callable[[], Awaitable[None]]:
    return looks_of(bus)


class Handled:
    """A handler that notes what starts, holds some of it and fails some."""

    def __init__(self, **settings: Any) -> None:
        self.started: list[tuple[int, int]] = []
        self.hold: set[int] = set()
        self.fail: set[int] = set()
        self.go = asyncio.Event()

        @event_handler(Asked, group=G, **{"backoff": SOON, "breaker": None, **settings})
        async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
            self.started.append((event.n, delivery.attempt))
            if event.n in self.hold:
                await self.go.wait()
            if event.n in self.fail:
                raise ValueError

        self.handler = handle

    @property
    def ns(self) -> list[int]:
        return [n for n, _ in self.started]


async def paused(bus: Bus, witness: Witness, **how: Any) -> None:
    """Pause the group, and wait until the worker has noticed."""
    witness.forget()
    await bus.admin.pause_group(G, **how)
    await eventually(lambda: witness.of("group.paused"))


async def resumed(bus: Bus, witness: Witness) -> None:
    await bus.admin.resume_group(G)
    await eventually(lambda: witness.of("group.resumed"))


async def by_hand(backend: Backend, ids: Sequence[str], owner: str, count: int) -> None:
    """Leave entries pending as a worker that is gone would have."""
    await backend.redis.xgroup_create(STREAM, G, "0", mkstream=True)
    await backend.redis.xreadgroup(G, "gone", {STREAM: ">"}, count=len(ids))
    await backend.redis.xclaim(STREAM, G, owner, 0, ids, retrycount=count, justid=True)
    await backend.redis.sadd(keys.workers(STREAM), "gone")


# --- what does not start


async def test_what_is_published_waits_and_is_handled_afterwards(
    bus: Bus, backend: Backend, witness: Witness, a_while
) -> None:
    handled = Handled()
    async with Worker(bus, [handled.handler], name="w") as worker:
        await bus.publish(Asked(n=0))
        await worker.drained()
        await paused(bus, witness, why="the printer is on fire")
        assert witness.of("group.paused") == [
            {"worker": "w", "topic": "work", "group": G, "why": "the printer is on fire"}
        ]
        await bus.publish_many([Asked(n=n) for n in range(1, 50)])
        await a_while()
        assert handled.ns == [0]
        assert await backend.pending(STREAM, G) == [], "they are not even read"
        await resumed(bus, witness)
        await worker.drained()
        assert witness.of("group.resumed") == [{"worker": "w", "topic": "work", "group": G}]
        assert len(witness.of("group.paused")) == 1, "it is told once"
    assert handled.started == [(n, 1) for n in range(50)]


async def test_retries_that_are_due_wait(bus: Bus, backend: Backend, witness, a_while) -> None:
    """Those of other workers, in lanes of the past, and its own, to the millisecond."""
    handled = Handled()
    handled.fail = {2}
    receipts = [await bus.publish(Asked(n=n)) for n in range(2)]
    await by_hand(backend, [r.entry_id for r in receipts], "parked:1000", 2)
    await backend.redis.hset("bus:paused", PLACE, "")
    async with Worker(bus, [handled.handler]) as worker:
        await a_while()
        assert handled.started == []
        await resumed(bus, witness)
        await worker.drained()
        assert sorted(handled.started) == [(0, 3), (1, 3)]
        await bus.publish(Asked(n=2))
        await eventually(lambda: witness.of("delivery.retried"))
        await paused(bus, witness)
        handled.fail = set()
        await a_while()
        await a_while()
        assert handled.started[2:] == [(2, 1)]
        (row,) = await backend.pending(STREAM, G)
        assert row.owner.startswith("parked:1"), "it is where it was, and not handed back"
        await resumed(bus, witness)
        await worker.drained()
    assert handled.started[2:] == [(2, 1), (2, 2)]


async def test_what_a_dead_worker_left_waits_where_it_is(bus, backend, witness, a_while) -> None:
    handled = Handled()
    receipts = [await bus.publish(Asked(n=n)) for n in range(3)]
    await by_hand(backend, [r.entry_id for r in receipts], "gone", 1)
    await backend.redis.hset("bus:paused", PLACE, "")
    async with Worker(bus, [handled.handler], lease_s=0.3) as worker:
        await a_while()
        await a_while()
        assert handled.started == []
        assert {p.owner for p in await backend.pending(STREAM, G)} == {"gone"}
        await resumed(bus, witness)
        await worker.drained()
    assert sorted(handled.started) == [(n, 2) for n in range(3)]


async def test_the_inbox_waits_too(bus: Bus, backend: Backend, witness, a_while) -> None:
    handled = Handled()
    async with Worker(bus, [handled.handler]) as worker:
        await paused(bus, witness)
        fields = {"id": "e", "type": "work.asked", "data": '{"n":7}'}
        await backend.add(INBOX, fields)
        await a_while()
        assert handled.started == []
        assert await backend.pending(INBOX, G) == []
        await resumed(bus, witness)
        await worker.drained()
    assert handled.started == [(7, 1)]


async def test_a_batch_that_waits_to_be_fuller_is_handed_back(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    calls: list[list[tuple[int, int]]] = []
    go = asyncio.Event()

    @event_handler(Asked, group=G, batch=10, batch_wait_ms=10_000, concurrency=4, breaker=None)
    async def handle(deliveries: list[Delivery[Asked]]) -> None:
        calls.append([(d.event.n, d.attempt) for d in deliveries])
        await go.wait()

    async with Worker(bus, [handle]) as worker:
        await bus.publish_many([Asked(n=n) for n in range(15)])
        await eventually(lambda: calls)
        await paused(bus, witness)
        await eventually(lambda: witness.total("delivery.handed_back") == 5)
        await bus.publish_many([Asked(n=n) for n in range(15, 30)])
        go.set()  # what runs ends, and is acked
        await eventually(lambda: witness.total("delivery.acked") == 10)
        await a_while()
        assert calls == [[(n, 1) for n in range(10)]]
        lanes = [(p.owner, p.deliveries) for p in await backend.pending(STREAM, G)]
        assert lanes == [("parked:0", 0)] * 5
        await resumed(bus, witness)
        await worker.drained()
    assert sorted(x for call in calls[1:] for x in call) == [(n, 1) for n in range(10, 30)]


async def test_what_was_fetched_and_has_not_started_comes_again_as_a_first_attempt(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    handled = Handled(concurrency=1, max_attempts=1)
    handled.hold = {0}
    await bus.publish_many([Asked(n=n) for n in range(40)])
    async with Worker(bus, [handled.handler]) as worker:
        await eventually(lambda: handled.ns == [0])
        for _ in range(3):  # however often
            await paused(bus, witness)
            await resumed(bus, witness)
        await paused(bus, witness)
        handled.go.set()
        await eventually(lambda: witness.total("delivery.acked") == 1)
        await a_while()
        assert handled.ns == [0]
        for row in await backend.pending(STREAM, G):
            assert (row.owner, row.deliveries) == ("parked:0", 0)
        await resumed(bus, witness)
        await worker.drained()
    assert sorted(handled.started) == [(n, 1) for n in range(40)]


async def test_what_was_reclaimed_and_has_not_started_keeps_its_count(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    """It is left pending, for whoever finds it idle when the group goes on."""
    handled = Handled(concurrency=8, max_attempts=9, visibility_s=0.5)
    receipts = [await bus.publish(Asked(n=n)) for n in range(5)]
    await by_hand(backend, [r.entry_id for r in receipts], "gone", 3)
    handled.hold = set(range(5))
    async with Worker(bus, [handled.handler], lease_s=0.3, name="w") as worker:
        await eventually(lambda: witness.total("delivery.reclaimed") > 1 and handled.started)
        await paused(bus, witness)
        handled.go.set()
        await eventually(lambda: witness.total("delivery.acked") == 1)
        await a_while()
        await a_while()
        rows = await backend.pending(STREAM, G)
        assert [p.deliveries for p in rows] == [3] * 4
        assert "w" in {p.owner for p in rows}
        assert len(handled.started) == 1, "one of them may be what killed its worker"
        await resumed(bus, witness)
        await worker.drained()
    assert sorted(handled.started) == [(n, 4) for n in range(5)]


# --- what was on its way


async def pause_and_look(bus: Bus, worker: Worker) -> None:
    await bus.redis.hset("bus:paused", PLACE, "")
    await worker._pauses.keep()


@pytest.mark.parametrize("place", [STREAM, INBOX], ids=["stream", "inbox"])
async def test_a_read_that_was_under_way_brings_nothing_to_the_handler(
    bus: Bus, backend: Backend, witness, a_while, place: str, monkeypatch
) -> None:
    """Its reply is on the wire as the worker notices the pause."""
    handled, armed = Handled(max_attempts=1, concurrency=64), False
    worker = Worker(bus, [handled.handler])
    (consumer,) = worker._consumers
    read = consumer.intake._reader.read

    async def reading(*args: Any) -> Any:
        nonlocal armed
        replies = await read(*args)
        if replies and armed:
            armed = False
            await pause_and_look(bus, worker)
        return replies

    monkeypatch.setattr(consumer.intake._reader, "read", reading)
    async with worker:
        await bus.publish(Asked(n=0))
        await worker.drained()
        armed = True
        async with backend.redis.pipeline(transaction=True) as pipe:
            for n in range(1, 20):
                data = json.dumps({"n": n})
                pipe.xadd(place, {"id": f"e{n}", "type": "work.asked", "data": data})
            await pipe.execute()
        await eventually(lambda: witness.total("delivery.handed_back") > 0)
        await a_while()
        assert handled.ns == [0]
        assert {p.deliveries for p in await backend.pending(place, G)} == {0}
        await resumed(bus, witness)
        await worker.drained()
    assert sorted(handled.started) == [(n, 1) for n in range(20)]


@pytest.mark.parametrize("verb", ["take_due", "reclaim"])
async def test_a_take_that_was_under_way_brings_nothing_either(
    bus: Bus, backend: Backend, witness, a_while, verb: str, monkeypatch
) -> None:
    handled = Handled(max_attempts=9, visibility_s=0.5)
    receipts = [await bus.publish(Asked(n=n)) for n in range(3)]
    owner = "gone" if verb == "reclaim" else "parked:1000"
    await by_hand(backend, [r.entry_id for r in receipts], owner, 4)
    take = getattr(bus.store, verb)
    async with Worker(bus, [handled.handler], lease_s=0.3) as worker:

        async def taking(*args: Any) -> Any:
            taken = await take(*args)
            if taken.entries:
                setattr(bus.store, verb, take)
                await pause_and_look(bus, worker)
            return taken

        monkeypatch.setattr(bus.store, verb, taking)
        await eventually(lambda: witness.of("group.paused"))
        await a_while()
        assert handled.started == []
        assert {p.deliveries for p in await backend.pending(STREAM, G)} == {4}
        await resumed(bus, witness)
        await worker.drained()
    assert sorted(handled.started) == [(n, 5) for n in range(3)]


async def test_what_waits_for_the_server_to_say_whether_it_may_run_does_not_start(
    bus: Bus, backend: Backend, witness, a_while, monkeypatch
) -> None:
    """With `once=` it is asked first; while nobody answers it is put back, paused or not."""
    handled = Handled(once=timedelta(hours=1), max_attempts=1)
    asked, claim = 0, bus.store.claim

    async def nobody_answers(*_: Any) -> Any:
        nonlocal asked
        asked += 1
        await eventually(hands_are_paused)
        raise ConnectionLost("as if", sent=True)

    async with Worker(bus, [handled.handler]) as worker:

        def hands_are_paused() -> bool:
            return any(h.paused for c in worker._consumers for h in c.hands.values())

        monkeypatch.setattr(bus.store, "claim", nobody_answers)
        await bus.publish(Asked(n=1))
        await eventually(lambda: asked)
        await paused(bus, witness)
        await eventually(lambda: witness.of("delivery.handed_back"))
        monkeypatch.setattr(bus.store, "claim", claim)
        await a_while()
        assert (handled.started, asked) == ([], 1)
        await resumed(bus, witness)
        await worker.drained()
    assert handled.started == [(1, 1)]


# --- what goes on


async def test_what_runs_goes_on_and_is_acked_or_parked(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    handled = Handled()
    handled.hold, handled.fail = {0, 1}, {1}
    async with Worker(bus, [handled.handler]) as worker:
        await bus.publish_many([Asked(n=0), Asked(n=1)])
        await eventually(lambda: len(handled.started) == 2)
        await paused(bus, witness)
        await a_while()
        assert len(await backend.pending(STREAM, G)) == 2
        handled.go.set()
        await eventually(lambda: witness.of("delivery.acked") and witness.of("delivery.retried"))
        handled.fail = set()
        await a_while()
        (row,) = await backend.pending(STREAM, G)
        assert (row.owner[:7], row.deliveries) == ("parked:", 1)
        await resumed(bus, witness)
        await worker.drained()
    assert sorted(handled.started) == [(0, 1), (1, 1), (1, 2)]


async def test_the_worker_stays_alive_and_serves_the_group(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    """Nobody takes over what it runs, and nobody removes the group because it seems idle."""
    handled = Handled(visibility_s=0.5)
    handled.hold = {0}
    async with Worker(bus, [handled.handler], lease_s=0.3, name="w"):
        await bus.publish(Asked(n=0))
        await eventually(lambda: handled.started)
        await paused(bus, witness)
        async with Worker(bus, [Handled(visibility_s=0.5).handler], lease_s=0.3):
            await a_while()
            await a_while()
            (row,) = await backend.pending(STREAM, G)
            assert row.owner == "w"
        group = (await bus.inspect(["work"])).topic("work").group(G)
        assert (group.served, group.running, group.orphaned) == (True, 1, 0)
        assert [(c.name, c.alive) for c in group.consumers] == [("w", True)]
        with pytest.raises(InUse):
            await bus.admin.remove_group(G)
        assert await backend.redis.get(keys.lease(STREAM, "w")) == b"g"
        handled.go.set()
        await eventually(lambda: witness.of("delivery.acked"))
    assert handled.started == [(0, 1)]


async def test_other_topics_and_other_groups_go_on(bus: Bus, witness, a_while) -> None:
    seen: list[tuple[str, int]] = []

    @event_handler(Asked, Told, group=G)
    async def handle(event: Asked | Told) -> None:
        seen.append((type(event).__name__, event.n))

    @event_handler(Asked, group="other")
    async def other(event: Asked) -> None:
        seen.append(("other", event.n))

    async with Worker(bus, [handle, other]) as worker:
        await bus.publish(Told(n=0))
        await worker.drained()
        await paused(bus, witness, topic="work")
        await bus.publish_many([Asked(n=1), Told(n=2)])
        await eventually(lambda: len(seen) == 3)
        await a_while()
        assert sorted(seen) == [("Told", 0), ("Told", 2), ("other", 1)]
        await bus.admin.pause_group(G, "told")
        await eventually(lambda: len(witness.of("group.paused")) == 2)
        await bus.publish(Told(n=3))
        assert await bus.admin.resume_group(G, "work") == ("work",)
        await eventually(lambda: ("Asked", 1) in seen)
        await a_while()
        assert ("Told", 3) not in seen
        assert await bus.admin.resume_group(G) == ("told",)
        await worker.drained()
    assert ("Told", 3) in seen


# --- how long it holds


async def test_a_pause_that_stands_before_a_worker_starts_holds(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    handled = Handled()
    await bus.publish_many([Asked(n=n) for n in range(100)])
    await backend.redis.xgroup_create(STREAM, G, "0")
    await bus.admin.pause_group(G)
    async with Worker(bus, [handled.handler]) as worker:
        await a_while()
        assert handled.started == []
        assert await backend.pending(STREAM, G) == []
    async with Worker(bus, [handled.handler]) as worker:  # as well as the next one
        await a_while()
        assert handled.started == []
        await resumed(bus, witness)
        await worker.drained()
    assert len(handled.started) == 100


async def test_it_outlives_the_server(private_server: PrivateServer, server_kind: str) -> None:
    server = private_server(server_kind, aof=True)
    handled = Handled()
    async with Bus.connect(server.url) as bus:
        await bus.topics.record("work")
        witness, pass_by = Witness(bus), looks_of(bus)
        async with Worker(bus, [handled.handler]) as worker:
            await paused(bus, witness)
            server.kill()
            server.restart()
            await bus.publish(Asked(n=1))
            await pass_by()
            assert handled.started == []
            assert witness.of("group.resumed") == []
            await resumed(bus, witness)
            await worker.drained(timeout_s=10)
    assert handled.started == [(1, 1)]


async def test_one_that_ends_by_itself_is_over_in_time(bus: Bus, witness) -> None:
    handled = Handled()
    loop = asyncio.get_running_loop()
    async with Worker(bus, [handled.handler]) as worker:
        until = loop.time() + 0.5
        await paused(bus, witness, until=timedelta(seconds=0.5))
        await bus.publish(Asked(n=1))
        await worker.drained()
        assert until - 0.01 <= loop.time() < until + 2
        assert len(witness.of("group.resumed")) == 1
        assert await bus.redis.hexists("bus:paused", PLACE), "what is over does nothing"
        await bus.publish(Asked(n=2))
        await worker.drained()
    assert handled.ns == [1, 2]


async def test_an_empty_field_by_hand_is_enough(bus: Bus, backend, witness, a_while) -> None:
    handled = Handled()
    async with Worker(bus, [handled.handler]) as worker:
        await backend.redis.execute_command("HSET", "bus:paused", PLACE, "")
        await eventually(lambda: witness.of("group.paused"))
        await bus.publish(Asked(n=1))
        await a_while()
        assert handled.started == []
        await backend.redis.delete("bus:paused")
        await worker.drained()
    assert handled.ns == [1]


async def test_pausing_again_changes_why_and_until_and_is_told_once(bus: Bus, witness) -> None:
    handled = Handled()
    async with Worker(bus, [handled.handler]) as worker:
        await paused(bus, witness, why="one")
        await bus.publish(Asked(n=1))
        await bus.admin.pause_group(G, until=timedelta(seconds=0.3), why="two")
        await worker.drained()
        assert [t["why"] for t in witness.of("group.paused")] == ["one"]
        assert len(witness.of("group.resumed")) == 1


# --- trouble


async def test_errors_leave_it_as_it_was_and_are_told(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    handled = Handled()
    async with Worker(bus, [handled.handler], name="w") as worker:
        await paused(bus, witness)
        await backend.redis.set("bus:paused", "a string")
        await eventually(lambda: len(witness.of("pauses.failed")) >= 3)
        (told, *_) = witness.of("pauses.failed")
        assert (told["worker"], told["error_type"]) == ("w", "WrongKeyType")
        assert "bus:paused" in told["error"]
        await bus.publish(Asked(n=1))
        await eventually(lambda: len(witness.of("pauses.failed")) >= 12)
        assert handled.started == []
        await backend.redis.delete("bus:paused")
        await worker.drained()
        witness.forget()
        await backend.redis.set("bus:paused", "a string")
        await eventually(lambda: len(witness.of("pauses.failed")) >= 3)
        await bus.publish(Asked(n=2))
        await worker.drained()
        assert witness.of("group.paused") == []
    assert handled.ns == [1, 2]


async def test_whatever_stands_there_when_it_starts_stops_no_worker(
    bus: Bus, backend: Backend, witness
) -> None:
    handled = Handled()
    await backend.redis.set("bus:paused", "a string")
    async with Worker(bus, [handled.handler], name="w") as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
        assert witness.of("pauses.failed")[0]["error_type"] == "WrongKeyType"
    assert handled.ns == [1]


async def test_a_lost_answer_is_told_and_the_next_look_counts(
    url: str, server: EmbeddedServer
) -> None:
    handled = Handled()
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as bus:
        await bus.topics.record("work")
        witness = Witness(bus)
        async with Worker(bus, [handled.handler]) as worker:
            await paused(bus, witness)
            proxy.lose(b"bus:paused", 2)
            await eventually(lambda: len(witness.of("pauses.failed")) == 2)
            assert {t["error_type"] for t in witness.of("pauses.failed")} == {"ConnectionLost"}
            await bus.publish(Asked(n=1))
            await resumed(bus, witness)
            await worker.drained()
    assert handled.ns == [1]


# --- seen from the program


async def test_a_worker_that_waits_to_be_drained_says_that_it_is_paused(
    bus: Bus, backend: Backend, witness
) -> None:
    handled = Handled()
    async with Worker(bus, [handled.handler]) as worker:
        await paused(bus, witness)
        await worker.drained(timeout_s=1)
        receipt = await bus.publish(Asked(n=1))
        undelivered = r"g has undelivered entries in bus:\{work:0\}, and is paused"
        with pytest.raises(TimeoutError, match=undelivered):
            await worker.drained(timeout_s=0.1)
        await backend.redis.xreadgroup(G, "other", {STREAM: ">"})
        pending = r"g has 1 pending in bus:\{work:0\}, and is paused"
        with pytest.raises(TimeoutError, match=pending):
            await worker.drained(timeout_s=0.1)
        await backend.redis.xack(STREAM, G, receipt.entry_id)


async def test_a_paused_worker_stops_at_once_and_leaves_nothing_in_hand(
    bus: Bus, backend: Backend, witness
) -> None:
    handled = Handled()
    loop = asyncio.get_running_loop()
    async with Worker(bus, [handled.handler]):
        await paused(bus, witness)
        await bus.publish_many([Asked(n=n) for n in range(20)])
        stopping = loop.time()
    assert loop.time() - stopping < 1.5
    assert handled.started == []
    assert await backend.consumers(STREAM, G) == set()
    assert await backend.pending(STREAM, G) == []


async def test_postponed_deliveries_do_not_come_back_early_or_lose_their_count(
    bus: Bus, backend: Backend, witness, a_while
) -> None:
    tried: list[int] = []

    @event_handler(Asked, group=G, breaker=None)
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        tried.append(delivery.attempt)
        if len(tried) < 3:
            raise RetryLater(0.1)

    async with Worker(bus, [handle]) as worker:
        await bus.publish(Asked(n=1))
        await eventually(lambda: len(tried) == 1)
        await paused(bus, witness)
        await a_while()
        assert tried == [1]
        await resumed(bus, witness)
        await worker.drained()
    assert tried == [1, 1, 1]
