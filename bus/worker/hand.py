"""What a worker holds, from delivery until the verdict is applied, and whether it is still its own.

A `Hand` is what is held of one stream for one group; `Holding` is all of a consumer's.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bus.config import VERDICTS_PER_CALL
from bus.delivery import HAND_BACK, DeadLetter, Delivery, HandBack, Origin, Park
from bus.errors import BusError
from bus.shortage import tell_lost
from bus.streams.answers import RawEntry, Taken
from bus.streams.codec import locate, moved
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry

Again = tuple[Delivery[Any], Park | HandBack]  # came in, and is not to start


class Cooldown:
    """The growing wait after failures of one kind of verdict; `until` is loop time."""

    __slots__ = ("_failures", "until")

    def __init__(self) -> None:
        self._failures = 0
        self.until = 0.0

    def after(self, *, ok: bool) -> None:
        """Note how an attempt ended: 20 ms after the first failure, doubling up to 2 s."""
        self._failures = 0 if ok else self._failures + 1
        if not ok:
            wait_s = min(0.01 * 2 ** min(self._failures, 10), 2.0)
            self.until = asyncio.get_running_loop().time() + wait_s


@dataclass(slots=True, eq=False)
class Hand(Origin):
    """The origin of its deliveries, and their verdicts on the way to the server.

    held: what waits, runs, or has a verdict with a body that is not yet on the server; all of it
        is renewed.
    acks, acking: ids that were handled and are not yet acked on the server, waiting and on their
        way; their bodies are gone already.
    commits, committing: deliveries with effects, waiting and on their way. commit_bytes: of the
        effects of both.
    away: parks and dead letters that are on their way. acks_cooldown, ...: after the server refused
        some of that kind. singly: send dead letters one by one, since it refused one for what
        it is.
    unburied: ids that found the dead letters full, until they are buried: their on_dead was told.
    paused: nothing of it is to start, see `pauses.py`.
    Nothing in any of them is taken up a second time by recovery or reclaim.
    """

    held: dict[bytes, Delivery[Any]] = field(default_factory=dict)
    acks: list[bytes] = field(default_factory=list)
    acking: list[bytes] = field(default_factory=list)
    skipped: int = 0
    commits: list[Delivery[Any]] = field(default_factory=list)
    committing: int = 0
    commit_bytes: int = 0
    parks: list[tuple[Delivery[Any], Park | HandBack]] = field(default_factory=list)
    dead: list[tuple[Delivery[Any], DeadLetter]] = field(default_factory=list)
    away: int = 0
    acks_cooldown: Cooldown = field(default_factory=Cooldown)
    commits_cooldown: Cooldown = field(default_factory=Cooldown)
    parks_cooldown: Cooldown = field(default_factory=Cooldown)
    dead_cooldown: Cooldown = field(default_factory=Cooldown)
    singly: bool = False
    unburied: set[bytes] = field(default_factory=set)
    paused: bool = False

    @property
    def is_inbox(self) -> bool:
        """Whether it is the hand of the group's inbox: acked entries are deleted there."""
        return self.stream != self.home

    @property
    def known(self) -> list[bytes]:
        """The ids of everything in hand."""
        return [*self.held, *self.acks, *self.acking]

    @property
    def has_verdicts(self) -> bool:
        """Whether anything waits to be brought to the server."""
        return bool(self.acks or self.commits or self.parks or self.dead)


