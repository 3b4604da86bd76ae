"""An event with everything that travels beside it."""

from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from bus.event import Event


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """An event with everything that travels beside it.

    event_id: the publisher's id, the same in every group and on every retry.
    type, version: of the event. stream, entry_id: where it lies.
    key: what decided the partition, None if the event has none.
    time: UTC; when it happened, or when it was appended if the publisher did not say.
    correlation_id, causation_id: the ids of the first event of the chain, and of its cause.
    causation_depth: how many causes it has: 0 if no handler published it.
    run: which replay or redrive brought it, "" if none did.
    data: the encoded event; content_type: JSON if None. `event` decodes it whenever it is asked.
    """

    event_id: str
    type: str
    version: int
    stream: str
    entry_id: str
    time: datetime
    key: str | None = None
    source: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    causation_depth: int = 0
    run: str = ""
    data: bytes = b""
    content_type: bytes | None = None
    _decode: "Callable[[Envelope], Event] | None" = None

    @property
    def event(self) -> Event:
        """The decoded event. Errors: Undecodable, UnknownEventType."""
        if self._decode is None:
            raise ValueError("an envelope made by hand has no event to decode")
        return self._decode(self)

    def __repr__(self) -> str:
        """Show where it is from and lies, never its key or data: those are the application's."""
        shown = (n for n in self.__struct_fields__ if n not in _HIDDEN and getattr(self, n))
        return f"Envelope({', '.join(f'{n}={getattr(self, n)!r}' for n in shown)})"


_HIDDEN = ("key", "data", "_decode")
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999, the last that a datetime can say


def entry_time(entry_id: bytes | str) -> datetime:
    """Return the UTC time at which the server appended the entry (its id counts ms)."""
    return datetime.fromtimestamp(min(order(entry_id)[0], _LATEST_MS) / 1000, UTC)


def order(entry_id: bytes | str) -> tuple[int, int]:
    """Return what entry ids are ordered by: milliseconds and sequence; "" comes before all."""
    text = entry_id if isinstance(entry_id, str) else entry_id.decode()
    ms, _, sequence = text.partition("-")
    return int(ms or 0), int(sequence or 0)
