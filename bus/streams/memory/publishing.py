"""The way in: units of events are appended, at most once, while there is room.

As `scripts/append.lua`; the forms of events are those of `forms.py`.
"""

from collections.abc import Iterator, Sequence

from bus.config import PRODUCER_MEMORY_S
from bus.streams import keys
from bus.streams.answers import Appended, Limits, Room
from bus.streams.connection import Arg
from bus.streams.memory.log import Fields, Log, written
from bus.streams.memory.place import Place, wire
from bus.streams.memory.room import look
from bus.streams.replies import Reply, ReplyError

_LAST_SEQUENCE = 4_503_599_627_370_496  # a server counts on from no higher one


def append(
    place: Place,
    stream: str,
    publisher: str,
    sequence: int,
    units: Sequence[list[Arg]],
    events: int,
    limits: Limits,
) -> Appended:
    """Append as many whole units as fit; a repeat of the publisher's last batch appends nothing.

    Errors: ReplyError STALE for a batch before the last.
    """
    memory = wire(keys.producer(stream, publisher))
    repeated = _repeated(place.get(memory, bytes), sequence)
    if repeated is not None:
        return repeated
    key = wire(stream)
    marks = limits.keep, limits.slack, limits.most
    length, found = look(place, stream, events, marks, drop=limits.drop_oldest)
    taken, first, added = 0, None, 0
    for unit in units:
        entries = list(_entries(unit))
        if length + added + len(entries) > limits.most:
            break
        for fields in entries:
            if first is None:
                first = place.append(key, fields)
                if first[1] > _LAST_SEQUENCE:
                    place.made(key, Log).delete(first)
                    raise ReplyError("ERR", "ERR the last id of the stream leaves no room")
            else:
                place.append(key, fields, (first[0], first[1] + added))
            added += 1
        taken += 1
    if first is not None:
        said = b"%d %b %d %d" % (sequence, written(first), added, taken)
        place.put(memory, said, PRODUCER_MEMORY_S * 1000)
    pinned = found.pinned if found and taken < len(units) else None
    room = Room(limits.most - length - added, pinned, found.lost if found else {})
    ms, low = first or ("", 0)
    return Appended(
        str(ms),
        low,
        added,
        taken,
        repeated=False,
        room=room,
        dropped=found.dropped if found else {},
    )


def _repeated(memory: bytes | None, sequence: int) -> Appended | None:
    """Return what the publisher's last batch was answered, if this is it."""
    if memory is None:
        return None
    last, first, events, units = memory.split(b" ")
    if sequence < int(last):
        raise ReplyError("STALE", f"STALE batch {sequence}, the last one was {int(last)}")
    if sequence > int(last):
        return None
    ms, low = first.decode().split("-")
    room = Room(-1, None, {})
    return Appended(ms, int(low), int(events), int(units), repeated=True, room=room, dropped={})


def _entries(unit: Sequence[Arg]) -> Iterator[Fields]:
    """Iterate over the fields of the events of a unit, in whatever form it has."""
    form = unit[0]
    if form in ("=", "+", "*", "#"):
        size = 3 if form in ("+", "#") else 2
        kind, rest = (unit[2], unit[3:]) if form in ("*", "#") else (unit[1], unit[2:])
        for at in range(0, len(rest), size):
            event_id, data, *key = map(wire, rest[at : at + size])
            fields = [b"id", event_id, b"type", wire(kind), b"data", data]
            yield [*fields, b"partitionkey", *key] if key else fields
        return
    at = 1
    for _ in range(int(form)):
        count = int(unit[at])
        yield [wire(v) for v in unit[at + 1 : at + 1 + count]]
        at += count + 1


def as_answered(done: Appended) -> list[Reply]:
    """Return what was done in the form in which `append.lua` answers, for `results.appended`."""
    first = f"{done.ms}-{done.sequence}".encode() if done.ms else b""
    pinned = done.room.pinned
    who: list[Reply] = []
    if pinned is not None:
        lag = -1 if pinned.undelivered is None else pinned.undelivered
        who = [keys.wire(pinned.group), pinned.floor.encode(), pinned.pending, lag]
    lost = [x for g, ids in done.room.lost.items() for i in ids for x in (keys.wire(g), i.encode())]
    dropped = [x for g, n in done.dropped.items() for x in (keys.wire(g), n)]
    head = [first, done.events, done.units, int(done.repeated), done.room.entries]
    return [*head, who, lost, dropped]
