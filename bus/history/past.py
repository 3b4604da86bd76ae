"""What lies between where a tail stands and the end of its streams, a page at a time."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial

from bus.config import FIRST_PAGE, READ_BYTES, READ_COUNT
from bus.envelope import order
from bus.history.batch import Batch, size_of
from bus.history.hub import tell_failure, tell_gap
from bus.history.patience import patiently
from bus.history.place import Gap, Place
from bus.streams.answers import RawEntry
from bus.streams.follower import Extent, pages, sound_extents
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry

Page = list[RawEntry]
_SHARERS = 8  # streams that share a page; with more, each page is this part of one


class Past:
    """Reads streams from places on, oldest first over all of them, up to their ends.

    until: the last id wanted, by stream; without it all that is there when it is asked for.
    """

    def __init__(
        self,
        store: StreamStore,
        telemetry: Telemetry,
        places: Mapping[str, Place],
        until: Mapping[str, bytes] | None = None,
    ) -> None:
        self._store = store
        self._telemetry = telemetry
        self._places = {stream: place.copy() for stream, place in places.items()}
        self._until = until or {}
        self._unread = set(places)  # streams that have more, as far as is known
        self._heads: dict[str, Page] = {}  # what was read and is not given yet
        self._gaps: list[Gap] = []
        self._count = FIRST_PAGE
        self.ends: dict[str, Extent | None] = {}  # of the streams, known when all is read

    async def next(self) -> Batch | None:
        """Return what comes next, None at the end. XRANGE per stream, all in one write; XINFO.

        Errors that time may heal are told and waited out. Errors: WrongKeyType, PermissionDenied,
        BusClosed.
        """
        while self._unread or self._heads:
            wanting = [s for s in self._places if s in self._unread and s not in self._heads]
            if wanting:
                await self._fetch(wanting)
            came = self._certain()
            gaps, self._gaps = self._gaps, []
            if came or gaps:
                return Batch(came, gaps)
        if not self._until:
            streams = list(self._places)
            self.ends = dict(zip(streams, await self._extents(streams), strict=True))
        return None

    async def _fetch(self, streams: list[str]) -> None:
        # What the others have in hand waits there: many streams must not have a page each.
        share = max(1, self._count // max(len(streams), min(len(self._unread), _SHARERS)))
        wanted = [self._page(stream, share) for stream in streams]
        ask = partial(pages, self._store.archive, wanted)
        found = await patiently(ask, math.inf, self._tell)
        doubtful = []
        for stream, page in zip(streams, found, strict=True):
            place, entries = self._places[stream], page
            if place.met:  # then it is asked for, too: as long as it is there nothing is missing
                if page and page[0][0] == place.at:
                    entries = page[1:]
                else:
                    doubtful.append(stream)
            if len(entries) < share:
                self._unread.discard(stream)
            if entries:
                self._heads[stream] = entries
        if doubtful:
            await self._check(doubtful)
        for stream in streams:
            if stream in self._heads:
                self._places[stream].move(self._heads[stream][-1][0])
        self._measure(streams)

    def _page(self, stream: str, count: int) -> tuple[str, bytes, bytes | str, int]:
        place = self._places[stream]
        first = place.at if place.met else b"(" + place.at
        return stream, first, self._until.get(stream, "+"), count + place.met

    async def _check(self, streams: list[str]) -> None:
        """Look whether where we stood was trimmed away, or the stream is another one."""
        for stream, extent in zip(streams, await self._extents(streams), strict=True):
            gap = self._places[stream].check(stream, extent)
            if gap is not None:
                tell_gap(self._telemetry, gap)
                self._gaps.append(gap)
                if gap.at != gap.after:
                    self._unread.add(stream)

    async def _extents(self, streams: list[str]) -> list[Extent | None]:
        look = partial(sound_extents, self._store.archive, streams)
        return await patiently(look, math.inf, self._tell)

    def _certain(self) -> dict[str, Page]:
        """Take out what certainly comes before all that is unread.

        That is everything up to where the first of the pages ends that others follow.
        """
        if any(stream not in self._heads for stream in self._unread):
            return {}
        if len(self._heads) == 1 or not self._unread:
            came, self._heads = self._heads, {}
            return came
        bound = min(order(self._heads[stream][-1][0]) for stream in self._unread)
        came = {}
        for stream, head in list(self._heads.items()):
            taken = bisect_right(head, bound, key=lambda entry: order(entry[0]))
            if taken:
                came[stream] = head[:taken]
            if taken < len(head):
                self._heads[stream] = head[taken:]
            else:
                del self._heads[stream]
        return came

    def _measure(self, streams: list[str]) -> None:
        """Ask for more the next time, as long as it is not too large."""
        read = [self._heads[s] for s in streams if s in self._heads]
        entries = sum(map(len, read))
        if entries:
            by_bytes = READ_BYTES * entries // sum(map(size_of, read))
            self._count = max(1, min(READ_COUNT, self._count * 4, by_bytes))

    def _tell(self, error: BaseException) -> None:
        tell_failure(self._telemetry, error)
