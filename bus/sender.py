"""The publishes of one stream: a queue, one script call in flight, every batch appended once.

A unit (one `publish`, or the part of a `publish_many` that goes to one stream) is appended whole
or not at all. A batch whose outcome is unknown is sent again, unchanged and under the same
sequence number, which the script recognises; nothing else is ever re-sent.
"""

import asyncio
import time
from collections import deque

from tenacity import AsyncRetrying, retry_if_exception, stop_never, wait_random_exponential

from bus.config import BATCH_BYTES, BATCH_EVENTS, REPLY_TIMEOUT_S
from bus.errors import BusError, PublishTimeout, PublishUnknown, ServerUnreachable
from bus.streams.connection import Arg, ConnectionLost
from bus.streams.replies import TRANSIENT, ReplyError
from bus.streams.stream import Appended, StreamStore
from bus.telemetry import Telemetry


class Unit:
    """What is appended whole: its wire arguments and who waits for it."""

    __slots__ = ("args", "bytes", "deadline", "events", "future")

    def __init__(self, events: int, size: int, args: list[Arg], deadline: float) -> None:
        self.events = events
        self.bytes = size
        self.args = args
        self.deadline = deadline
        self.future: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()


class Sender:
    """The publishes of one stream: a queue, and at most one script call in flight."""

    def __init__(
        self,
        stream: str,
        publisher_id: str,
        store: StreamStore,
        telemetry: Telemetry,
        patience_s: float,
    ) -> None:
        self._stream = stream
        self._publisher_id = publisher_id
        self._store = store
        self._telemetry = telemetry
        self._timeout_s = min(patience_s, REPLY_TIMEOUT_S)
        self._units: deque[Unit] = deque()
        self._in_flight: list[Unit] = []
        self._trouble: Exception | None = None  # why the batch in flight is not in yet
        self._maybe_sent = False  # whether the batch in flight may have been appended unseen
        self._attempting = False
        self._all_told = asyncio.Event()  # the callers of the batch in flight, by `_expire`
        self._sequence = 0
        self._deadline: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def add(self, unit: Unit) -> "asyncio.Future[tuple[str, int]]":
        """Queue a unit; its future gives the id of its first event as (ms, sequence)."""
        self._units.append(unit)
        loop = unit.future.get_loop()
        if self._deadline is None:
            self._deadline = loop.call_at(unit.deadline, self._expire)
        if self.task is None:
            # The task starts in the next turn of the loop: what this turn publishes goes together.
            self.task = loop.create_task(self._drain())
        return unit.future

    def awaited(self) -> list["asyncio.Future[tuple[str, int]]"]:
        """Return the futures that somebody waits for."""
        return [u.future for u in (*self._in_flight, *self._units) if not u.future.done()]

    async def _drain(self) -> None:
        try:
            while self._units:
                await self._send(self._next_batch())
        finally:
            self.task = None
            self._in_flight = []
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    def _next_batch(self) -> list[Unit]:
        batch: list[Unit] = []
        events = size = 0
        while self._units:
            unit = self._units[0]
            if batch and (events + unit.events > BATCH_EVENTS or size + unit.bytes > BATCH_BYTES):
                break
            events += unit.events
            size += unit.bytes
            batch.append(self._units.popleft())
        return batch

    async def _send(self, batch: list[Unit]) -> None:
        self._in_flight = batch
        self._trouble = None
        self._maybe_sent = False
        self._sequence += 1
        started = time.perf_counter()
        try:
            try:
                where = await self._attempt(batch)
            except BusError as error:
                if not is_transient(error):
                    raise
                where = await self._insist(batch, error)
        except Exception as error:
            self._fail(batch, error)
            return
        at = where.sequence
        for unit in batch:
            if not unit.future.done():
                unit.future.set_result((where.ms, at))
            at += unit.events
        self._telemetry.emit(
            "publish.appended",
            stream=self._stream,
            count=where.events,
            bytes=sum(u.bytes for u in batch),
            duration_s=time.perf_counter() - started,
        )

    async def _attempt(self, batch: list[Unit]) -> Appended:
        self._attempting = True
        try:
            return await self._store.append(
                self._stream,
                self._publisher_id,
                self._sequence,
                [u.args for u in batch],
                self._timeout_s,
            )
        except BusError as error:
            self._trouble = error
            if isinstance(error, ConnectionLost) and error.sent:
                self._maybe_sent = True
            raise
        finally:
            self._attempting = False

    async def _insist(self, batch: list[Unit], first: BusError) -> Appended:
        """Send the batch again until it is in or its last deadline has passed."""
        loop = asyncio.get_running_loop()
        last = max(u.deadline for u in batch)
        error: BusError = first
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_never,
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            sleep=self._pause,
            reraise=True,
        ):
            if loop.time() >= last:
                raise error
            if not self._maybe_sent:
                # Nothing of it was ever sent: who was told "not published" must not be in it.
                batch[:] = [u for u in batch if not u.future.done()]
                if not batch:
                    raise error
            self._telemetry.emit(
                "publish.retried",
                stream=self._stream,
                count=sum(u.events for u in batch),
                error_type=type(error).__name__,
                error=str(error),
            )
            with attempt:
                try:
                    return await self._attempt(batch)
                except BusError as again:
                    error = again
                    raise
        raise error

    async def _pause(self, delay_s: float) -> None:
        """Wait before the next attempt, no longer than anybody waits for it."""
        self._all_told.clear()
        try:
            async with asyncio.timeout(delay_s):
                await self._all_told.wait()
        except TimeoutError:
            pass

    def _expire(self) -> None:
        """Tell the callers whose time is up; their batch may go on being sent all the same."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        # An attempt that still connects may yet send it: doubt is the honest answer.
        doubt = self._maybe_sent or self._attempting
        for units, unknown in ((self._in_flight, doubt), (self._units, False)):
            late = [u for u in units if u.deadline <= now and not u.future.done()]
            for unit in late:
                unit.future.set_exception(self._too_late(unknown, self._trouble))
            if units is self._units:
                for unit in late:
                    self._units.remove(unit)
        if all(u.future.done() for u in self._in_flight):
            self._all_told.set()
        waiting = [u.deadline for u in (*self._in_flight, *self._units) if not u.future.done()]
        self._deadline = loop.call_at(min(waiting), self._expire) if waiting else None

    def _too_late(self, unknown: bool, cause: Exception | None = None) -> BusError:  # noqa: FBT001
        why = f" ({cause})" if cause is not None else ""
        if unknown:
            return PublishUnknown(
                f"no answer from {self._stream} in time{why}: the event may have been published;"
                " publish it again only if handlers tolerate it twice"
            )
        return PublishTimeout(
            f"the server did not take it into {self._stream} in time{why}:"
            " the event was not published"
        )

    def _fail(self, batch: list[Unit], error: Exception) -> None:
        for unit in batch:
            if not unit.future.done():
                unit.future.set_exception(self._told(error))
                unit.future.exception()  # a caller that gave up never looks
        told = self._told(error)
        self._telemetry.emit(
            "publish.failed",
            stream=self._stream,
            count=sum(u.events for u in batch),
            error_type=type(told).__name__,
            error=str(told),
        )

    def _told(self, error: Exception) -> Exception:
        """Return what one caller is told; each its own, since callers may add notes to it."""
        if is_transient(error) or self._maybe_sent:
            return self._too_late(self._maybe_sent, error)
        return error.explained(self._stream) if isinstance(error, ReplyError) else error


def is_transient(error: BaseException) -> bool:
    """Return whether the same thing may work later, unchanged."""
    if isinstance(error, ReplyError):
        return error.code in TRANSIENT
    return isinstance(error, ConnectionLost | ServerUnreachable)
