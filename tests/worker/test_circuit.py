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
