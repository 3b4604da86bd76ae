"""What the tables of several commands have in common."""

from collections.abc import Iterable
from typing import NamedTuple

from bus.cli.output import Column
from bus.history.backlog import duration
from bus.history.snapshot import GroupSnapshot, StreamSnapshot, TopicSnapshot


class Row(NamedTuple):
    """A group on one topic, over all its streams."""

    topic: TopicSnapshot
    group: GroupSnapshot


def groups_of(topics: Iterable[TopicSnapshot]) -> list[Row]:
    """Return every group of every topic."""
    return [Row(topic, group) for topic in topics for group in topic.groups]


def age(seconds: float | None) -> str:
    """Return a length of time as a person says it; nothing for None."""
    return "" if seconds is None else duration(seconds)


def rate(per_s: float) -> str:
    """Return how many a second."""
    return f"{per_s:,.1f}" if per_s else ""


def undelivered(group: GroupSnapshot) -> str:
    """Return how many entries a group was not given; `>`: there are more."""
    return f"{'>' * group.at_least}{group.undelivered:,}"


def state(group: GroupSnapshot) -> str:
    """Return why a group does nothing, if it does nothing."""
    said = [] if group.served else ["not served"]
    if group.paused is not None:
        until = group.paused.until
        said.append("paused" if until is None else f"paused until {until:%Y-%m-%d %H:%M:%S}Z")
        if group.paused.why:
            said[-1] += f" ({group.paused.why})"
    return ", ".join(said)


GROUPS: tuple[Column, ...] = (
    ("topic", lambda r: r.topic.name),
    ("group", lambda r: r.group.group),
    ("undelivered", lambda r: undelivered(r.group)),
    ("running", lambda r: r.group.running),
    ("parked", lambda r: r.group.parked),
    ("orphaned", lambda r: r.group.orphaned),
    ("inbox", lambda r: r.group.inbox),
    ("dead", lambda r: r.group.dead),
    ("oldest", lambda r: age(r.group.oldest_age_s) or "-"),
    ("workers", lambda r: r.group.workers),
    ("", lambda r: state(r.group)),
)


def _pinned(stream: StreamSnapshot) -> str:
    if stream.pinned_by is None:
        return ""
    return f"{stream.pinned_by}, {age(stream.pinned_age_s)}"


STREAMS: tuple[Column, ...] = (
    ("stream", lambda s: s.stream),
    ("entries", lambda s: s.length),
    ("room", lambda s: s.room),
    ("a second", lambda s: rate(s.appends_per_s)),
    ("first", lambda s: s.first_id),
    ("last", lambda s: s.last_id),
    ("pinned by", _pinned),
    ("full in", lambda s: age(s.full_in_s)),
    ("dead", lambda s: s.dead),
    ("workers", lambda s: s.workers),
    ("", lambda s: s.error or ""),
)
