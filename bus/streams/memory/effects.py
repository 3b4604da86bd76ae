"""Effects: commands on keys, applied in one step with the acks of their deliveries, or once.

The rules are those of `scripts/commit.lua`: types are looked at before the first write, events need
room before anything is done, and what fails half way is a dead letter that says what stays.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from bus.config import PRODUCER_MEMORY_S
from bus.envelope import order
from bus.streams import keys
from bus.streams.answers import Committed, Fate, Looked
from bus.streams.codec import without_inbox_fields
from bus.streams.connection import Arg
from bus.streams.letters import packed
from bus.streams.memory.log import Fields, Group, Id, Log, written
from bus.streams.memory.place import Place, Sealed, wire, wrong_type
from bus.streams.memory.room import look
from bus.streams.memory.values import VALUES
from bus.streams.memory.verdicts import bury, finish
from bus.streams.replies import Reply, ReplyError

_READS = frozenset(["GET", "HGET", "SISMEMBER", "SCARD", "ZSCORE", "ZCARD", "EXISTS"])
_ERROR_BYTES, _APPLIED_BYTES = 2_000, 8_000  # so much of an error, and of what was applied, is told
_NO_NUMBER = re.compile(r"[xX\s\0_]")
_decode = msgspec.msgpack.Decoder().decode


class _Test(NamedTuple):
    """What the reply to an earlier command must be: see `commit.lua`."""

    command: int
    name: str
    low: bytes
    high: bytes


class _Command(NamedTuple):
    tests: tuple[_Test, ...]
    args: list[bytes]

    @property
    def name(self) -> str:
        return self.args[0].decode()


class _Unit(NamedTuple):
    """The effects of one delivery, or a transaction.

    types: key, and the type it must have. places: command, and the stream to which it appends.
    marked: whether the last command is the mark of `once`.
    """

    entry_id: str
    attempt: bytes
    origin: bytes
    types: list[tuple[str, str]]
    places: list[tuple[int, str]]
    commands: list[_Command]
    marked: bool


class _Marks(NamedTuple):
    """How long a stream may grow; see `commit.lua`."""

    events: int
    keep: int
    slack: int
    most: int
    drop: bool


class Remembered(Sealed):
    """A sender's last transaction."""

    def __init__(self, sequence: int, fate: Committed) -> None:
        self.sequence = sequence
        self.fate = fate


@dataclass(slots=True)
class _Rooms:
    """The streams that events go to, and the room that is left there."""

    place: Place
    marks: dict[str, _Marks] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # streams that are none, and what they are
    looks: list[Looked] = field(default_factory=list)
    added: Counter[str] = field(default_factory=Counter)

    def look(self, stream: str, total: int) -> None:
        """Look for room, and note what is left."""
        marks = self.marks[stream]
        limits = marks.keep, marks.slack, marks.most
        length, found = look(self.place, stream, total, limits, drop=marks.drop)
        self.left[stream] = marks.most - length
        if found is not None:
            self.looks.append(found)

    def pinned(self, stream: str) -> Any:
        """Return who pinned it when it was last looked at."""
        return next((x.pinned for x in reversed(self.looks) if x.stream == stream), None)

    def full(self, unit: _Unit) -> Committed | None:
        """Return the fate of a unit whose events find no room; else take it for them.

        Those with a condition take theirs when they come; where the oldest give way, they do so
        when it was needed.
        """
        need: Counter[str] = Counter()
        for command, stream in unit.places:
            certain = not unit.commands[command].tests
            need[stream] += 1
            if need[stream] > self.left[stream] and (certain or not self.marks[stream].drop):
                return Committed(Fate.FULL, stream=stream, pinned=self.pinned(stream))
        for command, stream in unit.places:
            if not unit.commands[command].tests:
                self.left[stream] -= 1
        return None

    def appended(self, stream: str, *, certain: bool) -> None:
        """Note an event that has come."""
        self.added[stream] += 1
        if not certain:
            self.left[stream] -= 1


