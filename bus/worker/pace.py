"""How fast a consumer gets through its deliveries, hence how far to read ahead."""

from bus.config import IN_HAND_S, READ_COUNT


class Pace:
    """A running estimate of calls per second, while there is work.

    per_call: the most deliveries that one call takes. Calls are counted and not deliveries, since
    what is read ahead of a batch handler waits for a whole call to end.
    low_water: the buffer length at which reading on is worth a look: half of what is kept in hand.
    """

    __slots__ = ("_at", "_finished", "_most", "_rate", "low_water", "per_call")

    def __init__(self, per_call: int = 1) -> None:
        self.per_call = per_call
        self._most = max(per_call, 2 * READ_COUNT)
        self._rate = 0.0
        self.low_water = 0
        self._at = 0.0
        self._finished = 0

    def measure(self, now: float, finished: int) -> None:
        """Look at how many were `finished` since the last look."""
        done = finished - self._finished
        if done and now > self._at:
            self._estimate(self._rate + (done / (now - self._at) - self._rate) * 0.5)
        self._at, self._finished = now, finished

    def forget(self) -> None:
        """Begin with nothing: the estimate was wrong."""
        self._estimate(0.0)

    def _estimate(self, rate: float) -> None:
        self._rate = rate
        self.low_water = min(READ_COUNT, int(rate * IN_HAND_S) * self.per_call // 2)

    @property
    def ahead(self) -> int:
        """How many deliveries are IN_HAND_S of work."""
        return min(int(self._rate * IN_HAND_S) * self.per_call, self._most)
