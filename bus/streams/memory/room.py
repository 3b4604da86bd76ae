"""Making room in a stream: what somebody still needs stays, whatever the marks say.

The rules are those of `scripts/_trim.lua` and `_look.lua`. A server trims whole nodes of 100
entries where that is enough; here they are hundreds, so that as much history stays.
"""

from typing import NamedTuple

from bus.streams import keys
from bus.streams.answers import Looked, Pinned
from bus.streams.memory.log import HIGHEST, Group, Id, Log, first_of, following, written
from bus.streams.memory.place import Place, wire

_TRIMMED_MOST = 5_000  # entries per call, as a server is kept busy no longer
NODE = 100
_GHOSTS_MOST = 100  # per call

Lost = dict[str, list[str]]


class Floor(NamedTuple):
    """The smallest id that some group needs, and whose it is; (None, None, None) without groups."""

    at: Id | None
    name: bytes | None
    group: Group | None

    def pinned(self, log: Log) -> Pinned | None:
        """Return who pins the stream, for an error's text."""
        if self.at is None or self.name is None or self.group is None:
            return None
        at = written(self.at).decode()
        return Pinned(keys.text(self.name), at, len(self.group.rows), log.ahead_of(self.group))

    def spare(self, log: Log) -> int:
        """Return how many entries nobody needs."""
        return len(log) if self.at is None else log.count_before(self.at)


def floor_of(log: Log) -> tuple[Floor, Lost]:
    """Return the floor, and the ghosts met: pending ids without an entry, which pin nothing."""
    floor, lost = Floor(None, None, None), Lost()
    met = 0
    for name, group in sorted(log.groups.items()):
        needed = following(group.delivered)
        while group.ids:
            oldest = group.ids[0]
            above = floor.at is not None and oldest >= floor.at
            if met >= _GHOSTS_MOST or above or not log.drop_ghost(group, oldest):
                needed = min(needed, oldest)
                break
            lost.setdefault(keys.text(name), []).append(written(oldest).decode())
            met += 1
        if floor.at is None or needed < floor.at:
            floor = Floor(needed, name, group)
    return floor, lost


def trim(log: Log, keep: int, least: int, singly: int) -> tuple[Floor, Lost]:
    """Remove what no group needs, oldest first, never below `keep`, at most 5,000 entries.

    Whole hundreds, and only if that is less than `least` entries, single ones, at most `singly`.
    """
    floor, lost = floor_of(log)
    spare = max(0, min(len(log) - keep, floor.spare(log), _TRIMMED_MOST))
    hundreds = spare // NODE * NODE
    more = max(0, min(least - hundreds, spare - hundreds, singly))
    log.trim(hundreds + more)
    return floor, lost


def drop_oldest(log: Log, keep: int, count: int) -> dict[str, int]:
    """Remove the oldest entries, needed or not, but leave `keep`; return who had not handled them.

    What was pending of them is acked, and groups that were not given them yet are moved on.
    """
    gone = log.ids[: max(0, min(count, len(log) - keep, _TRIMMED_MOST))]
    if not gone:
        return {}
    dropped: dict[str, int] = {}
    for name, group in sorted(log.groups.items()):
        pending = [i for i, _ in group.pending(last=gone[-1])]
        unhandled = sum(i > group.delivered for i in gone) + len(pending)
        for entry_id in pending:
            group.finish(entry_id)
        group.delivered = max(group.delivered, gone[-1])
        if unhandled:
            dropped[keys.text(name)] = unhandled
    log.trim(len(gone))
    return dropped


def look(
    place: Place, stream: str, total: int, marks: tuple[int, int, int], *, drop: bool
) -> tuple[int, Looked | None]:
    """Look for room before `total` entries are added, once per `slack` entries or at the mark.

    marks: keep, slack, most. Returns the length, and what was found if it was looked.
    """
    keep, slack, most = marks
    log = place.log(wire(stream))
    length = len(log or ())
    over = length + total - keep
    crossed = over >= slack and over // slack > (length - keep) // slack
    if log is None or length == 0 or not (length + total > most or crossed):
        return length, None
    least = max(length + total - most, over - slack // 2)
    floor, lost = trim(log, keep, least, max(total, NODE))
    pinned = floor.pinned(log)  # as it was found: dropping is what its pin has come to
    dropped: dict[str, int] = {}
    if drop and len(log) + total > most:
        dropped = drop_oldest(log, keep, len(log) + total - most)
        overrun = place.made(wire(keys.overrun(stream)), dict) if dropped else {}
        for group, count in dropped.items():
            name = keys.wire(group)
            overrun[name] = b"%d" % (int(overrun.get(name, b"0")) + count)
    return len(log), Looked(stream, pinned, lost, dropped)


def room(
    place: Place, stream: str, keep: int, most: int, entries: int
) -> tuple[int, Pinned | None, Lost]:
    """Trim, and say how much would fit, who pins the stream, and what was lost.

    entries: how many are to fit; single ones are removed for them, else whole hundreds only.
    """
    log = place.log(wire(stream))
    if log is None or not log.ids:
        return most, None, {}
    floor, lost = trim(log, keep, len(log) + entries - most, entries)
    return most - len(log), floor.pinned(log), lost


def trim_by_hand(place: Place, stream: str, cut: str, keep: int) -> tuple[int, Pinned | None, Lost]:
    """Remove the oldest entries before the id `cut` that no group needs, as an operator asks for.

    Returns how many went, who holds up the rest, and what was lost.
    """
    log = place.log(wire(stream))
    if log is None or not log.ids:
        return 0, None, {}
    floor, lost = floor_of(log)
    most = min(len(log) - keep, _TRIMMED_MOST)
    if most <= 0:
        return 0, None, lost
    before = first_of(cut) if cut else HIGHEST
    held = None
    if floor.at is not None and floor.at < before:
        if log.between(floor.at, before if not cut else (before[0], before[1] - 1), 1):
            held = floor.pinned(log)
        before = floor.at
    return log.trim(min(most, log.count_before(before) if before != HIGHEST else most)), held, lost


def retain(place: Place, stream: str, retention_ms: int) -> tuple[int, Lost]:
    """Trim what is older than the retention time and needed by nobody, 5,000 at a time."""
    log = place.log(wire(stream))
    oldest = place.now_ms() - retention_ms
    if log is None or not log.ids or oldest <= 0:
        return 0, {}
    floor, lost = floor_of(log)
    cut = (oldest, 0) if floor.at is None else min(floor.at, (oldest, 0))
    return log.trim(min(log.count_before(cut), _TRIMMED_MOST)), lost
