"""How far behind the groups of a topic are, who holds its streams, and how long that can go on.

Undelivered entries, per group and stream, come from the first of these that applies:

nothing is left        the group's last-delivered id is at or past the last entry: 0
nothing was read       it lies before the first entry: the length of the stream
up to 100 are left     they are looked at, one by one
the server knows       entries-added - entries-read, called lag in XINFO GROUPS: exact; which of
                       these counters to believe is in `streams/lag.py`
else                   counted, up to 10,000; where more are left it is "at least 10,000"
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from bus.config import INSPECT_PATIENCE_S
from bus.envelope import entry_time, order
from bus.history.patience import patiently
from bus.streams.inspection import LOOKED_AHEAD, RECENT_MS, GroupSeen, StreamSeen, count, look
from bus.streams.lag import undelivered_of
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable

COUNTED_MOST = 10_000  # undelivered entries that are counted where the server keeps no counter
STREAMS_AT_ONCE = 64  # streams looked at in one write; their replies are in memory together


@dataclass(frozen=True, slots=True)
class GroupBacklog:
    """What one group still has to do.

    undelivered: entries it has not been given; at_least: there are more than that.
    pending: given to it and neither finished nor dead-lettered, parked ones included.
    inbox: entries that wait for it alone, redriven, replayed or moved there.
    oldest_undelivered_age_s: age of the oldest entry it has not been given, in seconds by the
        server's clock; None when there is none. Always exact.
    share: of the room between keep and maxlen, how much it pins, 0 to 1 (more in the reserve).
        Exact for the group that holds the floor while that is within 10,000 entries of the front;
        for others what they have undelivered and pending, at least.
    """

    group: str
    undelivered: int
    at_least: bool
    pending: int
    inbox: int
    oldest_undelivered_age_s: float | None
    share: float

    @property
    def total(self) -> int:
        """Everything it has to do: undelivered, pending and inbox."""
        return self.undelivered + self.pending + self.inbox

    def __str__(self) -> str:
        parts = []
        if self.pending:
            parts.append(f"{self.pending:,} pending")
        if self.undelivered:
            parts.append(f"{'at least ' * self.at_least}{self.undelivered:,} undelivered")
        if self.inbox:
            parts.append(f"{self.inbox:,} in its inbox")
        if self.oldest_undelivered_age_s is not None:
            parts.append(f"oldest {duration(self.oldest_undelivered_age_s)}")
        return ", ".join(parts) or "nothing to do"


@dataclass(frozen=True, slots=True)
class StreamBacklog:
    """What one stream holds, and who holds it.

    length, maxlen, keep, room: entries; room is what still fits below maxlen, 0 when full.
    pinned_by: the group that needs the oldest entry of those that any group needs: no trim goes
        past that. None when every group is done with everything.
    pinned_since: when that entry was appended, UTC.
    full_in_s: an estimate, in seconds, of when publishers will feel it: the room divided by how
        fast the newest 100 entries came, as if nothing were freed until then. 0 when it is full,
        None when nobody pins it or nothing was published in the last 10 minutes.
    """

    stream: str
    length: int
    maxlen: int
    keep: int
    room: int
    groups: tuple[GroupBacklog, ...]
    pinned_by: str | None
    pinned_since: datetime | None
    full_in_s: float | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """The backlog of a topic, stream by stream. `print(backlog)` shows a line per group."""

    topic: str
    streams: tuple[StreamBacklog, ...]

    @property
    def length(self) -> int:
        """The entries of all streams, handled or not."""
        return sum(s.length for s in self.streams)

    @property
    def groups(self) -> tuple[GroupBacklog, ...]:
        """Every group, summed over the streams, by name."""
        return tuple(self.of(n) for n in sorted({g.group for s in self.streams for g in s.groups}))

    def of(self, group: str) -> GroupBacklog:
        """Return one group's backlog over all streams.

        Numbers are sums, "at least" if one of them is; age and share are the largest.
        Errors: KeyError when no stream has such a group.
        """
        parts = [g for s in self.streams for g in s.groups if g.group == group]
        if not parts:
            raise KeyError(group)
        ages = [p.oldest_undelivered_age_s for p in parts if p.oldest_undelivered_age_s is not None]
        return GroupBacklog(
            group,
            sum(p.undelivered for p in parts),
            any(p.at_least for p in parts),
            sum(p.pending for p in parts),
            sum(p.inbox for p in parts),
            max(ages, default=None),
            max(p.share for p in parts),
        )

    def __str__(self) -> str:
        streams = "1 stream" if len(self.streams) == 1 else f"{len(self.streams)} streams"
        entries = "1 entry" if self.length == 1 else f"{self.length:,} entries"
        lines = [f"{self.topic}: {entries} in {streams}"]
        width = max((len(g.group) for g in self.groups), default=0)
        lines += [f"  {g.group:{width}}  {g}" for g in self.groups]
        lines += [f"  {_pin(s)}" for s in self.streams if s.pinned_by is not None]
        return "\n".join(lines)


async def backlog(store: StreamStore, topics: TopicTable, topic: str) -> Backlog:
    """Return the backlog of `topic`. See `Bus.backlog`."""
    return await patiently(lambda: _backlog(store, topics, topic), INSPECT_PATIENCE_S)


async def _backlog(store: StreamStore, topics: TopicTable, topic: str) -> Backlog:
    record = await topics.existing(topic)
    streams = topics.streams(topic, record.partitions)
    found: list[StreamBacklog] = []
    for at in range(0, len(streams), STREAMS_AT_ONCE):
        for seen in await look(store, streams[at : at + STREAMS_AT_ONCE]):
            found.append(await of_stream(store, seen, record))  # noqa: PERF401 - it may count
    return Backlog(topic, tuple(found))


def appends_per_s(newest: Sequence[bytes], now_ms: int) -> float:
    """Return how fast a stream grows, from its newest ids, the newest first.

    Entries after the oldest of them, over the time since then: it decays while nothing comes.
    """
    if not newest or now_ms - order(newest[0])[0] > RECENT_MS:
        return 0.0
    return (len(newest) - 1) * 1000 / max(1, now_ms - order(newest[-1])[0])


def pinning(groups: Iterable[GroupSeen]) -> tuple[GroupSeen, bytes] | None:
    """Return the group that needs the oldest entry, and that entry's id; None if none is needed."""
    needs = []
    for group in groups:
        ids = group.ahead[:1] + ([group.oldest_pending] if group.oldest_pending else [])
        if ids:
            needs.append((group, min(ids, key=order)))
    return min(needs, key=lambda need: order(need[1]), default=None)


