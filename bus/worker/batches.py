"""A batch handler at work: its slots take many deliveries for one call.

    the buffer holds `batch` deliveries       a slot takes them at once
    its oldest has waited `batch_wait_ms`     a slot takes what there is; one timer wakes it
    a slot meets what never reaches the       the verdict is given, and another takes its place
        handler: a type not asked for, ...
    reclaimed, condemned, undecodable,        goes alone, and at once
        a probe of the breaker

Alone, because it may be what killed its worker, and its neighbours must not die with it; because
one is enough to see whether an outage is over; because `on_dead` may take its time. All else is as
for single deliveries (`consumer.py`).
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from bus.delivery import HAND_BACK, NOT_DECODED, DeadLetter, Delivery, Verdict
from bus.handler import Handler
from bus.worker.consumer import Consumer
from bus.worker.executor import BatchEnd, Slot, absorb_cancellation, succeeded

_EARLY_S = 0.0005  # uvloop's timers count whole milliseconds


class BatchConsumer(Consumer):
    """Runs one batch handler under one worker name."""

    def __init__(self, handler: Handler[...], *args: Any, **settings: Any) -> None:
        super().__init__(handler, *args, **settings)
        assert handler.batch is not None
        self._most = handler.batch
        self._wait_s = handler.batch_wait_ms / 1000
        # Nothing is due before this loop time; when it has come, all are looked at. What comes in
        # is younger than what was there, so it may be too early, and never too late.
        self._due_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._calls = 0

    async def close(self) -> None:
        """End as any consumer does."""
        if self._timer is not None:
            self._timer.cancel()
        await super().close()

    @property
    def _calls_so_far(self) -> int:
        return self._calls

    # --- when

    def _is_ready(self, now: float) -> bool:
        """Whether a slot would find something to start."""
        buffer = self.holding.buffer
        if not buffer or self._circuit.blocked:
            return False
        if len(buffer) >= self._most or self._stopping or self._circuit.is_open:
            return True  # at stop nothing more will come
        if _goes_alone(buffer[0]):
            return True
        if _is_due(self._due_at, now):
            self._due_at = min(d.received_at for d in buffer) + self._wait_s
        return _is_due(self._due_at, now)

    def _wake_slots(self, entries: int) -> None:
        """Wake one slot if there is something to start; it wakes the next. Else see to it later."""
        if not entries:
            return
        if self._is_ready(asyncio.get_running_loop().time()):
            super()._wake_slots(1)
        elif self.holding.buffer and not self._circuit.blocked:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            if self._timer.when() <= self._due_at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._due_at, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self._wake_slots(len(self.holding.buffer))

    # --- what

    async def _slot(self, slot: Slot) -> None:
        clock = asyncio.get_running_loop().time
        buffer, turn, demand = self.holding.buffer, self._turn, self._demand
        has_run = False
        while True:
            now = clock()
            if not self._is_ready(now):
                if self._closing:
                    return
                self._wake_slots(len(buffer))  # sets the timer
                await self._rest(slot)
                continue
            if now > turn.ends:
                await self._give_way(slot, has_run=has_run)
                has_run = False
                continue
            has_run = True
            if self._once is not None and now < self._once.held_until:
                await self._slots.waited(slot, self._once.wait())
                continue
            if now - buffer[0].checked_at > self._unchecked_s:
                await self.holding.check(self._unchecked_s)
                continue
            taken = self._take(now)
            if not taken:
                continue
            self._wake_slots(len(buffer))
            self._read_on()
            demand.running += 1
            try:
                await self._run(slot, taken, now)
            finally:
                demand.running -= 1
            self._read_on()

    def _read_on(self) -> None:
        if self.intake.waits and len(self.holding.buffer) <= max(self._most, self._pace.low_water):
            self.intake.look_again()

    def _take(self, now: float) -> list[Delivery[Any]]:
        """Take what one call gets, or one that goes alone; nothing if it is to be looked at again.

        Gives their verdicts to those that never reach the handler. If too few are left and none of
        them is due, or one has to be checked first, they are put back.
        """
        buffer = self.holding.buffer
        batch: list[Delivery[Any]] = []
        aside: list[Delivery[Any]] = []  # those that come first when the next slot looks
        again = False
        triage, is_open = self.executor.triage, self._circuit.is_open
        while buffer and len(batch) < self._most:
            delivery = buffer.popleft()
            alone = delivery.reclaimed or delivery.condemned is not None
            if not batch and not aside and (alone or is_open):
                return [delivery]
            if now - delivery.checked_at > self._unchecked_s:
                aside.append(delivery)
                again = True
                break
            if alone:
                aside.append(delivery)
                continue
            # What was looked at before, and put back, is not looked at again.
            verdict = triage(delivery) if delivery.event is NOT_DECODED else None
            if verdict is None:
                batch.append(delivery)
            elif isinstance(verdict, DeadLetter):
                self._put_back([*aside, *batch])
                return [delivery]
            else:
                self._end(delivery, verdict)
        if again or not self._may_start(batch, now):
            aside, batch = [*aside, *batch], []
        self._put_back(aside)
        return batch

    def _may_start(self, batch: Sequence[Delivery[Any]], now: float) -> bool:
        """Whether a batch is full or due: some of those that made it so may have been skipped."""
        if not batch or len(batch) == self._most or self._stopping:
            return True
        return _is_due(min(d.received_at for d in batch) + self._wait_s, now)

    def _put_back(self, deliveries: Sequence[Delivery[Any]]) -> None:
        self.holding.buffer.extendleft(reversed(deliveries))

    def _triage(self, delivery: Delivery[Any]) -> Verdict | None:
        """Triage as the executor does, unless that was done when it was looked at before."""
        return self.executor.triage(delivery) if delivery.event is NOT_DECODED else None

    # --- the call

    async def _run(self, slot: Slot, taken: Sequence[Delivery[Any]], now: float) -> None:
        delivery = taken[0]
        if self._circuit.is_open:
            await self._probe(slot, delivery, now)
        elif _goes_alone(delivery):
            await self._handle_other(slot, delivery, now)
        elif len(taken) == 1:
            await self._handle(slot, delivery, now)
        elif admitted := await self._admitted(slot, taken):
            await self._call(slot, admitted, now)

    async def _handle(self, slot: Slot, delivery: Delivery[Any], now: float) -> Verdict | None:
        """Handle and settle a batch of one; return as any consumer does."""
        verdict = self._triage(delivery)
        if verdict is not None:
            await self._settle(slot, delivery, verdict)
            return None
        if not await self._admitted(slot, [delivery]):
            return None
        end = await self._call(slot, [delivery], now)
        return succeeded(delivery) if end.succeeded else end.verdict_on(delivery)

    async def _admitted(
        self, slot: Slot, batch: Sequence[Delivery[Any]]
    ) -> Sequence[Delivery[Any]]:
        """Return those that may be handled now; with `once=` each is asked for, see `once.py`."""
        return batch if self._once is None else await self._once.admitted(slot, batch)

    async def _call(self, slot: Slot, batch: Sequence[Delivery[Any]], now: float) -> BatchEnd:
        slot.delivery = batch[0]
        slot.started_at = now
        end = await self.executor.call_batch(slot, batch)
        slot.started_at = 0.0
        self._calls += 1
        if slot.task is not None and slot.task.cancelling():
            if slot.task.torn_down:
                raise asyncio.CancelledError  # what is left in hand is the next worker's
            await absorb_cancellation(slot.task)
        # First, because the guard weighs the failures against them.
        self._succeed(end.succeeded, now)
        await self._conclude(slot, end, now)
        return end

    def _succeed(self, deliveries: Sequence[Delivery[Any]], now: float) -> None:
        self.returned += len(deliveries)
        plain = [d for d in deliveries if d.collected is None]
        self._settler.ack_all(plain)
        if len(plain) < len(deliveries):
            for delivery in deliveries:
                if delivery.collected is not None:
                    self._settler.settle(self.holding.of(delivery), delivery, succeeded(delivery))
        if self._circuit.on_probation:
            for delivery in deliveries:
                self._circuit.vouch(now, parked=delivery.parked)

    async def _conclude(self, slot: Slot, end: BatchEnd, now: float) -> None:
        """Settle what was not handled to its end: retries first, for dead letters may take long."""
        clock = asyncio.get_running_loop().time
        dead: list[tuple[Delivery[Any], DeadLetter]] = []
        for delivery in end.others:
            if clock() > self._turn.ends:
                await self._give_way(slot, has_run=True)
            judged = self._guard.judge(delivery, end.verdict_on(delivery), now)
            if isinstance(judged, DeadLetter):
                dead.append((delivery, judged))
            elif judged is not None:
                await self._settle(slot, delivery, judged)
        late = False
        for delivery, verdict in dead:
            # After the grace period nobody waits for a row of calls of on_dead.
            late = late or (slot.cut_off == "shutdown" and self.handler.on_dead is not None)
            await self._settle(slot, delivery, HAND_BACK if late else verdict)


def _is_due(due_at: float, now: float) -> bool:
    return now >= due_at - _EARLY_S


def _goes_alone(delivery: Delivery[Any]) -> bool:
    return delivery.reclaimed or delivery.condemned is not None
