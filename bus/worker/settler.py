"""Brings verdicts to the server in batches, again and again until it has taken them.

A repeat does no harm: every script checks that the entries are still this worker's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from bus.config import READ_COUNT
from bus.delivery import SKIP, Ack, DeadLetter, Delivery, HandBack, Park, Verdict
from bus.errors import BusError
from bus.streams.connection import Arg
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.hand import Hand, chunks, names_of, tell_lost

BEHIND = 4 * READ_COUNT  # acks of one stream that wait for a slow server before reading stops
_MOST_VALUES = 2_000  # field names and values of one entry
_BODIES_PER_CALL = 50  # dead letters carry their bodies
Parked = Callable[[Hand, bytes, bytes, float], None]


class Settler:
    """Applies the verdicts of one consumer; while one batch is away, the next collects."""

    def __init__(
        self,
        store: StreamStore,
        consumer: str,
        hands: dict[str, Hand],
        telemetry: Telemetry,
        parked: Parked,
        relieved: Callable[[], None],
    ) -> None:
        self._store = store
        self._consumer = consumer
        self._hands = hands
        self._telemetry = telemetry
        self._parked = parked  # told (hand, lane, entry id, delay_s) of each entry that will be due
        self._relieved = relieved  # told when verdicts have gone, so that reading may go on
        self._wanted: asyncio.Future[None] | None = None
        self._applying = False
        self._letters_pass = True
        self._closing = False

    @property
    def has_work(self) -> bool:
        """Whether a verdict is not yet with the server."""
        return self._applying or any(h.has_verdicts for h in self._hands.values())

    @property
    def is_behind(self) -> bool:
        """Whether so many verdicts wait that nothing more should be read for now."""
        return any(len(h.acks) + len(h.acking) > BEHIND for h in self._hands.values())

    def ack(self, delivery: Delivery[Any]) -> None:
        """Take the commonest verdict."""
        delivery.settled = True
        hand: Hand = delivery.origin  # type: ignore[assignment] # deliveries of a worker have one
        hand.held.pop(delivery.entry_id, None)
        hand.acks.append(delivery.entry_id)
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def settle(self, hand: Hand, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Take a verdict."""
        delivery.settled = True
        if isinstance(verdict, Ack):
            hand.held.pop(delivery.entry_id, None)
            hand.acks.append(delivery.entry_id)
            hand.skipped += verdict is SKIP
        elif isinstance(verdict, DeadLetter):
            hand.dead.append((delivery, verdict))
        else:
            hand.parks.append((delivery, verdict))
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def run(self) -> None:
        """Apply verdicts until closed and empty."""
        loop = asyncio.get_running_loop()
        failures = 0
        while self.has_work or not self._closing:
            if not self.has_work:
                self._wanted = loop.create_future()
                await self._wanted
                self._wanted = None
                continue
            self._applying = True
            try:
                busy = [h for h in self._hands.values() if h.has_verdicts]
                done = await asyncio.gather(*(self._apply(h) for h in busy))
            finally:
                self._applying = False
            self._relieved()
            failures = 0 if all(done) else failures + 1
            if failures:
                if self._closing:
                    return
                await asyncio.sleep(min(0.01 * 2**failures, 2.0))

    def close(self) -> None:
        """Let `run` end once everything has been tried."""
        self._closing = True
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def _apply(self, hand: Hand) -> bool:
        """Bring the verdicts of one stream to the server; False if some are to be tried again."""
        hand.acking, skipped, hand.acks, hand.skipped = hand.acks, hand.skipped, [], 0
        parks, hand.parks = hand.parks, []
        dead, hand.dead = hand.dead, []
        ok = True
        for ids in chunks(hand.acking):
            if not await self._attempt(hand, ids, self._ack(hand, ids)):
                hand.acks += ids
                ok = False
        hand.acking = []
        if skipped:
            self._emit("delivery.skipped", hand, count=skipped)
        for part in chunks(parks):
            ids = [d.entry_id for d, _ in part]
            if not await self._attempt(hand, ids, self._park(hand, part)):
                hand.parks += part
                ok = False
        for letters in chunks(dead, _BODIES_PER_CALL if self._letters_pass else 1):
            ids = [d.entry_id for d, _ in letters]
            if not await self._attempt(hand, ids, self._dead_letter(hand, letters)):
                hand.dead += letters
                ok = False
        # Should the server refuse one for what it is, it must not hold up the others.
        self._letters_pass = not hand.dead
        return ok

    async def _attempt(self, hand: Hand, ids: Sequence[bytes], apply: Awaitable[None]) -> bool:
        """Apply verdicts; True when they are over and done with, or the group itself is gone."""
        try:
            await apply
        except BusError as error:
            if isinstance(error, ReplyError) and error.code in ("NOGROUP", "WRONGTYPE"):
                tell_lost(self._telemetry, hand, ids)  # the stream was deleted under us
            else:
                self._emit(
                    "verdict.failed",
                    hand,
                    count=len(ids),
                    error_type=type(error).__name__,
                    error=str(error),
                )
                return False
        for entry_id in ids:
            hand.held.pop(entry_id, None)
        return True

    async def _ack(self, hand: Hand, ids: list[bytes]) -> None:
        refused = await self._store.ack(hand.stream, hand.group, self._consumer, ids)
        self._emit("delivery.acked", hand, count=len(ids) - len(refused))
        self._tell_refused(hand, len(refused), "ack")

    async def _park(self, hand: Hand, part: list[tuple[Delivery[Any], Park | HandBack]]) -> None:
        entries = [(d.entry_id, *_delay_and_count(d, v)) for d, v in part]
        lanes = await self._store.park(hand.stream, hand.group, self._consumer, entries)
        refused = handed_back = 0
        for (delivery, verdict), lane in zip(part, lanes, strict=True):
            if lane == b"lost":
                tell_lost(self._telemetry, hand, [delivery.entry_id])
            elif not lane:
                refused += 1
            elif isinstance(verdict, HandBack):
                handed_back += 1
            else:
                self._tell_parked(delivery, verdict)
                self._parked(hand, lane, delivery.entry_id, verdict.delay_s)
        self._tell_refused(hand, refused, "park")
        if handed_back:
            self._emit("delivery.handed_back", hand, count=handed_back)

    async def _dead_letter(self, hand: Hand, part: list[tuple[Delivery[Any], DeadLetter]]) -> None:
        entries = [(d.entry_id, _dead_fields(d, v)) for d, v in part]
        moved = await self._store.dead_letter(hand.stream, hand.group, self._consumer, entries)
        for (delivery, verdict), done in zip(part, moved, strict=True):
            if done:
                self._telemetry.emit(
                    "delivery.dead_lettered",
                    **names_of(delivery),
                    reason=verdict.reason,
                    error_type=verdict.error.type,
                    error=verdict.error.text,
                    where=verdict.error.where,
                )
        self._tell_refused(hand, len(moved) - sum(moved), "dead_letter")

    # --- telling

    def _emit(self, name: str, hand: Hand, **fields: Any) -> None:
        self._telemetry.emit(name, stream=hand.stream, group=hand.group, **fields)

    def _tell_refused(self, hand: Hand, count: int, verb: str) -> None:
        if count:
            self._emit("delivery.refused", hand, count=count, verb=verb)

    def _tell_parked(self, delivery: Delivery[Any], verdict: Park) -> None:
        names = names_of(delivery)
        if verdict.error is None:
            self._telemetry.emit(
                "delivery.postponed", **names, delay_s=verdict.delay_s, reason=verdict.reason
            )
            return
        self._telemetry.emit(
            "delivery.retried",
            **names,
            delay_s=verdict.delay_s,
            error_type=verdict.error.type,
            error=verdict.error.text,
            where=verdict.error.where,
        )


