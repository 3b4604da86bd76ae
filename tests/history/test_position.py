"""Where in time: one parser for ids, times and ages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import DeclarationError
from bus.history.position import as_id

NOW = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)
NOW_MS = 1795165200000


@pytest.mark.parametrize(
    ("position", "entry_id"),
    [
        *(("start", "-"), ("-", "-"), ("end", "+"), ("+", "+")),
        *(("1763629200000-7", "1763629200000-7"), ("1763629200000", "1763629200000")),
        *((1763629200000, "1763629200000"), (0, "0"), ("18446744073709551615-0",) * 2),
        ("2026-11-20T09:00:00Z", str(NOW_MS)),
        ("2026-11-20T10:00:00+01:00", str(NOW_MS)),
        ("2026-11-20T09:00:00", str(NOW_MS)),  # without a zone it is UTC
        ("2026-11-20 09:00:00.250", str(NOW_MS + 250)),
        ("2026-11-20", str(NOW_MS - 9 * 3_600_000)),
        ("@2026-11-20", str(NOW_MS - 9 * 3_600_000)),
        (" @2026-11-20 ", str(NOW_MS - 9 * 3_600_000)),
        ("@-90s", str(NOW_MS - 90_000)),
        ("@-2m", str(NOW_MS - 120_000)),
        ("@-1.5h", str(NOW_MS - 5_400_000)),
        ("@-1d", str(NOW_MS - 86_400_000)),
        ("@-2w", str(NOW_MS - 14 * 86_400_000)),
        ("@-2000w", str(NOW_MS - 2000 * 604_800_000)),
        ("@-3000w", "0"),  # before there were entries
        ("@-9999999999999999w", "0"),
        (NOW, str(NOW_MS)),
        (NOW.replace(tzinfo=None), str(NOW_MS)),
        (NOW.astimezone(timezone(timedelta(hours=-5))), str(NOW_MS)),
    ],
    ids=repr,
)
def test_positions(position, entry_id):
    assert as_id(position, now=NOW) == entry_id


def test_nothing_said_is_the_default():
    assert as_id(None) == "-"
    assert as_id(None, default="+") == "+"


def test_an_age_counts_from_this_moment():
    before = datetime.now(UTC) - timedelta(hours=2)
    found = int(as_id("@-2h"))
    after = datetime.now(UTC) - timedelta(hours=2)
    assert before.timestamp() * 1000 - 1 <= found <= after.timestamp() * 1000 + 1


@pytest.mark.parametrize(
    "position",
    [
        "",
        "yesterday",
        "@",
        "@-",
        "@-2",
        "@-2y",
        "@2h",
        "-5",
        "5-",
        "5-x",
        "1e3",
        "2026-13-40",
        "2026-11-20T25:00",
        "1969-12-31",
        "1" * 21,
        "99999999999999999999",
        "5-99999999999999999999",
        "١٢٣",
        -1,
        2**64,
        10**400,
        True,
        1.5,
        b"5",
        [],
        pytest.param(object(), id="object"),
        datetime(1969, 1, 1, tzinfo=UTC),
        datetime.min,  # noqa: DTZ901
    ],
    ids=lambda p: repr(p)[:30],
)
def test_what_is_no_position_is_refused_in_words(position):
    with pytest.raises(DeclarationError, match="is no position: use start, end, an entry id"):
        as_id(position)


@given(st.text() | st.integers() | st.datetimes() | st.binary() | st.booleans())
def test_nothing_else_is_ever_raised(position):
    try:
        found = as_id(position)
    except DeclarationError:
        return
    assert found in ("-", "+") or found.replace("-", "").isascii()
