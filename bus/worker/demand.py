"""How many entries a consumer asks for, new ones and others, so that all get their share."""

import asyncio
from collections.abc import Callable

from bus.config import READ_COUNT
from bus.worker.circuit import Circuit
from bus.worker.hand import Holding
from bus.worker.pace import Pace


class Demand:
    """What there is room for now, in deliveries: a free slot of a batch handler takes `per_call`.

    running: slots at work, kept up to date by the consumer. stopping: nothing is wanted any more.
    is_behind: whether verdicts wait for the server. turn_given: told when a slot was kept for due
        and orphaned entries, since none was free when they were asked for.
    """

    def __init__(
        self,
        concurrency: int,
        holding: Holding,
        circuit: Circuit,
        pace: Pace,
        is_behind: Callable[[], bool],
    ) -> None:
        self.running = 0
        self.stopping = False
        self.turn_given: Callable[[], None] = lambda: None
        self._concurrency = concurrency
        self._holding = holding
        self._circuit = circuit
        self._pace = pace
        self._is_behind = is_behind
        self._per_call = pace.per_call
        self._reserved = 0
        self._wants_turn = False

    @property
    def all_busy(self) -> bool:
        """Whether every slot is at work."""
        return self.running >= self._concurrency

    def new(self) -> int:
        """Entries to read: for the free slots, or what is done in IN_HAND_S if that is more."""
        if self._is_behind():
            return 0
        if self._circuit.is_open:
            return self._for_probe(asyncio.get_running_loop().time(), new=True)
        free = self._for_slots(self._concurrency - self.running)
        room = max(free, self._pace.ahead) - len(self._holding.buffer)
        if room > 0 and self._wants_turn:
            self._wants_turn = False
            self._reserved = max(1, room // 2)
            self.turn_given()
        return room - self._reserved

    def parked(self) -> int:
        """Entries that may be taken from lanes, or from dead workers: for the free slots."""
        if self.stopping or self._is_behind():
            return 0
        now = asyncio.get_running_loop().time()
        if self._circuit.is_open:
            return self._for_probe(now, new=False)
        free = self._for_slots(self._concurrency - self.running) - self._holding.waiting
        if self._per_call > 1:  # reclaimed ones go alone: each of them takes a slot for itself
            free -= (self._per_call - 1) * self._holding.reclaimed
        return self._circuit.admits(now, max(0, free))

    def reserve(self) -> int:
        """Return how many due or orphaned entries may be taken: half the free slots, at least one.

        0 when none is free: then the next one that becomes free is kept and `turn_given` called.
        What was reserved is given back by `release`.
        """
        if not self._reserved:
            free = self.parked()
            self._wants_turn = not (free or self.stopping or self._circuit.is_limited)
            self._reserved = max(1, free // 2) if free else 0
        return self._reserved

    def release(self) -> None:
        """Give what was reserved back to the new ones."""
        self._reserved = 0

    def _for_slots(self, slots: int) -> int:
        """What so many slots take; of batches no more than one, or two reads: that fills the next.

        More would only lie there: a slot starts as soon as there is a batch for it.
        """
        return min(slots * self._per_call, max(slots, self._per_call, 2 * READ_COUNT))

    def _for_probe(self, now: float, *, new: bool) -> int:
        """Something for the probe, if it may be of that kind and there is nothing yet."""
        idle = not self.all_busy and not self._holding.waiting
        return 1 if idle and self._circuit.may_probe(now, new=new) else 0
