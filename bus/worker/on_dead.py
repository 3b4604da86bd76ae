"""Tells a handler's `on_dead` of what is about to become a dead letter."""

import asyncio
from typing import Any

from bus.config import GRACE_S
from bus.delivery import DeadLetter, DeadLettered, Delivery, Publishes
from bus.errors import BusError
from bus.handler import Handler
from bus.telemetry import Telemetry
from bus.worker.executor import Executor, Slot, SlotTask
from bus.worker.hand import Holding, names_of


class OnDead:
    """Calls `on_dead` of one handler, if it has one."""

    def __init__(
        self,
        handler: Handler[...],
        executor: Executor,
        holding: Holding,
        bus: Publishes,
        telemetry: Telemetry,
    ) -> None:
        self._handler = handler
        self._executor = executor
        self._holding = holding
        self._bus = bus
        self._telemetry = telemetry
        self._late: set[asyncio.Task[None]] = set()

    async def tell(self, slot: Slot, delivery: Delivery[Any], verdict: DeadLetter) -> bool:
        """Call on_dead in the slot, so that what it publishes is marked as caused by this.

        Returns False, without calling it, when another worker has the entry by now: that one
        may be handling it well. One that only waits for room among the dead letters was told.
        """
        hand = self._holding.of(delivery)
        if self._handler.on_dead is None or delivery.entry_id in hand.unburied:
            return True
        try:
            ours = await self._holding.still_ours(delivery)
        except BusError:
            ours = True  # the server is away: on_dead is at-least-once, as everything is
        if not ours:
            hand.held.pop(delivery.entry_id, None)
            self._holding.tell_dropped(hand, 1)
            return False
        await self._call(slot, delivery, verdict)
        return True

    def tell_late(self, delivery: Delivery[Any], verdict: DeadLetter) -> None:
        """Call on_dead for one that is a dead letter already; in a task, since no slot has it.

        A crash before it is over loses the call.
        """
        if self._handler.on_dead is None:
            return
        slot = Slot()
        slot.task = SlotTask(
            self._call_late(slot, delivery, verdict), loop=asyncio.get_running_loop()
        )
        self._late.add(slot.task)
        slot.task.add_done_callback(self._late.discard)

    async def _call_late(self, slot: Slot, delivery: Delivery[Any], verdict: DeadLetter) -> None:
        limit_s = self._handler.timeout_s
        loop = asyncio.get_running_loop()
        tick = loop.call_later(limit_s, slot.cancel, "timeout", loop.time()) if limit_s else None
        await self._call(slot, delivery, verdict)
        if tick is not None:
            tick.cancel()

    async def finish(self) -> None:
        """Wait for the calls that run late."""
        if self._late:
            await asyncio.wait(self._late, timeout=GRACE_S)

    async def _call(self, slot: Slot, delivery: Delivery[Any], verdict: DeadLetter) -> None:
        slot.delivery = delivery
        slot.started_at = asyncio.get_running_loop().time()
        told = DeadLettered(delivery, verdict.reason, verdict.error)
        # What it publishes is caused by this delivery, also when the verdict was taken before.
        was_settled, delivery.settled = delivery.settled, False
        try:
            failure = await self._executor.call_on_dead(slot, told, self._bus)
        finally:
            delivery.settled = was_settled
        slot.started_at = 0.0
        if failure is not None:
            self._telemetry.emit(
                "on_dead.failed",
                **names_of(delivery),
                error_type=failure.type,
                error=failure.text,
                where=failure.where,
            )