async def of_stream(store: StreamStore, seen: StreamSeen, record: Record) -> StreamBacklog:
    """Judge what was seen of one stream; asks the server only where something must be counted."""
    length = seen.info.get("length", 0)
    pin = pinning(seen.groups)
    groups = []
    for group in seen.groups:
        undelivered, at_least = await _undelivered(store, seen, group)
        pinned = undelivered + group.row["pending"]
        if pin and pin[0] is group:
            pinned = length - await _spare(store, seen.stream, pin[1], length - record.keep)
        groups.append(
            GroupBacklog(
                name_of(group.group),
                undelivered,
                at_least,
                group.row["pending"],
                group.inbox,
                _age_s(group, seen.now_ms),
                max(0, min(pinned, length) - record.keep) / (record.maxlen - record.keep),
            )
        )
    room = max(0, record.maxlen - length)
    rate = appends_per_s(seen.newest, seen.now_ms)
    return StreamBacklog(
        seen.stream,
        length,
        record.maxlen,
        record.keep,
        room,
        tuple(groups),
        None if pin is None else name_of(pin[0].group),
        None if pin is None else entry_time(pin[1]),
        None if pin is None else seconds_left(room, rate),
    )


async def _undelivered(store: StreamStore, seen: StreamSeen, group: GroupSeen) -> tuple[int, bool]:
    """Return how many, and whether there are more."""
    ahead = len(group.ahead)
    if ahead <= LOOKED_AHEAD:
        return ahead, False
    known = undelivered_of(group.row, seen.info)
    if known is not None:
        return max(known, ahead), False  # some may have come between the two looks
    beyond = "(" + group.ahead[-1].decode()
    counted = ahead + await count(store, seen.stream, beyond, "+", COUNTED_MOST + 1 - ahead)
    return min(counted, COUNTED_MOST), counted > COUNTED_MOST


async def _spare(store: StreamStore, stream: str, floor: bytes, most: int) -> int:
    """Return the entries before `floor`, up to `most`: more than that are kept in any case.

    A stream above `keep` is trimmed to its floor, so there is little to count.
    """
    return await count(store, stream, "-", "(" + floor.decode(), min(most, COUNTED_MOST))


def _age_s(group: GroupSeen, now_ms: int) -> float | None:
    return max(0, now_ms - order(group.ahead[0])[0]) / 1000 if group.ahead else None


def seconds_left(room: int, per_s: float) -> float | None:
    """Return how long `room` entries last at a rate; None for ever."""
    if room == 0:
        return 0.0
    return room / per_s if per_s else None


def name_of(group: bytes) -> str:
    """Return a group's name to be shown; others may have given it any bytes."""
    return group.decode(errors="backslashreplace")


def duration(seconds: float) -> str:
    """Return a length of time as a person says it."""
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{seconds:.0f} s"


def room_left(room: int, maxlen: int, full_in_s: float | None) -> str:
    """Return how much fits and how long that lasts, as a person says it."""
    text = f"room for {room:,} of {maxlen:,}"
    if full_in_s is not None:
        text += f", full in about {duration(full_in_s)}" if full_in_s else ", full"
    return text


def _pin(stream: StreamBacklog) -> str:
    since = "" if stream.pinned_since is None else f"{stream.pinned_since:%Y-%m-%d %H:%M:%S}Z"
    left = room_left(stream.room, stream.maxlen, stream.full_in_s)
    return f"{stream.stream} is pinned by {stream.pinned_by} since {since}, {left}"
