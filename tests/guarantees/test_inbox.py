"""Inboxes: parked entries that are moved aside, and entries that one group alone is to handle."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Delivery, RetryLater, StreamFull, Topic, Worker, event_handler
from bus.worker import supervisor
from tests.guarantees.events import STREAM, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

INBOX = f"{STREAM}:inbox:g"
SMALL = Topic("promise", maxlen=100, keep=10)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for streams that fill up twenty times a second instead of once."""
    monkeypatch.setattr(supervisor, "PRESSURE_S", 0.05)


async def inbox(backend: Backend) -> list[dict[str, bytes]]:
    return list((await backend.entries(INBOX)).values())


async def test_failing_events_do_not_stop_a_topic(backend: Backend) -> None:
    """Ten caps' worth goes through although the first three fail all along; none is lost."""
    mended = False
    handled: list[tuple[int, int]] = []

    @event_handler(Made, group="g", backoff=Backoff(base_s=1, jitter=0), max_attempts=50)
    async def handle(event: Made, delivery: Delivery[Made]) -> None:
        if event.n < 3 and not mended:
            raise ValueError
        handled.append((event.n, delivery.attempt))

    async with backend.bus(topics=[SMALL]) as (bus, witness), Worker(bus, [handle]) as worker:
        for n in range(1_000):
            await bus.publish(Made(n=n))
        assert witness.total("delivery.moved") >= 3
        assert witness.of("delivery.lost") == []
        mended = True
        await worker.drained()
    assert sorted(n for n, _ in handled) == list(range(1_000))
    assert await inbox(backend) == []
    assert (await backend.redis.xlen(STREAM)) <= 100


async def test_a_moved_entry_keeps_its_attempts_its_time_and_its_name(backend: Backend) -> None:
    failing = True
    seen: list[tuple[int, str, str, str]] = []

    @event_handler(Made, group="g", backoff=Backoff(base_s=2, jitter=0), max_attempts=3)
    async def handle(event: Made, delivery: Delivery[Made]) -> None:
        if event.n == 0:
            envelope = delivery.envelope
            seen.append((delivery.attempt, envelope.stream, envelope.entry_id, envelope.event_id))
            if failing:
                raise ValueError

    async with backend.bus(topics=[SMALL]) as (bus, witness), Worker(bus, [handle]) as worker:
        receipt = await bus.publish(Made(n=0))
        await eventually(lambda: witness.of("delivery.retried"))
        (pending,) = await backend.pending(STREAM, "g")
        await bus.publish_many([Made(n=n) for n in range(1, 90)])
        await eventually(lambda: witness.of("delivery.moved"))
        (fields,) = await inbox(backend)
        assert fields["origentry"].decode() == receipt.entry_id
        assert (fields["attempts"], fields["due"].decode()) == (b"1", pending.owner[7:])
        # Parked on arrival, for what is left of its time and with its old count.
        await eventually(lambda: _owner(backend, INBOX, pending.owner, 1))
        assert await backend.pending(STREAM, "g") == []
        failing = False
        await worker.drained()
    assert [s[0] for s in seen] == [1, 2]
    assert {s[1:] for s in seen} == {(STREAM, receipt.entry_id, receipt.event_id)}
    assert await inbox(backend) == []


async def _owner(backend: Backend, stream: str, owner: str, deliveries: int) -> bool:
    rows = await backend.pending(stream, "g")
    return [(r.owner, r.deliveries) for r in rows] == [(owner, deliveries)]


async def test_a_moved_entry_that_fails_for_good_is_a_dead_letter_like_any(
    backend: Backend,
) -> None:
    @event_handler(
        Made, group="g", backoff=Backoff(base_s=1, jitter=0), max_attempts=2, breaker=None
    )
    async def handle(event: Made) -> None:
        if event.n == 0:
            raise ValueError("never")

    async with backend.bus(topics=[SMALL]) as (bus, witness), Worker(bus, [handle]) as worker:
        receipt = await bus.publish(Made(n=0, text="precious"))
        await eventually(lambda: witness.of("delivery.retried"))
        await bus.publish_many([Made(n=n) for n in range(1, 90)])
        await eventually(lambda: witness.of("delivery.moved"))
        await worker.drained()
    (letter,) = await backend.dead(STREAM, "g")
    assert letter["deadentry"].decode() == receipt.entry_id
    assert letter["deadattempts"] == b"2"
    assert b"precious" in letter["data"]
    assert not letter.keys() & {"origentry", "attempts", "due"}
    assert await inbox(backend) == []


async def put(backend: Backend, n: int, **fields: Any) -> str:
    """Put an entry into the inbox as another program might."""
    data = f'{{"n":{n}}}'.encode()
    return await backend.add(INBOX, {"id": f"e{n}", "type": "promise.made", "data": data, **fields})