def _delay_and_count(delivery: Delivery[Any], verdict: Park | HandBack) -> tuple[int, int]:
    """Return the delay in ms and the delivery count to store; taking it will add one."""
    if isinstance(verdict, HandBack):
        return 0, max(0, delivery.attempt - 1)
    used = delivery.attempt if verdict.error is not None else max(0, delivery.attempt - 1)
    return max(1, round(verdict.delay_s * 1000)), used


def _dead_fields(delivery: Delivery[Any], verdict: DeadLetter) -> list[Arg]:
    """Return the fields of a dead letter: those of the entry, then why it died.

    An entry of more fields than a script can pass on in one call (about 8,000 values) keeps them
    in one field, `deadfields`, as a msgpack array.
    """
    fields: list[bytes] = delivery.fields
    if len(fields) > _MOST_VALUES:
        fields = [b"deadfields", msgspec.msgpack.encode(fields)]
    return [
        *fields,
        "deadreason",
        verdict.reason,
        "deaderror",
        f"{verdict.error.type}: {verdict.error.text}".encode("utf-8", "replace"),
        "deadtraceback",
        verdict.error.traceback.encode("utf-8", "replace"),
        "deadattempts",
        str(delivery.attempt),
        "deadentry",
        delivery.entry_id,
    ]
