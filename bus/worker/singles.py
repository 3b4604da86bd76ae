"""A handler of single deliveries at work: each of its slots runs one call at a time."""

import asyncio
from typing import Any

from bus.delivery import ACK, COMMIT, Delivery, Verdict
from bus.worker.consumer import Consumer
from bus.worker.executor import Slot, Suspended


class SingleConsumer(Consumer):
    """Runs a handler of single deliveries under one worker name."""

    async def _slot(self, slot: Slot) -> None:  # noqa: C901, PLR0912, PLR0915 - hot
        clock = asyncio.get_running_loop().time
        buffer, turn, circuit = self.holding.buffer, self._turn, self._circuit
        demand, once, pace, intake = self._demand, self._once, self._pace, self.intake
        triage, begin, ack = self.executor.triage, self.executor.begin, self._settler.ack
        task = slot.task
        assert task is not None
        has_run = False
        while True:
            if not buffer or circuit.blocked:
                if self._closing:
                    return
                await self._rest(slot)
                continue
            now = clock()
            if now > turn.ends:
                await self._give_way(slot, has_run=has_run)
                has_run = False
                continue
            if once is not None and now < once.held_until:
                await self._slots.waited(slot, once.wait())
                continue
            has_run = True
            delivery = buffer.popleft()
            if now - delivery.checked_at > self._unchecked_s:
                buffer.appendleft(delivery)
                await self.holding.check(self._unchecked_s)
                continue
            demand.running += 1
            try:
                if circuit.is_open:
                    await self._probe(slot, delivery, now)
                elif delivery.reclaimed or delivery.condemned is not None:
                    await self._handle_other(slot, delivery, now)
                elif once is not None:
                    await self._handle(slot, delivery, now)
                elif (verdict := triage(delivery)) is not None:
                    await self._settle(slot, delivery, verdict)
                else:  # as `_handle` and `_finish`; here, since most of them never suspend
                    slot.delivery = delivery
                    slot.started_at = now
                    begun = begin(slot, delivery)
                    if begun is ACK and not task.cancelling() and not circuit.on_probation:
                        slot.started_at = 0.0
                        self.returned += 1
                        ack(delivery)
                    else:
                        await self._finish(slot, delivery, now, begun)
            finally:
                demand.running -= 1
            if intake.waits and len(buffer) <= pace.low_water:
                intake.look_again()

    async def _handle(self, slot: Slot, delivery: Delivery[Any], now: float) -> Verdict | None:
        verdict = self.executor.triage(delivery)
        if verdict is not None:
            await self._settle(slot, delivery, verdict)
            return None
        if self._once is not None and not await self._once.admitted(slot, [delivery]):
            return None
        slot.delivery = delivery
        slot.started_at = now
        return await self._finish(slot, delivery, now, self.executor.begin(slot, delivery))

    async def _finish(
        self, slot: Slot, delivery: Delivery[Any], now: float, begun: Verdict | Suspended
    ) -> Verdict:
        """See a call to its end, and settle it; return how it ended."""
        verdict = begun
        if isinstance(verdict, Suspended):
            verdict = await self.executor.finish(slot, delivery, verdict)
            self._turn.prolong()
        slot.started_at = 0.0
        if slot.task is not None and slot.task.cancelling():
            await self._end_cancelled(slot.task, delivery, verdict)
        if verdict is ACK or verdict is COMMIT:
            self.returned += 1
            if verdict is ACK:
                self._settler.ack(delivery)
            else:
                self._settler.settle(self.holding.of(delivery), delivery, verdict)
            if self._circuit.on_probation:
                self._circuit.vouch(now, parked=delivery.parked)
        elif (judged := self._guard.judge(delivery, verdict, now)) is not None:
            await self._settle(slot, delivery, judged)
        return verdict
