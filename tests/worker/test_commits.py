"""Deliveries with effects on their way in: which share a call, and what becomes of each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Bus, Delivery, Event, Topic, Worker, event_handler
from bus.config import BATCH_BYTES, COMMITS_PER_CALL, EFFECTS_PER_CALL
from bus.delivery import DeadLetter, Origin
from bus.effects import Effects
from bus.errors import BusError
from bus.streams.answers import Committed, Fate
from bus.streams.codec import envelope_of
from bus.streams.connection import ConnectionLost
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.commits import Commits, together
from bus.worker.hand import Cooldown, Hand
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.guarantees.backend import Backend


class Heard(Event, type="hear.heard"):
    n: int


class _Anywhere:
    tag = "t"

    def admit(self, key: str) -> None: ...


class _Bus:
    def effects_of(self, delivery: Any) -> Effects:
        return Effects(_Anywhere())  # type: ignore[arg-type]


def collected(count: int, value: str = "v") -> Delivery[Any]:
    """A delivery with so many effects."""
    origin = Origin("g", STREAM, STREAM, _Bus(), envelope_of)  # type: ignore[arg-type]
    delivery: Delivery[Any] = Delivery(origin, b"1-1", [], 1, 0.0)
    for _ in range(count):
        delivery.effects.set("k", value)
    return delivery


def test_a_call_is_no_longer_than_the_server_can_bear() -> None:
    def lengths(deliveries: Sequence[Delivery[Any]]) -> list[int]:
        return [len(part) for part in together(deliveries)]

    assert lengths([]) == []
    assert lengths([collected(1)] * (2 * COMMITS_PER_CALL + 1)) == [200, 200, 1]
    assert lengths([collected(900)] * 5) == [2, 2, 1]
    assert EFFECTS_PER_CALL == 2_000
    assert lengths([collected(1, "x" * (BATCH_BYTES // 2 - 1_000))] * 5) == [2, 2, 1]
    assert lengths([collected(1_000), collected(1), collected(999), collected(1)]) == [3, 1]


class _Committer:
    """Answers as it is told."""

    def __init__(self, *fates: Committed, failed: dict[int, Committed] | None = None) -> None:
        self.fates = list(fates)
        self.failed = failed
        self.asked: list[int] = []

    async def commit(self, *_: Any) -> list[Committed]:
        return self.fates

    async def lost_failures(self, _: Any, __: Any, doubtful: Any) -> dict[Any, Committed]:
        self.asked.append(len(doubtful))
        if self.failed is None:
            raise ConnectionLost("connection lost: by the test", sent=True)
        return {doubtful[n]: fate for n, fate in self.failed.items()}


async def applied(committer: Any, *, doubtful: bool = False) -> tuple[Any, Any, Any, Any]:
    """Apply to as many deliveries as there are fates: what stays, is told, and is buried."""
    telemetry = Telemetry()
    told: list[tuple[str, int]] = []
    telemetry.attach("delivery.*", lambda name, f: told.append((name, f.get("count", 1))))
    buried: list[tuple[bytes, DeadLetter]] = []
    doomed: list[bytes] = []
    hand = Hand("g", STREAM, STREAM, None, envelope_of)  # type: ignore[arg-type]
    deliveries: list[Delivery[Any]] = [
        Delivery(hand, b"%d-1" % n, [], 1, 0.0) for n in range(len(committer.fates))
    ]
    commits = Commits(
        committer,
        "me",
        telemetry,
        lambda d, v: buried.append((d.entry_id, v)),
        lambda d, _: doomed.append(d.entry_id),
    )
    staying = await commits.apply(hand, deliveries, lambda _, __: doubtful)
    assert [d.entry_id for d, _ in hand.parks] == [i for i in sorted(staying) if i not in doomed]
    return sorted(staying), dict(told), buried, doomed


async def test_each_fate_goes_its_way() -> None:
    fates = [Committed(Fate(n), stream="s", error="why", applied=("SET k",)) for n in range(5)]
    staying, told, buried, doomed = await applied(_Committer(*fates))
    assert staying == [b"2-1", b"4-1"], "full is parked, what was never sent is settled by a slot"
    assert told == {"delivery.refused": 1, "delivery.acked": 1, "delivery.dead_lettered": 1}
    ((entry_id, verdict),) = buried
    assert (entry_id, verdict.reason) == (b"3-1", "effects-failed")
    assert verdict.error.text == "why; applied before, and not undone: SET k"
    assert doomed == [b"4-1"]


async def test_a_refused_one_in_doubt_was_done_or_had_failed() -> None:
    refused, failed = Committed(Fate.REFUSED), Committed(Fate.FAILED, error="why")
    committer = _Committer(refused, refused, Committed(Fate.DONE), failed={1: failed})
    _, told, buried, _ = await applied(committer, doubtful=True)
    assert told == {"delivery.acked": 2, "delivery.dead_lettered": 1}
    assert [i for i, _ in buried] == [b"1-1"]
    committer = _Committer(refused, failed=None)
    _, told, _, _ = await applied(committer, doubtful=True)
    assert told == {"delivery.acked": 1}, "if nobody can say, it is as good as done"


async def test_without_doubt_nobody_looks_for_lost_failures() -> None:
    committer = _Committer(Committed(Fate.REFUSED), Committed(Fate.DONE))
    _, told, _, _ = await applied(committer)
    assert (committer.asked, told) == ([], {"delivery.refused": 1, "delivery.acked": 1})


async def test_one_that_cannot_be_sent_has_failed_and_its_neighbours_are_done(
    bus: Bus, backend: Backend
) -> None:
    """Its topic is declared with another number of partitions than is recorded."""
    told: list[tuple[str, int]] = []

    async def on_dead(dead: Any, _: Any) -> None:
        told.append((dead.reason, len(await backend.dead(STREAM, "g"))))

    soon = Backoff(base_s=0.02, factor=1.0, jitter=0.0)

    @event_handler(Asked, group="g", on_dead=on_dead, breaker=None, max_attempts=2, backoff=soon)
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        delivery.effects.incrby("done")
        if event.n == 3:
            delivery.effects.publish(Heard(n=1))

    async with Bus.connect(backend.url, topics=[Topic("hear", partitions=2)]) as other:
        await other.publish(Heard(n=0))
    async with Bus.connect(backend.url) as mistaken:
        witness = Witness(mistaken)
        async with Worker(mistaken, [handle]) as worker:
            mistaken.topics._declared["hear"] = Topic("hear", partitions=5)
            await bus.publish_many([Asked(n=n) for n in range(10)])
            await worker.drained()
    assert await backend.redis.get("done") == b"9"
    (letter,) = await backend.dead(STREAM, "g")
    assert (letter["deadreason"], letter["deadattempts"]) == (b"failed", b"2")
    assert b"partitions" in letter["deaderror"]
    assert told == [("failed", 0)], "as of any other, before it is one"
    assert len(witness.of("delivery.dead_lettered")) == 1


async def test_a_worker_that_stops_brings_its_effects_in(bus: Bus, backend: Backend) -> None:
    running = asyncio.Event()
    go_on = asyncio.Event()

    @event_handler(Asked, group="g")
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        running.set()
        await go_on.wait()
        delivery.effects.incrby("done")

    async with Worker(bus, [handle], grace_s=10) as worker:
        await bus.publish(Asked(n=1))
        await running.wait()
        stopping = asyncio.create_task(worker.stop())
        go_on.set()
        await stopping
    assert await backend.redis.get("done") == b"1"
    assert await backend.pending(STREAM, "g") == []


async def test_one_that_is_cut_off_at_a_stop_has_none(bus: Bus, backend: Backend) -> None:
    running = asyncio.Event()

    @event_handler(Asked, group="g")
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        delivery.effects.incrby("done")
        running.set()
        await asyncio.Event().wait()

    async with Worker(bus, [handle], grace_s=0.1):
        await bus.publish(Asked(n=1))
        await running.wait()
    assert not await backend.redis.exists("done")
    (pending,) = await backend.pending(STREAM, "g")
    assert (pending.owner, pending.deliveries) == ("parked:0", 0)


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
async def test_effects_are_sent_until_they_are_known_to_be_in(
    bus: Bus, backend: Backend, witness: Witness, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    inner = StreamStore.commit
    calls = 0

    async def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= 3:
            if done:
                await inner(*args)
            raise ConnectionLost("connection lost: by the test", sent=True)
        return await inner(*args)

    monkeypatch.setattr(StreamStore, "commit", broken)

    @event_handler(Asked, group="g")
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        delivery.effects.incrby("done")

    async with Worker(bus, [handle]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert (calls, await backend.redis.get("done")) == (4, b"1")
    assert len(witness.of("verdict.failed")) == 3
    assert witness.total("delivery.acked") == 1
    assert witness.of("delivery.refused") == []


async def test_acks_are_not_held_up_by_effects_that_cannot_be_applied(
    bus: Bus, backend: Backend, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def for_ever(self: Cooldown, *, ok: bool) -> None:
        self.until = 0.0 if ok else float("inf")

    mended = False
    inner = StreamStore.commit

    async def refused(*args: Any) -> Any:
        if not mended:
            raise BusError("by the test")
        return await inner(*args)

    monkeypatch.setattr(StreamStore, "commit", refused)
    monkeypatch.setattr(Cooldown, "after", for_ever)

    @event_handler(Asked, group="g")
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        if event.n == 0:
            delivery.effects.incrby("done")

    async with Worker(bus, [handle]) as worker:
        await bus.publish(Asked(n=0))
        await eventually(lambda: witness.of("verdict.failed"))
        await bus.publish_many([Asked(n=n) for n in range(1, 20)])
        await eventually(lambda: witness.total("delivery.acked") == 19)
        mended = True
        await worker.stop()  # hurries what waits
    assert await backend.redis.get("done") == b"1"