class Holding:
    """Everything a consumer has in hand; the part that waits is in `buffer` and `suspects`.

    buffer: what the slots take next. suspects: reclaimed entries that wait until another of them
    has run, since one of them may be what killed its worker. condemned: dead letters to be, oldest
    first, with the loop time until which they are held (`guard.py`).
    """

    def __init__(self, store: StreamStore, group: str, consumer: str, telemetry: Telemetry) -> None:
        self._store = store
        self._group = group
        self._consumer = consumer
        self._telemetry = telemetry
        self.hands: dict[str, Hand] = {}
        self.buffer: deque[Delivery[Any]] = deque()
        self.suspects: deque[Delivery[Any]] = deque()
        self.condemned: dict[Delivery[Any], float] = {}
        self._checking = asyncio.Lock()

    @property
    def waiting(self) -> int:
        """How many deliveries wait to be started."""
        return len(self.buffer) + len(self.suspects)

    @property
    def reclaimed(self) -> int:
        """How many of those that wait were taken from other workers. Looks at each."""
        return sum(d.reclaimed for d in self.buffer) + len(self.suspects)

    @property
    def held(self) -> int:
        """How many deliveries are held with their bodies."""
        return sum(len(h.held) for h in self.hands.values())

    def of(self, delivery: Delivery[Any]) -> Hand:
        """Return the hand a delivery is in."""
        return self.hands[delivery.origin.stream]

    # --- coming in

    def add_new(
        self, hand: Hand, entries: Sequence[RawEntry], sent_at: float, now: float
    ) -> list[Again]:
        """Put entries read for the first time behind what is there; return those to give up again.

        They are dated by when the read was sent: a process that was stopped meanwhile finds
        replies that are long stale.
        """
        if hand.is_inbox:
            return self._add_moved(hand, entries, sent_at, now)
        held, append = hand.held, self.buffer.append
        again: list[Again] = []
        if hand.paused:  # since the read was sent
            append = _handed_back_to(again)
        for entry_id, fields in entries:
            delivery: Delivery[Any] = Delivery(hand, entry_id, fields, 1, sent_at, now)
            # An id that is held already comes again when its group was lost and made again: it
            # runs, and its verdict will settle it.
            if held.setdefault(entry_id, delivery) is delivery:
                append(delivery)
        return again

    def _add_moved(
        self, hand: Hand, entries: Sequence[RawEntry], sent_at: float, now: float
    ) -> list[Again]:
        """Add entries of an inbox; what was parked before it came there is parked again."""
        again: list[Again] = []
        append = _handed_back_to(again) if hand.paused else self.buffer.append
        for entry_id, fields in entries:
            was = moved(entry_id, fields)
            delivery: Delivery[Any] = Delivery(
                hand, entry_id, fields, was.attempts + 1, sent_at, now
            )
            if hand.held.setdefault(entry_id, delivery) is not delivery:
                continue
            if was.due_ms:
                again.append((delivery, Park(0, until_ms=was.due_ms)))
            else:
                append(delivery)
        return again

    def add_taken(
        self, hand: Hand, taken: Taken, asked_at: float, *, reclaimed: bool, recovered: bool
    ) -> tuple[int, list[Again]]:
        """Put entries moved here by a script sent at `asked_at` first.

        reclaimed: from another worker. recovered: ours, and not seen yet. Returns how many came,
        and those of them to give up again.
        """
        again: list[Again] = []
        now = asyncio.get_running_loop().time()
        known = set(hand.known)
        fresh = [e for e in taken.entries if e[0] not in known]
        for entry_id, count, fields in reversed(fresh):
            attempt, due_ms = count, 0
            if hand.is_inbox:  # its first delivery counted 1, whatever had been used up before
                was = moved(entry_id, fields)
                attempt = max(count, was.attempts + 1)
                if count <= 1 and (reclaimed or recovered):  # nobody came to park it again
                    due_ms = was.due_ms
            delivery: Delivery[Any] = Delivery(hand, entry_id, fields, attempt, asked_at, now)
            delivery.reclaimed = reclaimed
            delivery.parked = not reclaimed
            hand.held[entry_id] = delivery
            if due_ms:
                # One without attempts before may also come from its lane, with a count of 1 as
                # well. At 2 it is known from then on, or it could kill workers for ever.
                delivery.attempt = max(attempt, 2)
                again.append((delivery, Park(0, until_ms=due_ms)))
            elif hand.paused:
                if reclaimed:  # left as it is, as in `give_up_paused`
                    del hand.held[entry_id]
                else:
                    again.append((delivery, HAND_BACK))
            else:
                self.buffer.appendleft(delivery)
        if taken.lost:
            tell_lost(self._telemetry, hand.stream, {hand.group: texts(taken.lost)})
        return len(fresh), again

    # --- still ours?

    async def renew(self) -> None:
        """Renew everything in hand; drop what turns out to be another worker's by now."""
        for hand in list(self.hands.values()):
            try:
                for ids in chunks(list(hand.held)):
                    await self._renew(hand, ids)
            except ReplyError as error:
                if error.code not in ("NOGROUP", "WRONGTYPE"):
                    raise
                self.drop(hand, list(hand.held))  # the stream or group is gone; others are not

    async def _renew(self, hand: Hand, ids: Sequence[bytes]) -> None:
        asked_at = asyncio.get_running_loop().time()
        renewed = await self._store.renew(hand.stream, self._group, self._consumer, ids)
        for entry_id in ids:
            delivery = hand.held.get(entry_id)
            if delivery is not None:
                delivery.checked_at = asked_at
        self.drop(hand, renewed.refused)
        if renewed.lost:
            self.drop(hand, renewed.lost)
            tell_lost(self._telemetry, hand.stream, {hand.group: texts(renewed.lost)})

    async def still_ours(self, delivery: Delivery[Any]) -> bool:
        """Ask the server whether a delivery is still this worker's. One `renew` of one id."""
        hand = self.of(delivery)
        ids = [delivery.entry_id]
        renewed = await self._store.renew(hand.stream, self._group, self._consumer, ids)
        return not renewed.refused

    async def check(self, unchecked_s: float) -> None:
        """Ask the server whether what lay unread for long is still ours, before any of it runs."""
        async with self._checking:
            now = asyncio.get_running_loop().time()
            if not self.buffer or now - self.buffer[0].checked_at <= unchecked_s:
                return  # another slot has asked meanwhile
            try:
                await self.renew()
            except BusError as error:
                self._telemetry.emit(
                    "lease.failed",
                    worker=self._consumer,
                    error_type=type(error).__name__,
                    error=str(error),
                )
                await asyncio.sleep(0.1)  # the server is away; nothing may run until it says

    def drop(self, hand: Hand, ids: Sequence[bytes]) -> None:
        """Forget what waits and is not ours; what runs ends with a verdict that is refused."""
        gone = set(ids)
        waiting = (*self.buffer, *self.suspects, *self.condemned)
        theirs = [d for d in waiting if d.entry_id in gone and d.origin is hand]
        if theirs:
            self.forget(theirs)
            self.tell_dropped(hand, len(theirs))

    def forget(self, deliveries: Sequence[Delivery[Any]]) -> None:
        """Take deliveries out of the hand without a verdict."""
        gone = set(map(id, deliveries))
        # The suspect that was to run next may be among them, and its end would have brought in the
        # one after it. One too many in the buffer does no harm: it is put aside again.
        promote = any(d.reclaimed and id(d) in gone for d in self.buffer)
        for queue in (self.buffer, self.suspects):
            keep = [d for d in queue if id(d) not in gone]
            queue.clear()
            queue.extend(keep)
        if promote and self.suspects:
            self.buffer.appendleft(self.suspects.popleft())
        for delivery in deliveries:
            self.condemned.pop(delivery, None)
            self.of(delivery).held.pop(delivery.entry_id, None)

    def pardon(self, delivery: Delivery[Any]) -> None:
        """Take one that was to be a dead letter from where it waits; it gets another verdict."""
        delivery.condemned = None
        if self.condemned.pop(delivery, None) is None:
            self.buffer.remove(delivery)

    def take_out(self, chosen: Callable[[Delivery[Any]], bool]) -> list[Delivery[Any]]:
        """Take what has not started out of the buffer, to be handed back; reclaimed ones stay."""
        out = [d for d in self.buffer if not d.reclaimed and chosen(d)]
        keep = [d for d in self.buffer if d.reclaimed or not chosen(d)]
        self.buffer.clear()
        self.buffer.extend(keep)
        return out

    def tell_dropped(self, hand: Hand, count: int) -> None:
        """Tell that deliveries are another worker's and were not run."""
        self._telemetry.emit("delivery.dropped", stream=hand.stream, group=self._group, count=count)


def names_of(delivery: Delivery[Any]) -> dict[str, Any]:
    """Return what telemetry says of a delivery; works for entries that cannot be decoded."""
    located = locate(delivery.fields)
    return {
        "stream": delivery.origin.stream,
        "group": delivery.origin.group,
        "entry_id": delivery.entry_id.decode(),
        "event_id": (located.id or b"").decode(errors="replace")[:100],
        "event_type": (located.type or b"").decode(errors="replace")[:100],
        "attempt": delivery.attempt,
    }


def _handed_back_to(again: list[Again]) -> Callable[[Delivery[Any]], None]:
    return lambda delivery: again.append((delivery, HAND_BACK))


def texts(ids: Sequence[bytes]) -> list[str]:
    """Return entry ids as text."""
    return [i.decode() for i in ids]


def chunks(items: list[Any], size: int = VERDICTS_PER_CALL) -> Iterable[list[Any]]:
    """Cut `items` into lists of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))
