"""What waits to be published to one stream, and what is on its way there."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

from bus.config import ANSWER_S, BATCH_BYTES, BATCH_EVENTS
from bus.errors import BusError
from bus.streams.connection import ConnectionLost
from bus.streams.replies import Reply
from bus.unit import Unit


class Caller(Protocol):
    """Who sends batches, and is told what became of each."""

    def answered(self, batch: "Batch", replies: list[Reply]) -> None:
        """Take what the script has answered. Raises nothing."""

    def failed(self, batch: "Batch", error: BusError) -> None:
        """Take that there is no answer. Raises nothing."""


class Batch:
    """Units under one sequence number: what is sent together, and again if it must be.

    trouble: why it is not in yet. attempting: whether a call is on its way. maybe_sent: whether it
    may have been appended unseen. recalled: whether its units stand in line again. It is the
    `connection.Answer` of its first call, and hands that to its caller without another turn.
    """

    __slots__ = (
        "_caller",
        "attempting",
        "maybe_sent",
        "recalled",
        "sequence",
        "started_s",
        "trouble",
        "units",
    )

    def __init__(self, units: list[Unit], sequence: int, caller: Caller) -> None:
        self.units = units
        self.sequence = sequence
        self.started_s = time.perf_counter()
        self.trouble: BusError | None = None
        self.attempting = False
        self.maybe_sent = False
        self.recalled = False
        self._caller = caller

    @property
    def events(self) -> int:
        """How many events it has."""
        return sum([u.events for u in self.units])

    @property
    def age_ms(self) -> int:
        """How long ago it was sent first, at least 1."""
        return int((time.perf_counter() - self.started_s) * 1000) + 1

    @property
    def in_doubt(self) -> bool:
        """Whether nobody can say that it is not in.

        An attempt that still connects may yet send it: doubt is the honest answer.
        """
        return self.maybe_sent or self.attempting

    @property
    def grace_s(self) -> float:
        """How long its callers wait beyond their time.

        What was sent just before is usually answered at once, and then there is no doubt.
        """
        return ANSWER_S if self.attempting and not self.maybe_sent else 0.0

    def awaited(self) -> bool:
        """Whether anybody still waits for it."""
        return not all(u.future.done() for u in self.units)

    def note(self, error: BusError) -> None:
        """Note how an attempt has failed."""
        self.attempting = False
        self.trouble = error
        if isinstance(error, ConnectionLost) and error.sent:
            self.maybe_sent = True

    # --- as the answer of a call

    def done(self) -> bool:
        """Whether nobody wants to know any more."""
        return self.recalled

    def set_result(self, replies: list[Reply]) -> None:
        """Take the replies."""
        self._caller.answered(self, replies)

    def set_exception(self, error: BusError) -> None:
        """Take why there are none."""
        self._caller.failed(self, error)

    def exception(self) -> None:
        """Have nothing to say: it was told."""


class Line:
    """The units that wait, in the order of their calls, and how many events they are."""

    __slots__ = ("_units", "events")

    def __init__(self) -> None:
        self._units: deque[Unit] = deque()
        self.events = 0

    def __len__(self) -> int:
        return len(self._units)

    @property
    def units(self) -> Sequence[Unit]:
        """Those that wait, the first first."""
        return self._units

    def add(self, unit: Unit) -> None:
        """Let one wait behind all others."""
        self._units.append(unit)
        self.events += unit.events

    def put_back(self, units: Sequence[Unit]) -> None:
        """Let those wait again, before all others, whose callers still do."""
        waiting = [u for u in units if not u.future.done()]
        self._units.extendleft(reversed(waiting))
        self.events += sum([u.events for u in waiting])

    def remove(self, units: Iterable[Unit]) -> None:
        """Let some wait no longer."""
        for unit in units:
            self._units.remove(unit)
            self.events -= unit.events

    def first(self) -> Unit | None:
        """Return who is first, without those whose callers have gone: nothing of them was sent."""
        units = self._units
        while units and units[0].future.done():
            self.events -= units.popleft().events
        return units[0] if units else None

    def wanted(self) -> int:
        """Return how many events the next append would take."""
        first = self.first()
        wanted = sum([u.events for u in islice(self._units, BATCH_EVENTS)])
        return max(min(wanted, BATCH_EVENTS), first.events if first else 0)

    def take(self, most: int, fits: int = BATCH_EVENTS) -> tuple[list[Unit], bool]:
        """Take the first of them, with about `most` events, and no more than an append takes.

        fits: how many there is room for; one that is larger is taken, alone, all the same.
        Returns them, and whether there are more that did not fit.
        """
        taken: list[Unit] = []
        events = size = 0
        most = min(most, BATCH_EVENTS)
        while unit := self.first():
            if taken and (events + unit.events > most or size + unit.bytes > BATCH_BYTES):
                break
            if taken and events + unit.events > fits:
                self.events -= events
                return taken, True
            events += unit.events
            size += unit.bytes
            taken.append(self._units.popleft())
        self.events -= events
        return taken, False
