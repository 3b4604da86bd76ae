"""What a published event inherits from what was being handled when it was published.

The ids of its cause, an event id that a retry makes again, and how deep the chain of causes is.
"""

from hashlib import blake2b
from typing import Any

from bus.config import CAUSATION_DEPTH
from bus.delivery import BatchCause, Delivery
from bus.errors import EventLoop, Undecodable
from bus.streams.codec import Fields, Headers, plain_entry, run_of


def inherit(
    cause: Delivery[Any] | BatchCause, type: str, key: str | None, given: Headers | None
) -> tuple[str | None, Fields]:
    """Return the id and the header fields that an event of `type` has from its cause.

    given: headers of the caller, which may name another cause. The id is None if several
    deliveries caused it: no retry would find them together again. Errors: EventLoop.
    """
    if isinstance(cause, BatchCause):
        if cause.depth is None:
            cause.depth = max((_ids_of(d)[2] for d in cause.deliveries), default=0)
        return None, ["causationdepth", _deeper(cause.depth, type, "a batch")]
    event_id, correlation_id, depth = _ids_of(cause)
    fields: Fields = ["causationdepth", _deeper(depth, type, correlation_id)]
    if given is None or given.correlation_id is None:
        fields += ("correlationid", _wire(correlation_id))
    if given is None or given.causation_id is None:
        fields += ("causationid", _wire(event_id))
    return _derived_id(cause, event_id, type, key or ""), fields


def _deeper(depth: int, type: str, first: str) -> str:
    if depth >= CAUSATION_DEPTH:
        raise EventLoop(
            f"{type} would be event number {depth + 1} in a chain of causes, and {CAUSATION_DEPTH}"
            f" are allowed; the chain began with {first}. Do handlers trigger each other for ever?"
            " Publish only what has changed"
        )
    return str(depth + 1)


def _derived_id(cause: Delivery[Any], event_id: str, type: str, key: str) -> str:
    """Return an id that a retry of the same delivery makes again for the same publish."""
    ordinals = cause.ordinals
    if ordinals is None:
        ordinals = cause.ordinals = {}
    ordinal = ordinals[type, key] = ordinals.get((type, key), 0) + 1
    group = cause.origin.group
    if cause.origin.stream != cause.origin.home and (run := run_of(cause)):
        group = f"{group} {run}"  # a replay publishes anew; no group's name has a space
    # Lengths in front: ("ab", "c") and ("a", "bc") must not meet.
    text = f"{len(event_id)}:{event_id}{len(group)}:{group}{len(type)}:{type}{len(key)}:{key}"
    text += f"{len(str(ordinal))}:{ordinal}"
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _ids_of(cause: Delivery[Any]) -> tuple[str, str, int]:
    """Return event id, correlation id and depth; on_dead may run for one that has none."""
    try:
        if plain_entry(cause.fields) is not None:  # it has no headers, as most
            event_id = cause.fields[1].decode()
            return event_id, event_id, 0
        envelope = cause.envelope
    except (Undecodable, UnicodeDecodeError):
        return cause.entry_id.decode(), cause.entry_id.decode(), 0
    event_id = envelope.event_id
    return event_id, envelope.correlation_id or event_id, envelope.causation_depth


def _wire(text: str) -> str | bytes:
    return text if text.isascii() else text.encode()
