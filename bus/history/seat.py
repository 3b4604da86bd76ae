"""What lies before one tail and is not taken yet."""

import asyncio
from collections import deque

from bus.config import TAIL_BYTES, TAIL_ENTRIES
from bus.history.batch import Batch


class Seat:
    """A tail's place at the hub: what was read for it and is not taken yet.

    streams: those it is joined for, none when it is not at the hub. error: what ended that.
    work: what the tail waits for instead, when it reads by itself.
    """

    __slots__ = ("_bytes", "_entries", "_waiting", "error", "queue", "streams", "work")

    def __init__(self) -> None:
        self.queue: deque[Batch] = deque()
        self.streams: tuple[str, ...] = ()
        self.error: Exception | None = None
        self.work: asyncio.Task[Batch | None] | None = None
        self._entries = 0
        self._bytes = 0
        self._waiting: asyncio.Future[None] | None = None

    def put(self, batch: Batch) -> bool:
        """Take in a batch; return False, and take nothing, if too much lies here already."""
        entries = self._entries + len(batch.entries)
        size_bytes = self._bytes + batch.size_bytes
        if self.queue and (entries > TAIL_ENTRIES or size_bytes > TAIL_BYTES):
            return False
        self._entries, self._bytes = entries, size_bytes
        self.queue.append(batch)
        self.wake()
        return True

    def take(self) -> Batch:
        """Return the oldest batch."""
        batch = self.queue.popleft()
        self._entries -= len(batch.entries)
        self._bytes -= batch.size_bytes
        return batch

    def clear(self) -> None:
        """Forget what lies here."""
        self.queue.clear()
        self._entries = self._bytes = 0

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until something has happened, at most `timeout_s`."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        alarm = None if timeout_s is None else loop.call_later(timeout_s, self.wake)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if alarm is not None:
                alarm.cancel()

    def wake(self) -> None:
        """End `wait`."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
