"""What a stream that fills up is relieved of, before publishers feel it.

Once a second, one process per stream: what nobody needs is trimmed (appends do that as well, but
only while something is published), and where parked entries hold the floor of a stream that is
nearly full, they are moved aside: a failing event must not stop a topic. The inbox they go to has
a bound, too: a handler that fails all along must be felt by publishers in the end.
"""

from collections.abc import Mapping

from bus.config import FULL_SHARE, MOVED_PER_CALL, PRESSURE_S
from bus.errors import BusError
from bus.shortage import tell_lost
from bus.streams.answers import Room
from bus.streams.stream import StreamStore
from bus.streams.topics import Record
from bus.telemetry import Telemetry

TURN_MS = int(PRESSURE_S * 900)  # a turn ends before the next look: any process may have that
_MOST_MOVES = 50  # scripts per stream and second


class Pressure:
    """Relieves the streams of one process.

    records: stream -> what is recorded of its topic; the supervisor keeps it up to date.
    crowded: kept up to date here: the streams that were nearly full when last looked at.
    """

    def __init__(
        self,
        store: StreamStore,
        name: str,
        records: Mapping[str, Record],
        crowded: set[str],
        telemetry: Telemetry,
    ) -> None:
        self._store = store
        self._name = name
        self._records = records
        self._crowded = crowded
        self._telemetry = telemetry
        self._full_inboxes: set[tuple[str, str]] = set()

    async def relieve(self) -> None:
        """Look at all streams, and act on those above `keep`. Errors are told."""
        try:
            streams = list(self._records)
            lengths = dict(zip(streams, await self._store.lengths(streams), strict=True))
            records = self._records
            high = [s for s, n in lengths.items() if n > records[s].keep + records[s].slack]
            self._crowded.clear()
            self._crowded.update(s for s in high if is_crowded(records[s], lengths[s]))
            ours = await self._store.leases.try_chore(high, "room", self._name, TURN_MS)
        except BusError as error:
            self._tell(error)
            return
        for stream in ours:
            try:
                await self._relieve(stream, self._records[stream])
            except BusError as error:  # of this stream; the others are relieved all the same
                self._tell(error)

    def _tell(self, error: BusError) -> None:
        self._telemetry.emit(
            "janitor.failed",
            worker=self._name,
            error_type=type(error).__name__,
            error=str(error),
        )

    async def _relieve(self, stream: str, record: Record) -> None:
        room = await self._trim(stream, record)
        for _ in range(_MOST_MOVES):
            if not is_crowded(record, record.maxlen - room.entries) or room.pinned is None:
                return
            group = room.pinned.group
            moved, lost, full = await self._store.move_parked(
                stream, group, MOVED_PER_CALL, record.maxlen - record.keep
            )
            tell_lost(self._telemetry, stream, {group: lost} if lost else {})
            if moved:
                self._telemetry.emit("delivery.moved", stream=stream, group=group, count=moved)
            self._note_full(stream, group, full=full)
            if full or not (moved or lost):
                return  # it waits for what runs, or has not been delivered
            room = await self._trim(stream, record)

    def _note_full(self, stream: str, group: str, *, full: bool) -> None:
        """Tell of a full inbox, once until there is room again."""
        if full and (stream, group) not in self._full_inboxes:
            self._full_inboxes.add((stream, group))
            self._telemetry.emit("inbox.full", stream=stream, group=group)
        elif not full:
            self._full_inboxes.discard((stream, group))

    async def _trim(self, stream: str, record: Record) -> Room:
        room = await self._store.room(stream, record.limits(), 0, urgent=False)
        tell_lost(self._telemetry, stream, room.lost)
        return room


def share_used(record: Record, length: int) -> float:
    """Return how much of the room between keep and maxlen is used, 0 to 1, more in the reserve."""
    return (length - record.keep) / (record.maxlen - record.keep)


def is_crowded(record: Record, length: int) -> bool:
    """Return whether a stream is so full that what holds it up is moved aside."""
    return share_used(record, length) > FULL_SHARE
