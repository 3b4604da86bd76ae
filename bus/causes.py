"""What a published event inherits from what was being handled when it was published.

The ids of its cause, an event id that a retry makes again, and how deep the chain of causes is.
"""

from hashlib import blake2b
from typing import Any

from bus.config import CAUSATION_DEPTH
from bus.delivery import Delivery
from bus.errors import EventLoop, Undecodable
from bus.streams.codec import Headers


def caused_by(cause: Delivery[Any], type: str, headers: Headers) -> Headers:
    """Return the headers of an event of `type` that `cause` publishes. Errors: EventLoop."""
    event_id, correlation_id, depth = _ids_of(cause)
    if depth >= CAUSATION_DEPTH:
        raise EventLoop(
            f"{type} would be cause number {depth + 1} in one chain, of which {CAUSATION_DEPTH} are"
            f" allowed; the first event was {correlation_id}. Do handlers trigger each other for"
            " ever? Publish only what has changed"
        )
    return headers._replace(
        causation_id=headers.causation_id or event_id,
        correlation_id=headers.correlation_id or correlation_id,
        depth=str(depth + 1),
    )


def derived_id(cause: Delivery[Any], type: str, key: str | None) -> str:
    """Return an id that a retry of the same delivery makes again for the same publish."""
    ordinals = cause.ordinals
    if ordinals is None:
        ordinals = cause.ordinals = {}
    ordinal = ordinals[type, key or ""] = ordinals.get((type, key or ""), 0) + 1
    parts = (_ids_of(cause)[0], cause.group, type, key or "", str(ordinal))
    # Lengths in front: ("ab", "c") and ("a", "bc") must not meet.
    text = "".join([f"{len(p)}:{p}" for p in parts])
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _ids_of(cause: Delivery[Any]) -> tuple[str, str, int]:
    """Return event id, correlation id and depth; on_dead may run for one that has none."""
    try:
        envelope = cause.envelope
    except Undecodable:
        return cause.entry_id.decode(), cause.entry_id.decode(), 0
    event_id = envelope.event_id
    return event_id, envelope.correlation_id or event_id, envelope.causation_depth
