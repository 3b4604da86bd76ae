"""Prompt retries: a local timer per parked entry takes it out of its lane to the millisecond.

Only a convenience of the worker that parked it: when that worker dies, or has no free slot at the
moment, the entry is where it was, and the sweep takes it once its lane is due.
"""

import asyncio
from collections.abc import Callable

from bus.config import PROMPT_RETRIES
from bus.errors import BusError
from bus.streams.answers import Taken
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.hand import Hand


class PromptRetries:
    """The timers of one consumer.

    free: how many slots are free now. deliver: takes (hand, taken, loop time of asking), returns
        how many it took.
    failed: told when the outcome of a take is unknown, so that it is recovered.
    """

    def __init__(
        self,
        store: StreamStore,
        consumer: str,
        telemetry: Telemetry,
        free: Callable[[], int],
        deliver: Callable[[Hand, Taken, float], int],
        failed: Callable[[BusError], None],
    ) -> None:
        self._store = store
        self._consumer = consumer
        self._telemetry = telemetry
        self._free = free
        self._deliver = deliver
        self._failed = failed
        self._timers: set[asyncio.TimerHandle] = set()
        self._due: list[tuple[Hand, bytes, bytes]] = []
        self._taking: asyncio.Task[None] | None = None
        self._stopped = False

    def parked(self, hand: Hand, lane: bytes, entry_id: bytes, delay_s: float) -> None:
        """Take the entry again in `delay_s` seconds, if a slot is free then."""
        if self._stopped or len(self._timers) >= PROMPT_RETRIES:
            return
        timer: asyncio.TimerHandle

        def due() -> None:
            self._timers.discard(timer)
            self._due.append((hand, lane, entry_id))
            if self._taking is None:
                self._taking = asyncio.get_running_loop().create_task(self._take())

        timer = asyncio.get_running_loop().call_later(delay_s, due)
        self._timers.add(timer)

    def stop(self) -> None:
        """Take nothing more."""
        self._stopped = True
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    async def finish(self) -> None:
        """Wait until a take that is under way has ended."""
        if self._taking is not None:
            await asyncio.wait([self._taking])

    async def _take(self) -> None:
        try:
            while self._due and not self._stopped:
                due, self._due = [d for d in self._due if not d[0].paused], []
                due = due[: self._free()]
                for hand in {id(h): h for h, _, _ in due}.values():
                    entries = [(lane, i) for h, lane, i in due if h is hand]
                    asked_at = asyncio.get_running_loop().time()
                    taken = await self._store.take_parked(
                        hand.stream, hand.group, self._consumer, entries
                    )
                    self._telemetry.emit(
                        "delivery.taken",
                        stream=hand.stream,
                        group=hand.group,
                        count=self._deliver(hand, taken, asked_at),
                    )
        except BusError as error:
            self._failed(error)
        finally:
            self._taking = None
