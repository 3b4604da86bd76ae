"""Reads that wait: for a group, and for those who follow streams."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from bus.streams.answers import RawEntry
from bus.streams.connection import ConnectionLost
from bus.streams.follower import Follower
from bus.streams.memory.connection import Direct
from bus.streams.memory.place import Place, Waiter, wire
from bus.streams.memory.taking import follow, read
from bus.streams.reader import Reads
from bus.streams.replies import Reply, ReplyError

Entries = list[tuple[str, list[RawEntry]]]


class _Line:
    """What waits at one reader: one read at a time."""

    def __init__(self, place: Place) -> None:
        self.direct = Direct(place)
        self._waiter: Waiter | None = None

    async def until_there(
        self, streams: Iterable[str], block_ms: int, look: Callable[[Place], Entries]
    ) -> Entries:
        """Look at once, and again as soon as something came, until `block_ms` have passed."""
        loop, names = asyncio.get_running_loop(), [wire(s) for s in streams]
        deadline = loop.time() + block_ms / 1000
        while True:
            self.direct.check_open()
            await asyncio.sleep(0)
            with self.direct.place.lock:
                found = look(self.direct.place)
                left_s = deadline - loop.time()
                if found or left_s <= 0:
                    break
                waiter = self._waiter = Waiter()
                self.direct.place.wait_for(names, waiter)
            try:
                if not await self._woken(waiter, left_s):
                    return []
            finally:
                self._waiter = None
                with self.direct.place.lock:
                    self.direct.place.wait_no_more(names, waiter)
        await asyncio.sleep(0)
        return found

    async def _woken(self, waiter: Waiter, left_s: float) -> bool:
        """Wait until something came, for so long; False if it was time, or told to be."""
        try:
            async with asyncio.timeout(left_s):
                return await waiter.woken
        except TimeoutError:
            return False

    def end(self) -> None:
        """End what waits; it takes nothing."""
        if self._waiter is not None:
            self._waiter.wake(came=False)

    async def close(self) -> None:
        """Take nothing more; what waits fails with ConnectionLost."""
        await self.direct.close()
        if self._waiter is not None:
            self._waiter.wake(ConnectionLost("the bus is closing", sent=True))


class MemoryReader(Reads):
    """One group's reader."""

    def __init__(self, place: Place) -> None:
        self._line = _Line(place)

    async def read(
        self, group: str, consumer: str, streams: Sequence[str], count: int, block_ms: int
    ) -> Entries:
        """Return new entries, at most `count` per stream, waiting up to `block_ms`."""
        return await self._line.until_there(
            streams, block_ms, lambda place: read(place, group, consumer, streams, count)
        )

    async def unblock(self) -> None:
        """End a read that waits; it takes nothing."""
        await asyncio.sleep(0)
        self._line.end()

    async def close(self) -> None:
        """Take nothing more."""
        await self._line.close()


class MemoryFollower(Follower):
    """What tails share."""

    def __init__(self, place: Place) -> None:
        self._line = _Line(place)

    async def prepare(self, *, check: bool) -> None:  # noqa: ARG002 - there is one place only
        """Do nothing: there is no connection to be made. Errors: BusClosed."""
        self._line.direct.check_open()

    def read(
        self, after: Mapping[str, bytes], count: int, block_ms: int, measured: Sequence[str] = ()
    ) -> tuple["asyncio.Future[list[Reply]] | None", "asyncio.Future[list[Reply]]"]:
        """Ask for the entries beyond the ids of `after`, at most `count` per stream."""
        loop = asyncio.get_running_loop()
        lengths = None
        if measured:
            lengths = loop.create_task(
                self._line.direct.pipeline([("XLEN", s) for s in measured]), name="lengths"
            )
        return lengths, loop.create_task(self._followed(dict(after), count, block_ms), name="tails")

    async def _followed(self, after: Mapping[str, bytes], count: int, block_ms: int) -> list[Reply]:
        try:
            found = await self._line.until_there(
                after, block_ms, lambda place: follow(place, after.items(), count)
            )
        except ReplyError as error:
            return [error]
        return [[(wire(stream), entries) for stream, entries in found]]

    async def unblock(self) -> None:
        """End a read that waits."""
        await asyncio.sleep(0)
        self._line.end()

    async def close(self) -> None:
        """Take nothing more."""
        await self._line.close()
