"""The publishes of one stream: a queue, and every batch of it appended once, in order.

A unit (one `publish`, or the part of a `publish_many` that goes to one stream) is appended whole
or not at all.

While all is well, two calls of the script may be on their way: the second counts only behind the
first, taken whole (docs/adr/0020). When something has to be tried again or waited for, there is one
call at a time.

The script takes as many units as fit. What is left stays first in line, so the order of calls is
kept, until there is room: one asker per sender looks for it without sending the events again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    retry_if_result,
    stop_never,
    wait_random_exponential,
)

from bus.appender import Appender
from bus.batch import Batch, Line
from bus.config import BATCH_EVENTS, FOLLOW_EVENTS, ROOM_WAIT_S
from bus.errors import BusError
from bus.shortage import Shortage, tell_lost
from bus.streams.answers import Appended, Limits, Room
from bus.streams.connection import is_transient
from bus.streams.replies import Reply, ReplyError
from bus.streams.results import appended
from bus.streams.topics import Record
from bus.telemetry import Telemetry
from bus.unit import Appends, Unit, too_late

WORTH_TWO_CALLS = (
    2 * FOLLOW_EVENTS
)  # events that are sent in two calls even if nothing is in flight


class Sender:
    """The publishes of one stream: a queue, and a call or two of the script on their way.

    record: of the topic. waits: whether callers wait for room, until their deadlines; else they are
    told StreamFull at once.
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
        self.waits = False
        self._stream = stream
        self._telemetry = telemetry
        self._appender = Appender(stream, publisher_id, store, telemetry, patience_s)
        self._calls_at_once = store.calls_at_once
        self._shortage = Shortage(stream, telemetry)
        self._record_of_topic = record_of_topic
        self._is_alone = is_alone  # whether no other sender shares its connection
        self._line = Line()
        self._flight: list[Batch] = []  # what is on its way, the oldest first
        self._more_waits = False  # whether the last batch was cut to what fits
        self._trouble: BusError | None = None  # why it is not known whether there is room
        self._due = False  # whether `_begin` comes in this turn of the loop
        self._closed = False
        self._sequence = 0
        self._deadline: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def keep_to(self, record: Record, *, inside: bool) -> None:
        """Publish within the marks of `record` from now on; `inside`: for handlers."""
        self.record = record
        self._appender.limits = record.limits(inside=inside)
        self.waits = record.on_full == "block" and not inside

    @property
    def limits(self) -> Limits:
        """How long the stream may grow by it."""
        return self._appender.limits

    def add(self, unit: Unit) -> "asyncio.Future[tuple[str, int]]":
        """Queue a unit; its future gives the id of its first event as (ms, sequence)."""
        self._line.add(unit)
        if self._deadline is None:
            self._deadline = unit.future.get_loop().call_at(unit.deadline, self._expire)
        if not self._due and self._may_send():
            # It begins in the next turn of the loop: what this turn publishes goes together.
            self._due = True
            unit.future.get_loop().call_soon(self._begin)
        return unit.future

    def close(self) -> None:
        """Stop sending, and tell what is yet to be told."""
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._tell_late(float("inf"))
        if self.task is not None:
            self.task.cancel()
        self._shortage.tell_overrun()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        return not (self._due or self._flight or self.task)

    def awaited(self) -> list["asyncio.Future[tuple[str, int]]"]:
        """Return the futures that somebody waits for."""
        in_flight = [u for batch in self._flight for u in batch.units]
        return [u.future for u in (*in_flight, *self._line.units) if not u.future.done()]

    # --- while all is well: calls of the script, and a callback when one is answered

    def _may_send(self) -> bool:
        """Whether the next batch may leave: the first, or one behind it that is worth a call."""
        if self.task is not None:
            return False
        calls = len(self._flight)
        return not calls or (calls < self._calls_at_once and self._line.events >= FOLLOW_EVENTS)

    def _begin(self) -> None:
        """Send what waits: many events in two calls, so that both ends always have work."""
        self._due = False
        while self._may_send():
            if self._shortage.room is not None and self.waits and not self._closed:
                if not self._flight:
                    self._go_on_in_task()
                return
            most = BATCH_EVENTS
            if (
                not self._flight
                and self._calls_at_once > 1
                and self._line.events >= WORTH_TWO_CALLS
            ):
                most = -(-self._line.events // 2)
            batch = self._next_batch(most)
            if batch is None:
                return
            follows = len(self._flight) > 1
            try:
                self._appender.append_soon(batch, follows=follows, at_once=self._is_alone())
            except Exception as error:  # it could not be packed
                self._flight.pop()
                self._fail(batch, error)

    def answered(self, batch: Batch, replies: list[Reply]) -> None:
        """Take what the script has answered."""
        try:
            where = appended(replies)
        except BusError as error:
            self.failed(batch, error)
            return
        batch.attempting = False
        if self.task is not None or not self._flight or self._flight[0] is not batch:
            self._answered_early(batch, where)
            return
        self._flight.pop(0)  # answers come in the order of calls
        self._settle(batch, where)
        self._go_on()

    def _answered_early(self, batch: Batch, where: Appended) -> None:
        """Take what became of one while what was before it has failed, and the task is at that."""
        if not where.out_of_turn:
            batch.maybe_sent = True  # it is sent again in its turn, and answered once more
        elif batch in self._flight:  # it is not in: whose time is up meanwhile must not be later
            self._flight.remove(batch)
            self._line.put_back(batch.units)

    def _go_on(self) -> None:
        """Send more if more waits, after those who were told: what they publish now goes along."""
        if not self._due and self._line and self._may_send():
            self._due = True
            asyncio.get_running_loop().call_soon(self._begin)

    def failed(self, batch: Batch, error: BusError) -> None:
        """Take that there is no answer, or an error."""
        batch.note(error)
        if self._closed:
            if batch in self._flight:
                self._flight.remove(batch)
            if batch.awaited():  # else nobody is there to be told
                self._fail(batch, error)
        elif self.task is None:
            if isinstance(error, ReplyError) and len(self._flight) > 1:
                self._recall_followers(batch)
                # Nothing of it is in, and with its old number a follower that is late would be.
                self._sequence += 1
                batch.sequence = self._sequence
            self._go_on_in_task()

    def _recall_followers(self, batch: Batch) -> None:
        """Let those stand in line again that were sent behind a batch that is not in, whole.

        The script has taken nothing of them, nor will it: they count only behind that batch, by the
        number that it had, and when anything later is in they are stale.
        """
        while self._flight and self._flight[-1] is not batch:
            follower = self._flight.pop()
            follower.recalled = True
            self._line.put_back(follower.units)

    def _go_on_in_task(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._drain())

    # --- the task, when something has to be tried again or waited for: a call at a time

    async def _drain(self) -> None:
        """Bring in what is in flight and has failed; wait for room until everything fits."""
        try:
            while self._flight or (self._shortage.room is not None and self.waits):
                if not self._flight:
                    await self._wait_for_room()
                    if self._next_batch(BATCH_EVENTS) is None:
                        break
                batch = self._flight[0]
                try:
                    where = await self._appender.bring_in(batch)
                except Exception as failed:
                    self._flight.pop(0)
                    self._fail(batch, failed)
                else:
                    self._flight.pop(0)
                    self._settle(batch, where)
        finally:
            self.task = None
            self._flight.clear()
        self._go_on()

    def _next_batch(self, most: int) -> Batch | None:
        """Take up the first in line; while full, no more than fits. None when nobody waits."""
        fits = BATCH_EVENTS
        if self._shortage.room is not None and self.waits:
            fits = self._shortage.room.entries
        units, self._more_waits = self._line.take(most, fits)
        if not units:
            return None
        self._trouble = None
        self._sequence += 1
        batch = Batch(units, self._sequence, self)
        self._flight.append(batch)
        return batch

    def _settle(self, batch: Batch, where: Appended) -> None:
        """Tell callers where their events are; what was not taken is first in line again."""
        if where.out_of_turn:  # what it was to follow is in, but the server has forgotten that
            self._recall_followers(batch)
            self._line.put_back(batch.units)
            return
        units, at = batch.units, where.sequence
        taken = units if where.units == len(units) else units[: where.units]
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
                duration_s=time.perf_counter() - batch.started_s,
            )
        tell_lost(self._telemetry, self._stream, where.room.lost)
        if where.dropped:
            self._shortage.overrun(where.dropped)
        if taken is units:
            if self._shortage.room is not None and not self._more_waits:
                self._shortage.over()
            return
        self._recall_followers(batch)
        left = units[where.units :]
        if not self.waits and (taken or where.dropped):
            # What was taken may be trimmed or dropped already, or more may go: ask again.
            self._line.put_back(left)
        else:
            self._found_no_room(left, where.room)

    # --- no room

    def _found_no_room(self, left: list[Unit], room: Room) -> None:
        """Put what was not taken first in line again; tell those who do not wait for room."""
        if self.waits:
            self._shortage.room = room
            self._line.put_back(left)
            return
        self._shortage.tell(room)
        # One that is smaller than what stopped the others may fit yet.
        self._line.put_back([u for u in left if u.events <= room.entries])
        refused = [u for u in left if u.events > room.entries]
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
        if self._line.first() is None:
            return True
        await self._look_at_marks()
        try:
            # For as many as an append takes: for the first alone, room would come entry by entry.
            room = await self._appender.room(self._line.wanted())
        except BusError as error:
            # Whether there is room is not known any more: callers are told what is.
            self._trouble, self._shortage.room = error, None
            raise
        tell_lost(self._telemetry, self._stream, room.lost)
        self._shortage.room = room
        first = self._line.first()
        fits = first is None or room.entries >= first.events
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

    # --- what callers are told instead of an id

    def _expire(self) -> None:
        """Tell the callers whose time is up; their batch may go on being sent all the same."""
        loop = asyncio.get_running_loop()
        self._tell_late(loop.time())
        if self._flight and not self._flight[0].awaited():
            self._appender.all_told()
        waiting = [
            u.deadline + batch.grace_s
            for batch in self._flight
            for u in batch.units
            if not u.future.done()
        ]
        waiting += [u.deadline for u in self._line.units if not u.future.done()]
        self._deadline = loop.call_at(min(waiting), self._expire) if waiting else None

    def _tell_late(self, now: float) -> None:
        for batch in self._flight:
            for unit in batch.units:
                if unit.deadline + batch.grace_s <= now and not unit.future.done():
                    unit.future.set_exception(too_late(self._stream, batch.in_doubt, batch.trouble))
        late = [u for u in self._line.units if u.deadline <= now and not u.future.done()]
        full = self._shortage.room is not None
        trouble = self._flight[0].trouble if self._flight else self._trouble
        for unit in late:
            unit.future.set_exception(
                self._shortage.error(self.limits.most)
                if full
                else too_late(self._stream, unknown=False, cause=trouble)
            )
        if late and full:
            self._tell_failed(sum(u.events for u in late), self._shortage.error(self.limits.most))
        self._line.remove(late)

    def _fail(self, batch: Batch, error: Exception) -> None:
        for unit in batch.units:
            if not unit.future.done():
                unit.future.set_exception(self._told(batch, error))
                unit.future.exception()  # a caller that gave up never looks
        self._tell_failed(batch.events, self._told(batch, error))

    def _tell_failed(self, count: int, error: Exception) -> None:
        self._telemetry.emit(
            "publish.failed",
            stream=self._stream,
            count=count,
            error_type=type(error).__name__,
            error=str(error),
        )

    def _told(self, batch: Batch, error: Exception) -> Exception:
        """Return what one caller is told; each its own, since callers may add notes to it."""
        if is_transient(error) or batch.maybe_sent:
            return too_late(self._stream, batch.maybe_sent, error)
        return error.explained(self._stream) if isinstance(error, ReplyError) else error
