"""What a bus looks like at one moment, as values: topics, streams, groups, consumers, lanes.

All of it is plain data: `msgspec.to_builtins(snapshot)` is ready for JSON, `print(snapshot)` is for
people. Ages and durations are seconds by the server's clock, as of `Snapshot.time`; an age is that
of an entry's id, so counted from when it was appended.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from bus.history.backlog import duration, room_left
from bus.topic import OnFull

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LaneSnapshot:
    """Entries that wait for one moment.

    due_in_s: until then, 0 when it has come. pending: entries.
    """

    due_in_s: float
    pending: int


@dataclass(frozen=True, slots=True)
class ConsumerSnapshot:
    """A worker, as a group knows it.

    alive: whether its lease exists; of a consumer of another language, which keeps none, whether
        the server heard of it within the last minute.
    pending: entries it was given and has not finished.
    idle_s: since the server last heard of it; Redis before 7.2 does not count reads in vain.
    leased: whether it is of those that keep a lease while they live.
    """

    name: str
    alive: bool
    pending: int
    idle_s: float
    leased: bool = False


@dataclass(frozen=True, slots=True)
class Paused:
    """Why nothing of a group starts: an operator said so. until: None for no end. why: his words.

    since: when that was, None where it does not say; UTC, as `until`, by the server's clock.
    """

    since: datetime | None
    until: datetime | None
    why: str


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    """What one group still has to do, and who does it.

    undelivered: entries it has not been given; at_least: there are more than that.
    pending: entries of the stream given to it and neither finished nor dead-lettered.
    inbox: entries that wait for it alone, redriven, replayed or moved there; inbox_pending: those
        of them that were given to a worker.
    running, parked, orphaned: all that is pending, in stream and inbox together: with a worker that
        lives, in a lane, or with a worker that is gone. due: of those parked, those whose time has
        come.
    dead: its dead letters.
    oldest_undelivered_age_s: None when nothing is. oldest_pending_age_s: in the stream; None when
        nothing is, or the entry of nothing that is exists any more.
    oldest_dead_age_s, newest_dead_age_s: since they died; None when there is none.
    served: whether a worker that lives says so, or a consumer of another language was heard of.
    paused: by whom it was told to start nothing; None when it was not.
    lag: what the server itself counts as undelivered, right or wrong; None where it does not know.
    consumers: by name, lanes not among them. lanes: the next due first.
    workers: those that live and say that they serve it, and consumers of another language that were
        heard of.
    """

    group: str
    undelivered: int
    at_least: bool
    pending: int
    inbox: int
    inbox_pending: int
    running: int
    parked: int
    due: int
    orphaned: int
    dead: int
    oldest_undelivered_age_s: float | None
    oldest_pending_age_s: float | None
    oldest_dead_age_s: float | None
    newest_dead_age_s: float | None
    served: bool
    paused: Paused | None
    lag: int | None
    consumers: tuple[ConsumerSnapshot, ...]
    lanes: tuple[LaneSnapshot, ...]
    workers: int = 0

    @property
    def total(self) -> int:
        """Everything it has to do: undelivered, pending and inbox."""
        return self.undelivered + self.pending + self.inbox

    @property
    def oldest_age_s(self) -> float | None:
        """The age of the oldest entry that it was not given, or has not finished."""
        return _largest((self.oldest_undelivered_age_s, self.oldest_pending_age_s))


@dataclass(frozen=True, slots=True)
class StreamSnapshot:
    """One partition.

    length, maxlen, keep, room: entries; room is what still fits below maxlen, 0 when full.
    added: since the stream began; None where the server keeps no count (Redis 6.2).
    first_id, oldest_age_s: of its first entry; last_id, newest_age_s: of its last. None without.
    appends_per_s: since one of the snapshots before, 5 to 10 s ago where they are that frequent,
        else from when the newest 100 entries came.
    pinned_by: the group that needs the oldest entry of those that any group needs: no trim goes
        past that. pinned_age_s: of that entry. None when every group is done with everything.
    full_in_s: an estimate of when publishers will feel it: the room divided by `appends_per_s`, as
        if nothing were freed until then. 0 when it is full; None when nobody pins it or nothing
        comes.
    workers: those alive that keep a lease on it. dead: the dead letters of all its groups.
    error: what could not be looked at, and why; the rest is shown all the same. None: nothing.
    generated_id: the last id that an entry ever had here; the server chooses larger ones. None
        where there is no stream.
    """

    stream: str
    partition: int
    length: int
    added: int | None
    maxlen: int
    keep: int
    room: int
    first_id: str | None
    last_id: str | None
    oldest_age_s: float | None
    newest_age_s: float | None
    appends_per_s: float
    pinned_by: str | None
    pinned_age_s: float | None
    full_in_s: float | None
    workers: int
    dead: int
    error: str | None
    groups: tuple[GroupSnapshot, ...]
    generated_id: str | None = None


@dataclass(frozen=True, slots=True)
class TopicSnapshot:
    """One topic: what is recorded of it, or holds by default, and its streams.

    maxlen, keep: entries per stream. retention_s: None for no limit. implicit: nobody declared it.
    groups: by name, each summed over the streams. Numbers are sums, "at least" if one of them is;
    ages are the largest, of the newest dead letter the smallest; served if served on every stream
    that has the group, by as many workers as are on each; a consumer is alive if it is on one.
    """

    name: str
    partitions: int
    maxlen: int
    keep: int
    on_full: OnFull
    retention_s: float | None
    implicit: bool
    streams: tuple[StreamSnapshot, ...]
    groups: tuple[GroupSnapshot, ...]

    @property
    def length(self) -> int:
        """The entries of all streams, handled or not."""
        return sum(s.length for s in self.streams)

    @property
    def dead(self) -> int:
        """The dead letters of all groups."""
        return sum(s.dead for s in self.streams)

    @property
    def appends_per_s(self) -> float:
        """How fast all streams grow together."""
        return sum(s.appends_per_s for s in self.streams)

    def group(self, name: str) -> GroupSnapshot:
        """Return one group, summed over the streams. Errors: KeyError when there is none."""
        return _named(name, ((g.group, g) for g in self.groups))


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The server itself.

    kind: "valkey" or "redis". memory_bytes: in use; memory_limit_bytes: None when it has none.
    uptime_s: since its start.
    """

    kind: str
    version: str
    uptime_s: int
    memory_bytes: int
    memory_limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A bus at one moment; made by `Bus.inspect`.

    time: by the server's clock. What is not of one stream was looked at some milliseconds earlier
    or later, so that numbers agree with one another only as far as nothing moves.
    server: None when the user may not ask (INFO). topics: by name. errors: what is wrong with the
    records of topics that are left out, since nobody can read them, or with the pauses.
    """

    time: datetime
    server: ServerFacts | None
    topics: tuple[TopicSnapshot, ...]
    errors: tuple[str, ...] = ()

    def topic(self, name: str) -> TopicSnapshot:
        """Return one topic. Errors: KeyError when it was not looked at."""
        return _named(name, ((t.name, t) for t in self.topics))

    def __str__(self) -> str:
        lines = [f"{self.time:%Y-%m-%d %H:%M:%S}Z{_server(self.server)}"]
        for topic in self.topics:
            lines += ["", _headline(topic), *_table(topic.groups)]
            lines += [f"  {line}" for s in topic.streams for line in _remarks(s)]
        lines += ["", *self.errors] if self.errors else []
        return "\n".join(lines)


def summed(parts: Sequence[GroupSnapshot]) -> GroupSnapshot:
    """Return one group over several streams. See `TopicSnapshot`."""
    if len(parts) == 1:
        return parts[0]
    consumers: dict[str, ConsumerSnapshot] = {}
    lanes: dict[float, int] = {}
    for part in parts:
        for lane in part.lanes:
            lanes[lane.due_in_s] = lanes.get(lane.due_in_s, 0) + lane.pending
        for one in part.consumers:
            other = consumers.get(one.name)
            consumers[one.name] = one if other is None else _joined(one, other)
    newest = [p.newest_dead_age_s for p in parts if p.newest_dead_age_s is not None]
    return GroupSnapshot(
        parts[0].group,
        sum(p.undelivered for p in parts),
        any(p.at_least for p in parts),
        sum(p.pending for p in parts),
        sum(p.inbox for p in parts),
        sum(p.inbox_pending for p in parts),
        sum(p.running for p in parts),
        sum(p.parked for p in parts),
        sum(p.due for p in parts),
        sum(p.orphaned for p in parts),
        sum(p.dead for p in parts),
        _largest(p.oldest_undelivered_age_s for p in parts),
        _largest(p.oldest_pending_age_s for p in parts),
        _largest(p.oldest_dead_age_s for p in parts),
        min(newest, default=None),
        all(p.served for p in parts),
        next((p.paused for p in parts if p.paused), None),
        None if any(p.lag is None for p in parts) else sum(p.lag or 0 for p in parts),
        tuple(consumers[name] for name in sorted(consumers)),
        tuple(LaneSnapshot(*lane) for lane in sorted(lanes.items())),
        min(p.workers for p in parts),
    )


def _joined(one: ConsumerSnapshot, other: ConsumerSnapshot) -> ConsumerSnapshot:
    """Return one consumer that two streams know."""
    return ConsumerSnapshot(
        one.name,
        one.alive or other.alive,
        one.pending + other.pending,
        min(one.idle_s, other.idle_s),
        one.leased or other.leased,
    )


def _largest(ages_s: Iterable[float | None]) -> float | None:
    return max((age for age in ages_s if age is not None), default=None)


def _named(name: str, pairs: Iterable[tuple[str, _T]]) -> _T:
    for other, value in pairs:
        if other == name:
            return value
    raise KeyError(name)


# --- to be read by people

_PINNED_S = 60.0  # who pins a stream for less is at work
_COLUMNS = (
    "group",
    "undelivered",
    "running",
    "parked",
    "due",
    "orphaned",
    "inbox",
    "dead",
    "oldest",
    "",
)


def _server(facts: ServerFacts | None) -> str:
    if facts is None:
        return ""
    limit = facts.memory_limit_bytes
    of = "" if limit is None else f" of {limit / 1e6:,.0f}"
    return f"  {facts.kind} {facts.version}, {facts.memory_bytes / 1e6:,.0f}{of} MB"


def _headline(topic: TopicSnapshot) -> str:
    streams = "1 stream" if len(topic.streams) == 1 else f"{len(topic.streams)} streams"
    entries = "1 entry" if topic.length == 1 else f"{topic.length:,} entries"
    workers = max((s.workers for s in topic.streams), default=0)
    served = "1 worker" if workers == 1 else f"{workers} workers"
    return f"{topic.name}: {entries} in {streams}, {topic.appends_per_s:,.1f} a second, {served}"


def _table(groups: Sequence[GroupSnapshot]) -> list[str]:
    """Return the groups, a line each, below a line that names the columns."""
    if not groups:
        return []
    rows = [_COLUMNS, *(_row(g) for g in groups)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (
            "  "
            + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1])])
            + f"  {row[-1]}"
        ).rstrip()
        for row in rows
    ]


def _row(group: GroupSnapshot) -> tuple[str, ...]:
    oldest = group.oldest_age_s
    return (
        _printable(group.group),
        f"{'>' * group.at_least}{group.undelivered:,}",
        f"{group.running:,}",
        f"{group.parked:,}",
        f"{group.due:,}",
        f"{group.orphaned:,}",
        f"{group.inbox:,}",
        f"{group.dead:,}",
        "-" if oldest is None else duration(oldest),
        _remark(group),
    )


def _remark(group: GroupSnapshot) -> str:
    """Return why a group does nothing, if it does nothing."""
    said = [] if group.served else ["not served"]
    if group.paused is not None:
        until = group.paused.until
        said.append("paused" if until is None else f"paused until {until:%Y-%m-%d %H:%M:%S}Z")
    return ", ".join(said)


def _remarks(stream: StreamSnapshot) -> list[str]:
    """Return what deserves attention."""
    lines = []
    if stream.error is not None:
        lines.append(f"{stream.stream}: {_printable(stream.error)}")
    if stream.pinned_by is not None and (stream.pinned_age_s or 0) >= _PINNED_S:
        since = f"for {duration(stream.pinned_age_s or 0)}"
        left = room_left(stream.room, stream.maxlen, stream.full_in_s)
        lines.append(f"{stream.stream} is pinned by {_printable(stream.pinned_by)} {since}, {left}")
    elif stream.room == 0:
        lines.append(f"{stream.stream} is full")
    return lines


def _printable(name: str) -> str:
    """Return a name that others gave without what a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in name)
