"""One reader's way through its streams: what was is read page by page, what comes as it comes."""

import asyncio
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress

from bus.envelope import Envelope, order
from bus.errors import BusClosed
from bus.history.batch import Batch
from bus.history.hub import Hub, tell_gap
from bus.history.past import Past
from bus.history.place import Gap, Place
from bus.history.seat import Seat
from bus.history.selection import Selection
from bus.streams.answers import RawEntry
from bus.streams.follower import Extent

_NONE = Batch({})


class Pursuit:
    """Follows streams from places on: by itself up to their ends, from there on through the hub.

    places: stream -> where it stands. missed: gaps that nobody has been told of yet; those before
    the entries that `step` gives next. over: whether it was ended.
    """

    __slots__ = (
        "_admits",
        "_batch",
        "_drop",
        "_hub",
        "_names",
        "_next",
        "_past",
        "_seat",
        "missed",
        "over",
        "places",
    )

    def __init__(self, hub: Hub, selection: Selection) -> None:
        self.places: dict[str, Place] = {}
        self.missed: list[Gap] = []
        self.over = False
        self._hub = hub
        self._names, self._admits = selection.names, selection.admits
        self._seat = Seat()
        self._past: Past | None = None
        self._batch = _NONE
        self._next = 0  # of the batch
        self._drop: weakref.finalize[..., object] | None = None

    @property
    def begun(self) -> bool:
        """Whether it knows where it stands. Errors: BusClosed."""
        if self._hub.closed:
            raise BusClosed("the bus is closed")
        if self.over:
            raise BusClosed("the tail is closed")
        return self._drop is not None

    def begin(self, owner: object, places: dict[str, Place], ends: Mapping[str, Place]) -> None:
        """Stand at `places`; if they are all ends, have the hub read from now on.

        ends: those that were found to be at the end just now. owner: once it is dropped, nothing
        is read for it any more.
        """
        self._hub.enter(self._seat)
        self._drop = _leave_when_dropped(owner, self._hub, self._seat)
        self.places = places
        if len(ends) == len(places):
            for stream, at in self._hub.join(self._seat, ends).items():
                if order(at) > order(self.places[stream].at):  # it is that far ahead of our look
                    self.places[stream].move(at)

    def add(self, places: Mapping[str, Place]) -> None:
        """Follow more streams, from these places on."""
        self._hub.part(self._seat)
        self.places |= places

    def step(self) -> Envelope | None:
        """Return the next envelope that is asked for, None at the end of what is in hand."""
        batch = self._batch
        while self._next < len(batch.entries):
            n = self._next
            self._next = n + 1
            stream, entry = batch.entries[n]
            self.places[stream].move(entry[0])
            if self._names(entry):
                envelope = batch.envelope(n)
                if self._admits(envelope):
                    return envelope
        return None

    async def advance(self) -> bool:
        """Get the next batch, or come nearer to it; return False if there is none yet: `wait`.

        Errors: those of reading that time does not heal; what failed is done again when asked.
        """
        if self._next < len(self._batch.entries):
            return True  # another task has seen to it
        self._batch, self._next = _NONE, 0  # who waits need not hold on to it
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
            self._past = Past(self._hub.store, self._hub.telemetry, self.places)
        else:
            return False
        return True

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until something has happened, at most `timeout_s`."""
        await self._seat.wait(timeout_s)

    async def end(self) -> None:
        """Read no more; who waits is woken."""
        self.over = True
        self._batch, self._next = _NONE, 0
        if self._drop is not None:
            self._drop.detach()
            self._hub.leave(self._seat)
            await self._hub.settled()

    # --- what was, and from there to what comes

    async def _read(self, past: Past) -> None:
        """Take a page of what was; at its end, join those for whom is read what comes."""
        work = self._seat.work
        if work is None:  # else it was left when somebody was cancelled who had waited for it
            work = asyncio.get_running_loop().create_task(past.next())
            work.add_done_callback(_mark_seen)
            self._seat.work = work
        await asyncio.wait({work})
        self._seat.work = None
        if work.cancelled() or self.over:  # the bus or the tail was closed; the next turn says so
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
            place, end = self.places[stream], Place.end_of(extent)
            if extent is None:
                place.gone = True
            elif place.met and order(end.at) < order(place.at):
                return  # it was begun anew just now: look into it again
            ends[stream] = end
        reached = self._hub.join(self._seat, ends)
        until = {s: at for s, at in reached.items() if order(at) > order(self.places[s].at)}
        if until:
            places = {stream: self.places[stream] for stream in until}
            self._past = Past(self._hub.store, self._hub.telemetry, places, until)

    def _start(self, batch: Batch) -> None:
        """Begin a batch; what is not new to us is left out, we may be ahead of the hub."""
        self.missed += batch.gaps
        for gap in batch.gaps:
            place = self.places[gap.stream]
            # Only where the stream is behind us: the hub may be, when it tells what was trimmed.
            if order(gap.at) < order(gap.after) and place.met:
                place.at, place.met = gap.at, False
        late = False
        for stream, first in batch.starts.items():
            place = self.places[stream]
            if order(first) <= order(place.at):
                anew = place.renewed(stream, first)
                if anew is None:
                    late = True
                else:
                    self.missed.append(anew)
                    tell_gap(self._hub.telemetry, anew)
        if late:
            fresh: dict[str, list[RawEntry]] = {}
            for stream, entry in batch.entries:
                if order(entry[0]) > order(self.places[stream].at):
                    fresh.setdefault(stream, []).append(entry)
            batch = Batch(fresh)
        self._batch, self._next = batch, 0


def _leave_when_dropped(owner: object, hub: Hub, seat: Seat) -> "weakref.finalize[..., object]":
    """See to it that nothing is read for a tail that nobody has any more."""
    drop = weakref.finalize(owner, _leave, hub, seat, asyncio.get_running_loop(), os.getpid())
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
