"""The forms in which `append.lua` takes events: usual ones without the names of their fields."""

from collections.abc import Sequence

from bus.config import PRODUCER_MEMORY_S
from bus.streams import keys
from bus.streams.answers import Limits

Unit = list[bytes | str | int]  # events that are appended together
PLAIN, KEYED = 6, 8  # names and values of an entry with id, type, data; and with a key


def unit_of(fields: Sequence[bytes | str]) -> Unit:
    """Return one event as `append.lua` takes it, by all its fields."""
    return [1, len(fields), *fields]


def unit_of_several(units: Sequence[Unit]) -> Unit:
    """Return events that belong together as one unit, of the units of each."""
    form, kind = units[0][:2]
    joined: Unit
    if form != 1 and all(u[0] == form and u[1] == kind for u in units):
        joined = ["*" if form == "=" else "#", len(units), kind]
        for unit in units:
            joined += unit[2:]
        return joined
    joined = [len(units)]
    for unit in units:
        if unit[0] == 1:
            joined += unit[1:]
            continue
        _, kind, event_id, data, *key = unit
        joined += (KEYED if key else PLAIN, "id", event_id, "type", kind, "data", data)
        joined += ("partitionkey", *key) if key else ()
    return joined


def append_call(
    stream: str,
    publisher: str,
    sequence: int,
    units: Sequence[Unit],
    events: int,
    limits: Limits,
    *,
    follows: bool,
    again: bool,
) -> tuple[tuple[str, str, str], Unit]:
    """Return the keys and the arguments of a call of `append.lua`."""
    args: Unit = [sequence, PRODUCER_MEMORY_S, limits.keep, limits.slack, limits.most]
    args += (
        1 if limits.drop_oldest else 0,
        len(units),
        events,
        1 if follows else 2 if again else 0,
    )
    for unit in units:
        args += unit
    return (stream, keys.producer(stream, publisher), keys.overrun(stream)), args
