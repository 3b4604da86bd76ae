"""What is done to groups and consumers from outside of any worker."""

from bus.streams import keys
from bus.streams.memory.log import Id, first_of, written
from bus.streams.memory.place import Place, no_group, wire


def record_topic(place: Place, topic: str, expected: bytes, new: bytes) -> bytes:
    """Record `new` if `expected` still stands; return what stands now."""
    records = place.get(wire(keys.TOPICS), dict) or {}
    stands = records.get(wire(topic), b"")
    if stands != expected:
        return stands
    place.made(wire(keys.TOPICS), dict)[wire(topic)] = new
    return new


def forget_consumer(place: Place, stream: str, group_name: str, consumer: bytes) -> bool:
    """Remove a consumer that has no lease and nothing pending; whether it is gone now."""
    if place.exists(keys.lease(stream, consumer)):
        return False
    _, group = place.group(keys.wire(stream), keys.wire(group_name))
    name = wire(consumer)
    if name in group.consumers and group.consumers[name].rows:
        return False
    group.drop_consumer(name)
    return True


def seek(
    place: Place, stream: str, group_name: str, expected: str, to: str, *, pinned: bool
) -> str | None:
    """Set how far a group has been given its stream; see `Upkeep.seek`."""
    log = place.log(wire(stream))
    name = keys.wire(group_name)
    if log is None or name not in log.groups:
        raise no_group(wire(stream), name)
    group, target = log.groups[name], first_of(to)
    was = group.delivered
    if _may(was, expected, target):
        if pinned and not log.between((0, 0), target, 1):
            return None
        group.delivered = target
        place.ring(wire(stream))
    return written(was).decode()


def _may(was: Id, expected: str, target: Id) -> bool:
    if expected in ("<", ">"):
        return was < target if expected == "<" else was > target
    return not expected or was == first_of(expected)


def remove_group(place: Place, stream: str, group_name: str) -> bool:
    """Delete a group with everything that is its own; False if there was none."""
    name, key = keys.wire(group_name), keys.wire(stream)
    overrun = keys.wire(keys.overrun(stream))
    log, dropped = place.log(key), place.get(overrun, dict) or {}  # refused before the first change
    for own in (keys.inbox, keys.dead):
        place.drop(keys.wire(own(stream, group_name)))
    dropped.pop(name, None)
    place.tidy(overrun)
    if log is None or log.groups.pop(name, None) is None:
        return False
    place.ring(key)
    return True
