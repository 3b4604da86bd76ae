"""Events whose class this process does not know: their data goes as it is.

    await bus.publish(raw_event("order.paid", b'{"order_id":"o-1"}', key="o-1"))

For bridges and tools. Nothing checks that what reads the type can read the data: what cannot be
decoded becomes a dead letter of each handler. Publish an instance of the class where there is one.
"""

from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any

import msgspec

from bus.config import checked_name, checked_number
from bus.errors import InvalidEvent
from bus.event import Event, EventInfo, EventMeta, checked_type


class _Raw(Event):
    """Holds the encoded data; what a subclass says of itself is that of one type."""

    data: bytes


class _Keyed(_Raw):
    key: str


class _RawInfo(EventInfo):
    """How such events travel: as the bytes they hold."""

    def __init__(self, cls: type[_Raw], type: str, version: int, topic: str) -> None:
        key = "key" if issubclass(cls, _Keyed) else None
        super().__init__(cls, type, version, key, topic, "json")
        self.encode = attrgetter("data")
        self.decode = _looked_at
        self.may_hold_floats = False


def _looked_at(_: bytes) -> Any:
    """Do what a decoder does: there is no class that could refuse it."""


def raw_event(
    type: str,
    data: bytes | str,
    *,
    key: str | None = None,
    version: int = 1,
    topic: str | None = None,
) -> Event:
    """Return an event of any type, to be published as any other.

    data: a JSON object, encoded. key: what decides the partition. version: of the type.
    topic: where it is kept, by default the first segment of the type.
    Errors: DeclarationError for the names and the version; InvalidEvent when the data is no object.
    """
    try:
        encoded = data.encode() if isinstance(data, str) else bytes(data)
        value = msgspec.json.decode(encoded)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidEvent(f"{type}: the data is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidEvent(f"{type}: the data is {_named(value)}, not an object")
    cls = _class_of(type, version, topic, keyed=key is not None)
    return cls(data=encoded) if key is None else cls(data=encoded, key=key)


@lru_cache(maxsize=1024)
def _class_of(type: str, version: int, topic: str | None, *, keyed: bool) -> Callable[..., Event]:
    """Make the class of one type; it is known to nobody else."""
    checked_type(type, "raw event")
    checked_number(version, f"raw event {type}: version", 1, 1_000_000, whole=True)
    topic = checked_name(topic or type.partition(".")[0], f"raw event {type}: topic")
    base = _Keyed if keyed else _Raw
    cls: Any = EventMeta("Raw", (base,), {"__module__": __name__})
    cls.__event_info__ = _RawInfo(cls, type, version, topic)
    return cls  # type: ignore[no-any-return] # a class is what makes its instances


def _named(value: object) -> str:
    names = {list: "an array", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(value.__class__, "a number")
