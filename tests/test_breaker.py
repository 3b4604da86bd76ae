"""Declaring a breaker."""

from __future__ import annotations

import dataclasses
import math

import pytest

from bus import Breaker, DeclarationError, Event, event_handler


class Asked(Event, type="breakertest.asked"):
    pass


def test_the_defaults_are_the_ones_written_down():
    assert Breaker() == Breaker(failure_ratio=0.5, window_s=10, min_calls=20, probe_s=5)


def test_it_is_on_unless_switched_off():
    def handler(**settings):
        async def handle(event: Asked) -> None: ...

        return event_handler(Asked, group="g", **settings)(handle)

    own = Breaker(window_s=1)
    assert handler().breaker == Breaker()
    assert handler(breaker=None).breaker is None
    assert handler(breaker=own).breaker is own


def test_it_is_a_value():
    assert hash(Breaker()) == hash(Breaker())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Breaker().window_s = 3


@pytest.mark.parametrize("field", ["failure_ratio", "window_s", "min_calls", "probe_s"])
@pytest.mark.parametrize("value", [-1, 0, math.nan, math.inf, "1", None, True, 10**8])
def test_bad_numbers_are_refused(field, value):
    with pytest.raises(DeclarationError, match=rf"Breaker\.{field} must be a (whole )?number from"):
        Breaker(**{field: value})


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"failure_ratio": 1.1}, "from 0.001 to 1, not 1.1"),
        ({"min_calls": 2.5}, "must be a whole number from 1"),
        ({"window_s": 0.01}, "from 0.1 to 3600"),
        ({"probe_s": 0.01}, "from 0.05 to 3600"),
    ],
)
def test_the_bounds_are_told(setting, says):
    with pytest.raises(DeclarationError, match=says):
        Breaker(**setting)