async def test_what_is_put_into_an_inbox_is_for_that_group_alone(backend: Backend) -> None:
    mine: list[tuple[int, int]] = []
    others: list[int] = []

    @event_handler(Made, group="g")
    async def handle(event: Made, delivery: Delivery[Made]) -> None:
        mine.append((event.n, delivery.attempt))

    @event_handler(Made, group="other")
    async def look(event: Made) -> None:
        others.append(event.n)

    async with backend.bus() as (bus, _), Worker(bus, [handle, look]) as worker:
        await put(backend, 1)
        await put(backend, 2, attempts="3", origentry="5-0")
        await put(backend, 3, attempts="no number", due="-7")
        await eventually(lambda: len(mine) == 3)
        await worker.drained()
    assert sorted(mine) == [(1, 1), (2, 4), (3, 1)]
    assert others == []
    assert await inbox(backend) == []


async def test_a_dead_workers_inbox_entry_is_reclaimed_with_its_attempts(
    backend: Backend, quick_sweeps: None
) -> None:
    attempts: list[int] = []

    @event_handler(Made, group="g", visibility_s=0.5)
    async def handle(_: Made, delivery: Delivery[Made]) -> None:
        attempts.append(delivery.attempt)

    await backend.redis.xgroup_create(INBOX, "g", "0", mkstream=True)
    await put(backend, 1, attempts="2")
    await backend.redis.xreadgroup("g", "dead", {INBOX: ">"})
    await backend.redis.sadd(f"{STREAM}:workers", "dead")
    async with backend.bus() as (bus, witness), Worker(bus, [handle], lease_s=0.5) as worker:
        await eventually(lambda: attempts)
        await worker.drained()
        assert witness.total("delivery.reclaimed", stream=INBOX) == 1
    # Two before, the one that died with its worker, and this one: a start that is counted.
    assert attempts == [4]
    assert await inbox(backend) == []


async def test_an_inbox_entry_that_a_dead_worker_had_just_been_given_waits_until_it_is_due(
    backend: Backend, quick_sweeps: None
) -> None:
    handled: list[int] = []

    @event_handler(Made, group="g", visibility_s=0.5)
    async def handle(event: Made) -> None:
        handled.append(event.n)

    await backend.redis.xgroup_create(INBOX, "g", "0", mkstream=True)
    seconds, _ = await backend.redis.time()
    due_ms = (seconds + 3) * 1000
    await put(backend, 1, attempts="2", due=str(due_ms))
    await backend.redis.xreadgroup("g", "dead", {INBOX: ">"})
    await backend.redis.sadd(f"{STREAM}:workers", "dead")
    async with backend.bus() as (bus, _), Worker(bus, [handle], lease_s=0.5) as worker:
        await eventually(lambda: _owner(backend, INBOX, f"parked:{due_ms}", 2))
        assert handled == []
        await worker.drained()
        seconds, _ = await backend.redis.time()
        assert seconds * 1000 >= due_ms
    assert handled == [1]


async def test_a_busy_stream_does_not_keep_a_full_handler_from_its_inbox(
    backend: Backend,
) -> None:
    handled: list[int] = []
    release = asyncio.Semaphore(0)

    @event_handler(Made, group="g", concurrency=1)
    async def handle(event: Made) -> None:
        handled.append(event.n)
        await release.acquire()

    async with backend.bus() as (bus, _):
        await bus.publish_many([Made(n=n) for n in range(200)])
        async with Worker(bus, [handle]) as worker:
            await eventually(lambda: handled)
            await put(backend, 1_000)
            for done in range(1, 150):  # one at a time, until it comes
                release.release()
                await eventually(lambda done=done: len(handled) > done)
                if 1_000 in handled:
                    break
            assert 1_000 in handled, "it did not come long before the stream was done"
            for _ in range(300):
                release.release()
            await worker.drained()
    assert sorted(handled) == [*range(200), 1_000]


async def test_a_group_that_lost_its_inbox_goes_on(backend: Backend) -> None:
    handled: list[int] = []

    @event_handler(Made, group="g")
    async def handle(event: Made) -> None:
        handled.append(event.n)

    async with backend.bus() as (bus, _), Worker(bus, [handle]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        await backend.redis.delete(INBOX)
        await bus.publish(Made(n=2))
        await eventually(lambda: handled == [1, 2])
        await eventually(lambda: backend.redis.exists(INBOX))
        await put(backend, 3)
        await eventually(lambda: handled == [1, 2, 3])


async def test_a_handler_that_never_gets_done_is_felt_by_publishers_in_the_end(
    backend: Backend,
) -> None:
    """What is moved aside is bounded as well: the cap bounds memory, not only one key."""

    @event_handler(Made, group="g")
    async def handle(_: Made) -> None:
        raise RetryLater(3_600)

    topic = Topic("promise", maxlen=60, keep=10, on_full="reject")
    async with backend.bus(topics=[topic]) as (bus, witness), Worker(bus, [handle]):

        async def is_full() -> bool:
            try:
                await bus.publish_many([Made(n=n) for n in range(5)])
            except StreamFull:
                return bool(witness.of("inbox.full"))
            return False

        await eventually(is_full)
        assert await backend.redis.xlen(INBOX) == 50
        assert await backend.redis.xlen(STREAM) <= 60
        await eventually(lambda: len(witness.of("publish.full")) > 0)
        (told,) = witness.of("inbox.full")
        assert (told["stream"], told["group"]) == (STREAM, "g")
