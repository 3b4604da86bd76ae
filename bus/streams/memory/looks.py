"""The commands by which streams are looked at and groups made, as plain commands are sent.

Whoever looks back or takes stock asks many such questions in one write; here is what each is
answered, in the form of a server with counters (Redis 7.0, Valkey). Errors: ReplyError.
"""

from bus.streams.memory.log import Group, Log, first_of, last_of, written
from bus.streams.memory.place import Place, no_group
from bus.streams.memory.values import Command
from bus.streams.replies import Reply, ReplyError


def _xlen(place: Place, key: bytes) -> Reply:
    return len(place.log(key) or ())


def _xrange(place: Place, key: bytes, first: bytes, last: bytes, *count: bytes) -> Reply:
    log = place.log(key)
    if log is None:
        return []
    most = int(count[1]) if count else None
    return log.rows(log.between(first_of(first), last_of(last), most))


def _xrevrange(place: Place, key: bytes, last: bytes, first: bytes, *count: bytes) -> Reply:
    log = place.log(key)
    if log is None:
        return []
    most = int(count[1]) if count else None
    return log.rows(log.between(first_of(first), last_of(last), most, reverse=True))


def _xdel(place: Place, key: bytes, *ids: bytes) -> Reply:
    log = place.log(key)
    return 0 if log is None else sum(log.delete(first_of(i)) for i in ids)


def _xpending(place: Place, key: bytes, name: bytes, *rest: bytes) -> Reply:
    """XPENDING [IDLE ms] first last count [consumer]."""
    _, group = place.group(key, name)
    idle_ms = 0
    if rest[0] == b"IDLE":
        idle_ms, rest = int(rest[1]), rest[2:]
    first, last, count, *owner = rest
    now_ms, found = place.now_ms(), list[Reply]()
    rows = group.pending(first_of(first), last_of(last), owner[0] if owner else None)
    for entry_id, row in rows:
        if len(found) >= int(count):
            break
        idle = max(0, now_ms - row.since_ms)
        if idle >= idle_ms:
            found.append([written(entry_id), row.owner, idle, row.count])
    return found


def _xinfo_stream(place: Place, key: bytes) -> Reply:
    log = _there(place, key)
    ends = [log.rows(i)[0] if i else None for i in (log.ids[:1], log.ids[-1:])]
    return _row(
        length=len(log),
        groups=len(log.groups),
        last_generated_id=written(log.last),
        max_deleted_entry_id=written(log.deleted),
        entries_added=log.added,
        first_entry=ends[0],
        last_entry=ends[1],
    )


def _xinfo_groups(place: Place, key: bytes) -> Reply:
    log = _there(place, key)
    return [
        _row(
            name=name,
            consumers=len(group.consumers),
            pending=len(group.rows),
            last_delivered_id=written(group.delivered),
            entries_read=log.added - log.ahead_of(group),
            lag=log.ahead_of(group),
        )
        for name, group in sorted(log.groups.items())
    ]


def _xinfo_consumers(place: Place, key: bytes, name: bytes) -> Reply:
    group = _there(place, key).groups.get(name)
    if group is None:
        raise no_group(key, name)
    now_ms = place.now_ms()
    return [
        _row(name=n, pending=len(c.rows), idle=max(0, now_ms - c.seen_ms))
        for n, c in sorted(group.consumers.items())
    ]


def _xgroup_create(place: Place, key: bytes, name: bytes, after: bytes, *options: bytes) -> Reply:
    """XGROUP CREATE [MKSTREAM]; a count of what it has read is not needed here."""
    if b"MKSTREAM" not in options:
        _there(place, key)
    log = place.made(key, Log)
    if name in log.groups:
        raise ReplyError("BUSYGROUP", "BUSYGROUP Consumer Group name already exists")
    log.groups[name] = Group(log.last if after == b"$" else first_of(after))
    return b"OK"


def _there(place: Place, key: bytes) -> Log:
    log = place.log(key)
    if log is None:
        raise ReplyError("ERR", "ERR no such key")
    return log


def _row(**fields: Reply) -> Reply:
    return [part for n, v in fields.items() for part in (n.replace("_", "-").encode(), v)]


# --- the server that there is none of


def _time(place: Place) -> Reply:
    seconds, ms = divmod(place.now_ms(), 1000)
    return [b"%d" % seconds, b"%d" % (ms * 1000)]


def _info(_place: Place, *_sections: bytes) -> Reply:
    """Say nothing: there is neither version nor limit."""
    return b""


LOOKS: dict[str, Command] = {
    "XLEN": _xlen,
    "XRANGE": _xrange,
    "XREVRANGE": _xrevrange,
    "XDEL": _xdel,
    "XPENDING": _xpending,
    "XINFO STREAM": _xinfo_stream,
    "XINFO GROUPS": _xinfo_groups,
    "XINFO CONSUMERS": _xinfo_consumers,
    "XGROUP CREATE": _xgroup_create,
    "TIME": _time,
    "INFO": _info,
}
