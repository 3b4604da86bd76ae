"""One handler at work: a buffer of deliveries and the slots that run them.

What the slots do with what they take is in `singles.py` and `batches.py`.

    intake -> buffer -> slots (executor) -> settler
                ^                     |        |
                |                   guard      |
                +--- retries, reclaimer <------+  (lanes in the pending list)

The intake reads, the executor decides, the guard has a second look at failures, the settler
writes; here is only who runs when.
"""

import asyncio
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any

from bus.committer import Committer
from bus.config import WAITED_S
from bus.delivery import HAND_BACK, DeadLetter, Delivery, Failure, Publishes, Verdict
from bus.errors import BusError
from bus.handler import Handler
from bus.streams.answers import RawEntry, Taken
from bus.streams.codec import envelope_of
from bus.streams.keys import home
from bus.streams.reader import Reads
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.circuit import Circuit
from bus.worker.commits import Commits
from bus.worker.demand import Demand
from bus.worker.executor import Executor, Slot, SlotTask, absorb_cancellation
from bus.worker.guard import Guard
from bus.worker.hand import Hand, Holding
from bus.worker.intake import Intake
from bus.worker.on_dead import OnDead
from bus.worker.once import Once
from bus.worker.pace import Pace
from bus.worker.refunds import Refunds
from bus.worker.retries import PromptRetries
from bus.worker.settler import Settler
from bus.worker.slots import Slots
from bus.worker.suspects import Suspects
from bus.worker.turn import Turn

_SHORTEST_UNCHECKED_S = 0.1  # below a round trip to a distant server, every check would be late


