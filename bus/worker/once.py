"""Handlers with `once=`: an event that was published twice is handled by one of its deliveries.

    mark        of (group, event id, replay run), in the partition's slot
    missing     this delivery puts its name there and may run
    its name    it may run: a retry, or a crash before the end
    another's   pending still: parked a while, no attempt used; gone: this one takes its place
    done        acked unhandled; the mark was put by the script that acked the other one

The handler's own effects travel in that script, too. What it does elsewhere does not: a crash after
it and before the ack runs it again.
"""

from datetime import timedelta
from hashlib import blake2b
from typing import Any

from bus.config import ONCE_BUSY_PARK_S, ONCE_CLAIM_S
from bus.delivery import ACK, Delivery, Park, Verdict
from bus.errors import BusError
from bus.streams import keys
from bus.streams.answers import Claim
from bus.streams.codec import locate, run_of
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.hand import names_of

_LONGEST_ID = 100  # what is longer, or no text, has its hash in the key


class Once:
    """Asks for the deliveries of one handler; one round trip each, `once.lua`."""

    def __init__(self, store: StreamStore, once: timedelta, telemetry: Telemetry) -> None:
        self._store = store
        self._ttl_ms = once // timedelta(milliseconds=1)
        self._claim_ms = max(self._ttl_ms, ONCE_CLAIM_S * 1000)
        self._telemetry = telemetry

    async def admit(self, delivery: Delivery[Any]) -> Verdict | None:
        """Return a verdict if it must not be handled now; else see to its mark, return None."""
        origin = delivery.origin
        event_id = _text_of(locate(delivery.fields).id or b"")
        mark = keys.once(origin.home, origin.group, run_of(delivery), event_id)
        try:
            claim = await self._store.claim(
                mark, origin.home, origin.stream, origin.group, delivery.entry_id, self._claim_ms
            )
        except BusError as error:
            return Park(ONCE_BUSY_PARK_S, reason=f"whether it was handled is not known: {error}")
        if claim is Claim.DONE:
            self._telemetry.emit("delivery.duplicate", **names_of(delivery))
            return ACK
        if claim is Claim.BUSY:
            return Park(ONCE_BUSY_PARK_S, reason="another delivery of the same event is under way")
        delivery.effects.finally_set(mark, "done", self._ttl_ms)
        return None


def _text_of(event_id: bytes) -> str:
    try:
        text = event_id.decode()
    except UnicodeDecodeError:
        text = ""
    if 0 < len(text) <= _LONGEST_ID:
        return text
    return "#" + blake2b(event_id, digest_size=16).hexdigest()
