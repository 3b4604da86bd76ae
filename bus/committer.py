"""Brings effects to the server: those of deliveries with their acks, those of transactions once.

Both are the same commands and the same script, `commit.lua`. Here the events among them find
their streams, everything is written down for the script, and its answers are told.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bus.config import REPLY_TIMEOUT_S
from bus.delivery import Delivery
from bus.effects import Effects, Outgoing
from bus.errors import DeclarationError, InvalidEffect, InvalidEvent
from bus.event import Event
from bus.publisher import Publisher
from bus.reply import Arg
from bus.shortage import Shortage, tell_lost
from bus.streams import keys
from bus.streams.answers import Committed, Fate, Limits, Looked
from bus.streams.codec import Headers, original_id
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry


class Scope:
    """Where effects are collected: in a delivery, or in a transaction, which may be in one.

    cause: the delivery whose ids published events inherit. tag: see `effects.Scope`.
    """

    __slots__ = ("_cause", "_clustered", "_publisher", "_slot", "slot_tag", "tag")

    def __init__(
        self, publisher: Publisher, cause: Delivery[Any] | None, stream: str, *, clustered: bool
    ) -> None:
        self._publisher = publisher
        self._cause = cause
        self._clustered = clustered
        self._slot = keys.slot_of(stream.encode()) if clustered and stream else None
        self.slot_tag: bytes | None = None  # of the first key
        self.tag = keys.tag_of(stream.encode()).decode() if stream else ""

    def admit(self, key: bytes) -> None:
        """Accept a key. Errors: InvalidEffect, one of another slot than the keys before."""
        if not self._clustered:
            return
        slot = keys.slot_of(key)
        if self._slot is None:
            self._slot, self.slot_tag = slot, keys.tag_of(key)
        if slot != self._slot:
            hint = (
                "; effects.key(name) makes a key in the slot of the delivery's stream"
                if self.tag
                else "; give them one hash tag: the part of a key in braces"
            )
            raise InvalidEffect(
                f"{key.decode(errors='replace')} lies in another slot of the Cluster than the rest,"
                f" and one script works in one slot{hint}"
            )

    def outgoing(self, event: Event, event_id: str | None, given: Mapping[str, Any]) -> Outgoing:
        """Encode an event. Errors: InvalidEvent, EventTooLarge, EventLoop."""
        headers = Headers(**given) if given else None
        return self._publisher.outgoing(event, event_id, headers, self._cause)


@dataclass(slots=True)
class Unit:
    """The effects of one delivery or transaction, written down.

    args: as the script takes them. keys: that they touch, the bus's own among them. streams: to
    which they append, with the number of events, the limits, and whether one waits for room.
    """

    args: list[Arg] = field(default_factory=list)
    keys: dict[Arg, None] = field(default_factory=dict)
    streams: dict[str, tuple[int, Limits, bool]] = field(default_factory=dict)
    places: list[tuple[int, str, str]] = field(default_factory=list)  # command, stream, event id


_SENT = Committed(Fate.DONE)  # in the place of an answer that is yet to come


class Committer:
    """The one way of effects to the server; one per bus and process."""

    def __init__(self, store: StreamStore, publisher: Publisher, telemetry: Telemetry) -> None:
        self._store = store
        self._publisher = publisher
        self._telemetry = telemetry
        self._shortages: dict[str, Shortage] = {}

    # --- collecting

    def effects_of(self, delivery: Delivery[Any]) -> Effects:
        """Return an empty collection for a delivery."""
        clustered = self._store.clustered
        return Effects(Scope(self._publisher, delivery, delivery.origin.home, clustered=clustered))

    # --- writing down

    async def written(
        self, effects: Effects, attempt: int, origin: bytes, deadline: float, *, inside: bool
    ) -> Unit:
        """Write effects down for the script.

        deadline: loop time until which the streams of events are found out. Errors: InvalidEffect;
        those of `publish`.
        """
        unit = Unit()
        commands = effects.args
        for command, at, sent in effects.outgoing:
            stream, limits, waits = await self._publisher.place(sent, deadline, inside=inside)
            effects.admit(stream.encode())
            commands[at] = stream
            events = unit.streams.get(stream, (0,))[0]
            unit.streams[stream] = events + 1, limits, waits
            unit.places.append((command, stream, sent.event_id))
        args = unit.args
        args += (attempt, origin, len(effects.types))
        for key, kind in effects.types.items():
            args += (key, kind)
        args.append(len(unit.streams))
        for stream, (events, limits, _) in unit.streams.items():
            overrun, drop = keys.overrun(stream), int(limits.drop_oldest)
            args += (stream, overrun, events, limits.keep, limits.slack, limits.most, drop)
            unit.keys[stream] = unit.keys[overrun] = None
        args.append(len(effects))
        args += commands
        unit.keys.update(dict.fromkeys(effects.keys))
        return unit

    # --- with acks

    async def commit(
        self, stream: str, group: str, consumer: str, deliveries: Sequence[Delivery[Any]]
    ) -> list[Committed]:
        """Apply the effects of deliveries of one stream and ack them: one script.

        Errors: ReplyError and those of the connection and of `publish`, with nothing known.
        """
        deadline = asyncio.get_running_loop().time() + REPLY_TIMEOUT_S
        fates: list[Committed] = []
        units: list[list[Arg]] = []
        touched: dict[Arg, None] = {}
        for delivery in deliveries:
            effects, origin = delivery.effects, original_id(delivery)
            try:
                unit = await self.written(effects, delivery.attempt, origin, deadline, inside=True)
            except (InvalidEffect, InvalidEvent, DeclarationError) as error:
                fates.append(Committed(Fate.INVALID, error=str(error)))
                continue
            fates.append(_SENT)
            units.append([delivery.entry_id, len(unit.args), *unit.args])
            touched.update(unit.keys)
        if not units:
            return fates
        target = stream, keys.dead(stream, group)
        answers, looks, appended = await self._store.commit(target, group, consumer, touched, units)
        answered = iter(answers)
        fates = [next(answered) if f is _SENT else f for f in fates]
        self.tell(looks, appended)
        return fates

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
