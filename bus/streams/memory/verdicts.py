"""Verdicts: each does nothing for an entry that is not this worker's any more."""

from collections.abc import Iterable, Sequence
from math import ceil

from bus.envelope import order
from bus.streams import keys
from bus.streams.answers import Buried, Claim, Renewed, Started
from bus.streams.connection import Arg
from bus.streams.memory.log import Fields, Group, Id, Log, is_lane
from bus.streams.memory.place import Place, wire

# How finely lanes are named, by the delay: a few hundred lanes at most.
_GRAINS = ((60_000, 1_000), (600_000, 10_000), (3_600_000, 60_000), (86_400_000, 600_000))
_COARSEST = 3_600_000


def finish(log: Log, stream: str, group: Group, ids: Iterable[Id]) -> None:
    """Ack entries; those of an inbox are deleted, since no other group reads it."""
    for entry_id in ids:
        group.finish(entry_id)
        if keys.is_inbox(stream):
            log.delete(entry_id)


def ack(
    place: Place, stream: str, group_name: str, consumer: str, ids: Sequence[bytes]
) -> list[bytes]:
    """Finish deliveries; return the ids refused."""
    log, group = place.group(wire(stream), wire(group_name))
    me, refused = wire(consumer), []
    for said in ids:
        entry_id = order(said)
        if group.owned(entry_id, me):
            finish(log, stream, group, (entry_id,))
        else:
            refused.append(said)
    return refused


def park(
    place: Place,
    stream: str,
    group_name: str,
    consumer: str,
    entries: Iterable[tuple[bytes, Arg, int]],
) -> list[bytes]:
    """Give deliveries to lanes; return them, b"" for one refused, b"lost" for a ghost."""
    log, group = place.group(wire(stream), wire(group_name))
    now_ms, lanes = place.now_ms(), list[bytes]()
    for said, delay, count in entries:
        entry_id = order(said)
        if not group.owned(entry_id, wire(consumer)):
            lanes.append(b"")
        elif log.drop_ghost(group, entry_id):
            lanes.append(b"lost")
        else:
            lane = _lane(now_ms, delay)
            group.hand_over(entry_id, lane, now_ms, count)
            lanes.append(lane)
    return lanes


def _lane(now_ms: int, said: Arg) -> bytes:
    """Return the lane of a delay in ms, or of "@" and the time in ms at which an entry is due."""
    text = wire(said)
    delay_ms = int(text[1:]) - now_ms if text[:1] == b"@" else int(text)
    if delay_ms <= 0:
        return keys.LANE + b"0"
    grain = next((g for most, g in _GRAINS if delay_ms <= most), _COARSEST)
    return keys.LANE + b"%d" % (ceil((now_ms + delay_ms) / grain) * grain)


def dead_letter(
    place: Place,
    stream: str,
    group_name: str,
    consumer: str,
    most: int,
    entries: Iterable[tuple[bytes, list[Arg]]],
    *,
    lease: bytes | None,
) -> list[Buried]:
    """Move deliveries, with the bodies that the worker has, to the dead letters."""
    if lease is not None and place.exists(lease):
        return [Buried.REFUSED for _ in entries]
    log, group = place.group(keys.wire(stream), keys.wire(group_name))
    dead = keys.wire(keys.dead(stream, group_name))
    letters = place.log(dead)
    room = most - len(letters or ()) if most > 0 else None
    answers = []
    for said, fields in entries:
        entry_id = order(said)
        if not group.owned(entry_id, keys.wire(consumer)):
            answers.append(Buried.REFUSED)
        elif room is not None and room < 1:
            answers.append(Buried.FULL)
        else:
            bury(place, dead, [wire(f) for f in fields])
            finish(log, stream, group, (entry_id,))
            room = None if room is None else room - 1
            answers.append(Buried.YES)
    return answers


def bury(place: Place, dead: bytes, fields: Fields) -> None:
    """Add a dead letter, and when that was. Errors: ReplyError WRONGTYPE."""
    place.append(dead, [*fields, b"deadtime", b"%d" % place.now_ms()])


def renew(
    place: Place, stream: str, group_name: str, consumer: str, ids: Sequence[bytes]
) -> Renewed:
    """Say that what is held is still worked on."""
    log, group = place.group(wire(stream), wire(group_name))
    me, now_ms = wire(consumer), place.now_ms()
    refused, lost = list[bytes](), list[bytes]()
    for said in ids:
        entry_id = order(said)
        if not group.owned(entry_id, me):
            refused.append(said)
        elif log.drop_ghost(group, entry_id):
            lost.append(said)
        else:
            group.hand_over(entry_id, me, now_ms)
    return Renewed(refused, lost)


def start(
    place: Place, stream: str, group_name: str, consumer: str, said: bytes, count: int
) -> Started:
    """Count the start of a reclaimed delivery."""
    log, group = place.group(wire(stream), wire(group_name))
    me, entry_id = wire(consumer), order(said)
    if not group.owned(entry_id, me):
        return Started.REFUSED
    if log.drop_ghost(group, entry_id):
        return Started.LOST
    group.hand_over(entry_id, me, place.now_ms(), count)
    return Started.YES


def claim(
    place: Place, mark: str, home: str, stream: str, group_name: str, said: bytes, keep_ms: int
) -> Claim:
    """Ask whether a delivery may handle its event; another that is pending and may goes first."""
    key = wire(mark)
    me = (b"s " if stream == home else b"i ") + said
    named = place.get(key, bytes)
    if named == b"done":
        return Claim.DONE
    if named is not None and named != me:
        where, _, other = named.partition(b" ")
        there = home if where == b"s" else keys.inbox(home, group_name)
        log = place.log(wire(there))
        group = None if log is None else log.groups.get(wire(group_name))
        if group is not None and _is_pending(group, other):
            return Claim.BUSY
    place.put(key, me, keep_ms)
    return Claim.YES


def _is_pending(group: Group, said: bytes) -> bool:
    try:
        return order(said) in group.rows
    except ValueError:
        return False  # what stands there is no id


def refund(
    place: Place, stream: str, group_name: str, entries: Iterable[tuple[bytes, int, int]]
) -> list[int]:
    """Give parked entries attempts back, if their counts are at least what they should be."""
    log, group = place.group(wire(stream), wire(group_name))
    answers = list[int]()
    for said, least, back in entries:
        entry_id = order(said)
        row = group.rows.get(entry_id)
        if row is None or not is_lane(row.owner) or row.count < least:
            answers.append(0)
        elif log.drop_ghost(group, entry_id):
            answers.append(-1)
        else:
            row.count = max(0, row.count - back)
            answers.append(1)
    return answers
