"""How long a failed delivery waits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import Backoff, DeclarationError

SECONDS = st.floats(0, 86_400 * 30)
BACKOFFS = st.builds(
    Backoff, base_s=SECONDS, factor=st.floats(1, 100), max_s=SECONDS, jitter=st.floats(0, 1)
)


@given(backoff=BACKOFFS, attempt=st.integers(1, 10**9))
def test_the_delay_stays_within_its_bounds_however_often_it_failed(backoff, attempt):
    delay = backoff.delay_s(attempt)
    assert math.isfinite(delay)
    assert 0 <= delay <= backoff.max_s


@given(backoff=BACKOFFS, attempt=st.integers(1, 200))
def test_jitter_takes_away_its_share_at_most(backoff, attempt):
    full = Backoff(backoff.base_s, backoff.factor, backoff.max_s, jitter=0).delay_s(attempt)
    assert full * (1 - backoff.jitter) <= backoff.delay_s(attempt) * (1 + 1e-9)
    assert backoff.delay_s(attempt) <= full


def test_without_jitter_the_delays_are_the_ones_written_down():
    steady = Backoff(base_s=1, factor=2, max_s=10, jitter=0)
    assert [steady.delay_s(n) for n in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert [Backoff(base_s=3, factor=1, jitter=0).delay_s(n) for n in (1, 2, 50)] == [3, 3, 3]
    assert Backoff(base_s=0).delay_s(7) == 0


def test_entries_that_failed_together_do_not_come_back_together():
    assert len({Backoff().delay_s(1) for _ in range(100)}) > 90


@pytest.mark.parametrize("field", ["base_s", "factor", "max_s", "jitter"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", None, True, 10**8])
def test_bad_numbers_are_refused(field, value):
    with pytest.raises(DeclarationError, match=rf"Backoff\.{field} must be a number from"):
        Backoff(**{field: value})


def test_a_factor_that_shrinks_the_delay_is_refused():
    with pytest.raises(DeclarationError, match=r"Backoff\.factor must be a number from 1 to"):
        Backoff(factor=0.5)
