"""What a published event inherits from what was being handled when it was published.

The ids of its cause, an event id that a retry makes again, and how deep the chain of causes is.
"""

from hashlib import blake2b
from typing import Any

from bus.config import CAUSATION_DEPTH
from bus.delivery import Delivery
from bus.errors import EventLoop, Undecodable
from bus.streams.codec import Fields, Headers, plain_entry


def caused_fields(cause: Delivery[Any], type: str, given: Headers | None) -> Fields:
    """Return the fields that say what caused an event of `type`. Errors: EventLoop.

    given: headers of the caller, which may name another cause.
    """
    event_id, correlation_id, depth = _ids_of(cause)
    if depth >= CAUSATION_DEPTH:
        raise EventLoop(
            f"{type} would be event number {depth + 1} that one caused, and {CAUSATION_DEPTH} are"
            f" allowed; the first one was {correlation_id}. Do handlers trigger each other for"
            " ever? Publish only what has changed"
        )
    fields: Fields = ["causationdepth", str(depth + 1)]
    if given is None or given.correlation_id is None:
        fields += ("correlationid", correlation_id)
    if given is None or given.causation_id is None:
        fields += ("causationid", event_id)
    return fields


def derived_id(cause: Delivery[Any], type: str, key: str | None) -> str:
    """Return an id that a retry of the same delivery makes again for the same publish."""
    ordinals = cause.ordinals
    if ordinals is None:
        ordinals = cause.ordinals = {}
    ordinal = ordinals[type, key or ""] = ordinals.get((type, key or ""), 0) + 1
    event_id, group, key = _ids_of(cause)[0], cause.group, key or ""
    # Lengths in front: ("ab", "c") and ("a", "bc") must not meet.
    text = (
        f"{len(event_id)}:{event_id}{len(group)}:{group}{len(type)}:{type}{len(key)}:{key}"
        f"{len(str(ordinal))}:{ordinal}"
    )
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _ids_of(cause: Delivery[Any]) -> tuple[str, str, int]:
    """Return event id, correlation id and depth; on_dead may run for one that has none."""
    try:
        if plain_entry(cause.fields) is not None:  # no headers: most events are nobody's effect
            event_id = cause.fields[1].decode()
            return event_id, event_id, 0
        envelope = cause.envelope
    except (Undecodable, UnicodeDecodeError):
        return cause.entry_id.decode(), cause.entry_id.decode(), 0
    event_id = envelope.event_id
    return event_id, envelope.correlation_id or event_id, envelope.causation_depth
