"""Following topics from any point on: what was is read page by page, what comes as it comes."""

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Self

from bus.config import LOOK_PATIENCE_S, TOPICS_S, checked_name
from bus.envelope import Envelope, order
from bus.errors import BusError, DeclarationError
from bus.history.event_store import streams_of
from bus.history.hub import Hub
from bus.history.patience import patiently
from bus.history.place import LAST, START, Place
from bus.history.position import Position, as_id
from bus.history.pursuit import Pursuit
from bus.history.selection import Selection
from bus.streams import keys
from bus.streams.follower import sound_extents
from bus.streams.topics import TopicTable

After = Position | Mapping[str, Position]


class Tail:
    """Iterates over what is appended to topics, for ever; made by `Bus.tail`.

    `async for envelope in tail`, or `async with` around it, which fixes where it begins. Leaving
    the loop and dropping the tail unsubscribes, as `aclose` does. Each entry comes once, also
    when connections drop and servers restart: the tail goes on after the last one it has read,
    with growing pauses (`tail.failed`), for as long as it takes. A cancelled wait loses nothing;
    several tasks may take turns on one tail, and each entry goes to one of them.

    An entry that is trimmed before the tail has read it cannot come. When the entry that the tail
    read last is gone and older than the first one kept, entries may have been missed: that is told
    as `tail.gap` and counted in `gaps`. As long as it is not, none were missed since the first
    that came. A stream that ends before the place of the tail is told in the same way. It has
    lost its end to a restart with older data: the tail goes on from there, and brings nothing
    twice. Or it was seen to be gone in between, and has begun anew: then from its beginning.

    Errors of the iteration: PermissionDenied, WrongKeyType and others that time does not heal;
    the tail stays where it is and goes on when it is asked again. BusClosed.
    """

    def __init__(
        self,
        hub: Hub,
        topics: TopicTable,
        names: str | Iterable[str],
        after: After,
        selection: Selection,
    ) -> None:
        self._names = _names(names)
        self._after = _parsed(after, self._names)
        self._selection = selection
        self._topics = topics
        self._hub = hub
        self._pursuit = Pursuit(hub, selection)
        self._turn = asyncio.Lock()
        self._unsettled: list[str] = []  # topics that nobody has declared yet
        self._look_at_s = 0.0  # loop time at which they may have been
        self.gaps = 0

    @property
    def position(self) -> dict[str, str]:
        """Stream -> id of the entry that came last, or was passed over; before `ready`, of `after`.

        As `after` it makes another tail go on exactly there. It can be written as JSON. Empty if
        nothing is known yet: a tail from now on, or from a time, that has not begun.
        """
        places: Mapping[str, Place | None] = self._pursuit.places
        if not places and isinstance(self._after, dict):
            places = self._after
        return {stream: place.at.decode() for stream, place in places.items() if place}

    async def ready(self) -> None:
        """Fix where the tail begins: whatever is published after this returns will come.

        HGET per topic; from now on also XINFO STREAM per stream. Errors: UnknownTopic,
        DeclarationError for a position that names other streams, the ServerError family, BusClosed;
        a server that is away is waited for, 15 s.
        """
        if not self._pursuit.begun:
            async with self._turn:  # else somebody may hold it who waits for the next event
                await self._begin()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        while True:
            envelope = self._pursuit.step()
            if envelope is not None:
                return envelope
            async with self._turn:
                await self._refill()

    async def aclose(self) -> None:
        """End the tail: who waits for it gets the end of the iteration."""
        await self._pursuit.end()

    async def __aenter__(self) -> Self:
        """Fix where the tail begins, as `ready` does."""
        await self.ready()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the tail."""
        await self.aclose()

    # --- where it begins

    async def _begin(self) -> None:
        if self._pursuit.begun:
            return
        starts = await self._starts(LOOK_PATIENCE_S)
        now = [stream for stream, start in starts.items() if start is None]
        look = partial(sound_extents, self._hub.store.archive, now)
        ends = {s: Place.end_of(e) for s, e in zip(now, await patiently(look), strict=True)}
        if not self._pursuit.over:
            places = {s: start or ends[s].copy() for s, start in starts.items()}
            self._pursuit.begin(self, places, ends)

    async def _starts(self, patience_s: float) -> dict[str, Place | None]:
        """Return where each stream is to be read from; None for its end."""
        found: dict[str, Place | None] = {}
        unsettled = []
        for name in self._names:
            record = await patiently(partial(self._topics.existing, name), patience_s)
            if record.implicit:
                unsettled.append(name)
            streams = streams_of(record, name, self._selection.key)
            if isinstance(self._after, dict):
                found |= _named(self._after, name, record.partitions, streams)
            else:
                one = len(self._names) == len(streams) == 1
                found |= {s: _copy(self._after, shared=not one) for s in streams}
        self._unsettled = unsettled
        self._look_at_s = asyncio.get_running_loop().time() + TOPICS_S
        return found

    async def _look_for_partitions(self) -> None:
        """Read the partitions, too, that a topic got with its first declaration."""
        self._look_at_s = asyncio.get_running_loop().time() + TOPICS_S
        try:
            starts = await self._starts(0.0)
        except BusError:
            return  # the reads tell what is wrong with the server; this can wait
        places = self._pursuit.places
        # All that is in new ones was published after the tail had begun.
        added = {s: start or Place() for s, start in starts.items() if s not in places}
        if added:
            self._pursuit.add(added)

    # --- how it goes on

    async def _refill(self) -> None:
        """Get the next batch, or come nearer to it."""
        pursuit = self._pursuit
        if pursuit.over:
            raise StopAsyncIteration
        if not pursuit.begun:
            await self._begin()
            return  # others may wait for just that
        there = await pursuit.advance()
        self.gaps += len(pursuit.missed)
        pursuit.missed.clear()
        if not there:
            await self._wait()

    async def _wait(self) -> None:
        """Wait for what comes; where a topic may get partitions, look for them now and then."""
        if not self._unsettled:
            await self._pursuit.wait()
        elif (left_s := self._look_at_s - asyncio.get_running_loop().time()) > 0:
            await self._pursuit.wait(left_s)
        else:
            await self._look_for_partitions()


# --- positions


def _names(names: str | Iterable[str]) -> list[str]:
    one = isinstance(names, str) or not isinstance(names, Iterable)
    listed = [checked_name(name, "topic name") for name in ([names] if one else names)]
    if not listed:
        raise DeclarationError("a tail follows one topic or several, not none")
    return list(dict.fromkeys(listed))


def _parsed(after: After, names: list[str]) -> "Place | dict[str, Place | None] | None":
    """Return where to begin, None for the end. Errors: DeclarationError."""
    if not isinstance(after, Mapping):
        return _place(after)
    for stream in after:
        if not isinstance(stream, str) or not _is_partition_of(stream, names):
            raise DeclarationError(
                f"after names {stream!r}, which is no stream of {', '.join(names)}:"
                " a position belongs to the topics it was taken from"
            )
    if not after:
        raise DeclarationError(
            "after is an empty position, of a tail that had not begun: leave it out for what comes"
            " from now on, or say from where, such as 'start' or '@-1h'"
        )
    return {stream: _place(position) for stream, position in after.items()}


def _is_partition_of(stream: str, names: list[str]) -> bool:
    topic, number = keys.topic_of(stream), stream.rpartition(":")[2].removesuffix("}")
    return topic in names and number.isdecimal() and stream == keys.stream(topic, int(number))


def _place(position: Position) -> Place | None:
    found = as_id(position, default="+")
    if found == "+":
        return None
    if found == "-":
        return Place()
    at = order(found.encode())
    if "-" in found:
        return Place(b"%d-%d" % at, met=at[1] != LAST and found != START.decode())
    # A time: from there on, itself included.
    return Place(b"%d-%d" % (at[0] - 1, LAST)) if at[0] else Place()


def _copy(place: Place | None, *, shared: bool) -> Place | None:
    if place is not None:
        place = place.copy()
        place.shared = shared
    return place


def _named(
    after: Mapping[str, Place | None], topic: str, partitions: int, streams: list[str]
) -> dict[str, Place | None]:
    """Return what a mapping says of the streams of one topic. Errors: DeclarationError."""
    named = {stream for stream in after if keys.topic_of(stream) == topic}
    if strangers := named - {keys.stream(topic, p) for p in range(partitions)}:
        raise DeclarationError(
            f"after names {min(strangers)}, and topic {topic} has {partitions} partitions:"
            " a position belongs to the topics it was taken from"
        )
    # A partition that is not named was added since; a topic that is not named is new to the tail.
    other = Place() if named else None
    return {s: _copy(after.get(s, other), shared=False) for s in streams}
