"""Brings verdicts to the server in batches, again and again until it has taken them.

A repeat does no harm: every script checks that the entries are still this worker's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from bus.config import DEAD_LETTERS_FULL_PARK_S, READ_COUNT, VERDICTS_PER_CALL
from bus.delivery import SKIP, Ack, Commit, DeadLetter, Delivery, HandBack, Park, Verdict
from bus.errors import BusError
from bus.shortage import tell_lost
from bus.streams.answers import Buried
from bus.streams.codec import original_id, without_inbox_fields
from bus.streams.connection import Arg, ConnectionLost
from bus.streams.letters import closed
from bus.streams.replies import TRANSIENT, ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.commits import Commits, together
from bus.worker.hand import Cooldown, Hand, chunks, names_of, texts

BEHIND = 4 * READ_COUNT  # acks of one stream that wait for a slow server before reading stops
_BEHIND_BYTES = 32 * 1024 * 1024  # effects that wait, likewise
_BODIES_PER_CALL = 50  # dead letters carry their bodies...
_BYTES_PER_CALL = 1024 * 1024  # ...and copying many large ones would keep the server from others
_NAMED_SINGLY = 50  # of so few ids `ack.lua` names every one that it refuses
_UNBURIED = 10_000  # ids without room that are remembered per stream; beyond it all are forgotten
_NO_ROOM = Park(DEAD_LETTERS_FULL_PARK_S, reason="the dead letters are full")
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
        commits: Commits,
        *,
        dead_letter_maxlen: int = 0,
    ) -> None:
        self._store = store
        self._consumer = consumer
        self._hands = hands
        self._telemetry = telemetry
        self._parked = parked  # told (hand, lane, entry id, delay_s) of each entry that will be due
        self._dead_letter_maxlen = dead_letter_maxlen  # of one partition; 0 for no limit
        self._commits = commits
        self._relieved = relieved  # told when verdicts have gone, so that reading may go on
        self._loaded: set[Hand] = set()  # those with verdicts, waiting or on their way
        self._wanted: asyncio.Future[None] | None = None
        self._doubtful: set[tuple[str, bytes]] = set()  # sent, and the reply was lost
        self._applying = False
        self._closing = False

    @property
    def has_work(self) -> bool:
        """Whether a verdict is not yet with the server."""
        return self._applying or bool(self._loaded)

    @property
    def is_behind(self) -> bool:
        """Whether so many verdicts wait that nothing more should be read for now."""
        return any(
            len(h.acks) + len(h.acking) + len(h.commits) + h.committing > BEHIND
            or h.commit_bytes > _BEHIND_BYTES
            or len(h.parks) + len(h.dead) + h.away > READ_COUNT
            for h in self._loaded
        )

    def ack(self, delivery: Delivery[Any]) -> None:
        """Take the commonest verdict."""
        delivery.settled = True
        if delivery.collected is not None:  # none were collected, and none can be any more
            delivery.close_effects()
        hand: Hand = delivery.origin  # type: ignore[assignment] # deliveries of a worker have one
        entry_id, acks = delivery.entry_id, hand.acks
        hand.held.pop(entry_id, None)
        if not acks:  # else it is loaded, and somebody was woken for it
            self._loaded.add(hand)
            self._wake()
        acks.append(entry_id)

    def ack_all(self, deliveries: Sequence[Delivery[Any]]) -> None:
        """Take the commonest verdict for many, none of which has asked for effects."""
        hand: Hand | None = None
        for delivery in deliveries:
            if delivery.origin is not hand:
                hand = delivery.origin  # type: ignore[assignment] # as in `ack`
                assert hand is not None
                self._loaded.add(hand)
                forget, add = hand.held.pop, hand.acks.append
            delivery.settled = True
            forget(delivery.entry_id, None)
            add(delivery.entry_id)
        self._wake()

    def settle(self, hand: Hand, delivery: Delivery[Any], verdict: Verdict) -> None:
        """Take a verdict."""
        delivery.settled = True
        delivery.close_effects()
        if isinstance(verdict, Ack):
            hand.held.pop(delivery.entry_id, None)
            hand.acks.append(delivery.entry_id)
            hand.skipped += verdict is SKIP
        elif isinstance(verdict, Commit):
            hand.commits.append(delivery)
            hand.commit_bytes += delivery.effects.bytes
        elif isinstance(verdict, DeadLetter):
            hand.dead.append((delivery, verdict))
        else:
            hand.parks.append((delivery, verdict))
        self._loaded.add(hand)
        self._wake()

    async def run(self) -> None:
        """Apply verdicts until closed and empty."""
        loop = asyncio.get_running_loop()
        while self.has_work or not self._closing:
            ready = [h for h in self._loaded if self._is_ready(h, loop.time())]
            if not ready:
                await self._wait(loop.time())
                continue
            self._applying = True
            try:
                done = await asyncio.gather(*(self._apply(h) for h in ready))
            finally:
                self._applying = False
                self._loaded.difference_update([h for h in ready if not h.has_verdicts])
            self._relieved()
            if not all(done) and self._closing:
                return

    def _is_ready(self, hand: Hand, now: float) -> bool:
        return any(verdicts and now >= cooldown.until for verdicts, cooldown in _kinds(hand))

    async def _wait(self, now: float) -> None:
        """Wait for a verdict, or for the end of a cooldown if there are verdicts already."""
        self._wanted = asyncio.get_running_loop().create_future()
        timeout_s = None
        if self.has_work:
            ends = [p.until for h in self._loaded for _, p in _kinds(h)]
            timeout_s = max(0.001, min((p - now for p in ends if p > now), default=0.001))
        await asyncio.wait([self._wanted], timeout=timeout_s)
        self._wanted = None

    def close(self) -> None:
        """Let `run` end once everything has been tried."""
        self._closing = True
        self.hurry()

    def hurry(self) -> None:
        """Try at once what waits for the end of a cooldown."""
        for hand in self._hands.values():
            for _, cooldown in _kinds(hand):
                cooldown.until = 0.0
        self._wake()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def _apply(self, hand: Hand) -> bool:
        """Bring the verdicts of one stream to the server; False if some are to be tried again.

        Each kind has a cooldown of its own after a failure: a dead letter that the server refuses,
        for want of memory perhaps, must hold up neither acks nor retries.
        """
        done = True
        for cooldown, apply in (
            (hand.acks_cooldown, self._apply_acks),
            (hand.commits_cooldown, self._apply_commits),
            (hand.parks_cooldown, self._apply_parks),
            (hand.dead_cooldown, self._apply_dead),
        ):
            if asyncio.get_running_loop().time() >= cooldown.until:
                done = await apply(hand) and done
        return done

    async def _apply_acks(self, hand: Hand) -> bool:
        hand.acking, skipped, hand.acks, hand.skipped = hand.acks, hand.skipped, [], 0
        failed: list[bytes] = []
        # Few enough that the server names each that it refuses: one in doubt may be among them.
        at_once = _NAMED_SINGLY if self._doubtful else VERDICTS_PER_CALL
        for ids in chunks(hand.acking, at_once):
            if failed or not await self._attempt(hand, ids, partial(self._ack, hand, ids)):
                failed += ids
        hand.acking = []
        hand.acks += failed
        if skipped:
            self._emit("delivery.skipped", hand, count=skipped)
        hand.acks_cooldown.after(ok=not failed)
        return not failed

    async def _apply_commits(self, hand: Hand) -> bool:
        commits, hand.commits = hand.commits, []
        hand.committing = len(commits)
        parts = list(together(commits))
        # All at once: while the server is at one, the next is on its way, and the loop is ours.
        done = await asyncio.gather(*(self._apply_part(hand, part) for part in parts))
        failed = [d for part, ok in zip(parts, done, strict=True) if not ok for d in part]
        hand.commits += failed
        hand.committing = 0
        hand.commit_bytes = sum(d.effects.bytes for d in hand.commits)
        hand.commits_cooldown.after(ok=not failed)
        return not failed

    async def _apply_part(self, hand: Hand, part: Sequence[Delivery[Any]]) -> bool:
        came_through = self._came_through if self._doubtful else None
        apply = partial(self._commits.apply, hand, part, came_through)
        return await self._attempt(hand, [d.entry_id for d in part], apply)

    async def _apply_parks(self, hand: Hand) -> bool:
        parks, hand.parks = hand.parks, []
        hand.away = len(parks)
        failed: list[tuple[Delivery[Any], Park | HandBack]] = []
        for part in chunks(parks):
            ids = [d.entry_id for d, _ in part]
            if failed or not await self._attempt(hand, ids, partial(self._park, hand, part)):
                failed += part
        hand.parks += failed
        hand.away = 0
        hand.parks_cooldown.after(ok=not failed)
        return not failed

    async def _apply_dead(self, hand: Hand) -> bool:
        """Bring dead letters; after a failure that time heals, the rest waits, too."""
        dead, hand.dead = hand.dead, []
        hand.away = len(dead)
        ok, refused = True, False
        for letters in portions(dead, 1 if hand.singly else _BODIES_PER_CALL):
            ids = [d.entry_id for d, _ in letters]
            if not ok or not await self._attempt(
                hand, ids, partial(self._dead_letter, hand, letters)
            ):
                hand.dead += letters
                # One that is refused for what it is stops only itself, once they go singly.
                refused = refused or hand.singly
                ok = ok and hand.singly
        hand.away = 0
        hand.singly = hand.singly and bool(hand.dead)
        hand.dead_cooldown.after(ok=ok and not refused)
        return ok and not refused

    async def _attempt(
        self, hand: Hand, ids: Sequence[bytes], apply: Callable[[], Awaitable[Collection[bytes]]]
    ) -> bool:
        """Apply verdicts; True when they are over and done with, or the group itself is gone.

        `apply` returns the ids that stay in hand all the same, for another verdict.
        """
        try:
            staying = await apply()
        except BusError as error:
            hand.singly = False
            if isinstance(error, ReplyError):
                if error.code == "NOPERM":
                    raise error.explained(hand.stream) from None  # no time heals that
                if error.code == "NOGROUP" or await self._stream_is_gone(hand, error):
                    self._emit("verdict.void", hand, count=len(ids))
                    self._forget(hand, ids)
                    return True
                hand.singly = error.code not in TRANSIENT
            elif isinstance(error, ConnectionLost) and error.sent:
                self._doubtful.update((hand.stream, i) for i in ids)
            self._emit(
                "verdict.failed",
                hand,
                count=len(ids),
                error_type=type(error).__name__,
                error=str(error),
            )
            return False
        self._forget(hand, ids, staying)
        return True

    async def _stream_is_gone(self, hand: Hand, error: ReplyError) -> bool:
        """Whether WRONGTYPE means the stream itself, not the key of its dead letters."""
        if error.code != "WRONGTYPE":
            return False
        try:
            return await self._store.type_of(hand.stream) != b"stream"
        except BusError:
            return False

    def _forget(self, hand: Hand, ids: Sequence[bytes], staying: Collection[bytes] = ()) -> None:
        for entry_id in ids:
            delivery = hand.held.get(entry_id)
            # Of one that came again meanwhile, since its group was moved back, nothing is over.
            if delivery is not None and delivery.settled and entry_id not in staying:
                del hand.held[entry_id]
        if self._doubtful:
            self._doubtful.difference_update([(hand.stream, entry_id) for entry_id in ids])

    def _came_through(self, hand: Hand, entry_id: bytes) -> bool:
        """Whether a refused verdict was in truth applied, by an attempt whose reply was lost."""
        return (hand.stream, entry_id) in self._doubtful

    async def _ack(self, hand: Hand, ids: list[bytes]) -> Collection[bytes]:
        refused = await self._store.ack(hand.stream, hand.group, self._consumer, ids)
        late = sum(not self._came_through(hand, i) for i in refused)
        self._emit("delivery.acked", hand, count=len(ids) - late)
        self._tell_refused(hand, late, "ack")
        return ()

    async def _park(
        self, hand: Hand, part: list[tuple[Delivery[Any], Park | HandBack]]
    ) -> Collection[bytes]:
        entries = [(d.entry_id, *_delay_and_count(d, v)) for d, v in part]
        lanes = await self._store.park(hand.stream, hand.group, self._consumer, entries)
        refused = handed_back = 0
        for (delivery, verdict), lane in zip(part, lanes, strict=True):
            if lane == b"lost":
                tell_lost(self._telemetry, hand.stream, {hand.group: texts([delivery.entry_id])})
            elif not lane and not self._came_through(hand, delivery.entry_id):
                refused += 1
            elif isinstance(verdict, HandBack):
                handed_back += 1
            else:
                self._tell_parked(delivery, verdict)
                if lane and not verdict.until_ms:  # how long that is, only the server knows
                    self._parked(hand, lane, delivery.entry_id, verdict.delay_s)
        self._tell_refused(hand, refused, "park")
        if handed_back:
            self._emit("delivery.handed_back", hand, count=handed_back)
        return ()

    async def _dead_letter(
        self, hand: Hand, part: list[tuple[Delivery[Any], DeadLetter]]
    ) -> Collection[bytes]:
        entries = [(d.entry_id, _dead_fields(d, v)) for d, v in part]
        answers = await self._store.dead_letter(
            hand.stream, hand.group, self._consumer, self._dead_letter_maxlen, entries
        )
        refused = 0
        full: set[bytes] = set()
        for (delivery, verdict), done in zip(part, answers, strict=True):
            if done is Buried.FULL:
                full.add(delivery.entry_id)
                hand.parks.append((delivery, _NO_ROOM))
                continue
            hand.unburied.discard(delivery.entry_id)
            if done is Buried.REFUSED and not self._came_through(hand, delivery.entry_id):
                refused += 1
                continue
            self._telemetry.emit(
                "delivery.dead_lettered",
                **names_of(delivery),
                reason=verdict.reason,
                error_type=verdict.error.type,
                error=verdict.error.text,
                where=verdict.error.where,
            )
        self._tell_refused(hand, refused, "dead_letter")
        if full:
            if len(hand.unburied) + len(full) > _UNBURIED:
                hand.unburied.clear()  # others may have buried those long since
            hand.unburied |= full
            self._emit("dead_letters.full", hand, count=len(full), maxlen=self._dead_letter_maxlen)
        return full

    # --- telling

    def _emit(self, name: str, hand: Hand, **fields: Any) -> None:
        self._telemetry.emit(name, stream=hand.stream, group=hand.group, **fields)

    def _tell_refused(self, hand: Hand, count: int, verb: str) -> None:
        if count:
            self._emit("delivery.refused", hand, count=count, verb=verb)

    def _tell_parked(self, delivery: Delivery[Any], verdict: Park) -> None:
        if verdict.until_ms:
            return  # it was told when it was parked first
        names = names_of(delivery)
        if verdict.error is None:
            self._telemetry.emit(
                "delivery.postponed",
                **names,
                delay_s=round(verdict.delay_s, 3),
                reason=verdict.reason,
            )
            return
        self._telemetry.emit(
            "delivery.retried",
            **names,
            delay_s=round(verdict.delay_s, 3),
            error_type=verdict.error.type,
            error=verdict.error.text,
            where=verdict.error.where,
        )


def _kinds(hand: Hand) -> tuple[tuple[Sequence[Any], Cooldown], ...]:
    """Return each kind of verdict that waits, and its cooldown."""
    return (
        (hand.acks, hand.acks_cooldown),
        (hand.commits, hand.commits_cooldown),
        (hand.parks, hand.parks_cooldown),
        (hand.dead, hand.dead_cooldown),
    )


def portions(
    letters: Sequence[tuple[Delivery[Any], DeadLetter]], most: int
) -> Iterator[list[tuple[Delivery[Any], DeadLetter]]]:
    """Cut dead letters into calls: at most `most` and about `_BYTES_PER_CALL`, but one at least."""
    portion: list[tuple[Delivery[Any], DeadLetter]] = []
    size = 0
    for letter in letters:
        body = sum(map(len, letter[0].fields))
        if portion and (len(portion) >= most or size + body > _BYTES_PER_CALL):
            yield portion
            portion, size = [], 0
        portion.append(letter)
        size += body
    if portion:
        yield portion


def _delay_and_count(delivery: Delivery[Any], verdict: Park | HandBack) -> tuple[Arg, int]:
    """Return the delay in ms, or "@" and the server time, and the delivery count to store.

    Taking it will add one to the count.
    """
    if isinstance(verdict, HandBack):
        return 0, max(0, delivery.attempt - 1)
    used = delivery.attempt if verdict.uses_attempt else max(0, delivery.attempt - 1)
    if verdict.until_ms:
        return f"@{verdict.until_ms}", used
    return max(1, round(verdict.delay_s * 1000)), used


def _dead_fields(delivery: Delivery[Any], verdict: DeadLetter) -> list[Arg]:
    """Return the fields of a dead letter: those of the entry, then why it died."""
    fields: list[bytes] = delivery.fields
    if delivery.origin.stream != delivery.origin.home:
        fields = without_inbox_fields(fields)
    return closed(
        fields,
        reason=verdict.reason,
        error=f"{verdict.error.type}: {verdict.error.text}",
        traceback=verdict.error.traceback,
        attempts=delivery.attempt,
        origin=original_id(delivery),
    )
