"""When the slots of a process let the event loop have a look around."""

import asyncio

from bus.config import SLOT_TURN_S


class Turn:
    """How long the slots of a process may run before they let the event loop have a look around.

    Shared by all slots, since sixteen of them at 5 ms each would be 80 ms. `ends` is loop time. The
    time runs from when the first of them runs again: waking thousands may take longer than a turn.
    """

    __slots__ = ("_next", "ends")

    def __init__(self) -> None:
        self.ends = 0.0
        self._next: asyncio.Future[None] | None = None

    async def next(self) -> None:
        """Wait until the loop has been round and a new turn has begun."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.create_future()
            loop.call_soon(self._begin)
        try:
            await asyncio.shield(self._next)
        finally:
            self.ends = min(self.ends, loop.time() + SLOT_TURN_S)

    def _begin(self) -> None:
        waiter, self._next = self._next, None
        if waiter is not None and not waiter.done():
            self.ends = float("inf")
            waiter.set_result(None)
