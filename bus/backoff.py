"""How long a failed delivery waits before its next attempt."""

import random
from dataclasses import dataclass

from bus.config import checked_number


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter, computed once per failure; nothing is scheduled anywhere.

    base_s: delay after the first failure, in seconds.
    factor: growth per further failure; 1.0 keeps it constant.
    max_s: upper bound before jitter, in seconds.
    jitter: share of the delay that is random, 0.0 to 1.0; 0.5 means 50 % to 100 % of it, so that
        entries that failed together do not come back together.
    """

    base_s: float = 1.0
    factor: float = 2.0
    max_s: float = 600.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        checked_number(self.base_s, "Backoff.base_s", 0, 86_400 * 30)
        checked_number(self.factor, "Backoff.factor", 1, 100)
        checked_number(self.max_s, "Backoff.max_s", 0, 86_400 * 30)
        checked_number(self.jitter, "Backoff.jitter", 0, 1)

    def delay_s(self, attempt: int) -> float:
        """Return the seconds to wait after `attempt` (1 for the first) has failed."""
        # The exponent is bounded because 2.0 ** 1100 is an OverflowError, not infinity.
        full = min(self.max_s, self.base_s * self.factor ** min(attempt - 1, 150))
        return full * (1 - self.jitter * random.random())  # noqa: S311 - jitter is no secret
