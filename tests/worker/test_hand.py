"""What is held and what waits, without any server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from bus.delivery import Delivery, Park
from bus.streams.answers import Taken
from bus.streams.codec import envelope_of
from bus.telemetry import Telemetry
from bus.worker.hand import Hand, Holding
from tests.worker.events import STREAM

INBOX = f"{STREAM}:inbox:g"
DUE_MS = 99_999_999_999_000


@pytest.fixture
def holding() -> Holding:
    holding = Holding(SimpleNamespace(), "g", "me", Telemetry())  # type: ignore[arg-type]
    for stream in (STREAM, INBOX):
        holding.hands[stream] = Hand("g", stream, STREAM, None, envelope_of)  # type: ignore[arg-type]
    return holding


def suspect(holding: Holding, n: int) -> Delivery[Any]:
    """A reclaimed entry that was started before."""
    hand = holding.hands[STREAM]
    delivery: Delivery[Any] = Delivery(hand, b"%d-0" % n, [], 2, 0.0)
    delivery.reclaimed = True
    hand.held[delivery.entry_id] = delivery
    return delivery


def test_when_the_suspect_whose_turn_it_was_is_dropped_the_next_has_its_turn(
    holding: Holding,
) -> None:
    first, second, third = (suspect(holding, n) for n in range(3))
    holding.buffer.append(first)
    holding.suspects.extend([second, third])
    holding.drop(holding.hands[STREAM], [first.entry_id])
    assert list(holding.buffer) == [second]
    assert list(holding.suspects) == [third]


def test_a_dropped_entry_that_was_no_suspect_promotes_nobody(holding: Holding) -> None:
    fresh, waiting = suspect(holding, 1), suspect(holding, 2)
    fresh.reclaimed = False
    holding.buffer.append(fresh)
    holding.suspects.append(waiting)
    holding.drop(holding.hands[STREAM], [fresh.entry_id])
    assert (list(holding.buffer), list(holding.suspects)) == ([], [waiting])


def test_nobody_is_promoted_when_all_are_given_up(holding: Holding) -> None:
    both = [suspect(holding, 1), suspect(holding, 2)]
    holding.buffer.append(both[0])
    holding.suspects.append(both[1])
    holding.forget(both)
    assert holding.waiting == 0
    assert holding.held == 0


def fields(attempts: int, due_ms: int) -> list[bytes]:
    return [b"id", b"e", b"attempts", b"%d" % attempts, b"due", b"%d" % due_ms]


def taken(holding: Holding, count: int, entry: list[bytes], **how: bool) -> tuple[int, list[Any]]:
    async def add() -> tuple[int, list[Any]]:
        how_taken = {"reclaimed": False, "recovered": False, **how}
        return holding.add_taken(
            holding.hands[INBOX], Taken([(b"1-0", count, entry)], []), 0.0, **how_taken
        )

    return asyncio.run(add())


@pytest.mark.parametrize("way", ["reclaimed", "recovered"])
@pytest.mark.parametrize(("attempts", "attempt"), [(0, 2), (1, 2), (3, 4)])
def test_a_first_delivery_that_is_taken_over_is_parked_again_until_due(
    holding: Holding, way: str, attempts: int, attempt: int
) -> None:
    """Storing 1 for 0 attempts tells it from a first delivery when it is taken over once more."""
    count, parked = taken(holding, 1, fields(attempts, DUE_MS), **{way: True})
    assert count == 1
    ((delivery, park),) = parked
    assert park == Park(0, until_ms=DUE_MS)
    assert delivery.attempt == attempt
    assert holding.hands[INBOX].held == {b"1-0": delivery}
    assert not holding.buffer


@pytest.mark.parametrize(
    ("count", "due_ms", "how"),
    [
        (1, 0, {"reclaimed": True}),  # not parked before
        (2, DUE_MS, {"reclaimed": True}),  # has come from its lane
        (1, DUE_MS, {}),  # comes from its lane
    ],
)
def test_others_run_when_they_are_taken(
    holding: Holding, count: int, due_ms: int, how: dict[str, bool]
) -> None:
    assert taken(holding, count, fields(0, due_ms), **how) == (1, [])
    assert [d.entry_id for d in holding.buffer] == [b"1-0"]
