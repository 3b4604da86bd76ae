"""What is looked for: functions that are asked must answer at once, and say what they mean."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from bus import DeclarationError, Undecodable
from bus.envelope import Envelope, entry_time
from bus.history.selection import Selection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ENVELOPE = Envelope("e", "selection.made", 1, "bus:{selection:0}", "1-0", entry_time("1-0"))


async def waits(*_: Any) -> bool:
    return False


async def waits_and_yields(_: Any) -> AsyncIterator[bool]:
    yield False


def yields(_: Any) -> Iterator[bool]:
    yield False


class Waiting:
    async def __call__(self, _: Any) -> bool:
        return False

    async def method(self, _: Any) -> bool:
        return False


@pytest.mark.parametrize(
    "where",
    [waits, waits_and_yields, yields, partial(waits, 1), Waiting(), Waiting().method],
    ids=["async", "async generator", "generator", "partial", "callable", "method"],
)
def test_what_cannot_answer_at_once_is_refused_before_anything_is_read(where: Any) -> None:
    """What it returns is always true: everything would be found."""
    with pytest.raises(DeclarationError, match="where must be a plain function of an envelope"):
        Selection(None, None, where)


def test_an_answer_that_is_to_be_awaited_is_an_error() -> None:
    selection = Selection(None, None, lambda e: waits(e, 1))  # type: ignore[arg-type,return-value]
    with pytest.raises(DeclarationError, match="where gave a coroutine, to be awaited"):
        selection.admits(ENVELOPE)


@pytest.mark.parametrize(
    ("answer", "admits"),
    [(True, True), (False, False), (1, True), ("", False), (None, False), ([0], True)],
    ids=str,
)
def test_any_other_answer_counts_as_its_truth(answer: Any, admits: bool) -> None:
    assert Selection(None, None, lambda _: answer).admits(ENVELOPE) is admits


def test_what_cannot_be_decoded_to_answer_is_not_found() -> None:
    def where(_: Envelope) -> bool:
        raise Undecodable("no")

    assert not Selection(None, None, where).admits(ENVELOPE)
