"""The safety net: takes parked entries that are due, and what dead workers left behind.

Once a second one process per stream and set of groups looks (a lease that lasts two seconds and
is not renewed, so turns pass round), and only one with a free slot. What it takes goes to its own
slots; what it has no room for stays for the next sweep, which begins where this one ended.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bus.config import SWEEP_LEASE_MS, SWEEP_S
from bus.errors import BusError
from bus.streams.answers import Survey
from bus.streams.keys import lane_due_ms
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.consumer import Consumer
from bus.worker.hand import Hand


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be taken for one group: due lanes, oldest first, then (owner, least idle ms).

    Least idle 0 means that the owner's lease is gone: all it had is taken.
    """

    lanes: tuple[bytes, ...]
    owners: tuple[tuple[bytes, int], ...]


def plan(
    survey: Survey,
    place: tuple[str, str],
    me: bytes,
    visibility_ms: int,
    *,
    look_at_idle: bool,
    judge_leases: bool = True,
    untried_first: bool = False,
) -> Plan:
    """Decide what to take. Liveness is the lease; idle time only judges single entries.

    place: (stream or inbox, group).
    judge_leases: whether a missing lease means a dead worker; see `Lease.others_can_be_judged`.
    untried_first: take what was handed back, unstarted, before what has failed.
    look_at_idle: also ask workers that are alive, or that keep no lease (other languages), for
    entries that nobody renewed for `visibility_ms`. XINFO's idle times of consumers are not
    used: they mean different things before and after 7.2.
    """
    lanes: list[tuple[int, bytes]] = []
    owners: list[tuple[bytes, int]] = []
    for consumer in survey.consumers.get(place, ()):
        due_ms = lane_due_ms(consumer.name)
        if due_ms is not None:
            if due_ms <= survey.now_ms:
                # What was handed back (lane 0) is as old as a second: it must not starve retries.
                handed_back_ms = 0 if untried_first else survey.now_ms - 1000
                lanes.append((due_ms or handed_back_ms, consumer.name))
        elif consumer.pending == 0:
            continue
        elif consumer.name in survey.listed - survey.alive and consumer.name != me:
            if judge_leases:
                owners.append((consumer.name, 0))
        elif look_at_idle:
            owners.append((consumer.name, visibility_ms))
    return Plan(tuple(name for _, name in sorted(lanes)), tuple(owners))


# Lanes to look at beyond those that can give something: empty ones are deleted on the way.
_LANES_MORE = 16


