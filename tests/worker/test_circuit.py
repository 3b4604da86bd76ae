"""The state machine of the breaker, with made-up times and calls."""

from __future__ import annotations

import pytest

from bus import Breaker
from bus.worker.circuit import Circuit

BREAKER = Breaker(failure_ratio=0.5, window_s=10.0, min_calls=4, probe_s=5.0)
START = 1_000.0


class Calls:
    """Calls that end at the times they are given, and the tick in between."""

    def __init__(self, breaker: Breaker | None = BREAKER) -> None:
        self.circuit = Circuit(breaker)
        self.returned = 0
        self.circuit.sample(START, 0)

    def work(self, at: float, count: int = 1) -> Calls:
        self.returned += count
        self.circuit.sample(START + at, self.returned)
        return self

    def fail(self, at: float, count: int = 1, *, began: float | None = None) -> list[bool]:
        """`count` failures; each says whether it opened the circuit."""
        started_at = START + (at if began is None else began)
        return [self.circuit.failed(START + at, started_at, self.returned) for _ in range(count)]


def opened(at: float = 1.0) -> Calls:
    calls = Calls()
    assert calls.fail(at, 4)[-1]
    return calls


# --- opening


def test_it_begins_closed():
    circuit = Circuit(BREAKER)
    assert (circuit.is_open, circuit.blocked) == (False, False)


def test_it_opens_at_the_failure_that_completes_min_calls():
    calls = Calls()
    assert calls.fail(1.0, 4) == [False, False, False, True]
    assert (calls.circuit.is_open, calls.circuit.blocked) == (True, True)
    assert (calls.circuit.failures, calls.circuit.calls) == (4, 4)
    assert calls.circuit.opened_at == START + 1.0


def test_before_the_first_look_at_the_clock_failures_count_as_well():
    circuit = Circuit(BREAKER)
    assert [circuit.failed(5.0, 5.0, 0) for _ in range(4)] == [False, False, False, True]


def test_it_opens_at_the_ratio_and_not_below():
    calls = Calls().work(1.0, 10)
    assert calls.fail(2.0, 9) == [False] * 9  # 9 of 19
    assert calls.fail(2.0) == [True]  # 10 of 20
    assert (calls.circuit.failures, calls.circuit.calls) == (10, 20)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7, 0.9])
def test_exactly_the_ratio_is_enough(ratio):
    calls = Calls(Breaker(failure_ratio=ratio, min_calls=10)).work(1.0, round(30 * (1 - ratio)))
    assert calls.fail(2.0, round(30 * ratio))[-1]


def test_all_must_fail_where_the_ratio_is_one():
    calls = Calls(Breaker(failure_ratio=1.0, min_calls=4)).work(0.5)
    assert not any(calls.fail(1.0, 50))


def test_no_returned_call_opens_it():
    calls = Calls()
    calls.fail(1.0, 3)
    calls.work(1.1, 1)
    assert not calls.circuit.is_open
    assert calls.fail(1.2) == [True]  # 4 of 5


def test_what_failed_before_the_window_does_not_count():
    calls = Calls()
    assert not any(calls.fail(0.0, 3))
    for tenth in range(1, 120):
        calls.work(tenth / 10, 0)
    assert calls.fail(11.9) == [False]
    assert calls.fail(11.9, 3)[-1]


def test_what_returned_before_the_window_does_not_excuse_an_outage():
    calls = Calls().work(1.0, 1_000)
    for second in range(2, 21):
        calls.work(float(second), 0)
    assert calls.fail(20.0, 4)[-1]


def test_the_window_begins_no_later_than_it_should_and_a_sample_earlier_at_most():
    calls = Calls()
    for tick in range(1_000):
        calls.work(tick * 0.05, 1)
    assert START + 39.85 - 0.15 <= calls.circuit.window_began <= START + 999 * 0.05 - 10.0


def test_after_a_loop_that_stood_still_there_is_a_window_still():
    calls = Calls()
    assert calls.fail(500.0, 4)[-1]