def commit(
    place: Place,
    target: Sequence[Arg],
    group_name: str,
    owner: str,
    sheet: Sequence[Arg],
) -> tuple[list[Committed], list[Looked], dict[str, int]]:
    """Apply effects and ack, in one step; or a transaction. See `StreamStore.commit`."""
    streams, packed_units = _decode(wire(sheet[0]))
    units = [_unit(u, [wire(b) for b in sheet[1:]]) for u in packed_units]
    memory = None if group_name else wire(target[0])
    if memory is not None:
        told = _told_before(place, memory, int(owner))
        if told is not None:
            return [told], [], {}
    rooms = _Rooms(place)
    for stream, _, events, keep, slack, most, drop in streams:
        kind = place.kind(wire(stream))
        if kind in ("none", "stream"):
            rooms.marks[stream] = _Marks(events, keep, slack, most, drop == "1")
            rooms.look(stream, events)
        else:
            rooms.broken[stream] = kind
    if memory is None:
        fates = _with_acks(place, rooms, target, (group_name, owner), units)
    else:
        fates = [_transaction(place, rooms, memory, int(owner), units[0])]
    for stream, marks in rooms.marks.items():
        if marks.drop and rooms.left[stream] < 0:
            rooms.look(stream, 0)
    return fates, rooms.looks, dict(rooms.added)


# --- what was sent


def _unit(packed_unit: Any, binaries: Sequence[bytes]) -> _Unit:
    head, commands = packed_unit
    entry_id, attempt, origin, types, places, aside, marked = head
    for command, at, which in zip(aside[::3], aside[1::3], aside[2::3], strict=True):
        values = commands[command - 1][0 if at < 0 else 1]
        values[abs(at) - 1] = binaries[which - 1]
    return _Unit(
        entry_id,
        wire(attempt),
        wire(origin),
        list(zip(types[::2], types[1::2], strict=True)),
        [(c - 1, stream) for c, stream in zip(places[::2], places[1::2], strict=True)],
        [_Command(tuple(_tests(tests)), [wire(a) for a in args]) for tests, args in commands],
        bool(marked),
    )


def _tests(flat: Sequence[Any]) -> Iterator[_Test]:
    for at in range(0, len(flat), 4):
        command, name, low, high = flat[at : at + 4]
        yield _Test(command - 1, name, wire(low), wire(high))


def _told_before(place: Place, memory: bytes, sequence: int) -> Committed | None:
    last = place.value(memory)
    if last is None:
        return None
    if not isinstance(last, Remembered):
        raise wrong_type()
    if sequence > last.sequence:
        return None
    if sequence == last.sequence:
        return last.fate
    raise ReplyError("STALE", f"STALE transaction {sequence}, the last one was {last.sequence}")


# --- how it is applied


def _with_acks(
    place: Place,
    rooms: _Rooms,
    target: Sequence[Arg],
    reader: tuple[str, str],
    units: Sequence[_Unit],
) -> list[Committed]:
    stream, dead = (wire(t).decode("utf-8", "surrogateescape") for t in target[:2])
    log, group = place.group(keys.wire(stream), wire(reader[0]))
    fates, done = [], set[Id]()
    for unit in units:
        entry_id = order(unit.entry_id)
        if entry_id in done or not group.owned(entry_id, wire(reader[1])):
            fates.append(Committed(Fate.REFUSED))
            continue
        fate, applied = _applied(place, rooms, unit)
        if fate.fate is Fate.FAILED and not applied:
            fate = Committed(Fate.UNDONE, error=fate.error)
        elif fate.fate is Fate.FAILED:
            fate = _cut(fate, applied)
            if unit.marked:
                _run(place, unit.commands[-1].args)
            if _buried(place, (stream, log, group, keys.wire(dead)), unit, fate):
                done.add(entry_id)
        elif fate.fate is Fate.DONE:
            fate = Committed(Fate.DONE)
            done.add(entry_id)
        fates.append(fate)
    finish(log, stream, group, done)
    return fates


def _transaction(
    place: Place, rooms: _Rooms, memory: bytes, sequence: int, unit: _Unit
) -> Committed:
    fate, applied = _applied(place, rooms, unit)
    if fate.fate is Fate.FAILED:
        fate = _cut(fate, applied)
    if applied:
        place.put(memory, Remembered(sequence, fate), PRODUCER_MEMORY_S * 1000)
    return fate


