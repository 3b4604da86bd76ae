"""Tells a handler's `on_dead` of what becomes a dead letter: in the slot that has it, before.

Effects that failed half way are a dead letter already, by the script that found out. Of these it is
told late: beside the slots, as many at a time as there are slots.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from bus.config import READ_COUNT
from bus.delivery import DeadLetter, DeadLettered, Delivery, Failure, Publishes
from bus.errors import BusError
from bus.handler import Handler
from bus.telemetry import Telemetry
from bus.worker.executor import Executor, Slot, SlotTask
from bus.worker.hand import Holding, names_of
from bus.worker.slots import Slots

_CUT_OFF = {"timeout": "took longer than timeout_s", "shutdown": "cut off: the worker stopped"}
_NOT_CALLED = "not called: the worker stopped first"
_LEFT_BEHIND = "left behind: it ignores its cancellation, and the worker stopped"


class OnDead:
    """Calls `on_dead` of one handler, if it has one.

    slots: enforce timeout_s on late calls, too, and cut them off at the end. most_late: calls at a
    time. relieved: told when reading may go on that too many late calls had held up.
    """

    def __init__(
        self,
        handler: Handler[...],
        executor: Executor,
        holding: Holding,
        slots: Slots,
        bus: Publishes,
        telemetry: Telemetry,
        relieved: Callable[[], None],
        *,
        most_late: int,
    ) -> None:
        self._handler = handler
        self._executor = executor
        self._holding = holding
        self._slots = slots
        self._bus = bus
        self._telemetry = telemetry
        self._relieved = relieved
        self._most_late = most_late
        self._waiting: deque[tuple[Delivery[Any], DeadLetter]] = deque()
        self._late: dict[Slot, Delivery[Any]] = {}
        self._given_up = False

    # --- before

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

    # --- late

    @property
    def runs_late(self) -> bool:
        """Whether late calls run or wait."""
        return bool(self._late or self._waiting)

    @property
    def is_behind(self) -> bool:
        """Whether so many late calls wait that nothing more should be read for now."""
        return len(self._waiting) > READ_COUNT

    def tell_late(self, delivery: Delivery[Any], verdict: DeadLetter) -> None:
        """Call on_dead for one that is a dead letter already, when its turn has come.

        A crash before it is over loses the call.
        """
        if self._handler.on_dead is None:
            return
        if self._given_up:
            self._tell_not_called(delivery)
            return
        self._waiting.append((delivery, verdict))
        self._begin()

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._late) < self._most_late:
            delivery, verdict = self._waiting.popleft()
            slot = Slot()
            slot.task = SlotTask(self._call(slot, delivery, verdict), loop=loop)
            slot.delivery = delivery
            slot.started_at = loop.time()
            self._late[slot] = delivery
            self._slots.add(slot)
            slot.task.add_done_callback(partial(self._ended, slot))

    def _ended(self, slot: Slot, task: asyncio.Task[None]) -> None:
        was_behind = self.is_behind
        delivery = self._late.pop(slot)
        self._slots.remove(slot)
        if task.cancelled():  # before its first step
            self._tell_not_called(delivery)
        if not (self._given_up or (slot.task is not None and slot.task.torn_down)):
            self._begin()
        if was_behind and not self.is_behind:
            self._relieved()

    def give_up(self) -> None:
        """Begin no late call any more, and say whose were not: the grace period is over."""
        self._given_up = True
        while self._waiting:
            self._tell_not_called(self._waiting.popleft()[0])

    def close(self) -> None:
        """Say which late calls are left behind."""
        self.give_up()
        for delivery in self._late.values():
            self._tell_failed(delivery, Failure("CancelledError", _LEFT_BEHIND, _LEFT_BEHIND))

    # --- the call

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
            words = _CUT_OFF.get(slot.cancel_reason)
            if words is not None:
                failure = Failure(failure.type, words, f"{words}, in {failure.where}")
            self._tell_failed(delivery, failure)

    def _tell_not_called(self, delivery: Delivery[Any]) -> None:
        self._tell_failed(delivery, Failure("CancelledError", _NOT_CALLED, _NOT_CALLED))

    def _tell_failed(self, delivery: Delivery[Any], failure: Failure) -> None:
        self._telemetry.emit(
            "on_dead.failed",
            **names_of(delivery),
            error_type=failure.type,
            error=failure.text,
            where=failure.where,
        )