class Reclaimer:
    """Sweeps the streams of one process for all its consumers.

    can_judge: whether missing leases may be taken for death now.
    """

    def __init__(
        self,
        store: StreamStore,
        name: str,
        consumers: Sequence[Consumer],
        telemetry: Telemetry,
        can_judge: Callable[[], bool],
    ) -> None:
        self._store = store
        self._name = name
        self._consumers = consumers
        self._telemetry = telemetry
        self._can_judge = can_judge
        self._turns: dict[str, float] = {}  # stream -> loop time until which the turn is ours
        self._idle_looked_at: dict[tuple[str, str], float] = {}
        self._cursor = ""  # the stream at which the last sweep ran out of room
        self._ran_out: list[str] = []
        self._owners_first = False
        self._asked: set[Consumer] = set()  # those to sweep for before the next second
        self._wake = asyncio.Event()
        self._stopping = False
        for consumer in consumers:
            consumer.turn_given = self._sweep_soon

    def _sweep_soon(self, consumer: Consumer) -> None:
        self._asked.add(consumer)
        self._wake.set()

    def stop(self) -> None:
        """Take nothing more; `run` ends after the sweep that is under way."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Sweep once a second for all; in between for those that gave a slot, or have more."""
        loop = asyncio.get_running_loop()
        next_tick = loop.time()
        while not self._stopping:
            try:
                async with asyncio.timeout_at(next_tick):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            asked, self._asked = self._asked, set()
            if loop.time() >= next_tick:
                next_tick = loop.time() + SWEEP_S * random.uniform(0.8, 1.0)  # noqa: S311 - no secret
                asked = set(self._consumers)
            if asked and not self._stopping:
                await self._try_sweep([c for c in self._consumers if c in asked])

    async def _try_sweep(self, consumers: Sequence[Consumer]) -> None:
        try:
            await self.sweep(consumers)
        except BusError as error:
            for consumer in consumers:
                # What a script may have moved here unseen is recovered before the next read.
                consumer.intake.unseen = True
            self._telemetry.emit(
                "sweep.failed",
                worker=self._name,
                error_type=type(error).__name__,
                error=str(error),
            )

    async def sweep(self, consumers: Sequence[Consumer]) -> None:
        """Look once at the streams whose turn is ours, for those `consumers` that have room."""
        room = {c: n for c in consumers if (n := c.reserve())}
        try:
            by_home: dict[str, list[tuple[Consumer, Hand]]] = {}
            for consumer in room:
                for hand in consumer.hands.values():
                    if hand.stream not in consumer.intake.broken and not hand.paused:
                        by_home.setdefault(hand.home, []).append((consumer, hand))
            ours = sorted(await self._take_turns(list(by_home)))
            for stream in self._from_cursor(ours):
                with_room = [(c, hand) for c, hand in by_home[stream] if room[c] > 0]
                if with_room:
                    await self._sweep_partition(stream, with_room, room)
        finally:
            for consumer in room:
                consumer.release()
            # The first that ran out: nobody's later streams are passed over.
            self._cursor = self._ran_out[0] if self._ran_out else self._cursor
            self._ran_out.clear()

    def _from_cursor(self, streams: Sequence[str]) -> Iterable[str]:
        """Begin behind the stream at which the room ran out: every stream gets its turn."""
        later = [s for s in streams if s > self._cursor]
        return [*later, *(s for s in streams if s <= self._cursor)]

    async def _take_turns(self, streams: Sequence[str]) -> list[str]:
        now = asyncio.get_running_loop().time()
        ours = [s for s in streams if self._turns.get(s, 0.0) > now]
        by_groups: dict[tuple[str, ...], list[str]] = {}
        for stream in streams:
            if stream not in ours:
                served = tuple(sorted(c.group for c in self._consumers if stream in c.hands))
                by_groups.setdefault(served, []).append(stream)
        for served, asked in by_groups.items():
            got = await self._store.leases.try_sweep(asked, served, self._name, SWEEP_LEASE_MS)
            for stream in got:
                # Counted from before the asking, and a little short of what the server keeps.
                self._turns[stream] = now + SWEEP_LEASE_MS / 1000 - 0.1
            ours += got
        return ours

    async def _sweep_partition(
        self,
        home: str,
        places: Sequence[tuple[Consumer, Hand]],
        room: dict[Consumer, int],
    ) -> None:
        """Look at one partition's stream and inboxes, in one go."""
        survey = await self._store.leases.survey(home, [(h.stream, h.group) for _, h in places])
        now = asyncio.get_running_loop().time()
        for consumer, hand in places:
            if room[consumer] <= 0:
                continue
            place = (hand.stream, hand.group)
            visibility_s = consumer.handler.visibility_s
            looked_at = self._idle_looked_at.get(place, float("-inf"))
            # After an outage entries look idle, as leases look gone, until all have renewed.
            judges = self._can_judge()
            look_at_idle = judges and now - looked_at >= max(SWEEP_S / 2, visibility_s / 3)
            todo = plan(
                survey,
                place,
                self._name.encode(),
                int(visibility_s * 1000),
                look_at_idle=look_at_idle,
                judge_leases=judges,
                untried_first=consumer.is_probing,
            )
            left = await self._take(consumer, hand, todo, room[consumer])
            room[consumer] = left
            if left <= 0:  # it took all it had room for: there is probably more
                self._ran_out.append(home)
                self._sweep_soon(consumer)
            elif look_at_idle:
                self._idle_looked_at[place] = now

    async def _take(self, consumer: Consumer, hand: Hand, todo: Plan, room: int) -> int:
        """Take what `todo` says, at most `room` entries; return the room that is left.

        Where there are both, lanes and dead workers share the room, and take turns at being first.
        """
        self._owners_first = not self._owners_first
        if todo.lanes and todo.owners:
            first = -(-room // 2)
            if self._owners_first:
                room -= first - await self._take_orphans(consumer, hand, todo, first)
                return await self._take_lanes(consumer, hand, todo, room)
            room -= first - await self._take_lanes(consumer, hand, todo, first)
            return await self._take_orphans(consumer, hand, todo, room)
        room = await self._take_lanes(consumer, hand, todo, room)
        return await self._take_orphans(consumer, hand, todo, room)

    async def _take_lanes(self, consumer: Consumer, hand: Hand, todo: Plan, room: int) -> int:
        if not todo.lanes or room <= 0:
            return room
        asked_at = asyncio.get_running_loop().time()
        taken = await self._store.take_due(
            hand.stream, consumer.group, self._name, room, todo.lanes[: room + _LANES_MORE]
        )
        count = consumer.deliver(hand, taken, asked_at)
        if count:
            self._telemetry.emit(
                "delivery.taken", stream=hand.stream, group=consumer.group, count=count
            )
        return room - count

    async def _take_orphans(self, consumer: Consumer, hand: Hand, todo: Plan, room: int) -> int:
        per_call = consumer.handler.batch or 1  # which a reclaimed one takes for itself alone
        for owner, least_idle_ms in todo.owners:
            if room <= 0:
                break
            asked_at = asyncio.get_running_loop().time()
            most = -(-room // per_call)
            taken = await self._store.reclaim(
                hand.stream, consumer.group, self._name, owner, most, least_idle_ms
            )
            count = consumer.deliver(hand, taken, asked_at, reclaimed=True)
            room -= count * per_call
            if count:
                self._telemetry.emit(
                    "delivery.reclaimed",
                    stream=hand.stream,
                    group=consumer.group,
                    count=count,
                    owner=owner.decode(errors="replace"),
                )
        return room
