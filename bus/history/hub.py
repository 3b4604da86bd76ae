"""Where the tails of a bus meet: one XREAD over all their streams, each batch for who wants it.

A tail that has caught up joins; one that does not take what is put before it loses its seat, and
catches up by itself when it goes on. So nobody waits for anybody, and little is held.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress

from bus.config import BLOCK_MS, READ_BYTES, READ_COUNT
from bus.envelope import order
from bus.errors import BusClosed, BusError
from bus.history.batch import Batch, size_of
from bus.history.patience import patiently
from bus.history.place import Gap, Place, reaches
from bus.history.proof import Proofs
from bus.history.seat import Seat
from bus.streams.answers import RawEntry
from bus.streams.connection import is_transient
from bus.streams.follower import Extent, Follower, entries_of, extents
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry

_UNBLOCK_AGAIN_S = 0.05  # the read may still have been on its way
_LOOK_EVERY_S = BLOCK_MS / 1000  # whether streams still begin and end where they should...
_LOOKED_AT = 16  # ...so many at a time


class _Followed:
    """A stream that is read: up to where, and for whom."""

    __slots__ = ("members", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.members: dict[Seat, None] = {}


class Hub:
    """All open tails of a bus, and the loop that reads for those that have caught up."""

    def __init__(self, store: StreamStore, telemetry: Telemetry) -> None:
        self.store = store
        self.telemetry = telemetry
        self._seats: set[Seat] = set()
        self._followed: dict[str, _Followed] = {}
        self._proofs = Proofs()
        self._follower: Follower | None = None
        self._reading: asyncio.Task[None] | None = None
        self._hurrying: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._wanted = asyncio.Event()  # there is a stream to read
        self._listed = asyncio.Event()  # the read under way lists all streams
        self._shaken = False  # a read failed: streams may be others than before
        self._forbidden: ReplyError | None = None  # by whom, is not known yet
        self._look_at_s = 0.0  # loop time of the next look at a few streams...
        self._look_from = 0  # ...from this one on
        self._boost = 1  # by how much more than its share a stream may bring
        self._active = 1  # streams that brought something the last time
        self._entry_bytes = 512.0  # running mean
        self.closed = False

    # --- tails come and go

    def enter(self, seat: Seat) -> None:
        """Count a tail among the open ones. Errors: BusClosed."""
        if self.closed:
            raise BusClosed("the bus is closed")
        self._seats.add(seat)

    def join(self, seat: Seat, ends: Mapping[str, Place]) -> dict[str, bytes]:
        """Put whatever is appended to the streams from now on before `seat`.

        ends: where the streams end now. Returns the ids after which the seat gets everything.
        Errors: BusClosed.
        """
        if self.closed:
            raise BusClosed("the bus is closed")
        fresh = False
        for stream, end in ends.items():
            followed = self._followed.get(stream)
            if followed is None:
                fresh = True
                followed = self._followed[stream] = _Followed(end.copy())
            followed.members[seat] = None
        seat.streams = tuple(ends)
        if fresh:
            self._list_again()
        return {stream: self._followed[stream].place.at for stream in ends}

    def part(self, seat: Seat) -> None:
        """Read no more for `seat`; what lies before it stays."""
        for stream in seat.streams:
            followed = self._followed[stream]
            del followed.members[seat]
            if not followed.members:
                del self._followed[stream]
                self._proofs.pop(stream)
        seat.streams = ()

    def leave(self, seat: Seat) -> None:
        """Forget a tail; with the last one the connection ends."""
        self.part(seat)
        seat.clear()
        seat.wake()
        if seat.work is not None:
            seat.work.cancel()
        self._seats.discard(seat)
        if not self._seats:
            self._end()

    async def settled(self) -> None:
        """Wait until a connection that was ended is closed."""
        if self._ending:
            await asyncio.wait(self._ending)

    async def close(self) -> None:
        """Wake all tails, which then say that the bus is closed, and read no more."""
        self.closed = True
        for seat in list(self._seats):
            self.leave(seat)
        self._end()
        await self.settled()

    def _end(self) -> None:
        follower, self._follower = self._follower, None
        tasks = [t for t in (self._reading, self._hurrying) if t is not None]
        self._reading = self._hurrying = None
        if follower is not None:
            ending = asyncio.get_running_loop().create_task(_end(follower, tasks))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    # --- reading

    def _list_again(self) -> None:
        """See to it that a new stream is read at once: a read that blocks does not know of it."""
        self._listed.clear()
        self._wanted.set()
        loop = asyncio.get_running_loop()
        if self._reading is None:
            self._follower = self.store.follower()
            self._reading = loop.create_task(self._run(self._follower))
        elif self._hurrying is None or self._hurrying.done():
            self._hurrying = loop.create_task(self._hurry())

    async def _hurry(self) -> None:
        while self._followed and not self._listed.is_set() and self._follower is not None:
            with suppress(BusError):  # a broken server ends the read as well, and the read tells
                await self._follower.unblock()
            with suppress(TimeoutError):
                async with asyncio.timeout(_UNBLOCK_AGAIN_S):
                    await self._listed.wait()

    async def _run(self, follower: Follower) -> None:
        """Read until the last tail has gone. What fails is tried again, for as long as it takes."""
        failed = False
        while True:
            try:
                if failed:
                    await patiently(lambda: self._turn(follower), math.inf, self._tell)
                else:
                    await self._turn(follower)
                failed = False
            except Exception as error:
                failed = True
                self._tell(error)
                if isinstance(error, ReplyError) and error.code in ("NOPERM", "WRONGTYPE"):
                    self._forbidden = error
                elif not is_transient(error):
                    self._fail(self._members(), error)

    async def _turn(self, follower: Follower) -> None:
        """Read once, and put what came before the tails."""
        while not self._followed:
            self._wanted.clear()
            await self._wanted.wait()
        due = self._shaken or asyncio.get_running_loop().time() >= self._look_at_s
        await follower.prepare(check=due)
        if due:
            await self._look_about()
        if not self._followed:
            return
        # From here to the sending nothing is awaited: no stream can be added in between.
        sent = {stream: followed.place.at for stream, followed in self._followed.items()}
        count = self._count()
        asked = self._proofs.streams
        measured, coming = follower.read(sent, count, BLOCK_MS, asked)
        self._listed.set()
        lengths = dict(zip(asked, await measured, strict=True)) if measured else {}
        await self._prove(self._proofs.short(lengths))
        came = self._sift(sent, entries_of(await coming))
        self._pace(came, count)
        doubtful = self._proofs.weigh(lengths, came, count)
        self._give(came)
        await self._prove(doubtful)

    def _sift(
        self, sent: Mapping[str, bytes], replies: Iterable[tuple[str, list[RawEntry]]]
    ) -> dict[str, list[RawEntry]]:
        """Return what is new to the tails there are now."""
        came = {}
        for stream, read in replies:
            followed = self._followed.get(stream)
            if followed is None:
                continue
            entries = read
            if followed.place.at != sent[stream]:  # it was left and followed again meanwhile
                here = order(followed.place.at)
                if order(sent[stream]) > here:
                    continue
                entries = [entry for entry in read if order(entry[0]) > here]
            if entries:
                came[stream] = entries
        return came

    def _give(self, came: Mapping[str, list[RawEntry]]) -> None:
        """Put what was read before the tails; those of the same streams share one batch."""
        wanted: dict[Seat, list[str]] = {}
        for stream, entries in came.items():
            followed = self._followed[stream]
            self._proofs.add(stream, followed.place, entries)
            followed.place.move(entries[-1][0])
            for seat in followed.members:
                wanted.setdefault(seat, []).append(stream)
        batches: dict[tuple[str, ...], Batch] = {}
        for seat, streams in wanted.items():
            batch = batches.get(together := tuple(streams))
            if batch is None:
                batch = batches[together] = Batch({s: came[s] for s in streams})
            self._put(seat, batch)

    def _put(self, seat: Seat, batch: Batch) -> None:
        if not seat.put(batch):
            self.part(seat)
            seat.clear()

    def _count(self) -> int:
        """Return how much a stream may bring: COUNT holds per stream, and all may have much.

        A share of a full read each, more and more of it as long as few have more than that.
        """
        share = READ_COUNT * self._boost // len(self._followed)
        by_bytes = int(READ_BYTES / self._entry_bytes / self._active)
        return max(1, min(READ_COUNT, share, by_bytes))

    def _pace(self, came: Mapping[str, list[RawEntry]], count: int) -> None:
        if not came:
            return
        total = sum(map(len, came.values()))
        mean = sum(map(size_of, came.values())) / total
        self._entry_bytes += (mean - self._entry_bytes) * 0.2
        self._active = len(came)
        if total > 2 * READ_COUNT or all(len(entries) < count for entries in came.values()):
            self._boost = 1
        elif total < READ_COUNT:
            self._boost = min(self._boost * 2, len(self._followed) or 1)

    # --- what goes wrong

    async def _look_about(self) -> None:
        """Look whether streams are what they were: all after a failure, a few now and then."""
        now_s = asyncio.get_running_loop().time()
        if self._shaken:
            broken = await self._look(list(self._followed))
            forbidden, self._forbidden = self._forbidden, None
            self._shaken = False
            if forbidden is not None and forbidden.code == "NOPERM" and not broken:
                # No single stream is to blame: it is the reading that is not allowed.
                self._fail(self._members(), forbidden.explained("the streams"))
        else:
            streams = list(self._followed)
            start, few = self._look_from % len(streams), min(_LOOKED_AT, len(streams))
            self._look_from = start + few
            await self._look((streams + streams)[start : start + few])
        self._look_at_s = now_s + _LOOK_EVERY_S

    async def _prove(self, doubtful: list[str]) -> None:
        """Look at streams that may have been trimmed further than we had read."""
        if not doubtful:
            return
        try:
            await self._look(doubtful)
        except BusError as error:
            if not is_transient(error):
                raise
            self._tell(error)  # a read may be under way, and is not to be lost for that

    async def _look(self, streams: list[str]) -> bool:
        """Compare streams with where we stand in them; return whether one cannot be read at all.

        Its tails are told so, and those of the others of what may have been missed.
        """
        broken = False
        found = await extents(self.store.archive, streams)
        for stream, extent in zip(streams, found, strict=True):
            followed = self._followed.get(stream)
            if isinstance(extent, ReplyError):
                if is_transient(extent):
                    raise extent
                broken = True
                if followed is not None:
                    self._fail(list(followed.members), extent.explained(stream))
            elif followed is not None:
                self._compare(stream, followed, extent)
        return broken

    def _compare(self, stream: str, followed: _Followed, extent: Extent | None) -> None:
        gaps = []
        proof = self._proofs.pop(stream)
        if proof is not None and extent is not None and not reaches(extent, proof.after):
            at = followed.place.at
            gaps.append(Gap(stream, proof.after, proof.first, at, another=extent.whole))
        gap = followed.place.check(stream, extent)
        if gap is not None:
            gaps.append(gap)
        for gap in gaps:
            tell_gap(self.telemetry, gap)
        if gaps:
            batch = Batch({}, gaps)
            for seat in list(followed.members):
                self._put(seat, batch)

    def _members(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.streams]

    def _fail(self, seats: Iterable[Seat], error: Exception) -> None:
        """Tell tails that they cannot be read for; they hold what they have, and may try again."""
        for seat in seats:
            self.part(seat)
            seat.error = error
            seat.wake()

    def _tell(self, error: BaseException) -> None:
        self._shaken = True  # what comes back may not be what it was
        tell_failure(self.telemetry, error)


def tell_gap(telemetry: Telemetry, gap: Gap) -> None:
    """Say that entries may have been missed."""
    telemetry.emit(
        "tail.gap", stream=gap.stream, after=gap.after.decode(), first=gap.first.decode()
    )


def tell_failure(telemetry: Telemetry, error: BaseException) -> None:
    """Say that a read failed and is tried again."""
    telemetry.emit("tail.failed", error_type=type(error).__name__, error=str(error))


async def _end(follower: Follower, tasks: list["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await follower.close()
