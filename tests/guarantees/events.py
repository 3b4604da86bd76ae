"""The events of the suite. Types are known process-wide, so their family is the suite's own."""

from bus import Event

STREAM = "bus:{promise:0}"


class Made(Event, type="promise.made"):
    n: int
    text: str = ""


class Kept(Event, type="promise.kept"):
    n: int


class Packed(Event, type="promise.packed", encoding="msgpack"):
    n: int


class Renewed(Event, type="promise.renewed", version=2):
    n: int
