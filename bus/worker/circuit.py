"""Whether a handler's calls go through: the state of its breaker. Pure; times are handed in.

    closed --- a failure, with enough failures among the calls of the window ---> open
    open ----- a probe returned ------------------------------------------------> closed

    state    what may start
    closed   everything
    open     nothing, but one probe every `probe_s`, counted from the start of the last one

Only calls count that began in the present state: one that began before an outage, or during it,
says nothing of the time after. While it is closed, a call that returns costs the caller's own
counter and nothing here: the counter is sampled now and then, and compared at the next failure.
"""

from collections import deque
from typing import NamedTuple

from bus.breaker import Breaker

_SAMPLES = 100  # per window: how finely it slides


class _Sample(NamedTuple):
    at: float
    returned: int
    failed: int


class Circuit:
    """The breaker of one handler in one process; `breaker` None never opens.

    is_open: see above. blocked: nothing may start now; False while open when a probe may.
    failures, calls: in the window that opened it. opened_at, closed_at: times of the last change.
    """

    __slots__ = (
        "_breaker",
        "_failed",
        "_probe_at",
        "_samples",
        "blocked",
        "calls",
        "closed_at",
        "failures",
        "is_open",
        "opened_at",
    )

    def __init__(self, breaker: Breaker | None) -> None:
        self._breaker = breaker
        self._failed = 0
        self._samples = deque([_Sample(float("-inf"), 0, 0)])
        self._probe_at = 0.0
        self.is_open = False
        self.blocked = False
        self.failures = self.calls = 0
        self.opened_at = self.closed_at = float("-inf")

    # --- closed

    def sample(self, now: float, returned: int) -> None:
        """Note how many calls have returned so far; asked several times per window."""
        if self._breaker is None or self.is_open:
            return
        if now - self._samples[-1].at >= self._breaker.window_s / _SAMPLES:
            self._samples.append(_Sample(now, returned, self._failed))
        self._slide(now - self._breaker.window_s)

    def _slide(self, since: float) -> None:
        """Let the window begin at the last sample that is not younger than `since`."""
        while len(self._samples) > 1 and self._samples[1].at <= since:
            self._samples.popleft()

    def failed(self, now: float, started_at: float, returned: int) -> bool:
        """Count a call that failed; True if that opens it. returned: calls that returned so far."""
        if self._breaker is None or self.is_open or self.is_past(started_at):
            return False
        self._failed += 1
        self._slide(now - self._breaker.window_s)
        first = self._samples[0]
        self.failures = self._failed - first.failed
        self.calls = self.failures + returned - first.returned
        if (
            self.calls < self._breaker.min_calls
            or self.failures / self.calls < self._breaker.failure_ratio
        ):
            return False
        self.is_open = self.blocked = True
        self.opened_at = now
        self._probe_at = now + self._breaker.probe_s
        return True

    @property
    def window_began(self) -> float:
        """The time from which on failures are part of the window."""
        return self._samples[0].at

    def is_past(self, started_at: float) -> bool:
        """Whether a call that began then belongs to an outage that is over."""
        return started_at < self.closed_at

    # --- open

    def allow_probe(self, now: float) -> bool:
        """Let one call start if the time of a probe has come; True if that is new."""
        if not self.blocked or now < self._probe_at:
            return False
        self.blocked = False
        return True

    def probe(self, now: float) -> None:
        """A probe starts; the next may after `probe_s`, even if this one hangs until then."""
        assert self._breaker is not None
        self.blocked = True
        self._probe_at = now + self._breaker.probe_s

    def not_probed(self) -> None:
        """What was to be the probe did not reach the handler: another may start at once."""
        self.blocked = False

    def was_probe(self, started_at: float) -> bool:
        """Whether a call that began then is a probe of this outage, and not older than it."""
        return self.is_open and started_at > self.opened_at

    def close(self, now: float, returned: int) -> None:
        """A probe has returned: begin a new window."""
        self.is_open = self.blocked = False
        self.closed_at = now
        self._samples = deque([_Sample(now, returned, self._failed)])
