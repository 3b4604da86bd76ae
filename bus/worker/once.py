"""Handlers with `once=`: an event that was published twice is handled by one of its deliveries.

    mark        of (group, event type, event id, replay run), in the partition's slot
    missing     this delivery puts its name there and may run
    its name    it may run: a retry, or a crash before the end
    another's   pending still: parked a while, no attempt used; gone: this one takes its place
    done        acked unhandled; the mark was put by the script that acked the other one
    not known   the server is away, or refuses: it waits where it was, and so do all slots

The handler's own effects travel in that script, too. What it does elsewhere does not: a crash after
it and before the ack runs it again.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from bus.config import ONCE_BUSY_PARK_S, ONCE_CLAIM_S
from bus.delivery import ACK, Delivery, Park, Verdict
from bus.errors import BusError
from bus.streams import keys
from bus.streams.answers import Claim
from bus.streams.codec import locate, run_of
from bus.streams.replies import TRANSIENT, ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.executor import Slot
from bus.worker.hand import chunks, names_of
from bus.worker.slots import Slots

_PAUSE_S = 0.1  # after the server did not say; doubling up to...
_LONGEST_PAUSE_S = 1.0


class Once:
    """Asks for the deliveries of one handler; one round trip each, `once.lua`.

    end: told of each that must not be handled now, with its verdict. put_back: of each of which the
    server did not say. held_until: the loop time before which no slot is to take any.
    """

    def __init__(
        self,
        store: StreamStore,
        once: timedelta,
        slots: Slots,
        end: Callable[[Delivery[Any], Verdict], None],
        put_back: Callable[[Delivery[Any]], None],
        telemetry: Telemetry,
        *,
        group: str,
    ) -> None:
        self._store = store
        self._group = group
        self._ttl_ms = once // timedelta(milliseconds=1)
        self._claim_ms = max(self._ttl_ms, ONCE_CLAIM_S * 1000)
        self._slots = slots
        self._end = end
        self._put_back = put_back
        self._telemetry = telemetry
        self._pause_s = 0.0
        self.held_until = 0.0

    @property
    def is_held_up(self) -> bool:
        """Whether the server did not say when it was asked last."""
        return self._pause_s > 0

    async def wait(self) -> None:
        """Wait until the server may be asked again."""
        await asyncio.sleep(self.held_until - asyncio.get_running_loop().time())

    async def admitted(
        self, slot: Slot, deliveries: Sequence[Delivery[Any]]
    ) -> Sequence[Delivery[Any]]:
        """Return those that may be handled now; see to their marks, and to the others."""
        marks = [_mark_of(d) for d in deliveries]
        claims: list[Claim | BusError | None] = []  # None: cancelled as it was asked for
        for part in chunks([*zip(deliveries, marks, strict=True)]):
            try:
                answers = await self._slots.waited(slot, self._claim_all(part))
            except asyncio.CancelledError:  # everything ends
                self._put_all_back(deliveries)
                raise
            claims += answers or [None] * len(part)
        admitted: list[Delivery[Any]] = []
        unknown: list[Delivery[Any]] = []
        for delivery, mark, claim in zip(deliveries, marks, claims, strict=True):
            if claim is Claim.YES:
                delivery.effects.finally_set(mark, "done", self._ttl_ms)
                admitted.append(delivery)
            elif claim is None or _heals(claim):
                unknown.append(delivery)
            else:
                self._end(delivery, self._verdict(delivery, claim))
        self._put_all_back(unknown)
        self._note([c for c in claims if _heals(c)])
        return admitted

    async def _claim_all(
        self, asked: Sequence[tuple[Delivery[Any], str]]
    ) -> list[Claim | BusError]:
        if len(asked) == 1:
            return [await self._claim(*asked[0])]
        return await asyncio.gather(*(self._claim(*each) for each in asked))

    async def _claim(self, delivery: Delivery[Any], mark: str) -> Claim | BusError:
        """Ask for one; return an error as well. Errors: PermissionDenied, which time heals not."""
        origin = delivery.origin
        try:
            return await self._store.claim(
                mark, origin.home, origin.stream, origin.group, delivery.entry_id, self._claim_ms
            )
        except ReplyError as error:
            if error.code == "NOPERM":
                raise error.explained(mark) from None
            return error
        except BusError as error:
            return error

    def _verdict(self, delivery: Delivery[Any], claim: Claim | BusError) -> Verdict:
        """Return what becomes of one that must not be handled now."""
        if claim is Claim.DONE:
            self._telemetry.emit("delivery.duplicate", **names_of(delivery))
            return ACK
        if claim is Claim.BUSY:
            return Park(ONCE_BUSY_PARK_S, reason="another delivery of the same event is under way")
        # Its mark is not what it should be, perhaps: that is no reason for others to wait.
        return Park(ONCE_BUSY_PARK_S, reason=f"whether it was handled is not known: {claim}")

    def _put_all_back(self, deliveries: Sequence[Delivery[Any]]) -> None:
        for delivery in reversed(deliveries):
            self._put_back(delivery)

    def _note(self, errors: Sequence[Claim | BusError | None]) -> None:
        """Note how the server was when it was asked; after errors all slots pause."""
        now = asyncio.get_running_loop().time()
        if not errors:
            self._pause_s = 0.0
        elif now >= self.held_until:  # else they were asked for together with those that began it
            self._pause_s = min(max(2 * self._pause_s, _PAUSE_S), _LONGEST_PAUSE_S)
            self.held_until = now + self._pause_s
            self._telemetry.emit(
                "once.failed",
                group=self._group,
                error_type=type(errors[0]).__name__,
                error=str(errors[0]),
            )


def _heals(claim: Claim | BusError | None) -> bool:
    """Whether the server did not say, and will once it has recovered."""
    if isinstance(claim, ReplyError):
        return claim.code in TRANSIENT
    return isinstance(claim, BusError)


def _mark_of(delivery: Delivery[Any]) -> str:
    origin, located = delivery.origin, locate(delivery.fields)
    return keys.once(
        origin.home,
        origin.group,
        run_of(delivery).encode(),
        located.type or b"",
        located.id or b"",
    )
