"""Brings effects to the server: those of deliveries with their acks, those of transactions once.

Both are the same commands and the same script, `commit.lua`. Here the events among them find
their streams, everything is written down for the script, and its answers are told.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from bus.config import REPLY_TIMEOUT_S
from bus.delivery import Delivery
from bus.effects import Effects
from bus.errors import BusError, DeclarationError, InvalidEffect, InvalidEvent
from bus.event import Event
from bus.publisher import Publisher
from bus.reply import Arg
from bus.scope import Outgoing
from bus.shortage import Shortage, tell_lost
from bus.streams import keys
from bus.streams.answers import Committed, Fate, Limits, Looked
from bus.streams.codec import Headers, original_id
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.way_in import Publishing, WayIn


class Scope:
    """Where effects are collected: beside one stream, or in one transaction. See `effects.Scope`.

    slot_tag: on a Cluster, that of the first key of a transaction.
    """

    __slots__ = ("_clustered", "_slot", "_way_in", "slot_tag", "tag")

    def __init__(self, way_in: Publishing, stream: str, *, clustered: bool) -> None:
        self._way_in = way_in
        self._clustered = clustered
        self._slot = keys.slot_of(stream) if clustered and stream else None
        self.slot_tag: str | None = None
        self.tag = keys.tag_of(stream) if stream else ""

    def admit(self, key: str) -> None:
        """Accept a key. Errors: InvalidEffect, the bus's own, or of another slot than the rest."""
        if key.startswith(keys.OWN):
            raise InvalidEffect(
                f"{key}: keys that begin with {keys.OWN} are the bus's own; publish events with"
                " .publish"
            )
        if self._clustered:
            self.join(key)

    def join(self, key: str) -> None:
        """Accept any key. Errors: InvalidEffect, one of another slot than the rest."""
        if not self._clustered:
            return
        slot = keys.slot_of(key)
        if self._slot is None:
            tag = keys.tag_of(key)
            if "}" in tag:  # it could not be the tag of another key
                raise InvalidEffect(
                    f"{key}: on a Cluster, name the keys of a transaction with a part in braces,"
                    " or without braces at all"
                )
            self._slot, self.slot_tag = slot, tag
        if slot != self._slot:
            hint = (
                "; effects.key(name) makes a key in the slot of the delivery's stream"
                if self.tag
                else "; give them one hash tag: the part of a key in braces"
            )
            raise InvalidEffect(
                f"{key} lies in another slot of the Cluster than the rest, and one script works in"
                f" one slot{hint}"
            )

    def outgoing(
        self, event: Event, event_id: str | None, headers: tuple[Any, ...], cause: Any
    ) -> Outgoing:
        """Encode an event that `cause` publishes. Errors: InvalidEvent, EventLoop."""
        given = None if headers == _NOTHING else Headers(*headers)
        return self._way_in.outgoing(event, event_id, given, cause)


class Wanted(NamedTuple):
    """What a sheet appends to one stream.

    certain: events without a condition. events: all of them. waits: whether one waits for room.
    """

    certain: int
    events: int
    limits: Limits
    waits: bool


@dataclass(slots=True)
class Sheet:
    """What one call of the script is told: the effects of deliveries, or of a transaction.

    keys: all that are touched, the bus's own among them. streams: those appended to. units: see
    `commit.lua`, packed. binaries: values that are no UTF-8, which go beside.
    """

    keys: dict[str, None] = field(default_factory=dict)
    streams: dict[str, Wanted] = field(default_factory=dict)
    units: list[bytes] = field(default_factory=list)
    binaries: list[bytes] = field(default_factory=list)

    def arguments(self) -> list[Arg]:
        """Return it as the script takes it: one packed argument, then the binaries."""
        streams = []
        for stream, (certain, _, limits, _) in self.streams.items():
            overrun = keys.overrun(stream)
            self.keys[stream] = self.keys[overrun] = None
            drop = "1" if limits.drop_oldest else ""
            # Without a certain one it is looked at as if one of those with a condition came.
            total = certain if drop else max(certain, 1)
            streams.append((stream, overrun, total, limits.keep, limits.slack, limits.most, drop))
        return [_array([_pack(streams), _array(self.units)]), *self.binaries]


