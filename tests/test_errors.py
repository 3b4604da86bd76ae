"""The errors: one tree, told at the head of its file, and all of it within reach of a caller."""

from __future__ import annotations

import re

import pytest

import bus
from bus import errors
from bus.errors import BusError, Reject, RetryLater


def drawn_tree() -> dict[str, str]:
    """Return error -> parent, as the picture in the module's docstring has them."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([│ ├└─]*)([A-Z][A-Za-z]+)(?:  |$)", line)
        if found:
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_picture_at_the_head_is_the_tree():
    real = {
        name: cls.__bases__[0].__name__
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, BusError)
    }
    assert drawn_tree() == real
    assert len(real) > 10


def test_every_error_can_be_imported_from_the_package():
    public = {n for n, c in vars(errors).items() if isinstance(c, type)}
    assert public <= set(bus.__all__)


def test_every_error_says_when_it_happens():
    for name in drawn_tree():
        assert getattr(errors, name).__doc__.rstrip().endswith(".")


def test_what_a_handler_raises_is_no_error_of_the_bus():
    for verdict in (Reject, RetryLater):
        assert not issubclass(verdict, BusError)


def test_reject_carries_its_reason():
    assert Reject("not ours").reason == "not ours"
    assert str(Reject("not ours")) == "not ours"


def test_retry_later_carries_its_delay():
    assert RetryLater(0).delay_s == 0
    assert str(RetryLater(2.5)) == "retry in 2.5 s"


@pytest.mark.parametrize("delay_s", [-1, float("nan"), float("inf"), 365 * 86_400 + 1])
def test_retry_later_refuses_what_is_no_delay(delay_s):
    with pytest.raises(ValueError, match="RetryLater takes 0 to"):
        RetryLater(delay_s)
