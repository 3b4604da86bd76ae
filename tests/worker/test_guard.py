"""What becomes of failures: judged one by one, with made-up times and no server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus import Backoff, Breaker, event_handler
from bus.delivery import ACK, HAND_BACK, DeadLetter, Delivery, Failure, Park, Verdict
from bus.streams.codec import envelope_of
from bus.telemetry import Telemetry
from bus.worker.circuit import Circuit
from bus.worker.guard import Guard
from bus.worker.hand import Hand, Holding
from bus.worker.refunds import Refunds
from tests.worker.events import STREAM, Asked

FAILURE = Failure("ConnectionError", "nobody answers")
COUNTED = Park(1.0, FAILURE)
SPARED = Park(1.0, FAILURE, counts=False)
DEAD = DeadLetter("failed", FAILURE)


class Shop:
    """A guard and what it watches over; a consumer without slots."""

    def __init__(self, breaker: Breaker | None) -> None:
        @event_handler(Asked, group="g", backoff=Backoff(1.0, factor=1, jitter=0), breaker=breaker)
        async def handle(event: Asked) -> None: ...

        telemetry = Telemetry()
        self.returned = 0
        self.shuts = self.looks = 0
        self.settled: list[tuple[bytes, Verdict]] = []
        self.told: list[tuple[str, Any]] = []
        telemetry.attach("*", lambda name, fields: self.told.append((name, fields.get("outcome"))))
        self.holding = Holding(None, "g", "me", telemetry)  # type: ignore[arg-type]
        self.hand = Hand("g", STREAM, STREAM, None, envelope_of)  # type: ignore[arg-type]
        self.holding.hands[STREAM] = self.hand
        inbox = f"{STREAM}:inbox:g"
        self.inbox = Hand("g", inbox, STREAM, None, envelope_of)  # type: ignore[arg-type]
        self.holding.hands[inbox] = self.inbox
        refunds = Refunds(None, "g", self.holding.hands, telemetry)  # type: ignore[arg-type]
        circuit = Circuit(breaker)
        self.guard = Guard(handle, circuit, self, self.holding, self._settle, refunds, telemetry)
        self.now = asyncio.get_running_loop().time

    def _settle(self, hand: Hand, delivery: Delivery[Any], verdict: Verdict) -> None:
        self.settled.append((delivery.entry_id, verdict))

    def shut(self) -> None:
        self.shuts += 1

    def look_again(self) -> None:
        self.looks += 1

    def delivery(self, n: int = 0, attempt: int = 1) -> Delivery[Any]:
        delivery: Delivery[Any] = Delivery(self.hand, b"%d-0" % n, [], attempt, 0.0)
        self.hand.held[delivery.entry_id] = delivery
        return delivery

    def judge(self, verdict: Verdict, n: int = 0, *, began_ago_s: float = 0.0) -> Verdict | None:
        return self.guard.judge(self.delivery(n), verdict, self.now() - began_ago_s)

    def judge_inbox(self, verdict: Verdict, n: int, run: bytes, began_ago_s: float = 0.0) -> Any:
        """Judge one from the inbox: without headers, so that it has no envelope."""
        fields = [b"origentry", b"5-0", b"attempts", b"0", b"due", b"0", b"run", run]
        delivery: Delivery[Any] = Delivery(self.inbox, b"%d-0" % n, fields, 1, 0.0)
        self.inbox.held[delivery.entry_id] = delivery
        return self.guard.judge(delivery, verdict, self.now() - began_ago_s)

    def open(self, n: int = 99) -> None:
        """Let calls fail until it opens."""
        while not self.guard.circuit.is_open:
            self.judge(COUNTED, n)


def shop(**settings: Any) -> Shop:
    return Shop(Breaker(**{"min_calls": 3, "window_s": 10.0, **settings}))


async def test_closed_it_lets_verdicts_pass_and_holds_the_last() -> None:
    one = shop()
    assert one.judge(COUNTED, 1) is COUNTED
    assert one.judge(DEAD, 2) is None
    assert [d.entry_id for d in one.holding.condemned] == [b"2-0"]
    assert one.settled == []


async def test_what_there_is_no_room_to_hold_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bus.worker.guard.BREAKER_MEMORY", 2)
    one = shop(min_calls=100)
    assert [one.judge(DEAD, n) for n in range(3)] == [None, None, SPARED]
    assert len(one.holding.condemned) == 2


async def test_without_a_breaker_every_verdict_passes() -> None:
    one = Shop(None)
    assert [one.judge(v, n) for n in range(50) for v in (COUNTED, DEAD)] == [COUNTED, DEAD] * 50
    one.guard.look_after(one.now() + 1e6)
    assert (one.told, one.looks) == ([], 0)


async def test_what_is_no_failure_of_the_call_passes_and_opens_nothing() -> None:
    one = shop(min_calls=1)
    passing = (
        *(Park(1.0), HAND_BACK, DeadLetter("rejected", FAILURE)),
        *(DeadLetter("undecodable", FAILURE), DeadLetter("newer-version", FAILURE)),
    )
    for verdict in passing:
        assert one.judge(verdict) is verdict
    assert not one.guard.circuit.is_open


async def test_as_it_opens_what_was_to_die_is_spared_held_or_on_its_way_to_a_slot() -> None:
    one = shop()
    one.judge(DEAD, 1)
    one.guard.look_after(one.now() + 11)
    assert [d.entry_id for d in one.holding.buffer] == [b"1-0"]
    assert one.looks == 1
    one.judge(DEAD, 2)
    one.open()
    assert sorted(one.settled, key=lambda s: s[0]) == [(b"1-0", SPARED), (b"2-0", SPARED)]
    assert (list(one.holding.buffer), list(one.holding.condemned)) == ([], [])
    assert one.shuts == 1
    assert [name for name, _ in one.told] == ["breaker.opened"]


async def test_held_ones_are_let_go_when_their_window_has_passed_and_not_before() -> None:
    one = shop()
    one.judge(DEAD, 1)
    one.guard.look_after(one.now() + 9.9)
    assert (len(one.holding.buffer), one.looks) == (0, 0)
    one.guard.look_after(one.now() + 10.1)
    assert (len(one.holding.buffer), one.looks) == (1, 1)
    assert one.holding.buffer[0].condemned is DEAD


async def test_the_failure_that_opens_it_and_those_after_it_use_no_attempt() -> None:
    one = shop()
    assert [one.judge(COUNTED, n) for n in range(5)] == [COUNTED, COUNTED, SPARED, SPARED, SPARED]
    assert one.judge(DEAD, 6) == SPARED


async def test_what_began_before_it_closed_uses_no_attempt_and_does_not_open_it_again() -> None:
    one = shop(probe_s=0.05)
    one.open()
    began_ago_s = 1.0
    one.guard.circuit.opened_at -= 5.0
    one.guard.probed(ACK, one.now() - 0.5)
    assert one.told[-2:] == [("breaker.probed", "worked"), ("breaker.closed", None)]
    assert one.looks == 1, "everything may start at once"
    assert [one.judge(v, 7, began_ago_s=began_ago_s) for v in (COUNTED, DEAD) * 5] == [SPARED] * 10
    assert not one.guard.circuit.is_open
    assert one.judge(COUNTED, 8) is COUNTED


async def test_what_was_redriven_and_fails_again_opens_nothing_and_dies_at_once() -> None:
    one = shop()
    for n in range(50):
        assert one.judge_inbox(COUNTED, n, b"redrive-1") is COUNTED
        assert one.judge_inbox(DEAD, n, b"redrive-1") is DEAD
    assert not one.guard.circuit.is_open
    assert list(one.holding.condemned) == [], "held for nothing, they would crowd out the live"
    assert [one.judge(COUNTED, n) for n in range(3)] == [COUNTED, COUNTED, SPARED]
    assert [name for name, _ in one.told] == ["breaker.opened"]
    assert one.guard.circuit.failures == 3, "of the live ones alone"


async def test_what_was_redriven_is_spared_in_an_outage_like_all() -> None:
    one = shop()
    one.open()
    assert one.judge_inbox(COUNTED, 1, b"redrive-1") == SPARED
    assert one.judge_inbox(DEAD, 2, b"redrive-1") == SPARED
    one.guard.circuit.opened_at -= 5.0
    one.guard.probed(ACK, one.now() - 0.5)
    assert one.judge_inbox(DEAD, 3, b"redrive-1", began_ago_s=1.0) == SPARED, "it began before"
    assert one.judge_inbox(DEAD, 4, b"redrive-1") is DEAD


async def test_what_was_replayed_or_moved_aside_counts_as_any() -> None:
    one = shop(min_calls=5)
    assert one.judge_inbox(DEAD, 1, b"replay-1") is None
    assert [d.entry_id for d in one.holding.condemned] == [b"1-0"]
    assert one.judge_inbox(COUNTED, 2, b"") is COUNTED
    for n in range(3):
        one.judge_inbox(COUNTED, 3 + n, b"replay-1")
    assert one.guard.circuit.is_open


async def test_probes_of_an_outage_that_is_over_say_nothing() -> None:
    one = shop()
    one.open()
    one.guard.circuit.opened_at -= 5.0
    one.guard.probed(ACK, one.now() - 1.0)
    told = len(one.told)
    one.guard.probed(COUNTED, one.now() - 2.0)
    one.guard.probed(ACK, one.now() - 2.0)
    one.guard.probed(None, one.now() - 2.0)
    assert len(one.told) == told
    assert not one.guard.circuit.blocked


async def test_the_outcome_of_a_probe_is_told() -> None:
    one = shop()
    one.open()
    one.guard.circuit.opened_at -= 5.0
    for verdict in (COUNTED, DEAD, Park(1.0), DeadLetter("rejected", FAILURE), HAND_BACK):
        one.guard.probed(verdict, one.now() - 1.0)
    outcomes = [outcome for name, outcome in one.told if name == "breaker.probed"]
    assert outcomes == ["failed", "failed", "undecided", "undecided", "undecided"]
    assert one.guard.circuit.is_open


async def test_at_the_stop_held_ones_and_later_last_failures_are_handed_back() -> None:
    one = shop()
    one.judge(DEAD, 1)
    assert one.guard.stop() == 1
    assert one.settled == [(b"1-0", HAND_BACK)]
    assert one.judge(DEAD, 2) is HAND_BACK
    assert one.judge(COUNTED, 3) == SPARED, "the third failure opens it, stopping or not"
