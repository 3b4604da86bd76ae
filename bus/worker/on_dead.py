"""Tells a handler's `on_dead` of what is about to become a dead letter."""

import asyncio
from typing import Any

from bus.delivery import DeadLetter, DeadLettered, Delivery, Publishes
from bus.errors import BusError
from bus.handler import Handler
from bus.telemetry import Telemetry
from bus.worker.executor import Executor, Slot
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
        slot.delivery = delivery
        slot.started_at = asyncio.get_running_loop().time()
        told = DeadLettered(delivery, verdict.reason, verdict.error)
        failure = await self._executor.call_on_dead(slot, told, self._bus)
        slot.started_at = 0.0
        if failure is not None:
            self._telemetry.emit(
                "on_dead.failed",
                **names_of(delivery),
                error_type=failure.type,
                error=failure.text,
                where=failure.where,
            )
        return True
