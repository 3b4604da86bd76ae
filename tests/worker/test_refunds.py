"""What is owed for an outage, to whom, and that it is bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bus.delivery import Delivery
from bus.streams.codec import envelope_of
from bus.streams.replies import ReplyError
from bus.telemetry import Telemetry
from bus.worker.hand import Hand
from bus.worker.refunds import Refunds
from tests.worker.events import STREAM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bus.errors import BusError

FOREVER = float("-inf")


class Server:
    """Answers refunds with `answer`, or raises it."""

    def __init__(self, answer: int | BusError = 1) -> None:
        self.answer = answer
        self.asked: list[tuple[bytes, int, int]] = []

    async def refund(
        self, stream: str, group: str, entries: Sequence[tuple[bytes, int, int]]
    ) -> list[int]:
        self.asked += entries
        if not isinstance(self.answer, int):
            raise self.answer
        return [self.answer] * len(entries)


class Case:
    def __init__(self, answer: int | BusError = 1) -> None:
        self.server = Server(answer)
        self.told: list[tuple[str, dict[str, Any]]] = []
        telemetry = Telemetry()
        telemetry.attach("*", lambda name, fields: self.told.append((name, fields)))
        self.hand = Hand("g", STREAM, STREAM, None, envelope_of)  # type: ignore[arg-type]
        self.refunds = Refunds(self.server, "g", {STREAM: self.hand}, telemetry)  # type: ignore[arg-type]

    def delivery(self, n: int, attempt: int, *, held: bool = False) -> Delivery[Any]:
        delivery: Delivery[Any] = Delivery(self.hand, b"%d-0" % n, [], attempt, 0.0)
        if held:
            self.hand.held[delivery.entry_id] = delivery
        return delivery

    def fail(self, n: int, attempt: int, at: float = 0.0, since: float = FOREVER) -> None:
        self.refunds.note(self.delivery(n, attempt), at, since)


async def test_each_failure_in_the_window_is_owed() -> None:
    case = Case()
    for attempt in (1, 2, 3):
        case.fail(1, attempt)
    case.fail(2, 5)
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    assert case.server.asked == [(b"1-0", 3, 3), (b"2-0", 5, 1)]
    told = {"stream": STREAM, "group": "g", "count": 2, "missed": 0}
    assert case.told == [("breaker.refunded", told)]


async def test_failures_before_the_window_are_not_owed() -> None:
    case = Case()
    case.fail(1, 1, at=1.0)
    case.fail(2, 1, at=5.0)
    case.refunds.owe(4.0)
    await case.refunds.finish()
    assert case.server.asked == [(b"2-0", 1, 1)]


async def test_what_left_the_window_is_forgotten_and_the_rest_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bus.worker.refunds.BREAKER_MEMORY", 3)
    case = Case()
    for n in range(100):
        case.fail(n, 1, at=n, since=n - 1.5)
    assert len(case.refunds._noted) == 2
    for n in range(100):
        case.fail(n, 1)
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    assert [i for i, _, _ in case.server.asked] == [b"97-0", b"98-0", b"99-0"]


async def test_what_is_owed_is_given_once() -> None:
    case = Case()
    case.fail(1, 1)
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    assert len(case.server.asked) == 1


async def test_a_delivery_in_hand_is_given_it_in_memory() -> None:
    case = Case()
    case.fail(1, 1)
    case.fail(1, 2)
    again = case.delivery(1, 3, held=True)
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    assert again.attempt == 1
    assert case.server.asked == []


async def test_what_is_on_its_way_to_a_lane_waits_until_it_is_there() -> None:
    case = Case()
    case.fail(1, 2)
    going = case.delivery(1, 2, held=True)
    going.settled = True
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    assert (going.attempt, case.server.asked) == (2, [])
    del case.hand.held[going.entry_id]
    await case.refunds.finish()
    assert case.server.asked == [(b"1-0", 2, 1)]


async def test_what_was_taken_meanwhile_is_told_as_missed() -> None:
    case = Case(answer=0)
    case.fail(1, 1)
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    assert [(name, t["count"], t["missed"]) for name, t in case.told] == [
        ("breaker.refunded", 0, 1)
    ]


async def test_what_is_gone_is_told_as_lost() -> None:
    case = Case(answer=-1)
    case.fail(1, 1)
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    assert [(name, t["entry_ids"]) for name, t in case.told] == [("delivery.lost", ["1-0"])]


@pytest.mark.parametrize(("code", "times"), [("LOADING", 2), ("NOGROUP", 1), ("NOPERM", 1)])
async def test_a_refusal_that_time_does_not_heal_is_told_and_not_repeated(
    code: str, times: int
) -> None:
    case = Case(answer=ReplyError(code, "says the server"))
    case.fail(1, 1)
    case.refunds.owe(FOREVER)
    await case.refunds.finish()
    await case.refunds.finish()
    assert [name for name, _ in case.told] == ["breaker.refund_failed"] * times
    assert len(case.server.asked) == times
