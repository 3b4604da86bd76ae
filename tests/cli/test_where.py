"""--where: what is an expression, and what is of an event that it cannot be judged of."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from bus import DeclarationError
from bus.cli.where import Where
from bus.envelope import Envelope


def paid(**data: object) -> Envelope:
    time = datetime(2026, 11, 20, tzinfo=UTC)
    encoded = msgspec.json.encode(data)
    return Envelope("e-1", "order.paid", 1, "bus:{order:0}", "5-0", time, key="o-1", data=encoded)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "cents = 5",
        "data.cents = 5",
        "cents += 5",
        "cents := 5",
        "cents > 1; cents < 5",
        "cents > 1\ncents < 5",
        "import os",
        "del cents",
        "cents >",
        "(",
        "lambda: 1",
        "open('f')",
        "data.__class__",
        "yield 1",
        "\x00",
        "(" * 500 + ")" * 500,
    ],
)
def test_what_is_no_one_expression_is_refused(text: str) -> None:
    """An assignment would be taken for what is assigned: true of every event."""
    with pytest.raises(DeclarationError, match="is no expression"):
        Where(text)


@pytest.mark.parametrize(
    "text",
    [
        "cents == 5",
        "  cents == 5\n",
        "cents > 4 and key == 'o-1'",
        "int(text) == 7",  # of an event without it, no number
        "text in ('7', '8')",
        "data.text.startswith('7')",
        "like('7*', text) and len(text) == 1",
        "(cents\n == 5)",
        "missing == null",
    ],
)
def test_an_expression_chooses(text: str) -> None:
    assert Where(text)(paid(cents=5, text="7"))
    assert Where(f"not ({text.strip()})")(paid(cents=5, text="7")) is False


def test_what_cannot_be_judged_is_not_chosen_and_counted() -> None:
    where = Where("int(text) > 5")
    assert [where(paid(text=t)) for t in ("6", "x", "5")] == [True, False, False]
    assert where.failed == 1
    assert "invalid literal" in where.why
