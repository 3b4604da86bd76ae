"""Reclaimed entries: one of them may be what killed its worker.

Its count says how often it was started, so it is raised just before the handler runs. What was
started before is a suspect: one of those at a time, so that if it kills us, the others are cleared.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from bus.delivery import Delivery, Verdict
from bus.errors import BusError
from bus.shortage import tell_lost
from bus.streams.answers import Started
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.hand import Holding, texts


class Suspects:
    """Starts the reclaimed entries of one consumer.

    unseen: told when the outcome of a start is unknown, so that the entry is recovered.
    """

    def __init__(
        self,
        store: StreamStore,
        consumer: str,
        holding: Holding,
        telemetry: Telemetry,
        unseen: Callable[[BusError], None],
    ) -> None:
        self._store = store
        self._consumer = consumer
        self._holding = holding
        self._telemetry = telemetry
        self._unseen = unseen
        self._one_runs = False

    async def start(
        self, delivery: Delivery[Any], run: Callable[[], Awaitable[Verdict | None]]
    ) -> Verdict | None:
        """Count the start and `run`, or put it aside; the next suspect then waits in the buffer."""
        suspect = delivery.attempt > 1  # started before, or at least not its first worker
        if suspect and self._one_runs:
            self._holding.suspects.append(delivery)
            return None
        self._one_runs = self._one_runs or suspect
        try:
            started_at = asyncio.get_running_loop().time()
            if not await self._count_start(delivery):
                return None
            delivery.checked_at = started_at
            return await run()
        finally:
            if suspect:
                self._one_runs = False
                if self._holding.suspects:
                    self._holding.buffer.appendleft(self._holding.suspects.popleft())

    async def _count_start(self, delivery: Delivery[Any]) -> bool:
        """Raise the delivery count of a reclaimed entry; False if it must not run here."""
        hand = self._holding.of(delivery)
        try:
            started = await self._store.start(
                hand.stream, hand.group, self._consumer, delivery.entry_id, delivery.attempt + 1
            )
        except BusError as error:
            self._unseen(error)  # not started: recovered with the rest
            hand.held.pop(delivery.entry_id, None)
            return False
        if started is Started.YES:
            delivery.reclaimed = False
            delivery.attempt += 1
            return True
        hand.held.pop(delivery.entry_id, None)
        if started is Started.LOST:
            tell_lost(self._telemetry, hand.stream, {hand.group: texts([delivery.entry_id])})
        else:
            self._holding.tell_dropped(hand, 1)
        return False
