"""Following topics from any point on: what was is read page by page, what comes as it comes."""

import asyncio
import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from bus.config import LOOK_PATIENCE_S, TOPICS_S, checked_name
from bus.envelope import Envelope, order
from bus.errors import BusClosed, BusError, DeclarationError
from bus.history.batch import Batch
from bus.history.event_store import streams_of
from bus.history.hub import Hub, tell_gap
from bus.history.past import Past
from bus.history.patience import patiently
from bus.history.place import LAST, START, Place
from bus.history.position import Position, as_id
from bus.history.seat import Seat
from bus.history.selection import Selection
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.follower import Extent, sound_extents
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
        self._places: dict[str, Place] = {}
        self._seat = Seat()
        self._turn = asyncio.Lock()
        self._past: Past | None = None
        self._batch = Batch({})
        self._next = 0  # of the batch
        self._unsettled: list[str] = []  # topics that nobody has declared yet
        self._look_at_s = 0.0  # loop time at which they may have been
        self._drop: weakref.finalize[..., Tail] | None = None
        self._over = False
        self.gaps = 0

    @property
    def position(self) -> dict[str, str]:
        """Stream -> id of the entry that came last, or was passed over; before `ready`, of `after`.

        As `after` it makes another tail go on exactly there. It can be written as JSON. Empty if
        nothing is known yet: a tail from now on, or from a time, that has not begun.
        """
        if not self._places and isinstance(self._after, dict):
            return {s: place.at.decode() for s, place in self._after.items() if place}
        return {stream: place.at.decode() for stream, place in self._places.items()}

    async def ready(self) -> None:
        """Fix where the tail begins: whatever is published after this returns will come.

        HGET per topic; from now on also XINFO STREAM per stream. Errors: UnknownTopic,
        DeclarationError for a position that names other streams, the ServerError family, BusClosed;
        a server that is away is waited for, 15 s.
        """
        if self._drop is None or self._over or self._hub.closed:
            async with self._turn:  # else somebody may hold it who waits for the next event
                await self._begin()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        while True:
            envelope = self._step()
            if envelope is not None:
                return envelope
            async with self._turn:
                await self._refill()

    async def aclose(self) -> None:
        """End the tail: who waits for it gets the end of the iteration."""
        self._over = True
        self._batch, self._next = Batch({}), 0
        if self._drop is not None:
            self._drop.detach()
            self._hub.leave(self._seat)
            await self._hub.settled()

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
        if self._hub.closed:
            raise BusClosed("the bus is closed")
        if self._over:
            raise BusClosed("the tail is closed")
        if self._drop is not None:
            return
        starts = await self._starts(LOOK_PATIENCE_S)
        now = [stream for stream, start in starts.items() if start is None]
        look = partial(sound_extents, self._hub.store.archive, now)
        ends = {s: Place.end_of(e) for s, e in zip(now, await patiently(look), strict=True)}
        if self._over:
            return
        self._hub.enter(self._seat)
        self._drop = _leave_when_dropped(self, self._hub, self._seat)
        self._places = {s: start or ends[s].copy() for s, start in starts.items()}
        if len(ends) == len(starts):
            for stream, at in self._hub.join(self._seat, ends).items():
                if order(at) > order(self._places[stream].at):  # it is that far ahead of our look
                    self._places[stream].move(at)

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
        added = {s: start for s, start in starts.items() if s not in self._places}
        if added:
            self._hub.part(self._seat)
            # All that is in them was published after the tail had begun.
            self._places |= {s: start or Place() for s, start in added.items()}

    # --- how it goes on

    def _step(self) -> Envelope | None:
        """Return the next envelope that is asked for, None at the end of the batch."""
        batch, names, admits = self._batch, self._selection.names, self._selection.admits
        while self._next < len(batch.entries):
            n = self._next
            self._next = n + 1
            stream, entry = batch.entries[n]
            self._places[stream].move(entry[0])
            if names(entry):
                envelope = batch.envelope(n)
                if admits(envelope):
                    return envelope
        return None

    async def _refill(self) -> None:
        """Get the next batch, or come nearer to it."""
        if self._over:
            raise StopAsyncIteration
        if self._drop is None or self._hub.closed:
            await self._begin()
            return  # others may wait for just that
        if self._next < len(self._batch.entries):
            return  # another task has seen to it
        seat = self._seat
        if self._past is not None:
            await self._read(self._past)
        elif seat.queue:
            await asyncio.sleep(0)  # others want to live, too, however much comes
            if seat.queue:
                self._start(seat.take())
        elif seat.error is not None:
            error, seat.error = seat.error, None
            raise error
        elif not seat.streams:
            self._past = Past(self._hub.store, self._hub.telemetry, self._places)
        else:
            await self._wait()

    async def _wait(self) -> None:
        """Wait for what comes; where a topic may get partitions, look for them now and then."""
        if not self._unsettled:
            await self._seat.wait()
        elif (left_s := self._look_at_s - asyncio.get_running_loop().time()) > 0:
            await self._seat.wait(left_s)
        else:
            await self._look_for_partitions()

    async def _read(self, past: Past) -> None:
        """Take a page of what was; at its end, join those for whom is read what comes."""
        work = self._seat.work
        if work is None:  # else it was left when somebody was cancelled who had waited for it
            work = asyncio.get_running_loop().create_task(past.next())
            work.add_done_callback(_mark_seen)
            self._seat.work = work
        await asyncio.wait({work})
        self._seat.work = None
        if work.cancelled() or self._over:  # the bus or the tail was closed; the next turn says so
            return
        try:
            batch = work.result()
        except Exception:
            self._past = self._seat.error = None  # it may be halfway through something
            self._hub.part(self._seat)  # what came meanwhile lies beyond what was not read
            self._seat.clear()
            raise
        if batch is not None:
            self._start(batch)
        else:
            self._past = None
            if past.ends and not self._seat.streams:
                self._join(past.ends)

    def _join(self, extents: Mapping[str, Extent | None]) -> None:
        """Have read for us what comes, and read what lies between that and our places."""
        ends = {}
        for stream, extent in extents.items():
            place, end = self._places[stream], Place.end_of(extent)
            if extent is None:
                place.gone = True
            elif place.met and order(end.at) < order(place.at):
                return  # it was begun anew just now: look into it again
            ends[stream] = end
        reached = self._hub.join(self._seat, ends)
        until = {s: at for s, at in reached.items() if order(at) > order(self._places[s].at)}
        if until:
            places = {stream: self._places[stream] for stream in until}
            self._past = Past(self._hub.store, self._hub.telemetry, places, until)

    def _start(self, batch: Batch) -> None:
        """Begin a batch; what is not new to us is left out, we may be ahead of the hub."""
        self.gaps += len(batch.gaps)
        for gap in batch.gaps:
            place = self._places[gap.stream]
            # Only where the stream is behind us: the hub may be, when it tells what was trimmed.
            if order(gap.at) < order(gap.after) and place.met:
                place.at, place.met = gap.at, False
        late = False
        for stream, first in batch.starts.items():
            place = self._places[stream]
            if order(first) <= order(place.at):
                anew = place.renewed(stream, first)
                if anew is None:
                    late = True
                else:
                    self.gaps += 1
                    tell_gap(self._hub.telemetry, anew)
        if late:
            fresh: dict[str, list[RawEntry]] = {}
            for stream, entry in batch.entries:
                if order(entry[0]) > order(self._places[stream].at):
                    fresh.setdefault(stream, []).append(entry)
            batch = Batch(fresh)
        self._batch, self._next = batch, 0


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


# --- the end


def _leave_when_dropped(tail: Tail, hub: Hub, seat: Seat) -> "weakref.finalize[..., Tail]":
    """See to it that nothing is read for a tail that nobody has any more."""
    drop = weakref.finalize(tail, _leave, hub, seat, asyncio.get_running_loop(), os.getpid())
    drop.atexit = False
    return drop


def _leave(hub: Hub, seat: Seat, loop: asyncio.AbstractEventLoop, process: int) -> None:
    """Leave the hub: from any thread, where the collector may be at work. Not in a forked child."""
    if os.getpid() == process:
        with suppress(RuntimeError):  # the loop has ended, and the hub with it
            loop.call_soon_threadsafe(hub.leave, seat)


def _mark_seen(work: "asyncio.Task[Batch | None]") -> None:
    """Keep asyncio from warning of an error that nobody has asked for yet."""
    if not work.cancelled():
        work.exception()
