"""Looking back: replays and redrives put entries into inboxes, once per run."""

from collections.abc import Iterable, Sequence

from bus.config import PRODUCER_MEMORY_S
from bus.envelope import order
from bus.streams import keys
from bus.streams.answers import Copied, Returned
from bus.streams.connection import Arg
from bus.streams.memory.log import Group, Log, written
from bus.streams.memory.place import Place, wire
from bus.streams.memory.taking import put_aside
from bus.streams.replies import ReplyError

_VALUES_MOST = 7_000  # names and values; more a script could not move


def replay(
    place: Place,
    stream: str,
    group_name: str,
    run: str,
    known: bytes,
    most: int,
    memory_s: int,
    ids: Sequence[bytes],
) -> Copied | None:
    """Copy entries to a group's inbox while it has less than `most`; see `Archive.replay`."""
    memory, inbox = wire(keys.replay(stream, run)), wire(keys.inbox(stream, group_name))
    said = place.get(memory, bytes)
    last, total = None, 0
    if said is not None:
        at, _, number = said.partition(b" ")
        last, total = order(at), int(number)
    if known and (last is None or last < order(known)):
        return None
    log = place.log(wire(stream))
    room = most - len(place.log(inbox) or ())
    copied, gone, full, begun = 0, 0, False, False
    for entry_id in map(order, ids):
        if last is not None and entry_id <= last:
            continue
        if copied >= room:
            full = True
            break
        if not begun:
            begun = True
            place.made(inbox, Log).groups.setdefault(wire(group_name), Group((0, 0)))
        fields = None if log is None else log.entries.get(entry_id)
        if fields is None:
            gone += 1
        else:
            put_aside(
                place, inbox, wire(group_name), fields, origin=written(entry_id), run=wire(run)
            )
            copied += 1
        last = entry_id
    total += copied
    if last is not None and (copied or gone):
        place.put(memory, b"%b %d" % (written(last), total), memory_s * 1000)
    return Copied(copied, gone, full, total, b"" if last is None else written(last))


def redrive(
    place: Place,
    stream: str,
    group_name: str,
    run: str,
    number: int,
    most: int,
    letters: Iterable[tuple[bytes, Arg, int, Sequence[Arg]]],
) -> list[Returned]:
    """Move dead letters to the group's inbox; see `Archive.redrive`."""
    memory, inbox = wire(keys.redrive(stream, run)), wire(keys.inbox(stream, group_name))
    said = place.get(memory, bytes)
    if said is not None:
        last, _, answers = said.partition(b" ")
        if int(last) == number:
            return [Returned(int(digit)) for digit in answers.decode()]
        if int(last) > number:
            raise ReplyError("STALE", f"STALE call {number}, the last one was {int(last)}")
    dead = place.log(wire(keys.dead(stream, group_name)))
    room = most - len(place.log(inbox) or ())
    verdicts = list[Returned]()
    for letter_id, origin, values, instead in letters:
        fields = None if dead is None else dead.entries.get(order(letter_id))
        if dead is None or fields is None:
            verdicts.append(Returned.GONE)
        elif verdicts.count(Returned.YES) >= room:
            verdicts.append(Returned.FULL)
        elif (len(instead) or values) > _VALUES_MOST:
            verdicts.append(Returned.UNFIT)
        else:
            moved = [wire(v) for v in instead] if instead else fields[:values]
            put_aside(place, inbox, wire(group_name), moved, origin=wire(origin), run=wire(run))
            dead.delete(order(letter_id))
            verdicts.append(Returned.YES)
    if Returned.YES in verdicts:
        digits = "".join(str(int(v)) for v in verdicts)
        place.put(memory, f"{number} {digits}".encode(), PRODUCER_MEMORY_S * 1000)
    return verdicts


def lags(place: Place, stream: str, groups: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return per group how much lies before it, twice: here what is said is what there is."""
    log = place.log(wire(stream))
    there = {} if log is None else log.groups
    return {
        g: (log.ahead_of(there[name]), log.ahead_of(there[name]))
        for g in groups
        if log is not None and (name := keys.wire(g)) in there
    }
