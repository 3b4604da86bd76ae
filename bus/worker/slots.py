"""The slots of one handler: who waits for work, and whose call is cancelled, and why."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from bus.telemetry import Telemetry
from bus.worker.executor import Slot, SlotTask, absorb_cancellation
from bus.worker.hand import names_of

T = TypeVar("T")


class Slots:
    """The slots of one consumer, as many as its concurrency.

    timeout_s: what one call may take, None for ever. ending: nothing more will be waited for, so a
    cancellation between two calls is meant.
    """

    def __init__(
        self, group: str, concurrency: int, timeout_s: float | None, telemetry: Telemetry
    ) -> None:
        self.ending = False
        self._group = group
        self._timeout_s = timeout_s
        self._telemetry = telemetry
        self._all = [Slot() for _ in range(concurrency)]
        self._idle: deque[asyncio.Future[None]] = deque()

    def start(
        self, work: Callable[[Slot], Coroutine[Any, Any, None]]
    ) -> list["asyncio.Task[None]"]:
        """Start a task that works in each slot; return the tasks."""
        loop = asyncio.get_running_loop()
        for i, slot in enumerate(self._all):
            slot.task = SlotTask(work(slot), loop=loop, name=f"{self._group} slot {i}")
        return [s.task for s in self._all if s.task is not None]

    # --- between two calls

    def wake(self, count: int) -> None:
        """Wake so many of those that rest."""
        for _ in range(min(count, len(self._idle))):
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def wake_all(self) -> None:
        """Wake all that rest."""
        self.wake(len(self._idle))

    def rest(self) -> "asyncio.Future[None]":
        """Return a future that is done once there may be something to start."""
        waiter = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        return waiter

    async def waited(self, slot: Slot, until: Awaitable[T]) -> T | None:
        """Wait between two calls and return what came; None if cancelled, which ends no slot.

        Such a cancellation was meant for the last call.
        """
        try:
            return await until
        except asyncio.CancelledError:
            if slot.task is None or slot.task.torn_down or self.ending:
                raise
            await absorb_cancellation(slot.task)
            return None

    # --- cancelling calls

    def add(self, slot: Slot) -> None:
        """Look after the call of one more, which runs beside those that were started here."""
        self._all.append(slot)

    def remove(self, slot: Slot) -> None:
        """Look after it no more."""
        self._all.remove(slot)

    def cancel_calls(self) -> int:
        """Cancel the calls that still run, to be handed back uncounted; return how many."""
        now = asyncio.get_running_loop().time()
        running = [s for s in self._all if s.started_at]
        for slot in running:
            slot.cancel("shutdown", now)
        return len(running)

    def look_after(self, now: float) -> None:
        """Enforce the time limit: one tick for all slots."""
        limit_s = self._timeout_s
        if limit_s is None:
            return
        for slot in self._all:
            if slot.started_at and now - max(slot.started_at, slot.cancelled_at) >= limit_s:
                self._time_out(slot, now)

    def _time_out(self, slot: Slot, now: float) -> None:
        if slot.cancelled_at > slot.started_at and slot.delivery is not None:
            self._telemetry.emit(
                "handler.stuck",
                **names_of(slot.delivery),
                running_s=round(now - slot.started_at, 3),
            )
        slot.cancel("timeout", now)
