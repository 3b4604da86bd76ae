"""Whether a handler's calls go through: the state of its breaker. Pure; times are handed in.

    closed --- a failure, with enough failures in the window ---> open
    open ----- a probe returned --------------------------------> on probation
    on probation --- calls return -----------------------------> closed

    state         what may start
    closed        everything
    open          nothing, but one probe every `probe_s`, counted from the start of the last one:
                  one that was never tried, or if there is none, one that was parked
    on probation  everything new; of what is parked no more than the calls that return vouch for

Only calls count that began in the present state: one that began before an outage, or during it,
says nothing of the time after. While it is closed, a call that returns costs the caller's own
counter and nothing here: the counter is sampled now and then, and compared at the next failure.

The share of failures is one of *events*: an event that fails again and again in the window counts
once, else a few that always fail would pass for an outage of all. And probation keeps them from
opening it again as soon as it is closed: they are many and quick, where the others do their work.
"""

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from bus.breaker import Breaker
from bus.config import BREAKER_MEMORY

_SAMPLES = 100  # per window: how finely it slides
_LONGEST_REACH_S = 600.0
_FIRST_CREDIT = 2.0  # parked events that may start when a probe has worked...
_CREDIT_NEW = 0.5  # ...and per call of a new event that returns: failures stay a minority...
_CREDIT_PARKED = 2.0  # ...and per parked one: if they work again, twice as many may follow
_PARKED_FIRST = 4  # every fourth probe prefers one that was parked
_PATIENCE_SHARE = 0.2  # of probe_s: how long a probe of the one kind is waited for


class _Sample(NamedTuple):
    at: float
    returned: int
    failed: int


class Circuit:
    """The breaker of one handler in one process; `breaker` None never opens.

    is_open, on_probation: see above. blocked: nothing may start now; False while open when a probe
        may. failures, calls: in the window that opened it. opened_at, closed_at: times of the last
        change. reach_s: how far back is looked, `window_s` or more, see `_reach`.
    """

    __slots__ = (
        "_allowed_at",
        "_breaker",
        "_concurrency",
        "_credit",
        "_credited_at",
        "_events",
        "_failed",
        "_probe_at",
        "_probes",
        "_samples",
        "blocked",
        "calls",
        "closed_at",
        "failures",
        "is_open",
        "on_probation",
        "opened_at",
        "reach_s",
    )

    def __init__(self, breaker: Breaker | None, concurrency: int = 1) -> None:
        self._breaker = breaker
        self._concurrency = concurrency
        self._failed = 0
        self._samples = deque([_Sample(float("-inf"), 0, 0)])
        self._events: dict[Hashable, float] = {}  # those that failed in the window, and when first
        self._probe_at = self._allowed_at = 0.0
        self._probes = 0
        self._credit = self._credited_at = 0.0
        self.is_open = self.blocked = self.on_probation = False
        self.failures = self.calls = 0
        self.opened_at = self.closed_at = float("-inf")
        self.reach_s = 0.0 if breaker is None else breaker.window_s

    # --- closed

    def sample(self, now: float, returned: int) -> None:
        """Note how many calls have returned so far; asked several times per window."""
        if self._breaker is None or self.is_open:
            return
        if now - self._samples[-1].at >= self._breaker.window_s / _SAMPLES:
            self._samples.append(_Sample(now, returned, self._failed))
        self._slide(now - self.reach_s)

    def _slide(self, since: float) -> None:
        """Let the window begin at the last sample that is not younger than `since`."""
        while len(self._samples) > 1 and self._samples[1].at <= since:
            self._samples.popleft()

    def _reach(self, took_s: float) -> None:
        """Look back further when calls are slow to fail, else too few of them would be seen.

        Sixteen slots with calls that hang for 30 s make five calls in ten seconds.
        """
        assert self._breaker is not None
        needed_s = 2 * self._breaker.min_calls * took_s / self._concurrency
        self.reach_s = max(
            self._breaker.window_s, min(needed_s, _LONGEST_REACH_S), self.reach_s * 0.95
        )

    def failed(self, now: float, started_at: float, returned: int, event: Hashable = None) -> bool:
        """Count a call that failed; True if that opens it.

        returned: calls that returned so far. event: which one it was, None for one of its own.
        """
        if self._breaker is None or self.is_open or self.is_past(started_at):
            return False
        self._reach(now - started_at)
        since = now - self.reach_s
        self._failed += 1
        self._slide(since)
        self._count_event(now, since, event)
        first = self._samples[0]
        self.failures = self._failed - first.failed
        self.calls = self.failures + returned - first.returned
        events = len(self._events)
        share = events / (events + returned - first.returned)
        if self.calls < self._breaker.min_calls or share < self._breaker.failure_ratio:
            return False
        self.is_open = self.blocked = True
        self.on_probation = False
        self.opened_at = now
        self._probe_at = now + self._breaker.probe_s
        self._probes = 0
        return True

    def _count_event(self, now: float, since: float, event: Hashable) -> None:
        events = self._events
        while events and (
            events[oldest := next(iter(events))] < since or len(events) > BREAKER_MEMORY
        ):
            del events[oldest]
        events.setdefault(object() if event is None else event, now)

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
        self._allowed_at = now
        self._probes += 1
        return True

    def may_probe(self, now: float, *, new: bool) -> bool:
        """Whether the probe that is allowed may be a new event, or a parked one, by now.

        New ones come first, since of the parked ones all may be such that always fail; but every
        fourth time it is the other way round, since all new ones may be.
        """
        assert self._breaker is not None
        if not self.is_open or self.blocked:
            return False
        waited = now - self._allowed_at >= self._breaker.probe_s * _PATIENCE_SHARE
        return waited or new is bool(self._probes % _PARKED_FIRST)

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
        """A probe has returned: begin a new window, on probation."""
        self.is_open = self.blocked = False
        self.on_probation = True
        self.closed_at = self._credited_at = now
        self._credit = _FIRST_CREDIT
        self._samples = deque([_Sample(now, returned, self._failed)])
        self._events.clear()

    # --- on probation

    @property
    def is_limited(self) -> bool:
        """Whether not everything that is parked or orphaned may be taken: open or on probation."""
        return self.is_open or self.on_probation

    def admits(self, now: float, wanted: int) -> int:
        """Return how many of `wanted` parked or orphaned events may be taken now."""
        if not self.on_probation:
            return wanted
        assert self._breaker is not None
        self._credit += (now - self._credited_at) / self._breaker.probe_s
        self._credit = min(self._credit, max(self._concurrency, _FIRST_CREDIT))
        self._credited_at = now
        return max(0, min(wanted, int(self._credit)))

    def took(self, count: int) -> None:
        """Note that so many parked or orphaned events were taken."""
        if self.on_probation:
            self._credit -= count

    def vouch(self, now: float, *, parked: bool) -> None:
        """Note that a call returned while on probation, which ends when enough have."""
        assert self._breaker is not None
        self._credit += _CREDIT_PARKED if parked else _CREDIT_NEW
        enough = self._credit >= max(self._concurrency, _FIRST_CREDIT)
        if enough and now - self.closed_at >= self._breaker.window_s:
            self.on_probation = False
