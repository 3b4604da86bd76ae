"""Verdicts reach the server in batches, again and again until it has taken them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Bus, EffectsClosed, Reject, Worker, event_handler
from bus.delivery import COMMIT, HAND_BACK, DeadLetter, Delivery, Failure, Origin, Park
from bus.streams.answers import Buried
from bus.streams.codec import envelope_of
from bus.streams.connection import ConnectionLost
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker import settler as settler_module
from bus.worker.hand import Hand
from bus.worker.settler import Settler, _delay_and_count, portions
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus import Effects
    from tests.guarantees.backend import Backend


def break_first_calls(
    monkeypatch: pytest.MonkeyPatch, verb: str, times: int, *, done: bool
) -> Callable[[], int]:
    """Lose the first answers of a verb, with the server having done it or not."""
    inner = getattr(StreamStore, verb)
    calls = 0

    async def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= times:
            if done:
                await inner(*args, **kwargs)
            raise ConnectionLost("connection lost: by the test", sent=True)
        return await inner(*args, **kwargs)

    monkeypatch.setattr(StreamStore, verb, broken)
    return lambda: calls


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
@pytest.mark.parametrize("verb", ["ack", "park", "dead_letter"])
async def test_a_verdict_is_tried_until_it_is_known_to_be_taken(
    bus: Bus,
    backend: Backend,
    witness: Witness,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    done: bool,
) -> None:
    calls = break_first_calls(monkeypatch, verb, 3, done=done)
    runs: list[int] = []

    @event_handler(Asked, group="g", backoff=Backoff(base_s=0.02, jitter=0), max_attempts=2)
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        runs.append(delivery.attempt)
        if verb == "dead_letter":
            raise Reject("no")
        if verb == "park" and delivery.attempt == 1:
            raise ValueError

    async with Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert calls() > 3
    assert len(witness.of("verdict.failed")) == 3
    assert runs == ([1, 2] if verb == "park" else [1])
    assert len(await backend.dead(STREAM, "g")) == (verb == "dead_letter"), "never two"


async def test_acks_of_one_turn_travel_together(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, witness: Witness
) -> None:
    batches: list[int] = []
    inner = StreamStore.ack

    async def counted(self: Any, stream: Any, group: Any, consumer: Any, ids: Any) -> Any:
        batches.append(len(ids))
        return await inner(self, stream, group, consumer, ids)

    monkeypatch.setattr(StreamStore, "ack", counted)

    @event_handler(Asked, group="g", concurrency=50)
    async def read(event: Asked) -> None: ...

    async with Worker(bus, [read]) as worker:
        await bus.publish_many([Asked(n=n) for n in range(1_000)])
        await worker.drained()
    assert sum(batches) == 1_000
    assert max(batches) <= 500, "one script keeps the server busy for a bounded time"
    assert len(batches) < 200


async def test_verdicts_of_many_kinds_at_once_each_find_their_place(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    @event_handler(
        Asked, group="g", concurrency=30, backoff=Backoff(60), max_attempts=2, breaker=None
    )
    async def read(event: Asked) -> None:
        if event.n % 3 == 1:
            raise ValueError
        if event.n % 3 == 2:
            raise Reject("no")

    async with Worker(bus, [read]):
        await bus.publish_many([Asked(n=n) for n in range(600)])
        await eventually(lambda: witness.total("delivery.acked") == 200)
        await eventually(lambda: len(witness.of("delivery.retried")) == 200)
        await eventually(lambda: len(witness.of("delivery.dead_lettered")) == 200)
        pending = await backend.pending(STREAM, "g")
        assert len(pending) == 200
        assert all(p.owner.startswith("parked:") and p.deliveries == 1 for p in pending)
        assert len({p.owner for p in pending}) < 40, "few lanes"
        assert len(await backend.dead(STREAM, "g")) == 200


async def test_while_the_server_takes_nothing_the_handlers_go_on(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts collect; they do not hold a slot."""
    gate = asyncio.Event()
    inner = StreamStore.ack

    async def held(*args: Any, **kwargs: Any) -> Any:
        await gate.wait()
        return await inner(*args, **kwargs)

    monkeypatch.setattr(StreamStore, "ack", held)
    handled: list[int] = []

    @event_handler(Asked, group="g", concurrency=2)
    async def read(event: Asked) -> None:
        handled.append(event.n)

    async with Worker(bus, [read]) as worker:
        await bus.publish_many([Asked(n=n) for n in range(50)])
        await eventually(lambda: len(handled) == 50)
        gate.set()
        await worker.drained()


