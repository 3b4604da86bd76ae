"""Which of the server's counters are believed; tests/history/test_backlog.py tries the servers."""

from __future__ import annotations

import pytest

from bus.streams.lag import undelivered_of

INFO = {
    "length": 300,
    "first-entry": [b"5-0", []],
    "last-entry": [b"400-7", []],
    "last-generated-id": b"500-0",
    "max-deleted-entry-id": b"0-0",
    "entries-added": 400,
}


@pytest.mark.parametrize(
    ("row", "info", "number"),
    [
        ({"last-delivered-id": b"400-7"}, {}, 0),
        ({"last-delivered-id": b"450-0"}, {}, 0),
        ({"last-delivered-id": b"400-6", "lag": 1}, {}, 1),
        ({"last-delivered-id": b"400-10", "lag": 7}, {}, 0),  # ids are numbers
        ({"last-delivered-id": b"4-18446744073709551615"}, {}, 300),
        ({"last-delivered-id": b"0-0", "lag": 400}, {}, 300),
        ({"last-delivered-id": b"5-0", "lag": 299}, {}, 299),
        ({"last-delivered-id": b"5-0", "lag": 300}, {}, None),
        ({"last-delivered-id": b"5-0", "lag": 0}, {}, None),
        ({"last-delivered-id": b"5-0", "lag": -1}, {}, None),
        ({"last-delivered-id": b"5-0", "lag": None}, {}, None),
        ({"last-delivered-id": b"5-0"}, {}, None),
        ({"last-delivered-id": b"9-0", "lag": 9}, {"max-deleted-entry-id": b"10-0"}, None),
        ({"last-delivered-id": b"10-0", "lag": 9}, {"max-deleted-entry-id": b"9-0"}, 9),
        ({"last-delivered-id": b"9-0", "lag": 9}, {"max-deleted-entry-id": b"9-0"}, 9),
        ({"last-delivered-id": b"0-0", "lag": 9}, {"first-entry": None, "last-entry": None}, 0),
    ],
)
def test_what_is_undelivered(row, info, number):
    assert undelivered_of(row, INFO | info) == number
