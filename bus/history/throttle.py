"""How fast a replay or a redrive goes: as fast as it was asked to, and as there is room."""

import asyncio

from bus.config import (
    INBOX_WAIT_LEAST_S,
    INBOX_WAIT_MOST_S,
    READ_COUNT,
    THROTTLE_S,
    checked_number,
)


class Throttle:
    """Spreads work evenly over time.

    rate: at most so many a second, by this machine's clock; None for as fast as it goes.
    Errors: DeclarationError.
    """

    def __init__(self, rate: float | None) -> None:
        if rate is not None:
            checked_number(rate, "rate", 0.001, 1e9)
        self._rate = rate
        self._started: float | None = None
        self._passed = 0
        self._waits_s = INBOX_WAIT_LEAST_S

    @property
    def most(self) -> int:
        """How many to do in one go: what the rate allows in a tenth of a second, 1 to 500."""
        if self._rate is None:
            return READ_COUNT
        return max(1, min(READ_COUNT, int(self._rate * THROTTLE_S)))

    async def passed(self, count: int) -> None:
        """Wait until `count` more may be followed by others."""
        self._waits_s = INBOX_WAIT_LEAST_S
        if self._rate is None:
            return
        now = asyncio.get_running_loop().time()
        if self._started is None:
            self._started = now
        self._passed += count
        ahead_s = self._started + self._passed / self._rate - now
        if ahead_s > 0:
            await asyncio.sleep(ahead_s)
        elif ahead_s < -1.0:  # what was missed while there was no room is not made up in a burst
            self._started, self._passed = now, 0

    async def no_room(self) -> None:
        """Wait before asking again for room; longer each time, until something has passed."""
        await asyncio.sleep(self._waits_s)
        self._waits_s = min(self._waits_s * 2, INBOX_WAIT_MOST_S)
