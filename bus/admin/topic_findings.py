"""What is wrong with topics and their streams. Pure functions over a snapshot.

Who needs a stream's oldest entry is at work on it most of the time: that is a finding only if it
has lasted for a while, and matters.
"""

from collections.abc import Iterator, Mapping

from bus.admin.finding import Finding, Severity, bus, counted, printable, redis_cli
from bus.config import UNSERVED_SHARE
from bus.envelope import order
from bus.history.backlog import duration, room_left
from bus.history.snapshot import GroupSnapshot, Snapshot, StreamSnapshot, TopicSnapshot
from bus.streams import keys

PINNED_S = 60.0  # who needs an entry for less is at work on it
SOON_S = 86_400.0  # a stream that is full within a day is to be seen to today
LONG_S = 7 * 86_400.0  # of a group that nobody read for so long the handler is gone
NODES = 200  # entries that may stay above a mark, since whole nodes of up to 100 are trimmed
RETENTION_SHARE = 0.8  # of the retention time: then there is still time to do something
CHORES_S = 300.0  # by then the janitor of any worker has trimmed what is too old
AHEAD_S = 60.0  # beyond what a clock that was set right makes of ids
_LAST = 2**64 - 1  # ms and sequence of the largest id there is


def topics(address: str, snapshot: Snapshot) -> Iterator[Finding]:
    """Judge all topics, and their streams one by one."""
    for topic in snapshot.topics:
        yield from _as_a_whole(topic)
        for stream in topic.streams:
            yield from full(topic, stream)
            yield from retention(topic, stream)
            yield from future(address, topic, stream, snapshot.time.timestamp())


def _as_a_whole(topic: TopicSnapshot) -> Iterator[Finding]:
    if not topic.length:
        return
    held = counted(topic.length, "entry")
    if topic.implicit:
        yield Finding(
            "implicit",
            "note",
            f"topic {topic.name} has {held} and was never declared: it has one partition and the"
            " default marks by its first use",
            topic=topic.name,
        )
    if not topic.groups:
        yield Finding(
            "no-group",
            "note",
            f"topic {topic.name} has {held} and no group: no handler is given any of them",
            bus("worker", "PACKAGE"),
            topic=topic.name,
        )


# --- how long streams are


def full(topic: TopicSnapshot, stream: StreamSnapshot) -> Iterator[Finding]:
    """Judge how full a stream is, and who holds it."""
    pinned_s = stream.pinned_age_s or 0.0
    if stream.pinned_by is None:
        yield from _oversize(topic, stream)
    elif stream.room == 0:
        feel = {
            "block": "publishers wait",
            "reject": "publishers are refused",
            "drop_oldest": "the oldest entries are dropped unhandled",
        }[topic.on_full]
        yield _held(
            "full",
            "problem" if pinned_s >= PINNED_S else "note",
            topic,
            stream,
            f"is full, with {stream.length:,} entries of {stream.maxlen:,}, and {feel}",
        )
    elif pinned_s >= PINNED_S and not _waits_for_retries(stream):
        used = (stream.length - stream.keep) / (stream.maxlen - stream.keep)
        soon = stream.full_in_s is not None and stream.full_in_s < SOON_S
        rate = f"{stream.appends_per_s:,.1f} entries a second"
        left = room_left(stream.room, stream.maxlen, stream.full_in_s)
        if soon or used >= UNSERVED_SHARE:
            yield _held("pinned", "warning", topic, stream, f"takes {rate} and has {left}")


def _held(
    check: str, severity: Severity, topic: TopicSnapshot, stream: StreamSnapshot, what: str
) -> Finding:
    """Return a finding about a stream that a group holds, and what makes that go on."""
    group = topic.group(stream.pinned_by or "")
    since = duration(stream.pinned_age_s or 0.0)
    return Finding(
        check,
        severity,
        f"{stream.stream} {what}: group {printable(group.group)} needs what came {since} ago",
        freeing(topic, group, stream),
        topic=topic.name,
        group=group.group,
        stream=stream.stream,
    )


def freeing(
    topic: TopicSnapshot, group: GroupSnapshot, stream: StreamSnapshot | None = None
) -> str:
    """Return the command that lets a group go on: what it lacks, or else room to wait for it."""
    if group.paused is not None:
        return bus("groups resume", group.group, topic=topic.name)
    if not group.served:
        return staffing(topic, group)
    if (group.oldest_undelivered_age_s or 0.0) < (group.oldest_pending_age_s or 0.0):
        return bus("pending ls", group.group, topic=topic.name)
    if stream is None:
        return bus("groups lag", group.group, topic=topic.name)
    return bus("topics set", topic.name, options=f"--maxlen {2 * topic.maxlen}")


def staffing(topic: TopicSnapshot, group: GroupSnapshot) -> str:
    """Return the command for a group that nobody serves: to remove it, if nobody has for long.

    Workers that are stopped leave no consumer behind: a group without any may be between two
    deployments, and then only the age of what waits tells.
    """
    lately = any(c.idle_s < LONG_S for c in group.consumers)
    waits_long = (group.oldest_undelivered_age_s or 0.0) >= LONG_S
    if lately or not (waits_long or group.consumers):
        return bus("worker", "PACKAGE")
    return bus("groups rm", group.group, topic=topic.name)