_pack = msgspec.msgpack.Encoder().encode
_SINGLE, _PAIR = b"\x91", b"\x92"  # the heads of arrays of one and two
_SHORT = 16  # arrays below this length have a head of one byte


def _array(packed: Sequence[bytes]) -> bytes:
    """Return the msgpack array of what is packed already."""
    count = len(packed)
    head = bytes((0x90 | count,)) if count < _SHORT else b"\xdd" + count.to_bytes(4, "big")
    return head + b"".join(packed)


def _added(before: Wanted | None, more: Wanted) -> Wanted:
    """Return what is wanted of a stream with `more` besides."""
    if before is None:
        return more
    return more._replace(certain=before.certain + more.certain, events=before.events + more.events)


def _check_fits(stream: str, events: int, limits: Limits) -> None:
    room = limits.most - limits.keep
    if events > room:
        raise InvalidEvent(
            f"so many events can never be published at once to {stream}: there is room for"
            f" {room:,} between keep and maxlen; do it in several steps"
        )


_LATELY = 20  # dead letters that others may have added since an answer was lost
_NOTHING = (None,) * 6
_SENT = Committed(Fate.DONE)  # in the place of an answer that is yet to come


class Committer:
    """The one way of effects to the server; one per bus and process."""

    def __init__(
        self, store: StreamStore, publisher: Publisher, way_in: WayIn, telemetry: Telemetry
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._way_in = way_in
        self._telemetry = telemetry
        self._scopes: dict[str, Scope] = {}
        self._shortages: dict[str, Shortage] = {}

    # --- collecting

    def effects_of(self, delivery: Delivery[Any]) -> Effects:
        """Return an empty collection for a delivery."""
        stream = delivery.origin.home
        scope = self._scopes.get(stream)
        if scope is None:
            scope = Scope(self._way_in, stream, clustered=self._store.clustered)
            self._scopes[stream] = scope
        return Effects(scope, delivery)

    # --- writing down

    async def find_streams(self, classes: Iterable[type[Event]], deadline: float) -> None:
        """See to it that `write` knows where events go, until loop time `deadline`.

        Errors: those of `publish`.
        """
        for cls in classes:
            if not self._publisher.is_placed(cls):
                await self._publisher.find(cls, deadline)

    def write(
        self, sheet: Sheet, effects: Effects, entry: tuple[str, int, str], *, inside: bool
    ) -> list[str]:
        """Write effects down on a sheet; return the streams of the events, in their order.

        entry: id, attempt, and id in its own stream. Errors: InvalidEffect; InvalidEvent, more
        events than ever fit. Nothing is written then.
        """
        if not (effects.sent or effects.binaries or effects.last):
            return self._write_plain(sheet, effects, entry)
        places: list[int | str] = []
        streams: list[str] = []
        wanted: dict[str, Wanted] = {}
        for sent in effects.sent:
            stream, limits, waits = self._publisher.place(sent, inside=inside)
            effects.join(stream)
            places += (sent.command + 1, stream)
            streams.append(stream)
            more = Wanted(int(sent.certain), 1, limits, waits)
            wanted[stream] = _added(wanted.get(stream), more)
            _check_fits(stream, wanted[stream].certain, limits)
        for stream, more in wanted.items():
            sheet.streams[stream] = _added(sheet.streams.get(stream), more)
        aside: list[int] = []
        for command, at, value in effects.binaries:
            sheet.binaries.append(value)
            aside += (command + 1, at, len(sheet.binaries))
        commands = effects.commands
        if effects.last:
            commands = [*commands, effects.last]
            sheet.keys[effects.last_key] = None
        head = _pack((*entry, effects.types, places, aside, bool(effects.last)))
        sheet.units.append(_array((head, _array(commands))))
        sheet.keys.update(dict.fromkeys(effects.keys))
        return streams

    def _write_plain(
        self, sheet: Sheet, effects: Effects, entry: tuple[str, int, str]
    ) -> list[str]:
        """Write down what publishes nothing and is all text, as most is."""
        head = _pack((*entry, effects.types, (), (), False))
        commands = effects.commands
        if len(commands) == 1:
            sheet.units.append(_PAIR + head + _SINGLE + commands[0])
        else:
            sheet.units.append(_PAIR + head + _array(commands))
        for key in effects.keys:
            sheet.keys[key] = None
        return []

    # --- with acks

    async def commit(
        self, stream: str, group: str, consumer: str, deliveries: Sequence[Delivery[Any]]
    ) -> list[Committed]:
        """Apply the effects of deliveries of one stream and ack them: one script.

        Errors: ReplyError and those of the connection and of `publish`, with nothing known.
        """
        fates: list[Committed] = []
        classes = {sent.cls for d in deliveries for sent in d.effects.sent}
        unplaced = await self._unplaced(classes) if classes else {}
        sheet = Sheet()
        for delivery in deliveries:
            effects, entry_id = delivery.effects, delivery.entry_id.decode()
            moved = delivery.origin.stream != delivery.origin.home
            origin = original_id(delivery).decode() if moved else entry_id
            try:
                for sent in effects.sent if unplaced else ():
                    if sent.cls in unplaced:
                        raise unplaced[sent.cls]
                self.write(sheet, effects, (entry_id, delivery.attempt, origin), inside=True)
            except (InvalidEffect, InvalidEvent, DeclarationError) as error:
                fates.append(Committed(Fate.UNDONE, error=str(error)))
            else:
                fates.append(_SENT)
        if not sheet.units:
            return fates
        target = stream, keys.dead(stream, group)
        args = sheet.arguments()
        answers, looks, appended = await self._store.commit(
            target, group, consumer, sheet.keys, args
        )
        self.tell(looks, appended)
        if len(answers) != len(fates):
            answered = iter(answers)
            answers = [next(answered) if f is _SENT else f for f in fates]
        if appended:
            self._tell_observers(deliveries, answers)
        return answers

    def _tell_observers(
        self, deliveries: Sequence[Delivery[Any]], fates: Sequence[Committed]
    ) -> None:
        """Tell of what was published; whether one with a condition was, the server does not say."""
        for delivery, fate in zip(deliveries, fates, strict=True):
            if fate.fate is Fate.DONE:
                for sent in delivery.effects.sent:
                    if sent.certain:
                        self._way_in.tell(sent.event, None)

    async def _unplaced(self, classes: Iterable[type[Event]]) -> dict[type[Event], BusError]:
        """Find out where events go; return those classes that can go nowhere, and why."""
        deadline = asyncio.get_running_loop().time() + REPLY_TIMEOUT_S
        unplaced: dict[type[Event], BusError] = {}
        for cls in classes:
            try:
                await self.find_streams((cls,), deadline)
            except (InvalidEvent, DeclarationError) as error:
                unplaced[cls] = error
        return unplaced

    async def lost_failures(
        self, stream: str, group: str, deliveries: Sequence[Delivery[Any]]
    ) -> dict[Delivery[Any], Committed]:
        """Return those of which an attempt without an answer had failed: dead letters by now.

        One round trip. Errors: as `commit`.
        """
        failed = await self._store.failed_lately(stream, group, len(deliveries) + _LATELY)
        named = {(original_id(d), str(d.attempt).encode()): d for d in deliveries}
        return {d: failed[name] for name, d in named.items() if name in failed}

    def tell(self, looks: Iterable[Looked], appended: Mapping[str, int]) -> None:
        """Tell what a script met and added."""
        for look in looks:
            tell_lost(self._telemetry, look.stream, look.lost)
            if look.dropped:
                self.shortage(look.stream).overrun(look.dropped)
        for stream, count in appended.items():
            self._telemetry.emit("effects.published", stream=stream, count=count)

    def shortage(self, stream: str) -> Shortage:
        """Return what is known of the lack of room in a stream."""
        return self._shortages.setdefault(stream, Shortage(stream, self._telemetry))

    def close(self) -> None:
        """Tell what is yet to be told."""
        for shortage in self._shortages.values():
            shortage.tell_overrun()
