"""The ids of dead letters, as people write them: `document:0/1763629200000-0`, or its end alone."""

import re
from typing import NamedTuple

from bus.config import checked_name
from bus.errors import DeclarationError
from bus.streams import keys

_ID = re.compile(r"(?:([^/:]+):([0-9]{1,4})/)?([0-9]{1,20}-[0-9]{1,20})")


class LetterId(NamedTuple):
    """An id that was asked for. stream: where the event was published; None if it may be any."""

    stream: str | None
    entry_id: str


def parsed(letter_id: str, topic: str | None) -> LetterId:
    """Return what an id names; `topic`: the only one it may be of. Errors: DeclarationError."""
    found = _ID.fullmatch(letter_id) if isinstance(letter_id, str) else None
    if found is None or any(int(n) >= 2**64 for n in found[3].split("-")):
        raise DeclarationError(
            f"{letter_id!r} is no id of a dead letter: they look like document:0/1763629200000-0,"
            " or 1763629200000-0 for any partition"
        )
    if found[1] is None:
        return LetterId(None, found[3])
    if topic not in (None, found[1]):
        raise DeclarationError(f"{letter_id} is of the topic {found[1]}, not of {topic}")
    return LetterId(keys.stream(checked_name(found[1], "topic name"), int(found[2])), found[3])
