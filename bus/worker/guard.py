"""What the breaker does to deliveries: an outage of what a handler calls dead-letters nothing.

    a call failed   while closed, and stays so   parked as decided; a dead letter is held
                    opens it, or it is open      parked, no attempt used
    it opens        held dead letters            parked, no attempt used
                    failures of the window       their attempts are given back (`refunds.py`)
                    what waits                   handed back, so that healthy processes take it
    window passed   held dead letters            to a slot, which tells on_dead and settles them

A dead letter is held because it could not be undone: on_dead has been told, and others may have
read it. Held is in hand: renewed, its owner's, and with the next worker if this one dies.

What was redriven has died before. That it fails again says nothing of an outage, and thousands of
such must not stop the live traffic: while closed its failures neither count nor are held.
"""

import asyncio
from collections.abc import Callable, Container
from typing import Any, Protocol

from bus.config import BREAKER_MEMORY
from bus.delivery import ACK, COMMIT, HAND_BACK, DeadLetter, Delivery, Failure, Park, Verdict
from bus.handler import Handler
from bus.streams.codec import is_redriven
from bus.telemetry import Telemetry
from bus.worker.circuit import Circuit
from bus.worker.hand import Hand, Holding
from bus.worker.refunds import Refunds


class Guarded(Protocol):
    """Whom the guard watches over: the consumer."""

    returned: int  # calls of the handler that have returned so far

    def shut(self) -> None:
        """Give up what waits: the circuit has opened."""

    def look_again(self) -> None:
        """See what may start now: a probe, everything, or a held dead letter."""


class Guard:
    """The breaker of one consumer, with its effects."""

    def __init__(
        self,
        handler: Handler[...],
        circuit: Circuit,
        guarded: Guarded,
        holding: Holding,
        settle: Callable[[Hand, Delivery[Any], Verdict], None],
        refunds: Refunds,
        telemetry: Telemetry,
        *,
        crowded: Container[str] = (),
    ) -> None:
        self.circuit = circuit
        self._crowded = crowded  # streams that are nearly full, see Pressure
        self._handler = handler
        self._breaker = handler.breaker
        self._guarded = guarded
        self._holding = holding
        self._settle = settle
        self._refunds = refunds
        self._telemetry = telemetry
        self._stopping = False

    # --- after a call

    def judge(self, delivery: Delivery[Any], verdict: Verdict, started_at: float) -> Verdict | None:
        """Return what becomes of a call that did not return; None when its end is put off."""
        failure = failure_in(verdict)
        if failure is None or self._breaker is None:
            return verdict
        now = asyncio.get_running_loop().time()
        if is_redriven(delivery):
            over = self.circuit.is_open or self.circuit.is_past(started_at)
            return self._spare(delivery, failure) if over else verdict
        event = (delivery.origin.home, delivery.entry_id)
        if self.circuit.failed(now, started_at, self._guarded.returned, event):
            self._open()
            return self._spare(delivery, failure)
        if self.circuit.is_open or self.circuit.is_past(started_at):
            return self._spare(delivery, failure)
        if isinstance(verdict, DeadLetter):
            return self._hold(delivery, verdict, now)
        self._refunds.note(delivery, now, self.circuit.window_began)
        return verdict

    def probed(self, verdict: Verdict | None, started_at: float) -> None:
        """Note how a probe has ended; None: it did not come to a call."""
        if verdict is None:
            if self.circuit.is_open:
                self.circuit.not_probed()
            return
        if not self.circuit.was_probe(started_at):
            return  # another one has closed it meanwhile
        outcome = "failed" if failure_in(verdict) else "undecided"
        if verdict is ACK or verdict is COMMIT:
            outcome = "worked"
        self._telemetry.emit("breaker.probed", group=self._handler.group, outcome=outcome)
        if outcome == "worked":
            self._close()

    def _spare(self, delivery: Delivery[Any], failure: Failure) -> Park:
        return Park(self._handler.backoff.delay_s(delivery.attempt), failure, counts=False)

    # --- opening and closing

    def _open(self) -> None:
        circuit = self.circuit
        assert self._breaker is not None
        self._telemetry.emit(
            "breaker.opened",
            group=self._handler.group,
            failures=circuit.failures,
            calls=circuit.calls,
            window_s=self._breaker.window_s,
        )
        self._refunds.owe(circuit.window_began)
        released = [d for d in self._holding.buffer if d.condemned is not None]
        for delivery in (*self._holding.condemned, *released):
            self._spare_condemned(delivery)
        self._guarded.shut()

    def _close(self) -> None:
        now = asyncio.get_running_loop().time()
        open_s = now - self.circuit.opened_at
        self.circuit.close(now, self._guarded.returned)
        self._telemetry.emit("breaker.closed", group=self._handler.group, open_s=round(open_s, 3))
        self._guarded.look_again()

    # --- held dead letters

    def _hold(self, delivery: Delivery[Any], verdict: DeadLetter, now: float) -> Verdict | None:
        assert self._breaker is not None
        if self._stopping:
            return HAND_BACK
        if len(self._holding.condemned) >= BREAKER_MEMORY:
            # Thousands a second: rather tried once more than dead in what may be an outage.
            return self._spare(delivery, verdict.error)
        delivery.condemned = verdict
        self._holding.condemned[delivery] = now + self.circuit.reach_s
        return None

    def _spare_crowding(self) -> None:
        """Let go of what is held of nearly full streams: in a lane it can be moved aside."""
        for delivery in [d for d in self._holding.condemned if d.origin.stream in self._crowded]:
            self._spare_condemned(delivery)

    def _spare_condemned(self, delivery: Delivery[Any]) -> None:
        assert delivery.condemned is not None
        spared = self._spare(delivery, delivery.condemned.error)
        self._holding.pardon(delivery)
        self._settle(self._holding.of(delivery), delivery, spared)

    def _release(self, now: float) -> None:
        """Give a slot the held ones for which the window has passed."""
        condemned = self._holding.condemned
        due = 0
        while condemned:
            delivery = next(iter(condemned))  # the oldest; later ones are seldom due before it
            if condemned[delivery] > now:
                break
            del condemned[delivery]
            self._holding.buffer.append(delivery)
            due += 1
        if due:
            self._guarded.look_again()

    # --- the tick and the end

    def look_after(self, now: float) -> None:
        """Let the window slide, probes start, held ones go, and refunds be tried: one tick."""
        if self._breaker is None:
            return
        self.circuit.sample(now, self._guarded.returned)
        if self.circuit.allow_probe(now):
            self._guarded.look_again()
        if self._holding.condemned:
            self._spare_crowding()
            self._release(now)
        self._refunds.look_after(now)

    def stop(self) -> int:
        """Hand back what is held, as what fails from now on; return how many that were."""
        self._stopping = True
        held = list(self._holding.condemned)
        for delivery in held:
            self._holding.pardon(delivery)
            self._settle(self._holding.of(delivery), delivery, HAND_BACK)
        return len(held)

    async def finish(self) -> None:
        """Give back what is owed still; the verdicts are with the server by now."""
        await self._refunds.finish()


def failure_in(verdict: Verdict) -> Failure | None:
    """Return how a call failed, None if it did not: `Reject` and `RetryLater` are answers."""
    if isinstance(verdict, Park):
        return verdict.error
    if isinstance(verdict, DeadLetter) and verdict.reason == "failed":
        return verdict.error
    return None