def _cut(fate: Committed, applied: Sequence[str]) -> Committed:
    stays = "\n".join(applied)[:_APPLIED_BYTES]
    told = tuple(stays.split("\n")) if stays else ()
    return fate._replace(error=fate.error[:_ERROR_BYTES], applied=told)


def _applied(place: Place, rooms: _Rooms, unit: _Unit) -> tuple[Committed, list[str]]:
    """Run the commands of a unit until one fails; return its fate, and the writes that stay."""
    wrong = _mistyped(place, rooms, unit)
    if wrong:
        return Committed(Fate.FAILED, error=wrong), []
    full = rooms.full(unit)
    if full is not None:
        return full, []
    appends = dict(unit.places)
    replies: list[tuple[bool, Reply]] = []
    applied: list[str] = []
    for number, command in enumerate(unit.commands):
        if not all(_holds(replies[t.command], t) for t in command.tests):
            replies.append((False, None))
            continue
        stream = appends.get(number)
        args = command.args if stream is None else [b"XADD", wire(stream), *command.args[2:]]
        said = " ".join(a.decode(errors="replace") for a in args[:2])
        try:
            replies.append((True, _run(place, args)))
        except ReplyError as error:
            return Committed(Fate.FAILED, error=f"{said}: {error.text}"), applied
        if stream is not None:
            rooms.appended(stream, certain=not command.tests)
        if command.name not in _READS:
            applied.append(said)
    return Committed(Fate.DONE, replies=tuple(replies)), applied


def _run(place: Place, args: Sequence[bytes]) -> Reply:
    name, key, *rest = args
    if name == b"XADD":  # `*` stands before the fields
        return written(place.append(key, rest[1:]))
    return VALUES[name.decode()](place, key, *rest)


def _mistyped(place: Place, rooms: _Rooms, unit: _Unit) -> str:
    """Return what is wrong with the types of keys, "" if nothing is."""
    for key, wanted in unit.types:
        kind = place.kind(wire(key))
        if kind not in ("none", wanted):
            return f"WRONGTYPE {key} is a {kind}, not a {wanted}"
    for _, stream in unit.places:
        if stream in rooms.broken:
            return f"WRONGTYPE {stream} is a {rooms.broken[stream]}, not a stream"
    return ""


def _holds(said: tuple[bool, Reply], test: _Test) -> bool:
    ran, reply = said
    if not ran:
        return False
    if test.name in ("missing", "present") or reply is None:
        return (reply is None) == (test.name == "missing")
    if test.name == "between":
        number = _number(reply)
        return number is not None and float(test.low) <= number <= float(test.high)
    return (wire(reply) == test.low) == (test.name == "equals")


def _number(reply: Reply) -> float | None:
    if isinstance(reply, int):
        return reply
    try:
        text = reply.decode()
        return None if _NO_NUMBER.search(text) else float(text)
    except ValueError:
        return None


def _buried(
    place: Place, where: tuple[str, Log, Group, bytes], unit: _Unit, fate: Committed
) -> bool:
    """Make a dead letter of a delivery that failed half way: it must never run again by itself.

    If the key of the dead letters is no stream, it stays pending in a lane that is never due.
    """
    stream, log, group, dead = where
    entry_id = order(unit.entry_id)
    fields: Fields = log.entries.get(entry_id, [])
    if keys.is_inbox(stream):
        fields = without_inbox_fields(fields)
    letter = [
        *packed(fields),
        b"deadreason",
        b"effects-failed",
        b"deaderror",
        b"EffectsFailed: " + fate.error.encode(),
        b"deadtraceback",
        b"",
        b"deadattempts",
        unit.attempt,
        b"deadentry",
        unit.origin,
        b"deadapplied",
        "\n".join(fate.applied).encode(),
    ]
    try:
        bury(place, dead, letter)
    except ReplyError:
        group.hand_over(entry_id, keys.HALF_DONE, place.now_ms())
        return False
    return True
