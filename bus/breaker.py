"""When a handler stops taking events because most of them fail."""

from dataclasses import dataclass

from bus.config import (
    BREAKER_FAILURE_RATIO,
    BREAKER_MIN_CALLS,
    BREAKER_PROBE_S,
    BREAKER_WINDOW_S,
    checked_number,
)


@dataclass(frozen=True, slots=True)
class Breaker:
    """An outage of what a handler calls opens it; then the events wait instead of dying.

    failure_ratio: it opens when at least this share of the events called for in the window failed,
        above 0.0 to 1.0; one that fails several times is one. A call fails by raising or by its
        timeout; `Reject` and `RetryLater` are answers.
    window_s: how far back is looked, in seconds; further when calls are slow to fail. An event that
        has used up its attempts is held for so long before it becomes a dead letter, in case the
        next ones fail as well.
    min_calls: with fewer calls than these in the window it does not open: one of one is no outage.
    probe_s: while it is open one event is tried every so many seconds; it closes when one works.
    Errors: DeclarationError. The state is that of one handler in one process.
    """

    failure_ratio: float = BREAKER_FAILURE_RATIO
    window_s: float = BREAKER_WINDOW_S
    min_calls: int = BREAKER_MIN_CALLS
    probe_s: float = BREAKER_PROBE_S

    def __post_init__(self) -> None:
        checked_number(self.failure_ratio, "Breaker.failure_ratio", 0.001, 1)
        checked_number(self.window_s, "Breaker.window_s", 0.1, 3_600)
        checked_number(self.min_calls, "Breaker.min_calls", 1, 1_000_000, whole=True)
        checked_number(self.probe_s, "Breaker.probe_s", 0.05, 3_600)