def test_samples_are_bounded_whatever_the_window():
    calls = Calls(Breaker(window_s=3_600.0))
    for tick in range(200_000):
        calls.work(tick * 0.05, 1)
    assert len(calls.circuit._samples) < 200


def test_without_a_breaker_nothing_ever_opens():
    calls = Calls(None)
    assert not any(calls.fail(1.0, 1_000))
    assert not calls.circuit.allow_probe(START + 1e6)
    assert len(calls.circuit._samples) == 1


# --- open


def test_it_opens_once():
    calls = opened()
    assert not any(calls.fail(1.1, 10))


def test_a_probe_is_allowed_after_its_time_and_told_once():
    circuit = opened(1.0).circuit
    assert not circuit.allow_probe(START + 5.9)
    assert circuit.blocked
    assert circuit.allow_probe(START + 6.0)
    assert not circuit.blocked
    assert not circuit.allow_probe(START + 6.1), "told once"
    assert not circuit.blocked, "and it stays allowed until one is found"


def test_the_next_probe_is_counted_from_the_start_of_the_last():
    circuit = opened(1.0).circuit
    circuit.allow_probe(START + 6.0)
    circuit.probe(START + 8.0)
    assert circuit.blocked
    assert not circuit.allow_probe(START + 12.9)
    assert circuit.allow_probe(START + 13.0), "though the last one may hang still"


def test_what_was_no_call_is_no_probe():
    circuit = opened(1.0).circuit
    circuit.allow_probe(START + 6.0)
    circuit.probe(START + 6.0)
    circuit.not_probed()
    assert not circuit.blocked
    assert circuit.is_open


def test_only_a_call_that_began_while_open_is_a_probe():
    circuit = opened(1.0).circuit
    assert not circuit.was_probe(START + 0.5)
    assert not circuit.was_probe(START + 1.0)
    assert circuit.was_probe(START + 6.0)


# --- closing


def test_closing_lets_everything_start_and_begins_a_new_window():
    calls = opened(1.0)
    calls.circuit.close(START + 7.0, calls.returned)
    assert (calls.circuit.is_open, calls.circuit.blocked) == (False, False)
    assert not calls.circuit.allow_probe(START + 60.0)
    assert not calls.circuit.was_probe(START + 6.5)
    assert calls.fail(7.1, 4) == [False, False, False, True], "what failed before is forgotten"


def test_calls_that_began_before_it_closed_do_not_open_it_again():
    """A herd of hung calls that time out just after the service is back."""
    calls = opened(1.0)
    calls.circuit.close(START + 7.0, calls.returned)
    assert calls.circuit.is_past(START + 6.9)
    assert not calls.circuit.is_past(START + 7.0)
    assert not any(calls.fail(8.0, 50, began=6.9))
    assert calls.fail(8.0, 4)[-1]


# --- events, not calls


def test_an_event_that_fails_again_and_again_counts_once_beside_those_that_work():
    """Ten events always fail, each four times; thirty work: a quarter of the events is at fault."""
    calls = Calls().work(1.0, 30)
    circuit = calls.circuit
    for again in range(4):
        for event in range(10):
            assert not circuit.failed(START + 2 + again, START + 2 + again, 30, event)
    assert (circuit.failures, circuit.calls) == (40, 70)
    for event in range(10, 30):
        opens = circuit.failed(START + 6, START + 6, 30, event)
    assert opens, "30 of 60"


def test_a_few_events_that_fail_alone_open_it_by_their_calls():
    circuit = Circuit(BREAKER)
    assert [circuit.failed(float(n), float(n), 0, "one") for n in range(4)] == [False] * 3 + [True]


def test_an_event_counts_anew_once_it_has_left_the_window():
    calls = Calls().work(0.5, 1)
    circuit = calls.circuit
    assert not circuit.failed(START + 1, START + 1, 1, "a")
    assert not circuit.failed(START + 2, START + 2, 1, "a")
    calls.work(9.0, 0).work(20.0, 0)
    assert not circuit.failed(START + 20, START + 20, 1, "a")
    assert circuit.failures == 1


# --- calls that are slow to fail