ORIGIN = Origin("g", STREAM, STREAM, None, envelope_of)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "attempt", "stored"),
    [
        (Park(2.5, Failure("E", "")), 3, (2500, 3)),  # taking it makes that 4
        (Park(2.5, Failure("E", ""), counts=False), 3, (2500, 2)),  # an outage
        (Park(2.5), 3, (2500, 2)),  # taking it makes that 3 again
        (Park(0.0), 1, (1, 0)),
        (Park(0.0001, Failure("E", "")), 1, (1, 1)),
        (HAND_BACK, 3, (0, 2)),
        (HAND_BACK, 1, (0, 0)),
        (HAND_BACK, 0, (0, 0)),
    ],
)
def test_counts_are_stored_so_that_taking_makes_the_next_attempt(
    verdict: Any, attempt: int, stored: tuple[int, int]
) -> None:
    assert _delay_and_count(Delivery(ORIGIN, b"1-0", [], attempt, 0.0), verdict) == stored


# --- without a server


class Unscanned(dict[str, Hand]):
    """All hands: two per partition and handler, which may be thousands."""

    def values(self) -> Any:
        raise AssertionError("all hands were gone through for one verdict")


class Graves:
    """A store that takes acks, and dead letters as told."""

    def __init__(self, hand: Hand, answers: list[Buried]) -> None:
        self._hand = hand
        self._answers = answers
        self.acked: list[bytes] = []
        self.held: list[set[bytes]] = []  # at each call
        self.calls: list[int] = []

    async def ack(self, stream: str, group: str, consumer: str, ids: list[bytes]) -> list[bytes]:
        self.acked += ids
        return []

    async def park(self, stream: str, group: str, consumer: str, entries: list[Any]) -> Any:
        return [b"parked:1" for _ in entries]

    async def dead_letter(
        self, stream: str, group: str, consumer: str, most: int, entries: list[Any]
    ) -> list[Buried]:
        self.held.append(set(self._hand.held))
        self.calls.append(len(entries))
        return [self._answers.pop(0) for _ in entries]


def settler_of(hands: dict[str, Hand], store: Graves) -> Settler:
    def ignore(*_: Any) -> None: ...

    return Settler(store, "me", hands, Telemetry(), ignore, ignore, None)  # type: ignore[arg-type]


def own_hand() -> Hand:
    return Hand("g", STREAM, STREAM, None, envelope_of)  # type: ignore[arg-type]


async def test_only_hands_with_verdicts_are_looked_at() -> None:
    hand = own_hand()
    store = Graves(hand, [])
    settler = settler_of(Unscanned({STREAM: hand}), store)
    running = asyncio.create_task(settler.run())
    await asyncio.sleep(0)
    for n in range(3):
        settler.ack(Delivery(hand, b"%d-0" % n, [], 1, 0.0))
        assert settler.has_work
        assert not settler.is_behind
        await eventually(lambda: not settler.has_work)
    assert store.acked == [b"0-0", b"1-0", b"2-0"]
    running.cancel()
    await asyncio.wait([running])


WHY = DeadLetter("failed", Failure("E", ""))


def dead_letters(hand: Hand, count: int, size: int = 0) -> list[tuple[Delivery[Any], DeadLetter]]:
    return [
        (Delivery(hand, b"%d-0" % n, [b"data", b"x" * size], 1, 0.0), WHY) for n in range(count)
    ]