def _waits_for_retries(stream: StreamSnapshot) -> bool:
    """Return whether a group keeps up, and only what waits for its next attempt holds the stream.

    Such entries are moved aside by the workers before publishers feel it.
    """
    group = next(g for g in stream.groups if g.group == stream.pinned_by)
    keeps_up = (group.oldest_undelivered_age_s or 0.0) < PINNED_S
    return keeps_up and group.served and group.parked > 0 and not group.orphaned


def _oversize(topic: TopicSnapshot, stream: StreamSnapshot) -> Iterator[Finding]:
    """Judge a stream of which nobody needs anything any more, but what `keep` says stays."""
    slack = max(NODES, (stream.maxlen - stream.keep) // 10)
    if stream.length <= stream.keep + slack:
        return
    yield Finding(
        "oversize",
        "note",
        f"{stream.stream} holds {stream.length:,} entries, of which no group needs any and"
        f" {stream.keep:,} are to be kept: what is published next trims it, or a worker",
        bus("topics trim", topic.name, options=f"--keep {stream.keep}"),
        topic=topic.name,
        stream=stream.stream,
    )


# --- how old entries are


def retention(topic: TopicSnapshot, stream: StreamSnapshot) -> Iterator[Finding]:
    """Judge the oldest entries against the time after which they are to go."""
    limit_s = topic.retention_s
    if limit_s is None:
        return
    for group in stream.groups:
        age_s = group.oldest_age_s or 0.0
        if age_s < max(PINNED_S, RETENTION_SHARE * limit_s):
            continue
        over = age_s > limit_s + PINNED_S
        told = "is kept beyond that" if over else "will be kept beyond that"
        yield Finding(
            "retention",
            "problem" if over else "warning",
            f"an entry of {stream.stream} is {duration(age_s)} old, of {duration(limit_s)} of"
            f" retention, and {told}: group {printable(group.group)} needs it",
            freeing(topic, group),
            topic=topic.name,
            group=group.group,
            stream=stream.stream,
        )
    oldest_s, pinned_s = stream.oldest_age_s or 0.0, stream.pinned_age_s or 0.0
    if oldest_s > limit_s + CHORES_S and pinned_s < oldest_s - CHORES_S:
        yield Finding(
            "retention",
            "warning",
            f"{stream.stream} begins {duration(oldest_s)} ago, although no group needs that and its"
            f" retention is {duration(limit_s)}: workers trim by age, and none does",
            bus("topics trim", topic.name, options=f"--before @-{limit_s:.0f}s"),
            topic=topic.name,
            stream=stream.stream,
        )


def future(
    address: str, topic: TopicSnapshot, stream: StreamSnapshot, now_s: float
) -> Iterator[Finding]:
    """Judge the last id against the server's clock: ids go on from there."""
    if stream.generated_id is None:
        return
    ms, sequence = order(stream.generated_id)
    ahead_s = ms / 1000 - now_s
    if ahead_s < AHEAD_S:
        return
    last = (ms, sequence) == (_LAST, _LAST)
    what = "is the largest there is: nothing can be published any more"
    if not last:
        what = (
            f"lies {duration(ahead_s)} in the future: until then all that is published has its time"
        )
    newest = f"XREVRANGE {stream.stream} + - COUNT 10"
    yield Finding(
        "ids",
        "problem" if last else "warning",
        f"the last id of {stream.stream} {what}, since somebody chose ids himself",
        redis_cli(address, *newest.split()),
        topic=topic.name,
        stream=stream.stream,
    )


# --- what cannot be read


def records(address: str, wrong: Mapping[str, str]) -> Iterator[Finding]:
    """Tell of the records of topics that nobody can read; name -> what is wrong."""
    for name, why in wrong.items():
        yield Finding(
            "records",
            "problem",
            f"{printable(why)}: publishers and workers of that topic fail",
            redis_cli(address, "HDEL", keys.TOPICS, name),
            topic=name,
        )


def types(address: str, found: Mapping[str, tuple[str, str]]) -> Iterator[Finding]:
    """Tell of keys that hold something else; key -> the type it has, the type it should have."""
    for key, (kind, should) in found.items():
        topic = keys.topic_of(key) if "{" in key else None
        yield Finding(
            "types",
            "problem",
            f"{printable(key)} is a {kind} and should be a {should}: whoever uses it fails",
            redis_cli(address, "RENAMENX", key, f"aside:{key}"),
            topic=topic,
            stream=keys.home(key) if topic else None,
        )


def unseen(snapshot: Snapshot, told: frozenset[str]) -> Iterator[Finding]:
    """Tell of streams that could not be looked at whole; not of those that were told of."""
    for topic in snapshot.topics:
        for stream in topic.streams:
            if stream.error is not None and stream.stream not in told:
                yield Finding(
                    "hidden",
                    "warning",
                    f"{stream.stream} could not be looked at whole: {printable(stream.error)}",
                    bus("topics info", topic.name),
                    topic=topic.name,
                    stream=stream.stream,
                )