def test_calls_that_hang_are_looked_back_at_for_longer():
    """Sixteen at a time that take 30 s each: five in a window, and yet it is an outage."""
    circuit = Circuit(Breaker(min_calls=20), concurrency=16)
    circuit.sample(START, 0)
    assert not any(circuit.failed(START + 30, START, 0) for _ in range(16))
    assert circuit.reach_s == 75
    for second in range(31, 60):
        circuit.sample(START + second, 0)
    outcomes = [circuit.failed(START + 61, START + 31, 0) for _ in range(4)]
    assert outcomes == [False, False, False, True]
    assert circuit.window_began <= START + 30


def test_the_longer_look_has_an_end_and_is_given_up_again():
    circuit = Circuit(Breaker(min_calls=1_000), concurrency=1)
    circuit.failed(START + 3_600, START, 0)
    assert circuit.reach_s == 600
    for _ in range(200):
        circuit.failed(START + 3_601, START + 3_601, 0)
    assert circuit.reach_s == 10


# --- which probe


def test_a_new_event_is_the_first_to_be_probed_and_a_parked_one_if_there_is_none():
    calls = opened()
    circuit = calls.circuit
    assert not circuit.may_probe(START + 2, new=True), "too early for any"
    assert circuit.allow_probe(START + 6)
    assert circuit.may_probe(START + 6, new=True)
    assert not circuit.may_probe(START + 6, new=False)
    assert circuit.may_probe(START + 7, new=False), "none came within a second"


def test_every_fourth_probe_prefers_a_parked_one():
    circuit = opened().circuit
    kinds = []
    for n in range(8):
        at = START + 6 + n * 5
        assert circuit.allow_probe(at)
        kinds.append(circuit.may_probe(at, new=True))
        assert circuit.may_probe(at, new=False) is not kinds[-1]
        circuit.probe(at)
    assert kinds == [True, True, True, False] * 2


# --- probation


def closed(at: float = 10.0, concurrency: int = 8) -> Circuit:
    circuit = Circuit(BREAKER, concurrency)
    while not circuit.is_open:
        circuit.failed(START, START, 0)
    circuit.close(START + at, 1)
    return circuit


def test_after_an_outage_few_parked_events_may_start_until_calls_return():
    circuit = closed()
    assert circuit.is_limited
    assert circuit.admits(START + 10, 100) == 2
    circuit.took(2)
    assert circuit.admits(START + 10, 100) == 0
    assert circuit.admits(START + 15, 100) == 1, "one per probe_s at least, or they would never end"


def test_failures_of_what_is_parked_stay_a_minority_beside_new_events_that_work():
    circuit = closed()
    circuit.took(circuit.admits(START + 10, 100))
    for _ in range(100):
        circuit.vouch(START + 10, parked=False)
    assert circuit.admits(START + 10, 1_000) == 8, "no more at once than there are slots"
    started = 8
    circuit.took(8)
    for _ in range(92):
        circuit.vouch(START + 10, parked=False)
        taken = circuit.admits(START + 10, 1)
        circuit.took(taken)
        started += taken
    assert started <= 8 + 92 / 2


def test_parked_events_that_work_again_let_more_and_more_follow():
    circuit = closed(concurrency=64)
    rounds = []
    while circuit.on_probation and len(rounds) < 20:
        now = START + 10 + len(rounds)
        rounds.append(circuit.admits(now, 64))
        circuit.took(rounds[-1])
        for _ in range(rounds[-1]):
            circuit.vouch(now, parked=True)
    assert rounds[:4] == [2, 4, 8, 16]
    assert not circuit.on_probation
    assert len(rounds) >= 10, "not before a window has passed"


def test_without_an_outage_nothing_is_limited():
    circuit = Circuit(BREAKER)
    assert circuit.admits(START, 77) == 77
    circuit.took(77)
    assert circuit.admits(START, 77) == 77
    assert not circuit.is_limited


def test_opening_again_ends_the_probation():
    circuit = closed()
    while not circuit.is_open:
        circuit.failed(START + 11, START + 11, 1)
    assert not circuit.on_probation