async def test_what_finds_the_dead_letters_full_never_leaves_the_hand() -> None:
    """Not even until the next call has ended: a recovery in between would take it up again."""
    hand = own_hand()
    store = Graves(hand, [Buried.FULL] * 50 + [Buried.YES] * 50)
    settler = settler_of({STREAM: hand}, store)
    letters = dead_letters(hand, 100)
    for delivery, verdict in letters:
        hand.held[delivery.entry_id] = delivery
        settler.settle(hand, delivery, verdict)
    assert await settler._apply_dead(hand)
    full = {d.entry_id for d, _ in letters[:50]}
    assert [full <= held for held in store.held] == [True, True]
    assert set(hand.held) == {d.entry_id for d, _ in hand.parks} == hand.unburied == full


async def test_an_id_that_found_no_room_is_remembered_until_it_is_buried() -> None:
    hand = own_hand()
    store = Graves(hand, [Buried.FULL, Buried.FULL, Buried.YES, Buried.REFUSED])
    settler = settler_of({STREAM: hand}, store)
    for left in (2, 0):
        hand.dead = dead_letters(hand, 2)
        await settler._apply_dead(hand)
        assert len(hand.unburied) == left


@pytest.mark.parametrize(
    ("count", "size", "most", "calls"),
    [
        (120, 100, 50, [50, 50, 20]),
        (3, 100, 1, [1, 1, 1]),
        (5, 400_000, 50, [2, 2, 1]),
        (3, 8 * 1024 * 1024, 50, [1, 1, 1]),
        (0, 0, 50, []),
    ],
)
def test_dead_letters_are_sent_by_number_and_by_size(
    count: int, size: int, most: int, calls: list[int]
) -> None:
    letters = dead_letters(own_hand(), count, size)
    cut = list(portions(letters, most))
    assert [len(portion) for portion in cut] == calls
    assert [letter for portion in cut for letter in portion] == letters


@pytest.mark.parametrize("end", ["returned", "failed", "rejected"])
async def test_whatever_the_verdict_nothing_is_collected_after_it(
    bus: Bus, backend: Backend, end: str
) -> None:
    """Effects that nobody would ever apply must not be taken in silence."""
    held: list[Effects] = []

    @event_handler(Asked, group="g", max_attempts=1, breaker=None)
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        held.append(delivery.effects)
        if end == "failed":
            raise ValueError
        if end == "rejected":
            raise Reject("no")

    async with Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=1))
        await worker.drained()
        with pytest.raises(EffectsClosed, match="the handler has returned"):
            held[0].incrby("late")
    assert not await backend.redis.exists("late")


async def test_effects_that_wait_count_as_verdicts_that_hold_up_reading(
    bus: Bus, backend: Backend
) -> None:
    hand = Hand("g", STREAM, STREAM, bus, envelope_of)
    settler = Settler(
        bus.store, "me", {STREAM: hand}, Telemetry(), lambda *_: None, lambda: None, None
    )  # type: ignore[arg-type]
    for n in range(settler_module.BEHIND + 1):
        assert not settler.is_behind
        settler.settle(hand, Delivery(hand, b"%d-1" % n, [], 1, 0.0), COMMIT)
    assert settler.is_behind


async def test_large_effects_that_wait_hold_up_reading_before_they_are_many(
    bus: Bus, backend: Backend
) -> None:
    hand = Hand("g", STREAM, STREAM, bus, envelope_of)
    settler = Settler(
        bus.store, "me", {STREAM: hand}, Telemetry(), lambda *_: None, lambda: None, None
    )  # type: ignore[arg-type]
    for n in range(40):
        assert settler.is_behind is (n > 32), n
        delivery: Delivery[Any] = Delivery(hand, b"%d-1" % n, [], 1, 0.0)
        delivery.effects.set("k", "x" * 1_040_000)
        settler.settle(hand, delivery, COMMIT)
