"""What a stream that fills up is relieved of, before publishers feel it.

Once a second, one process per stream: what nobody needs is trimmed (appends do that as well, but
only while something is published), and where parked entries hold the floor of a stream that is
nearly full, they are moved aside: a failing event must not stop a topic.
"""

from collections.abc import Mapping

from bus.config import FULL_SHARE, MOVED_PER_CALL
from bus.errors import BusError
from bus.shortage import tell_lost
from bus.streams.answers import Room
from bus.streams.stream import StreamStore
from bus.streams.topics import Record
from bus.telemetry import Telemetry

TURN_MS = 2_000
_MOST_MOVES = 50  # scripts per stream and second


class Pressure:
    """Relieves the streams of one process.

    records: stream -> what is recorded of its topic; the supervisor keeps it up to date.
    """

    def __init__(
        self, store: StreamStore, name: str, records: Mapping[str, Record], telemetry: Telemetry
    ) -> None:
        self._store = store
        self._name = name
        self._records = records
        self._telemetry = telemetry

    async def relieve(self) -> None:
        """Look at all streams, and act on those above `keep`. Errors are told."""
        try:
            streams = list(self._records)
            lengths = zip(streams, await self._store.lengths(streams), strict=True)
            high = [s for s, n in lengths if n > self._records[s].keep + self._records[s].slack]
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
            if share_used(record, room.entries) <= FULL_SHARE or room.pinned is None:
                return
            group = room.pinned.group
            moved, lost = await self._store.move_parked(stream, group, MOVED_PER_CALL)
            tell_lost(self._telemetry, stream, {group: lost} if lost else {})
            if moved:
                self._telemetry.emit("delivery.moved", stream=stream, group=group, count=moved)
            elif not lost:
                return  # it waits for what runs, or has not been delivered
            room = await self._trim(stream, record)

    async def _trim(self, stream: str, record: Record) -> Room:
        room = await self._store.room(stream, record.limits(), 0, urgent=False)
        tell_lost(self._telemetry, stream, room.lost)
        return room


def share_used(record: Record, room: int) -> float:
    """Return how much of the room between keep and maxlen is used, 0 to 1, more in the reserve."""
    return 1 - room / (record.maxlen - record.keep)
