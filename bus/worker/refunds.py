"""Gives back the attempts that events lost to an outage, before the breaker saw that it was one.

An event that failed in the window is by now in one of three places: in this worker's hand again,
where the count is in memory; in a lane, where a script lowers it; or with another worker, where it
stays as it is. A refund that does not arrive costs the event an attempt and nothing else.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from bus.config import BREAKER_MEMORY
from bus.delivery import Delivery
from bus.errors import BusError
from bus.shortage import tell_lost
from bus.streams.replies import TRANSIENT, ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.hand import Cooldown, Hand, chunks, texts


@dataclass(frozen=True, slots=True)
class _Failed:
    """A failure that used up an attempt; count: of the delivery, as it was parked."""

    at: float
    stream: str
    entry_id: bytes
    count: int


@dataclass(frozen=True, slots=True)
class _Owed:
    """What is to be given back; count: the least that the server can have."""

    count: int
    attempts: int


class Refunds:
    """The failures of one consumer's window, and what is owed for them once it was an outage."""

    def __init__(
        self, store: StreamStore, group: str, hands: dict[str, Hand], telemetry: Telemetry
    ) -> None:
        self._store = store
        self._group = group
        self._hands = hands
        self._telemetry = telemetry
        self._noted: deque[_Failed] = deque(maxlen=BREAKER_MEMORY)
        self._owed: dict[tuple[str, bytes], _Owed] = {}
        self._cooldown = Cooldown()
        self._giving: asyncio.Task[None] | None = None

    def note(self, delivery: Delivery[Any], now: float, since: float) -> None:
        """Remember a failure that uses up an attempt; forget those before `since`."""
        noted = self._noted
        while noted and noted[0].at < since:
            noted.popleft()
        noted.append(_Failed(now, delivery.origin.stream, delivery.entry_id, delivery.attempt))

    def owe(self, since: float) -> None:
        """All failures from `since` on cost nothing; what is in hand again is settled at once."""
        for failed in self._noted:
            if failed.at >= since:
                key = (failed.stream, failed.entry_id)
                attempts = self._owed[key].attempts + 1 if key in self._owed else 1
                self._owed[key] = _Owed(failed.count, attempts)
        self._noted.clear()
        for key in list(self._owed):
            self._give_in_hand(key)

    def look_after(self, now: float) -> None:
        """Give back what can be by now, in a task of its own; called often."""
        if self._owed and self._giving is None and now >= self._cooldown.until:
            self._giving = asyncio.get_running_loop().create_task(self._give())

    async def finish(self) -> None:
        """Try once more what is owed still: the worker stops."""
        if self._giving is not None:
            await asyncio.wait([self._giving])
        await self._give()

    def _give_in_hand(self, key: tuple[str, bytes]) -> bool:
        """Give back what is owed to a delivery in hand; False if it is not there, or half gone."""
        stream, entry_id = key
        delivery = self._hands[stream].held.get(entry_id)
        if delivery is None or delivery.settled or delivery.reclaimed:
            return False
        delivery.attempt = max(1, delivery.attempt - self._owed.pop(key).attempts)
        return True

    def _ready(self) -> dict[str, list[tuple[bytes, int, int]]]:
        """Return what no longer waits for its verdict to reach the server, by stream."""
        ready: dict[str, list[tuple[bytes, int, int]]] = {}
        for key, owed in list(self._owed.items()):
            stream, entry_id = key
            if not self._give_in_hand(key) and entry_id not in self._hands[stream].held:
                ready.setdefault(stream, []).append((entry_id, owed.count, owed.attempts))
        return ready

    async def _give(self) -> None:
        try:
            for stream, entries in self._ready().items():
                for part in chunks(entries):
                    await self._give_part(self._hands[stream], part)
        finally:
            self._giving = None

    async def _give_part(self, hand: Hand, part: list[tuple[bytes, int, int]]) -> None:
        try:
            done = await self._store.refund(hand.stream, self._group, part)
        except BusError as error:
            self._telemetry.emit(
                "breaker.refund_failed",
                stream=hand.stream,
                group=self._group,
                count=len(part),
                error_type=type(error).__name__,
                error=str(error),
            )
            self._cooldown.after(ok=False)
            if isinstance(error, ReplyError) and error.code not in TRANSIENT:
                for entry_id, _, _ in part:  # the group is gone, or it is forbidden
                    self._owed.pop((hand.stream, entry_id), None)
            return
        self._cooldown.after(ok=True)
        self._tell(hand, [i for i, _, _ in part], done)

    def _tell(self, hand: Hand, ids: list[bytes], done: list[int]) -> None:
        count = missed = 0
        lost: list[bytes] = []
        for entry_id, outcome in zip(ids, done, strict=True):
            key = (hand.stream, entry_id)
            if outcome > 0 or self._give_in_hand(key):  # taken while the script was on its way
                count += 1
            elif outcome < 0:
                lost.append(entry_id)
            else:
                missed += 1
            self._owed.pop(key, None)
        if lost:
            tell_lost(self._telemetry, hand.stream, {hand.group: texts(lost)})
        if count or missed:
            self._telemetry.emit(
                "breaker.refunded",
                stream=hand.stream,
                group=self._group,
                count=count,
                missed=missed,
            )
