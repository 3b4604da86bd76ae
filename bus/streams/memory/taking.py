"""Taking entries: new ones, those whose time has come, and what others have left behind."""

from collections.abc import Iterable, Sequence

from bus.envelope import order
from bus.streams import keys
from bus.streams.answers import RawEntry, Taken
from bus.streams.memory.log import Group, Id, Log, is_lane, written
from bus.streams.memory.place import Place, wire

_FIELDS_MOST = 7_000  # names and values; more a script could not move


def read(
    place: Place, group_name: str, consumer: str, streams: Sequence[str], count: int
) -> list[tuple[str, list[RawEntry]]]:
    """Give a consumer what is new in streams, up to `count` of each."""
    name, me, now_ms = wire(group_name), wire(consumer), place.now_ms()
    there = [(stream, *place.group(wire(stream), name)) for stream in streams]
    found = []
    for stream, log, group in there:
        group.consumer(me, now_ms)
        at = len(log) - log.ahead_of(group)
        new = log.ids[at : at + count]
        for entry_id in new:
            group.deliver(entry_id, me, now_ms)
        if new:
            group.delivered = new[-1]
            found.append((stream, log.rows(new)))
    return found


def follow(
    place: Place, after: Iterable[tuple[str, bytes]], count: int
) -> list[tuple[str, list[RawEntry]]]:
    """Return what lies beyond ids, up to `count` of each stream; nobody is given it."""
    found = []
    for stream, entry_id in after:
        log = place.log(wire(stream))
        last = order(entry_id)
        if log is not None and log.last > last:
            new = log.between((last[0], last[1] + 1), log.last, count)
            if new:
                found.append((stream, log.rows(new)))
    return found


def _take(
    place: Place, log: Log, group: Group, me: bytes, ids: Iterable[Id], *, raising: int
) -> Taken:
    """Move pending entries to a worker, with their bodies; ghosts are acked and told."""
    entries, lost, now_ms = [], [], place.now_ms()
    for entry_id in ids:
        if log.drop_ghost(group, entry_id):
            lost.append(written(entry_id))
            continue
        row = group.rows[entry_id]
        group.hand_over(entry_id, me, now_ms, row.count + raising)
        entries.append((written(entry_id), row.count, log.copied(entry_id)))
    return Taken(entries, lost)


def recover(
    place: Place, stream: str, group_name: str, consumer: str, most: int, held: Iterable[bytes]
) -> Taken:
    """Hand a worker what was delivered to it and never reached it."""
    log, group = place.group(wire(stream), wire(group_name))
    me, known = wire(consumer), {order(i) for i in held}
    ids = [i for i, _ in group.pending(owner=me) if i not in known][:most]
    return _take(place, log, group, me, ids, raising=0)


def take_due(
    place: Place, stream: str, group_name: str, consumer: str, most: int, lanes: Sequence[bytes]
) -> Taken:
    """Take parked entries from lanes whose time has come, in their order."""
    log, group = place.group(wire(stream), wire(group_name))
    taken, now_ms = Taken([], []), place.now_ms()
    for lane in lanes:
        due_ms = keys.lane_due_ms(lane)
        if due_ms is None or due_ms > now_ms:
            continue
        left = most - len(taken.entries)
        ids = [i for i, _ in group.pending(owner=lane)][:left]
        entries, lost = _take(place, log, group, wire(consumer), ids, raising=1)
        taken.entries.extend(entries)
        taken.lost.extend(lost)
        group.drop_if_empty(lane)
    return taken


def take_parked(
    place: Place,
    stream: str,
    group_name: str,
    consumer: str,
    wanted: Iterable[tuple[bytes, bytes]],
) -> Taken:
    """Take single entries out of their lanes; what has left its lane is not among them."""
    log, group = place.group(wire(stream), wire(group_name))
    pairs = [(lane, order(said)) for lane, said in wanted]
    ids = [i for lane, i in pairs if group.owned(i, lane)]
    taken = _take(place, log, group, wire(consumer), ids, raising=1)
    for lane, _ in pairs:
        group.drop_if_empty(lane)
    return taken


def reclaim(
    place: Place,
    stream: str,
    group_name: str,
    consumer: str,
    owner: bytes,
    most: int,
    least_idle_ms: int,
) -> Taken:
    """Take over what a worker left that has no lease, or what has been idle for so long."""
    if not least_idle_ms and place.exists(keys.lease(stream, owner)):
        return Taken([], [])
    log, group = place.group(wire(stream), wire(group_name))
    oldest_ms = place.now_ms() - least_idle_ms
    rows = group.pending(owner=wire(owner))
    ids = [i for i, row in rows if row.since_ms <= oldest_ms][:most]
    return _take(place, log, group, wire(consumer), ids, raising=0)


def release(
    place: Place, stream: str, group_name: str, owner: bytes, ids: Sequence[bytes]
) -> list[int]:
    """Let any worker take entries of a lane or of a dead worker; counts stay."""
    if place.exists(keys.lease(stream, owner)):
        return [0] * len(ids)
    log, group = place.group(keys.wire(stream), keys.wire(group_name))
    now_ms, answers = place.now_ms(), list[int]()
    for said in ids:
        entry_id = order(said)
        if not group.owned(entry_id, wire(owner)):
            answers.append(0)
        elif log.drop_ghost(group, entry_id):
            answers.append(-1)
        else:
            group.hand_over(entry_id, keys.LANE + b"%d" % now_ms, now_ms)
            answers.append(1)
    if is_lane(wire(owner)):
        group.drop_if_empty(wire(owner))
    return answers


def move_parked(
    place: Place, stream: str, group_name: str, most: int, most_in_inbox: int, most_bytes: int
) -> tuple[int, list[str], bool]:
    """Move the oldest parked entries into the group's inbox, as long as they stand first.

    Returns how many, ghosts met, and whether the inbox is full.
    """
    name, inbox = keys.wire(group_name), keys.wire(keys.inbox(stream, group_name))
    log, group = place.group(wire(stream), name)
    moved, lost, lanes, room = 0, list[str](), set[bytes](), most_in_inbox
    room -= len(place.log(inbox) or ())
    for entry_id, row in list(group.pending())[:most]:
        due_ms = keys.lane_due_ms(row.owner)
        if due_ms is None or moved >= room or most_bytes <= 0:
            break
        lane = row.owner
        if log.drop_ghost(group, entry_id):
            lost.append(written(entry_id).decode())
        else:
            fields = log.entries[entry_id]
            if len(fields) > _FIELDS_MOST:
                break
            most_bytes -= sum(map(len, fields))
            put_aside(
                place,
                inbox,
                name,
                fields,
                origin=written(entry_id),
                attempts=row.count,
                due_ms=due_ms,
            )
            group.finish(entry_id)
            moved += 1
        lanes.add(lane)
    for lane in lanes:
        group.drop_if_empty(lane)
    return moved, lost, moved >= room


def put_aside(
    place: Place,
    inbox: bytes,
    group_name: bytes,
    fields: list[bytes],
    *,
    origin: bytes,
    attempts: int = 0,
    due_ms: int = 0,
    run: bytes | None = None,
) -> None:
    """Put an entry into a group's inbox, made with its group if there is none.

    origin: the id it had in its stream. run: of a replay or redrive.
    """
    place.made(inbox, Log).groups.setdefault(group_name, Group((0, 0)))
    added = [b"origentry", origin, b"attempts", b"%d" % attempts, b"due", b"%d" % due_ms]
    if run is not None:
        added += (b"run", run)
    place.append(inbox, [*fields, *added])
