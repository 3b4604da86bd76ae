"""When the slots of a process let the event loop have a look around."""

import asyncio

from bus.config import SLOT_TURN_S


class Turn:
    """How long the slots of a process may run before they let the event loop have a look around.

    Shared by all slots, since sixteen of them at 5 ms each would be 80 ms. `ends` is loop time.
    """

    __slots__ = ("_next", "ends")

    def __init__(self) -> None:
        self.ends = 0.0
        self._next: asyncio.Future[None] | None = None

    def next(self) -> "asyncio.Future[None]":
        """Return a future that is done when the loop has been round and a new turn has begun."""
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.create_future()
            loop.call_soon(self._begin)
        return self._next

    def _begin(self) -> None:
        waiter, self._next = self._next, None
        if waiter is not None and not waiter.done():
            self.ends = waiter.get_loop().time() + SLOT_TURN_S
            waiter.set_result(None)