class Consumer:
    """Runs one handler under one worker name. Started and stopped by the supervisor.

    Of two kinds: `SingleConsumer` and `BatchConsumer`.
    """

    def __init__(
        self,
        handler: Handler[...],
        name: str,
        store: StreamStore,
        bus: Publishes,
        telemetry: Telemetry,
        committer: Committer,
        reader: Reads,
        *,
        concurrency: int,
        lease_s: float,
        turn: Turn,
        crowded: Container[str] = (),
    ) -> None:
        self.handler = handler
        self.group = handler.group
        self.name = name
        self.concurrency = concurrency
        self.turn_given: Callable[[Consumer], None] = lambda _: None  # set by the reclaimer
        self._store = store
        self._bus = bus
        self._telemetry = telemetry
        self._turn = turn
        # What was not confirmed to be ours for this long is checked before it runs: a third of
        # the time after which others may take it, be it by visibility or by our lease.
        self._unchecked_s = max(min(handler.visibility_s, lease_s) / 3, _SHORTEST_UNCHECKED_S)
        # What waits for its batch to be fuller does not wait for a slot.
        self._patience_s = WAITED_S + (handler.batch_wait_ms / 1000 if handler.batch else 0.0)
        self.executor = Executor(handler)
        self.holding = Holding(store, handler.group, name, telemetry)
        self.hands = self.holding.hands
        self._slots = Slots(self.group, concurrency, handler.timeout_s, telemetry)
        self._on_dead = OnDead(
            handler,
            self.executor,
            self.holding,
            self._slots,
            bus,
            telemetry,
            self.look_again,
            most_late=concurrency,
        )
        self._circuit = Circuit(handler.breaker, concurrency)
        self._pace = Pace(handler.batch or 1)
        self._demand = Demand(
            concurrency,
            self.holding,
            self._circuit,
            self._pace,
            lambda: self._settler.is_behind or self._on_dead.is_behind,
        )
        self._demand.turn_given = lambda: self.turn_given(self)
        self._retries = PromptRetries(
            store,
            name,
            telemetry,
            self._demand.parked,
            self.deliver,
            self._outcome_unknown,
        )
        self._settler = Settler(
            store,
            name,
            self.hands,
            telemetry,
            self._retries.parked,
            self.look_again,
            Commits(committer, name, telemetry, self._on_dead.tell_late, self._undone),
            dead_letter_maxlen=handler.dead_letter_maxlen or 0,
        )
        refunds = Refunds(store, self.group, self.hands, telemetry)
        self._guard = Guard(
            handler,
            self._circuit,
            self,
            self.holding,
            self._settler.settle,
            refunds,
            telemetry,
            crowded=crowded,
        )
        self._once: Once | None = None
        if handler.once:
            told = (self._slots, self._end, self._not_started, telemetry)
            self._once = Once(store, handler.once, *told, group=self.group)
        self._suspects = Suspects(store, name, self.holding, telemetry, self._outcome_unknown)
        self.intake = Intake(
            store,
            reader,
            handler.group,
            name,
            self.hands,
            self,
            telemetry,
            block_ms=max(1, int(self._unchecked_s * 500)),
        )
        self._stopping = False
        self._closing = False
        self.returned = 0  # calls of the handler that returned; one addition for each, see Circuit
        self._ended_otherwise = 0

    # --- life

    def serve(self, streams: Iterable[str], state: Any) -> None:
        """Read these streams too, from the next read on."""
        for stream in streams:
            if stream not in self.hands:
                self.hands[stream] = Hand(
                    self.group, stream, home(stream), self._bus, envelope_of, state
                )

    def start(self) -> list["asyncio.Task[None]"]:
        """Start the slots and loops; return their tasks, the read loop first."""
        loop = asyncio.get_running_loop()
        return [
            loop.create_task(self.intake.run(), name=f"{self.group} intake"),
            loop.create_task(self._settler.run(), name=f"{self.group} settler"),
            *self._slots.start(self._slot),
        ]

    @property
    def busy(self) -> bool:
        """Whether anything is in hand, a verdict is on its way or on_dead is told of one."""
        return self._settler.has_work or bool(self.holding.held) or self._on_dead.runs_late

    async def stop_reading(self, intake: "asyncio.Task[None]") -> int:
        """Stop reading and hand back what has not started; return how many that were."""
        self._stopping = self._demand.stopping = self._slots.ending = True
        self._retries.stop()
        await self.intake.stop(intake)
        await self._retries.finish()
        return self._give_up() + self._guard.stop()

    def _give_up(self) -> int:
        """Hand back what waits; return how many that were.

        What was reclaimed and not started is left as it is: its count says how often it was
        started, and others reclaim it when our lease is gone.
        """
        back = self._hand_back(lambda _: True)
        self.holding.forget([*self.holding.buffer, *self.holding.suspects])
        return back

    def give_up_paused(self) -> None:
        """Give up what waits of streams that are paused, in the same way."""
        self._hand_back(lambda d: self.holding.of(d).paused and d.condemned is None)
        waiting = (*self.holding.buffer, *self.holding.suspects)
        self.holding.forget([d for d in waiting if d.reclaimed and self.holding.of(d).paused])

    def quit(self) -> None:
        """Take nothing in any more, because a part of the worker broke."""
        self._retries.stop()
        self.intake.quit()

    @property
    def tells_late(self) -> bool:
        """Whether on_dead runs, or waits to, for what is a dead letter already."""
        return self._on_dead.runs_late

    async def calls_ended(self) -> None:
        """Wait until neither the handler nor on_dead runs."""
        while self._demand.running or self._on_dead.runs_late:  # noqa: ASYNC110 - at stop only
            await asyncio.sleep(0.002)

    async def verdicts_applied(self) -> None:
        """Wait until every verdict is with the server, and what came in late is handed back."""
        self._settler.hurry()
        stuck = self._demand.running
        # What fails as its verdict is applied waits for a slot, but none is woken any more.
        while (  # noqa: ASYNC110 - at stop only
            self._give_up() or self._settler.has_work or self._demand.running > stuck
        ):
            await asyncio.sleep(0.002)
        await self._guard.finish()

    def cancel_calls(self) -> int:
        """Cancel the calls that still run, to be handed back uncounted; return how many."""
        self._on_dead.give_up()
        return self._slots.cancel_calls()

    async def close(self) -> None:
        """End the slots and loops, which are idle by now, and close the reading connection."""
        self._closing = self._slots.ending = True
        self._slots.wake_all()
        self._settler.close()
        self._on_dead.close()
        await self.intake.close()

    # --- what comes in

    def deliver_new(self, hand: Hand, entries: Sequence[RawEntry], sent_at: float) -> None:
        """Take entries read for the first time, behind what is there."""
        now = asyncio.get_running_loop().time()
        self._pace.measure(now, self._calls_so_far)
        for delivery, verdict in self.holding.add_new(hand, entries, sent_at, now):
            self._settler.settle(hand, delivery, verdict)
        self._came_in(len(entries))

    def deliver(
        self,
        hand: Hand,
        taken: Taken,
        asked_at: float,
        *,
        reclaimed: bool = False,
        recovered: bool = False,
    ) -> int:
        """Take entries moved here by a script sent at `asked_at`, before the new ones."""
        count, again = self.holding.add_taken(
            hand, taken, asked_at, reclaimed=reclaimed, recovered=recovered
        )
        for delivery, verdict in again:
            self._settler.settle(hand, delivery, verdict)
        self._circuit.took(count)
        self._came_in(count)
        return count

    def _came_in(self, count: int) -> None:
        if self._circuit.is_open and count:
            # Asked for before it opened, or by several ways at once: one may be the probe.
            buffer = self.holding.buffer
            probe = buffer[0] if buffer and not self._circuit.blocked else None
            self._hand_back(lambda d: d is not probe)
        self._wake_slots(count)

    def _outcome_unknown(self, error: BusError) -> None:
        """A script may have moved entries here and its reply was lost: recover before reading."""
        self.intake.unseen = True
        self._telemetry.emit(
            "read.failed", group=self.group, error_type=type(error).__name__, error=str(error)
        )

    # --- how much is wanted

    @property
    def _calls_so_far(self) -> int:
        """How many calls have ended, for the pace; what needed none counts, too."""
        return self.returned + self._ended_otherwise

    @property
    def is_probing(self) -> bool:
        """Whether only a probe is wanted: what was never tried, before what failed."""
        return self._circuit.is_open

    def wanted(self) -> int:
        """Return how many new entries to ask for."""
        return self._demand.new()

    def reserve(self) -> int:
        """Return how many due or orphaned entries may be taken, until `release`."""
        return self._demand.reserve()

    def release(self) -> None:
        """Give the reserved slots back to the intake."""
        self._demand.release()
        self.intake.look_again()

    def _hand_back(self, chosen: Callable[[Delivery[Any]], bool]) -> int:
        """Hand back what has not started and was not reclaimed; return how many."""
        back = self.holding.take_out(chosen)
        for delivery in back:
            self._settler.settle(self.holding.of(delivery), delivery, HAND_BACK)
        return len(back)

    def _undone(self, delivery: Delivery[Any], failure: Failure) -> None:
        """Judge one whose effects were refused before any took place, as if it had raised."""
        now = asyncio.get_running_loop().time()
        self.returned -= 1  # it seemed to have succeeded
        verdict = self.executor.failed(delivery, failure)
        judged = self._guard.judge(delivery, verdict, now)
        if isinstance(judged, DeadLetter):
            delivery.condemned = judged  # a slot tells on_dead, and settles it
            self.holding.buffer.append(delivery)
            self._wake_slots(1)
        elif judged is not None:
            self._end(delivery, judged)

    # --- what the guard asks for

    def shut(self) -> None:
        """Give up what waits: the circuit has opened. What was reclaimed stays, for the probes."""
        self._demand.release()
        self._hand_back(lambda _: True)

    def look_again(self) -> None:
        """See what may start now: a probe, everything, or a held dead letter."""
        self._wake_slots(len(self.holding.buffer))
        self.intake.look_again()

    # --- slots

    def _wake_slots(self, entries: int) -> None:
        if not self._stopping:  # what comes in now is handed back
            self._slots.wake(entries)

    async def _slot(self, slot: Slot) -> None:
        """Take what waits and handle it, until closed."""
        raise NotImplementedError

    async def _rest(self, slot: Slot) -> None:
        """Wait until there may be something to start."""
        waiter = self._slots.rest()
        self.intake.look_again()
        await self._slots.waited(slot, waiter)

    async def _give_way(self, slot: Slot, *, has_run: bool) -> None:
        """Wait for the next turn; those who have not run in this one ask for it first."""
        if has_run:
            self._turn.end()
            await self._slots.waited(slot, asyncio.sleep(0))
        await self._slots.waited(slot, self._turn.next())

    async def _handle(self, slot: Slot, delivery: Delivery[Any], now: float) -> Verdict | None:
        """Handle and settle one; return how the call ended, None if there was none."""
        raise NotImplementedError

    async def _probe(self, slot: Slot, delivery: Delivery[Any], now: float) -> None:
        """Try one while the circuit is open."""
        self._circuit.probe(now)
        verdict = None
        try:
            verdict = await self._handle_other(slot, delivery, now)
        finally:
            self._guard.probed(verdict, now)

    async def _handle_other(
        self, slot: Slot, delivery: Delivery[Any], now: float
    ) -> Verdict | None:
        """Handle what may need more than a call; return as `_handle`."""
        if delivery.condemned is not None:
            await self._settle(slot, delivery, delivery.condemned)
            return None
        if not delivery.reclaimed:
            return await self._handle(slot, delivery, now)
        crashed = self.executor.crashed(delivery)
        if crashed is not None:
            await self._settle(slot, delivery, crashed)
            return None
        run = partial(self._handle_counted, slot, delivery, probe=self._circuit.is_open)
        return await self._suspects.start(delivery, run)

    def _not_started(self, delivery: Delivery[Any]) -> None:
        """Put one back that was taken and could not start: it is looked at as any other."""
        if self._stopping or self.holding.of(delivery).paused:
            self._settler.settle(self.holding.of(delivery), delivery, HAND_BACK)
        else:
            self.holding.buffer.appendleft(delivery)

    async def _handle_counted(
        self, slot: Slot, delivery: Delivery[Any], *, probe: bool
    ) -> Verdict | None:
        """Handle one whose start was counted, unless it must not start any more."""
        now = asyncio.get_running_loop().time()
        stopped_for_long = now - delivery.checked_at > self._unchecked_s
        if stopped_for_long or (self._circuit.is_open and not probe):
            self._not_started(delivery)
            return None
        verdict = await self._handle(slot, delivery, now)
        if verdict is None and not delivery.settled:
            # It was put back: a suspect as before, whose start is counted with the same number.
            delivery.reclaimed = True
            delivery.attempt -= 1
        return verdict

    async def _settle(self, slot: Slot, delivery: Delivery[Any], verdict: Verdict) -> None:
        if isinstance(verdict, DeadLetter):
            if not await self._on_dead.tell(slot, delivery, verdict):
                return
            if slot.task is not None and slot.task.cancelling():
                await self._end_cancelled(slot.task, delivery, verdict)
        self._end(delivery, verdict)

    def _end(self, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Settle one whose handler was not called, or did not return."""
        self._ended_otherwise += 1
        self._settler.settle(self.holding.of(delivery), delivery, verdict)

    async def _end_cancelled(
        self, task: SlotTask, delivery: Delivery[Any], verdict: Verdict
    ) -> None:
        """Use up the cancellation of a call, unless everything is being torn down around us."""
        if task.torn_down:
            self._settler.settle(self.holding.of(delivery), delivery, verdict)
            raise asyncio.CancelledError
        await absorb_cancellation(task)

    # --- the tick

    def look_after(self, now: float) -> None:
        """Enforce timeout_s, and hand back what has waited too long: one tick for all slots."""
        self._slots.look_after(now)
        since = now - self._patience_s
        waits_for_server = self._once is not None and self._once.is_held_up
        if (
            self.holding.buffer
            and self._demand.all_busy
            and not waits_for_server
            and self._hand_back(lambda d: d.received_at < since and d.condemned is None)
        ):
            self._pace.forget()
        self._guard.look_after(now)
