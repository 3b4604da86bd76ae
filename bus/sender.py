"""The publishes of one stream: a queue, one script call in flight, every batch appended once.

A unit (one `publish`, or the part of a `publish_many` that goes to one stream) is appended whole
or not at all. A batch whose outcome is unknown is sent again, unchanged and under the same
sequence number, which the script recognises; nothing else is ever re-sent.

The script takes as many units as fit. What is left stays first in line, so the order of calls is
kept, until there is room: one asker per sender looks for it without sending the events again.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any

from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    retry_if_result,
    stop_never,
    wait_random_exponential,
)

from bus.config import ANSWER_S, BATCH_BYTES, BATCH_EVENTS, REPLY_TIMEOUT_S, ROOM_WAIT_S
from bus.errors import BusError
from bus.shortage import Shortage, tell_lost
from bus.streams.answers import Appended, Limits, Room
from bus.streams.connection import ConnectionLost, is_transient
from bus.streams.replies import Reply, ReplyError
from bus.streams.results import appended
from bus.streams.topics import Record
from bus.telemetry import Telemetry
from bus.unit import Appends, Told, Unit, too_late


class Sender:
    """The publishes of one stream: a queue, and at most one script call in flight.

    record: of the topic. limits: how long the stream may grow by it. waits: whether callers wait
    for room, until their deadlines; else they are told StreamFull at once.
    """

    def __init__(
        self,
        stream: str,
        publisher_id: str,
        store: Appends,
        telemetry: Telemetry,
        patience_s: float,
        record_of_topic: Callable[[], Awaitable[Record]],
        is_alone: Callable[[], bool],
    ) -> None:
        self.record: Record | None = None  # until `keep_to`, before anything is added
        self.limits = Limits(1, 1, 1)
        self.waits = False
        self._stream = stream
        self._publisher_id = publisher_id
        self._store = store
        self._telemetry = telemetry
        self._shortage = Shortage(stream, telemetry)
        self._record_of_topic = record_of_topic
        self._is_alone = is_alone  # whether no other sender shares its connection
        self._answer = Told(self.answered, self.failed)
        self._more_waits = False  # whether the batch in flight was cut to what fits
        self._timeout_s = min(patience_s, REPLY_TIMEOUT_S)
        self._units: deque[Unit] = deque()
        self._in_flight: list[Unit] = []
        self._trouble: Exception | None = None  # why the batch in flight is not in yet
        self._maybe_sent = False  # whether the batch in flight may have been appended unseen
        self._attempting = False
        self._at_work = False
        self._closed = False
        self._started_s = 0.0
        self._all_told = asyncio.Event()  # the callers of the batch in flight, by `_expire`
        self._sequence = 0
        self._deadline: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def keep_to(self, record: Record, *, inside: bool) -> None:
        """Publish within the marks of `record` from now on; `inside`: for handlers."""
        self.record = record
        self.limits = record.limits(inside=inside)
        self.waits = record.on_full == "block" and not inside

    def add(self, unit: Unit) -> "asyncio.Future[tuple[str, int]]":
        """Queue a unit; its future gives the id of its first event as (ms, sequence)."""
        self._units.append(unit)
        if self._deadline is None:
            self._deadline = unit.future.get_loop().call_at(unit.deadline, self._expire)
        if not self._at_work:
            self._at_work = True
            # It begins in the next turn of the loop: what this turn publishes goes together.
            unit.future.get_loop().call_soon(self._begin)
        return unit.future

    def close(self) -> None:
        """Stop sending, and tell what is yet to be told."""
        self._closed = True
        if self.task is not None:
            self.task.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        self._shortage.tell_overrun()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        return not self._at_work

    def awaited(self) -> list["asyncio.Future[tuple[str, int]]"]:
        """Return the futures that somebody waits for."""
        return [u.future for u in (*self._in_flight, *self._units) if not u.future.done()]

    # --- while all is well: one call of the script, and a callback when it is answered

    def _begin(self) -> None:
        """Send the next batch. What has to be waited for is the task's."""
        if self._shortage.room is not None and self.waits and not self._closed:
            self._go_on_in_task(None)
            return
        batch = self._next_batch()
        if not batch:
            self._at_work = False
            self._in_flight = []
            return
        self._take_up(batch)
        self._attempting = True
        try:
            self._store.append_soon(
                *self._asked(batch), answer=self._answer, at_once=self._is_alone()
            )
        except Exception as error:  # it could not be packed
            self._attempting = False
            self._fail(batch, error)
            asyncio.get_running_loop().call_soon(self._begin)

    def answered(self, replies: list[Reply]) -> None:
        """Take what the script has answered."""
        self._attempting = False
        try:
            where = appended(replies)
        except BusError as error:
            self.failed(error)
            return
        self._settle(self._in_flight, where)
        if self._units:  # after those who have just been told: what they publish now goes along
            asyncio.get_running_loop().call_soon(self._begin)
        else:
            self._at_work = False
            self._in_flight = []

    def failed(self, error: BusError) -> None:
        """Take that there is no answer, or an error."""
        self._attempting = False
        self._note(error)
        if not self._closed:
            self._go_on_in_task(error)
        elif self.awaited():  # else nobody is there to be told
            self._fail(self._in_flight, error)

    def _go_on_in_task(self, error: BusError | None) -> None:
        self.task = asyncio.get_running_loop().create_task(self._drain(error))

    # --- the task, when something has to be tried again or waited for

    async def _drain(self, error: BusError | None) -> None:
        """Send until nothing is left; `error`: how the batch in flight has failed."""
        try:
            if error is not None:
                await self._send_again(error)
            while self._units:
                if self._shortage.room is not None and self.waits:
                    await self._wait_for_room()
                batch = self._next_batch()
                if batch:
                    self._take_up(batch)
                    await self._send_again(None)
        finally:
            self.task = None
            self._at_work = False
            self._in_flight = []

    def _next_batch(self) -> list[Unit]:
        """Take the first in line, no more than an append takes; while full, no more than fits."""
        batch: list[Unit] = []
        events = size = 0
        fits = BATCH_EVENTS
        if self._shortage.room is not None and self.waits:
            fits = min(fits, self._shortage.room.entries)
        self._more_waits = False
        while self._units:
            unit = self._units[0]
            if unit.future.done():  # the caller has gone, or been told that its time was up
                self._units.popleft()
                continue
            if batch and (events + unit.events > BATCH_EVENTS or size + unit.bytes > BATCH_BYTES):
                break
            if batch and events + unit.events > fits:
                self._more_waits = True
                break
            events += unit.events
            size += unit.bytes
            batch.append(self._units.popleft())
        return batch

    def _take_up(self, batch: list[Unit]) -> None:
        self._in_flight = batch
        self._trouble = None
        self._maybe_sent = False
        self._sequence += 1
        self._started_s = time.perf_counter()

    async def _send_again(self, error: BusError | None) -> None:
        """Bring the batch in flight in; `error`: how its first attempt has failed."""
        batch = self._in_flight
        try:
            where = await self._until_in(batch, error)
        except Exception as failed:
            self._fail(batch, failed)
            return
        self._settle(batch, where)

    async def _until_in(self, batch: list[Unit], error: BusError | None) -> Appended:
        if error is None or (isinstance(error, ReplyError) and error.code == "NOSCRIPT"):
            try:
                return await self._attempt(batch)
            except BusError as first:
                error = first
        if is_transient(error):
            return await self._insist(batch, error)
        raise error

    def _settle(self, batch: list[Unit], where: Appended) -> None:
        """Tell callers where their events are; what was not taken is first in line again."""
        at = where.sequence
        taken = batch if where.units == len(batch) else batch[: where.units]
        for unit in taken:
            if not unit.future.done():
                unit.future.set_result((where.ms, at))
            at += unit.events
        if taken:
            self._telemetry.emit(
                "publish.appended",
                stream=self._stream,
                count=where.events,
                bytes=sum([u.bytes for u in taken]),
                duration_s=time.perf_counter() - self._started_s,
            )
        tell_lost(self._telemetry, self._stream, where.room.lost)
        if where.dropped:
            self._shortage.overrun(where.dropped)
        if taken is batch:
            if self._shortage.room is not None and not self._more_waits:
                self._shortage.over()
        else:
            self._in_flight = []
            left = batch[where.units :]
            if not self.waits and (taken or where.dropped):
                # What was taken may be trimmed or dropped already, or more may go: ask again.
                self._units.extendleft(reversed(left))
            else:
                self._found_no_room(left, where.room)

    # --- no room

    def _found_no_room(self, left: list[Unit], room: Room) -> None:
        """Put what was not taken first in line again; tell those who do not wait for room."""
        if self.waits:
            self._shortage.room = room
            self._units.extendleft(u for u in reversed(left) if not u.future.done())
            return
        self._shortage.tell(room)
        # One that is smaller than what stopped the others may fit yet.
        smaller = [u for u in left if u.events <= room.entries]
        refused = [u for u in left if u.events > room.entries]
        self._units.extendleft(reversed(smaller))
        for unit in refused:
            if not unit.future.done():
                unit.future.set_exception(self._shortage.error(self.limits.most))
                unit.future.exception()  # a caller that gave up never looks
        if refused:
            count = sum(u.events for u in refused)
            self._telemetry.emit("publish.rejected", stream=self._stream, count=count)

    async def _wait_for_room(self) -> None:
        """Ask for room, without events, until the first in line fits or nobody waits any more."""
        ask_again = AsyncRetrying(
            retry=retry_if_result(lambda fits: not fits) | retry_if_exception(is_transient),
            stop=stop_never,
            wait=wait_random_exponential(multiplier=ROOM_WAIT_S / 4, max=ROOM_WAIT_S),
            reraise=True,
        )
        with contextlib.suppress(BusError):  # what is wrong with the server, the next append says
            await ask_again(self._ask_for_room)

    async def _ask_for_room(self) -> bool:
        self._drop_cancelled()
        if not self._units:
            return True
        await self._look_at_marks()
        # For as many as an append takes: for the first alone, room would come entry by entry.
        wanted = sum(u.events for u in islice(self._units, BATCH_EVENTS))
        wanted = max(min(wanted, BATCH_EVENTS), self._units[0].events)
        try:
            room = await self._store.room(self._stream, self.limits, wanted)
        except BusError as error:
            # Whether there is room is not known any more: callers are told what is.
            self._trouble, self._shortage.room = error, None
            raise
        tell_lost(self._telemetry, self._stream, room.lost)
        self._shortage.room = room
        fits = not self._units or room.entries >= self._units[0].events
        if not fits:
            self._shortage.tell(room)
        return fits

    async def _look_at_marks(self) -> None:
        """Notice that the marks were changed: those who wait publish nothing that would."""
        try:
            record = await self._record_of_topic()  # asks the server every few seconds
        except BusError:
            return  # those that are known must do
        if record is not self.record:
            self.keep_to(record, inside=False)

    def _drop_cancelled(self) -> None:
        """Forget the first in line whose callers have gone: nothing of them was sent."""
        while self._units and self._units[0].future.done():
            self._units.popleft()

    def _asked(self, batch: list[Unit]) -> tuple[Any, ...]:
        """Return what the script is told."""
        return (
            self._stream,
            self._publisher_id,
            self._sequence,
            [u.args for u in batch],
            sum([u.events for u in batch]),
            self.limits,
            self._timeout_s,
        )

    async def _attempt(self, batch: list[Unit]) -> Appended:
        self._attempting = True
        try:
            return await self._store.append(*self._asked(batch))
        except BusError as error:
            self._note(error)
            raise
        finally:
            self._attempting = False

    def _note(self, error: BusError) -> None:
        """Note how an attempt has failed."""
        self._trouble = error
        if isinstance(error, ConnectionLost) and error.sent:
            self._maybe_sent = True

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
        # An attempt that still connects may yet send it: doubt is the honest answer. But one that
        # was sent just before the deadline is usually answered at once, and then there is none.
        doubt = self._maybe_sent or self._attempting
        answer_s = ANSWER_S if self._attempting and not self._maybe_sent else 0.0
        for units, unknown, more_s in (
            (self._in_flight, doubt, answer_s),
            (self._units, False, 0.0),
        ):
            late = [u for u in units if u.deadline + more_s <= now and not u.future.done()]
            full = self._shortage.room is not None and units is self._units
            for unit in late:
                unit.future.set_exception(
                    self._shortage.error(self.limits.most)
                    if full
                    else too_late(self._stream, unknown, self._trouble)
                )
            if late and full:
                count = sum(u.events for u in late)
                self._tell_failed(count, self._shortage.error(self.limits.most))
            if units is self._units:
                for unit in late:
                    self._units.remove(unit)
        if all(u.future.done() for u in self._in_flight):
            self._all_told.set()
        waiting = [u.deadline + answer_s for u in self._in_flight if not u.future.done()]
        waiting += [u.deadline for u in self._units if not u.future.done()]
        self._deadline = loop.call_at(min(waiting), self._expire) if waiting else None

    def _fail(self, batch: list[Unit], error: Exception) -> None:
        for unit in batch:
            if not unit.future.done():
                unit.future.set_exception(self._told(error))
                unit.future.exception()  # a caller that gave up never looks
        self._tell_failed(sum(u.events for u in batch), self._told(error))

    def _tell_failed(self, count: int, error: Exception) -> None:
        self._telemetry.emit(
            "publish.failed",
            stream=self._stream,
            count=count,
            error_type=type(error).__name__,
            error=str(error),
        )

    def _told(self, error: Exception) -> Exception:
        """Return what one caller is told; each its own, since callers may add notes to it."""
        if is_transient(error) or self._maybe_sent:
            return too_late(self._stream, self._maybe_sent, error)
        return error.explained(self._stream) if isinstance(error, ReplyError) else error
