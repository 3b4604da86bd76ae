"""One way to say where in time: entry ids and times are the same thing, ids count milliseconds.

start  -  end  +        the first and the last entry
1763629200000-0         an entry id
1763629200000           milliseconds since 1970, UTC
2026-11-20T09:00:00Z    ISO 8601; without a zone it is UTC; a date alone is its midnight
@2026-11-20             the same with an @ in front
@-2h                    two hours ago; ms, s, m, h, d, w
"""

import re
from datetime import UTC, datetime

from bus.errors import DeclarationError
from bus.history.lengths import length_s

Position = str | int | datetime | None

_ID = re.compile(r"[0-9]{1,20}(-[0-9]{1,20})?")
_FIRST_ISO = re.compile(r"@?\d{4}-\d{2}-\d{2}")


def as_id(position: Position, *, now: datetime | None = None, default: str = "-") -> str:
    """Return the entry id (or `-`, `+`) that `position` names; None gives `default`.

    now: what `@-2h` counts from, by default this machine's clock. Errors: DeclarationError.
    """
    if position is None:
        return default
    if isinstance(position, datetime):
        position = position.isoformat()
    if isinstance(position, int) and not isinstance(position, bool) and 0 <= position < 2**64:
        return str(position)
    if isinstance(position, str):
        found = _of_text(position.strip(), now or datetime.now(UTC))
        if found is not None:
            return found
    raise DeclarationError(
        f"{position!r} is no position: use start, end, an entry id, milliseconds since 1970,"
        " an ISO 8601 time, or an age such as @-2h"
    )


def span(since: Position, until: Position) -> tuple[str, str]:
    """Return the first and the last id of a range, both included.

    Errors: DeclarationError, also for a range that ends before it begins.
    """
    now = datetime.now(UTC)
    first, last = as_id(since, now=now, default="-"), as_id(until, now=now, default="+")
    if _order(first, -1) > _order(last, 2**64):
        raise DeclarationError(
            f"the range ends before it begins: since {since} ({first}), until {until} ({last})"
        )
    return first, last


def _order(place: str, without_sequence: int) -> tuple[int, int]:
    """Return where an id stands; one of milliseconds alone is all of that millisecond."""
    if place in ("-", "+"):
        return (-1, 0) if place == "-" else (2**64, 0)
    ms, _, sequence = place.partition("-")
    return int(ms), int(sequence) if sequence else without_sequence


def _of_text(text: str, now: datetime) -> str | None:  # noqa: PLR0911 - one per form
    if text in ("start", "-"):
        return "-"
    if text in ("end", "+"):
        return "+"
    if _ID.fullmatch(text):
        return text if all(int(number) < 2**64 for number in text.split("-")) else None
    age_s = length_s(text[2:]) if text.startswith("@-") else None
    try:
        if age_s is not None:
            return str(max(0, round((now.timestamp() - age_s) * 1000)))
        if _FIRST_ISO.match(text):
            return str(_ms(datetime.fromisoformat(text.removeprefix("@"))))
    except (ValueError, OverflowError):
        return None
    return None


def _ms(time: datetime) -> int:
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    ms = round(time.timestamp() * 1000)
    if ms < 0:
        raise ValueError("before 1970")
    return ms
