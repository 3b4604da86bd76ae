"""When the slots of a process let the event loop have a look around."""

import asyncio

from bus.config import SLOT_TURN_S, SLOT_WAKE_S, TURN_S


class Turn:
    """How long the slots of a process may run before they let the event loop have a look around.

    Shared by all slots, since sixteen of them would make it sixteen times as long. Short, because
    acks and reads leave in between: with a turn in which all that is in hand is handled the server
    and the worker would take turns, too. `ends` is loop time. The time runs from when the first of
    them runs again: waking thousands may take longer than a turn.
    """

    __slots__ = ("_began", "_ended", "_is_new", "_length_s", "_many", "_next", "_waiting", "ends")

    def __init__(self) -> None:
        self.ends = 0.0
        self._next: asyncio.Future[None] | None = None
        self._waiting = 0  # slots that wait for the next one
        self._many = 0.0  # how many have waited at most, of late
        self._began = 0.0
        self._ended = 0.0  # when the first who had run gave way
        self._length_s = SLOT_TURN_S
        self._is_new = False  # whether none of them has run again yet

    def end(self) -> None:
        """Note that one who has run gives way: until the next turn the time is that of others."""
        if not self._ended:
            self._ended = asyncio.get_running_loop().time()

    def prolong(self) -> None:
        """Note that the loop has been round: a call that had suspended goes on. Not for ever."""
        now = asyncio.get_running_loop().time()
        self.ends = max(self.ends, min(now + SLOT_TURN_S, self._began + TURN_S))

    async def next(self) -> None:
        """Wait until the loop has been round and a new turn has begun."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.create_future()
            loop.call_soon(self._begin)
        self._waiting += 1
        try:
            await asyncio.shield(self._next)
        finally:
            if self._is_new:
                self._is_new = False
                self._began = now = loop.time()
                # As long as others took: beside busy ones, too, half of the time is theirs.
                others_s = min(TURN_S, now - self._ended) if self._ended else 0.0
                self._ended = 0.0
                self.ends = now + max(self._length_s, others_s)

    def _begin(self) -> None:
        waiter, self._next = self._next, None
        woken, self._waiting = self._waiting, 0
        if waiter is not None and not waiter.done():
            self._is_new = True
            self._many = max(woken, 0.9 * self._many)
            self._length_s = max(SLOT_TURN_S, min(TURN_S, self._many * SLOT_WAKE_S))
            self.ends = asyncio.get_running_loop().time() + self._length_s  # for those who rested
            waiter.set_result(None)
