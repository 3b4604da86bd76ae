"""How fast a consumer gets through its deliveries, hence how far to read ahead."""

from bus.config import IN_HAND_S, READ_COUNT


class Pace:
    """A running estimate of deliveries settled per second, while there is work."""

    __slots__ = ("_at", "_finished", "_rate")

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = 0.0
        self._finished = 0

    def measure(self, now: float, finished: int) -> None:
        """Look at how many were `finished` since the last look."""
        done = finished - self._finished
        if done and now > self._at:
            self._rate += (done / (now - self._at) - self._rate) * 0.5
        self._at, self._finished = now, finished

    def forget(self) -> None:
        """Begin with nothing: the estimate was wrong."""
        self._rate = 0.0

    @property
    def ahead(self) -> int:
        """How many deliveries are IN_HAND_S of work."""
        return min(int(self._rate * IN_HAND_S), 2 * READ_COUNT)

    @property
    def low_water(self) -> int:
        """The buffer length at which reading on is worth a look: half of what is kept in hand."""
        return min(READ_COUNT, int(self._rate * IN_HAND_S) // 2)
