"""Pausing groups, and what that will mean for those who publish."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from bus.admin.scope import rows_of
from bus.config import checked_number
from bus.errors import DeclarationError
from bus.history.backlog import name_of, seconds_left
from bus.history.inspector import Inspector, paused_of
from bus.history.patience import patiently, twice_at_worst
from bus.history.snapshot import GroupSnapshot, Paused, StreamSnapshot
from bus.streams import keys
from bus.streams.pauses import Pause, Place
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable

MOST_S = 366 * 86_400  # a pause that is longer has no end that anybody would wait for


@dataclass(frozen=True, slots=True)
class Held:
    """What a paused group holds of one stream.

    needed: entries that it holds there now, at least. appends_per_s: how fast the stream grows.
    full_in_s: an estimate of when publishers will feel it: the group needs all that comes from now
    on, and what it does not need goes. None if nothing comes.
    """

    stream: str
    needed: int
    maxlen: int
    appends_per_s: float
    full_in_s: float | None


@dataclass(frozen=True, slots=True)
class PausedGroup:
    """A group that is paused on one topic, and what it holds there.

    streams: those that have it and may be looked at.
    """

    group: str
    topic: str
    paused: Paused
    streams: tuple[Held, ...]

    @property
    def full_in_s(self) -> float | None:
        """When publishers will feel it first; None if nothing comes."""
        times = [s.full_in_s for s in self.streams if s.full_in_s is not None]
        return min(times, default=None)


async def pause(
    store: StreamStore,
    topics: TopicTable,
    inspector: Inspector,
    group: str,
    topic: str | None,
    until: datetime | timedelta | None,
    why: str,
) -> tuple[PausedGroup, ...]:
    """Pause a group. See `Admin.pause_group`."""
    streams = await rows_of(store, topics, group, topic)
    now_ms, before = await patiently(store.pauses.look)
    until_ms = _until_ms(until, now_ms)
    said = why.encode("utf-8", "replace").decode()  # a terminal may send any bytes
    names = sorted({keys.topic_of(s) for s in streams})
    paused = {}
    for name in names:
        old = before.get((name, group))
        if old is None or not old.holds(now_ms):
            old = Pause(now_ms)
        paused[name] = Pause(old.since_ms, until_ms, said or old.why)
        await patiently(partial(store.pauses.pause, (name, group), paused[name]))
    snapshot = await inspector.snapshot(names)
    return tuple(
        PausedGroup(
            group,
            seen.name,
            paused_of(paused[seen.name]),
            tuple(
                held(stream, g)
                for stream in seen.streams
                if stream.error is None
                for g in stream.groups
                if g.group == name_of(keys.wire(group))
            ),
        )
        for seen in snapshot.topics
    )


async def resume(
    store: StreamStore, topics: TopicTable, group: str, topic: str | None
) -> tuple[str, ...]:
    """End the pauses of a group; return the topics of which it was paused."""
    now_ms, pauses = await patiently(store.pauses.look)
    places = {(t, g): p for (t, g), p in pauses.items() if g == group and topic in (None, t)}
    if not places:  # an unknown group is an error, one that was not paused is none
        await rows_of(store, topics, group, topic)
    resumed = []
    for place, pause in sorted(places.items()):
        if await ended(store, place) and pause.holds(now_ms):
            resumed.append(place[0])
    return tuple(resumed)


async def paused_topics(store: StreamStore, group: str) -> frozenset[str]:
    """Return the topics on which a group is paused now."""
    now_ms, pauses = await patiently(store.pauses.look)
    return frozenset(t for (t, g), p in pauses.items() if g == group and p.holds(now_ms))


async def ended(store: StreamStore, place: Place) -> bool:
    """End one pause; return whether there was one."""
    there, in_doubt = await twice_at_worst(partial(store.pauses.resume, place))
    return there or in_doubt


def _until_ms(until: datetime | timedelta | None, now_ms: int) -> int | None:
    """Return when a pause ends, by the server's clock. Errors: DeclarationError."""
    if until is None:
        return None
    if isinstance(until, datetime):
        if until.tzinfo is None:
            raise DeclarationError("until has no time zone: use datetime.now(UTC)")
        ms = round(until.timestamp() * 1000)
    elif isinstance(until, timedelta):
        ms = now_ms + round(until.total_seconds() * 1000)
    else:
        raise DeclarationError(f"until is a datetime or a timedelta, not {until!r}")
    checked_number((ms - now_ms) / 1000, "the time until then, in seconds,", 0.001, MOST_S)
    return ms


def held(stream: StreamSnapshot, group: GroupSnapshot) -> Held:
    """Estimate how long a stream can do without a group.

    What the group is done with goes first, unless another group needs it, too.
    """
    needed = min(stream.length, group.undelivered + group.pending)
    stays = needed if stream.pinned_by in (None, group.group) else stream.length
    room = max(0, stream.maxlen - stays)
    return Held(
        stream.stream,
        needed,
        stream.maxlen,
        stream.appends_per_s,
        seconds_left(room, stream.appends_per_s),
    )
