"""The forms in which `append.lua` takes events: usual ones without the names of their fields."""

from collections.abc import Sequence

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
