"""One handler at work: a buffer of deliveries and the slots that run them.

    intake -> buffer -> slots (executor) -> settler
                ^                              |
                +--- retries, reclaimer <------+  (lanes in the pending list)

The intake reads, the executor decides, the settler writes; here is only who runs when.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from bus.config import IN_HAND_S, READ_COUNT, WAITED_S
from bus.delivery import ACK, HAND_BACK, DeadLetter, DeadLettered, Delivery, Publishes, Verdict
from bus.errors import BusError
from bus.handler import Handler
from bus.streams.answers import RawEntry, Started, Taken
from bus.streams.codec import envelope_of
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.executor import Executor, Slot, SlotTask, absorb_cancellation
from bus.worker.hand import Hand, Holding, names_of, tell_lost
from bus.worker.intake import Intake
from bus.worker.retries import PromptRetries
from bus.worker.settler import Settler
from bus.worker.turn import Turn

_SHORTEST_UNCHECKED_S = 0.1  # below a round trip to a distant server, every check would be late


class Consumer:
    """Runs one handler under one worker name. Started and stopped by the supervisor."""

    def __init__(
        self,
        handler: Handler[...],
        name: str,
        store: StreamStore,
        bus: Publishes,
        telemetry: Telemetry,
        *,
        concurrency: int,
        lease_s: float,
        turn: Turn,
    ) -> None:
        self.handler = handler
        self.group = handler.group
        self.name = name
        self.concurrency = concurrency
        self.turn_given: Callable[[Consumer], None] = lambda _: None  # set by the reclaimer
        self._store = store
        self._bus = bus
        self._telemetry = telemetry
        self._turn = turn
        # What was not confirmed to be ours for this long is checked before it runs: a third of
        # the time after which others may take it, be it by visibility or by our lease.
        self._unchecked_s = max(min(handler.visibility_s, lease_s) / 3, _SHORTEST_UNCHECKED_S)
        self._executor = Executor(handler)
        self.holding = Holding(store, handler.group, name, telemetry)
        self.hands = self.holding.hands
        self._retries = PromptRetries(
            store, name, telemetry, self._free, self.deliver, self._outcome_unknown
        )
        self._settler = Settler(
            store, name, self.hands, telemetry, self._retries.parked, self._relieved
        )
        self.intake = Intake(
            store,
            handler.group,
            name,
            self.hands,
            self,
            telemetry,
            block_ms=max(1, int(self._unchecked_s * 500)),
        )
        self._slots = [Slot() for _ in range(concurrency)]
        self._suspect_runs = False
        self._idle: deque[asyncio.Future[None]] = deque()
        self._running = 0
        self._reserved = 0
        self._wants_turn = False
        self._stopping = False
        self._closing = False
        self._checking = asyncio.Lock()
        self._finished = 0
        self._rate = 0.0  # deliveries settled per second, while there is work
        self._measured_at = 0.0
        self._measured = 0

    # --- life

    def serve(self, streams: Iterable[str], state: Any) -> None:
        """Read these streams too, from the next read on."""
        for stream in streams:
            if stream not in self.hands:
                self.hands[stream] = Hand(self.group, stream, self._bus, envelope_of, state)

    def start(self) -> list["asyncio.Task[None]"]:
        """Start the slots and loops; return their tasks, the read loop first."""
        loop = asyncio.get_running_loop()
        for i, slot in enumerate(self._slots):
            slot.task = SlotTask(self._slot(slot), loop=loop, name=f"{self.group} slot {i}")
        return [
            loop.create_task(self.intake.run(), name=f"{self.group} intake"),
            loop.create_task(self._settler.run(), name=f"{self.group} settler"),
            *(s.task for s in self._slots if s.task is not None),
        ]

    @property
    def busy(self) -> bool:
        """Whether anything is in hand or a verdict is on its way."""
        return self._settler.has_work or bool(self.holding.held)

    async def stop_reading(self, intake: "asyncio.Task[None]") -> int:
        """Stop reading and hand back what has not started; return how many that were."""
        self._stopping = True
        self._retries.stop()
        await self.intake.stop(intake)
        await self._retries.finish()
        back = self._hand_back(lambda _: True)
        # What was reclaimed and not started is left as it is: its count says how often it was
        # started, and others reclaim it when our lease is gone.
        self.holding.forget([*self.holding.buffer, *self.holding.suspects])
        return back

    def quit(self) -> None:
        """Take nothing in any more, because a part of the worker broke."""
        self._retries.stop()
        self.intake.quit()

    async def calls_ended(self) -> None:
        """Wait until no handler runs."""
        while self._running:  # noqa: ASYNC110 - at stop only
            await asyncio.sleep(0.002)

    async def verdicts_applied(self) -> None:
        """Wait until every verdict is with the server."""
        self._settler.hurry()
        while self._settler.has_work:  # noqa: ASYNC110 - at stop only
            await asyncio.sleep(0.002)

    def cancel_calls(self) -> int:
        """Cancel the calls that still run, to be handed back uncounted; return how many."""
        now = asyncio.get_running_loop().time()
        running = [s for s in self._slots if s.started_at]
        for slot in running:
            slot.cancel("shutdown", now)
        return len(running)

    async def close(self) -> None:
        """End the slots and loops, which are idle by now, and close the reading connection."""
        self._closing = True
        while self._idle:
            _wake(self._idle.popleft())
        self._settler.close()
        await self.intake.close()

    # --- what comes in

    def deliver_new(self, hand: Hand, entries: Sequence[RawEntry], sent_at: float) -> None:
        """Take entries read for the first time, behind what is there."""
        now = asyncio.get_running_loop().time()
        self._measure(now)
        self.holding.add_new(hand, entries, sent_at, now)
        self._wake_slots(len(entries))

    def deliver(self, hand: Hand, taken: Taken, asked_at: float, *, reclaimed: bool = False) -> int:
        """Take entries moved here by a script sent at `asked_at`, before the new ones."""
        count = self.holding.add_taken(hand, taken, asked_at, reclaimed=reclaimed)
        self._wake_slots(count)
        return count

    def _outcome_unknown(self, error: BusError) -> None:
        """A script may have moved entries here and its reply was lost: recover before reading."""
        self.intake.unseen = True
        self._telemetry.emit(
            "read.failed", group=self.group, error_type=type(error).__name__, error=str(error)
        )

    # --- how much is wanted

    def _free(self) -> int:
        if self._stopping or self._settler.is_behind:
            return 0
        return max(0, self.concurrency - self._running - self.holding.waiting)

    def _relieved(self) -> None:
        self.intake.look_again()

    def wanted(self) -> int:
        """Entries to ask for: the free slots, or what they do in IN_HAND_S if that is more."""
        if self._settler.is_behind:
            return 0
        ahead = min(int(self._rate * IN_HAND_S), 2 * READ_COUNT)
        room = max(self.concurrency - self._running, ahead) - len(self.holding.buffer)
        if room > 0 and self._wants_turn:
            self._wants_turn = False
            self._reserved = max(1, room // 2)
            self.turn_given(self)
        return room - self._reserved

    def _measure(self, now: float) -> None:
        done = self._finished - self._measured
        if done and now > self._measured_at:
            self._rate += (done / (now - self._measured_at) - self._rate) * 0.5
        self._measured_at, self._measured = now, self._finished

    def reserve(self) -> int:
        """Return how many due or orphaned entries may be taken: half the free slots, at least one.

        0 when none is free: then the next one that becomes free is kept and `turn_given` called.
        What was reserved is given back by `release`.
        """
        if not self._reserved:
            free = self._free()
            self._wants_turn = not free and not self._stopping
            self._reserved = max(1, free // 2) if free else 0
        return self._reserved

    def release(self) -> None:
        """Give the reserved slots back to the intake."""
        self._reserved = 0
        self.intake.look_again()

    # --- slots

    def _wake_slots(self, entries: int) -> None:
        for _ in range(min(entries, len(self._idle))):
            _wake(self._idle.popleft())

    async def _slot(self, slot: Slot) -> None:
        clock = asyncio.get_running_loop().time
        buffer, turn = self.holding.buffer, self._turn
        has_run = False
        while True:
            if not buffer:
                if self._closing:
                    return
                waiter = asyncio.get_running_loop().create_future()
                self._idle.append(waiter)
                self.intake.look_again()
                await self._waited(slot, waiter)
                continue
            now = clock()
            if now > turn.ends:
                if has_run:  # those who have not run in this turn ask for the next one first
                    has_run = False
                    await self._waited(slot, asyncio.sleep(0))
                await self._waited(slot, asyncio.shield(turn.next()))
                continue
            has_run = True
            delivery = buffer.popleft()
            if now - delivery.checked_at > self._unchecked_s:
                buffer.appendleft(delivery)
                await self._check_ownership()
                continue
            self._running += 1
            try:
                if delivery.reclaimed:
                    await self._handle_reclaimed(slot, delivery)
                else:
                    await self._handle(slot, delivery, now)
            finally:
                self._running -= 1
            if self.intake.waits and len(buffer) <= self._low_water():
                self.intake.look_again()

    async def _waited(self, slot: Slot, until: Awaitable[None]) -> None:
        """Wait between two calls; a cancellation that was meant for the last one is void."""
        try:
            await until
        except asyncio.CancelledError:
            if slot.task is None or slot.task.torn_down or self._closing or self._stopping:
                raise
            await absorb_cancellation(slot.task)

    def _low_water(self) -> int:
        """The buffer length at which reading on is worth a look: half of what is kept in hand."""
        return min(READ_COUNT, int(self._rate * IN_HAND_S) // 2)

    async def _handle(self, slot: Slot, delivery: Delivery[Any], now: float) -> None:
        verdict = self._executor.triage(delivery)
        if verdict is None:
            slot.delivery = delivery
            slot.started_at = now
            verdict = await self._executor.call(slot, delivery)
            slot.started_at = 0.0
            if slot.task is not None and slot.task.cancelling():
                await self._end_cancelled(slot.task, delivery, verdict)
        if verdict is ACK:
            self._finished += 1
            self._settler.ack(delivery)
        else:
            await self._settle(slot, delivery, verdict)

    async def _settle(self, slot: Slot, delivery: Delivery[Any], verdict: Verdict) -> None:
        if (
            isinstance(verdict, DeadLetter)
            and self.handler.on_dead is not None
            and not await self._tell_on_dead(slot, delivery, verdict)
        ):
            return
        self._finished += 1
        self._settler.settle(self.holding.of(delivery), delivery, verdict)

    async def _end_cancelled(
        self, task: SlotTask, delivery: Delivery[Any], verdict: Verdict
    ) -> None:
        """Use up the cancellation of a call, unless everything is being torn down around us."""
        if task.torn_down:
            self._settler.settle(self.holding.of(delivery), delivery, verdict)
            raise asyncio.CancelledError
        await absorb_cancellation(task)

    async def _tell_on_dead(self, slot: Slot, delivery: Delivery[Any], verdict: DeadLetter) -> bool:
        """Call on_dead in the slot, so that what it publishes is marked as caused by this.

        Returns False, without calling it, when another worker has the entry by now: that one
        may be handling it well.
        """
        hand = self.holding.of(delivery)
        try:
            ours = await self.holding.still_ours(delivery)
        except BusError:
            ours = True  # the server is away: on_dead is at-least-once, as everything is
        if not ours:
            hand.held.pop(delivery.entry_id, None)
            self.holding.tell_dropped(hand, 1)
            return False
        slot.delivery = delivery
        slot.started_at = asyncio.get_running_loop().time()
        told = DeadLettered(delivery, verdict.reason, verdict.error)
        failure = await self._executor.call_on_dead(slot, told, self._bus)
        slot.started_at = 0.0
        if slot.task is not None and slot.task.cancelling():
            await self._end_cancelled(slot.task, delivery, verdict)
        if failure is not None:
            self._telemetry.emit(
                "on_dead.failed",
                **names_of(delivery),
                error_type=failure.type,
                error=failure.text,
                where=failure.where,
            )
        return True

    # --- reclaimed entries: one of them may be what killed its worker

    async def _handle_reclaimed(self, slot: Slot, delivery: Delivery[Any]) -> None:
        crashed = self._executor.crashed(delivery)
        if crashed is not None:
            await self._settle(slot, delivery, crashed)
            return
        suspect = delivery.attempt > 1  # started before, or at least not its first worker
        if suspect and self._suspect_runs:
            # One at a time: if it kills us, the others are cleared.
            self.holding.suspects.append(delivery)
            return
        self._suspect_runs = self._suspect_runs or suspect
        try:
            started_at = asyncio.get_running_loop().time()
            if await self._count_start(delivery):
                delivery.checked_at = started_at
                await self._check_start(slot, delivery)
        finally:
            if suspect:
                self._suspect_runs = False
                if self.holding.suspects:
                    self.holding.buffer.appendleft(self.holding.suspects.popleft())
                    self._wake_slots(1)

    async def _check_start(self, slot: Slot, delivery: Delivery[Any]) -> None:
        """Run a delivery whose start was counted, unless we were stopped meanwhile for long."""
        now = asyncio.get_running_loop().time()
        if now - delivery.checked_at > self._unchecked_s:
            self.holding.buffer.appendleft(delivery)  # as any other: asked for before it runs
        else:
            await self._handle(slot, delivery, now)

    async def _count_start(self, delivery: Delivery[Any]) -> bool:
        """Raise the delivery count of a reclaimed entry; False if it must not run here."""
        hand = self.holding.of(delivery)
        try:
            started = await self._store.start(
                hand.stream, self.group, self.name, delivery.entry_id, delivery.attempt + 1
            )
        except BusError as error:
            self._outcome_unknown(error)  # not started: recovered with the rest
            hand.held.pop(delivery.entry_id, None)
            return False
        if started is Started.YES:
            delivery.reclaimed = False
            delivery.attempt += 1
            return True
        hand.held.pop(delivery.entry_id, None)
        if started is Started.LOST:
            tell_lost(self._telemetry, hand, [delivery.entry_id])
        else:
            self.holding.tell_dropped(hand, 1)
        return False

    # --- ownership

    async def _check_ownership(self) -> None:
        """Ask the server whether what lay unread for long is still ours, before any of it runs."""
        async with self._checking:
            now = asyncio.get_running_loop().time()
            buffer = self.holding.buffer
            if not buffer or now - buffer[0].checked_at <= self._unchecked_s:
                return  # another slot has asked meanwhile
            try:
                await self.holding.renew()
            except BusError as error:
                self._telemetry.emit(
                    "lease.failed",
                    worker=self.name,
                    error_type=type(error).__name__,
                    error=str(error),
                )
                await asyncio.sleep(0.1)  # the server is away; nothing may run until it says

    def _hand_back(self, chosen: Callable[[Delivery[Any]], bool]) -> int:
        """Hand back what has not started and was not reclaimed; return how many."""
        back = self.holding.take_out(chosen)
        for delivery in back:
            self._settler.settle(self.holding.of(delivery), delivery, HAND_BACK)
        return len(back)

    # --- the tick

    def look_after(self, now: float) -> None:
        """Enforce timeout_s, and hand back what has waited too long: one tick for all slots."""
        limit_s = self.handler.timeout_s
        if limit_s is not None:
            for slot in self._slots:
                if slot.started_at and now - max(slot.started_at, slot.cancelled_at) >= limit_s:
                    self._time_out(slot, now)
        all_busy = self._running >= self.concurrency
        if (
            self.holding.buffer
            and all_busy
            and self._hand_back(lambda d: now - d.received_at > WAITED_S)
        ):
            self._rate = 0.0  # the estimate that read so far ahead was wrong

    def _time_out(self, slot: Slot, now: float) -> None:
        if slot.cancelled_at > slot.started_at and slot.delivery is not None:
            self._telemetry.emit(
                "handler.stuck",
                **names_of(slot.delivery),
                running_s=round(now - slot.started_at, 3),
            )
        slot.cancel("timeout", now)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
