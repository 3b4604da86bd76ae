"""The way in: events become entries, coalesced per stream, each batch appended at most once.

    publish -> encode -> the stream's sender -> at most two script calls in flight -> receipt

While calls are in flight, publishes collect in the sender; the next call takes them in order.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Iterable
from functools import partial
from itertools import count
from typing import Any

import msgspec
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    stop_never,
    wait_random_exponential,
)

from bus.causes import inherit
from bus.config import ANSWER_S, UNIT_BYTES, UNIT_EVENTS
from bus.delivery import BatchCause, Delivery, current_delivery
from bus.errors import BusError, InvalidEvent, PublishRefused, PublishTimeout
from bus.event import QUESTIONS, Event, EventInfo, info_of
from bus.reply import text_of
from bus.scope import Outgoing, Sent
from bus.sender import Sender
from bus.streams import keys
from bus.streams.answers import Limits
from bus.streams.codec import (
    Fields,
    Headers,
    encode,
    encode_plain,
    header_fields,
    key_of,
)
from bus.streams.connection import Arg, is_transient
from bus.streams.forms import unit_of, unit_of_several
from bus.streams.replies import REMEDIES, ReplyError
from bus.streams.stream import StreamStore
from bus.streams.topics import RECORD_TTL_S, Record, TopicTable
from bus.telemetry import Telemetry
from bus.unit import Unit

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: its order is sort order


class Receipt(msgspec.Struct, frozen=True):
    """Proof that an event is in its stream.

    What it means when the server crashes is in docs/guarantees.md, by persistence setting.
    """

    event_id: str
    stream: str
    entry_id: str


class _Route:
    """Where the events of one class go."""

    __slots__ = ("info", "inside", "outside", "plain", "record", "stale_at", "streams")

    def __init__(
        self, info: EventInfo, record: Record, streams: list[str], stale_at: float
    ) -> None:
        self.info = info
        self.plain = info.version == 1 and info.encoding == "json"  # see `encode_plain`
        self.record = record
        self.streams = streams
        self.stale_at = stale_at  # loop time after which the partition count is asked for again
        self.inside, self.outside = record.limits(inside=True), record.limits()

    def stream_of(self, routed_by: str) -> str:
        """Return the stream of an event with this key, or without a key, this id."""
        streams = self.streams
        if len(streams) == 1:
            return streams[0]
        return streams[keys.partition_of(routed_by, len(streams))]


class _Part:
    """What one `publish_many` has for one stream: a unit, which goes in whole or not at all."""

    __slots__ = ("bytes", "ids", "positions", "route", "stream", "units")

    def __init__(self, stream: str, route: _Route) -> None:
        self.stream = stream
        self.route = route
        self.positions: list[int] = []
        self.ids: list[str] = []
        self.units: list[list[Arg]] = []
        self.bytes = 0

    def add(self, position: int, event_id: str, unit: list[Arg], size: int) -> None:
        """Add the event at `position` in the call."""
        self.positions.append(position)
        self.ids.append(event_id)
        self.units.append(unit)
        self.bytes += size

    def unit(self, sender: Sender, deadline: float) -> Unit:
        """Return the unit. Errors: InvalidEvent if it is too large."""
        count = len(self.ids)
        if count > UNIT_EVENTS or self.bytes > UNIT_BYTES:
            raise InvalidEvent(
                f"publish_many takes {UNIT_EVENTS:,} events or {UNIT_BYTES // 1024**2} MiB for one"
                f" stream, not {count:,} events of {self.bytes:,} bytes for {self.stream}: split"
                " the list"
            )
        room = sender.limits.most - sender.limits.keep
        if count > room:
            raise InvalidEvent(
                f"{count:,} events can never be published at once to {self.stream}: there is room"
                f" for {room:,} between keep and maxlen; split the list"
            )
        return Unit(count, self.bytes, unit_of_several(self.units), deadline)


class Publisher:
    """Publishes events; one per bus and process.

    Safe to use from any number of tasks of one event loop. After os.fork the bus makes a new
    one, with an id of its own: a child must not repeat or continue its parent's sequences.
    """

    def __init__(
        self,
        store: StreamStore,
        topics: TopicTable,
        telemetry: Telemetry,
        *,
        publish_timeout_s: float,
        max_event_bytes: int,
        source: str | None,
    ) -> None:
        self._store = store
        self._topics = topics
        self._telemetry = telemetry
        self._timeout_s = publish_timeout_s
        self._max_event_bytes = max_event_bytes
        self._source = source
        self._headers = header_fields(Headers(source=source))  # of events that are given none
        self.id = secrets.token_hex(8)
        self._ids = _EventIds()
        self._senders: dict[str, Sender] = {}
        self._inside: dict[str, Sender] = {}  # for what handlers publish, which never waits
        self._routes: dict[type[Event], _Route] = {}
        self._routing: dict[str, asyncio.Lock] = {}
        # Why the partitions of a topic could not be had the last time, and when that was.
        self._trouble: dict[str, tuple[BusError, float]] = {}
        self._unrouted = 0

    async def publish(
        self, event: Event, event_id: str | None = None, headers: Headers | None = None
    ) -> Receipt:
        """Append one event and wait until the server has it. See `Bus.publish`."""
        now = asyncio.get_running_loop().time()
        deadline = now + self._timeout_s
        route = self._routes.get(event.__class__)
        if route is None or now >= route.stale_at or self._unrouted:
            route = await self._route(event.__class__, deadline)
        cause = current_delivery.get()
        event_id, stream, unit, size = self._unit(route, event, event_id, headers, cause)
        sender = self._sender(stream, route, cause)
        ms, at = await sender.add(Unit(1, size, unit, deadline))
        return Receipt(event_id, stream, f"{ms}-{at}")

    async def publish_many(
        self, events: Iterable[Event], headers: Headers | None = None
    ) -> list[Receipt]:
        """Append events, atomically per stream. See `Bus.publish_many`."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        cause = current_delivery.get()
        parts: dict[str, _Part] = {}
        cls: type[Event] | None = None
        total = 0
        for event in events:
            if event.__class__ is not cls:
                cls = event.__class__
                route = await self._route(cls, deadline)
            event_id, stream, unit, size = self._unit(route, event, None, headers, cause)
            part = parts.get(stream)
            if part is None:
                part = parts[stream] = _Part(stream, route)
            part.add(total, event_id, unit, size)
            total += 1
        senders = {s: self._sender(s, part.route, cause) for s, part in parts.items()}
        units = {s: part.unit(senders[s], deadline) for s, part in parts.items()}
        futures = [senders[s].add(u) for s, u in units.items()]
        results = await asyncio.gather(*futures, return_exceptions=True)
        receipts: list[Receipt | None] = [None] * total
        failures: list[BaseException] = []
        for (stream, part), result in zip(parts.items(), results, strict=True):
            if isinstance(result, BaseException):
                failures.append(result)
                continue
            ms, at = result
            for position, event_id in zip(part.positions, part.ids, strict=True):
                receipts[position] = Receipt(event_id, stream, f"{ms}-{at}")
                at += 1
        done = [r for r in receipts if r is not None]
        if failures:
            if done:
                failures[0].add_note(f"{len(done)} of {total} events, of other streams, are in")
            raise failures[0]
        return done

    async def close(self) -> None:
        """Wait until everybody who waits for a publish has an outcome."""
        awaited = [f for sender in self._all_senders() for f in sender.awaited()]
        if awaited:
            await asyncio.wait(awaited, timeout=self._timeout_s + ANSWER_S)
        # What is left is waited for by nobody: callers that gave up, or were cancelled.
        tasks = [sender.task for sender in self._all_senders() if sender.task is not None]
        for sender in self._all_senders():
            sender.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _unit(
        self,
        route: _Route,
        event: Event,
        event_id: str | None,
        headers: Headers | None,
        cause: Delivery[Any] | BatchCause | None,
    ) -> tuple[str, str, list[Arg], int]:
        """Return event id, stream, the event as the script takes it, and its size."""
        if (
            headers is None
            and route.plain
            and not self._headers
            and (cause is None or cause.settled)
        ):  # as nearly all are
            info = route.info
            key = None if info.key is None else key_of(info, event)
            if event_id is None:
                event_id = self._ids.next()
            unit, size = encode_plain(info, event, event_id, key, self._max_event_bytes)
            return event_id, route.stream_of(event_id if key is None else key), unit, size
        event_id, routed_by, fields, size = self._prepared(
            route.info, event, event_id, headers, cause
        )
        return event_id, route.stream_of(routed_by), unit_of(fields), size

    def _prepared(
        self,
        info: EventInfo,
        event: Event,
        event_id: str | None,
        headers: Headers | None,
        cause: Delivery[Any] | BatchCause | None,
    ) -> tuple[str, str, Fields, int]:
        """Return event id, what decides the partition, the entry's fields and their size."""
        key = key_of(info, event)
        if headers is not None and headers.source is None:
            headers = headers._replace(source=self._source)
        extra = self._headers if headers is None else header_fields(headers)
        if cause is not None and not cause.settled:
            derived, inherited = inherit(cause, info.type, key, headers)
            event_id = event_id or derived
            extra = extra + inherited
        if event_id is None:
            event_id = self._ids.next()
        fields, size = encode(info, event, event_id, key, extra, self._max_event_bytes)
        return event_id, event_id if key is None else key, fields, size

    def entry_of(self, event: Event) -> tuple[str, Fields, int]:
        """Return id, fields and size of an event that goes elsewhere than to its topic.

        It carries the bus's source, and no causes. Errors: InvalidEvent, EventTooLarge.
        """
        if not isinstance(event, Event):
            raise _no_event(event.__class__)
        event_id, _, fields, size = self._prepared(
            info_of(event.__class__), event, None, None, None
        )
        return event_id, fields, size

    # --- as effects

    def outgoing(
        self,
        event: Event,
        event_id: str | None,
        headers: Headers | None,
        cause: Delivery[Any] | BatchCause | None,
    ) -> Outgoing:
        """Make an event ready to be appended by a script of others; see `place`."""
        if not isinstance(event, Event):
            raise _no_event(event.__class__)
        info = _published(event.__class__)
        event_id, routed_by, fields, _ = self._prepared(info, event, event_id, headers, cause)
        fields[5] = text_of(fields[5])  # type: ignore[arg-type] # the data
        return Outgoing(event, event_id, routed_by, fields)

    def is_placed(self, cls: type[Event]) -> bool:
        """Return whether `place` knows where events of a class go; else `find` has to ask."""
        return self._fresh_route(cls) is not None

    async def find(self, cls: type[Event], deadline: float) -> None:
        """Ask where events of a class go, until loop time `deadline`. Errors: as `publish`."""
        await self._route(cls, deadline)

    def place(self, sent: Sent, *, inside: bool) -> tuple[str, Limits, bool]:
        """Return the stream of an event, how long it may grow, and whether one waits for room.

        inside: for handlers, which may use the reserve. Only after `find`.
        """
        route = self._routes[sent.cls]
        if inside:
            return route.stream_of(sent.routed_by), route.inside, False
        return route.stream_of(sent.routed_by), route.outside, route.record.on_full == "block"

    async def _route(self, cls: type[Event], deadline: float) -> _Route:
        route = self._fresh_route(cls)
        if route is not None and not self._unrouted:
            return route
        if not issubclass(cls, Event):
            raise _no_event(cls)
        info = _published(cls)
        # First in, first out, per topic: what comes later must not overtake those that wait here.
        lock = self._routing.setdefault(info.topic, asyncio.Lock())
        since = asyncio.get_running_loop().time()
        self._unrouted += 1
        try:
            async with asyncio.timeout_at(deadline), lock:
                return self._fresh_route(info.cls) or await self._find_route(info)
        except TimeoutError:
            # Whoever stood before us in the line may have been the one to ask.
            cause, at = self._trouble.get(info.topic, (None, 0.0))
            raise _not_routed(info.topic, cause if at >= since else None) from None
        finally:
            self._unrouted -= 1

    async def _find_route(self, info: EventInfo) -> _Route:
        """Ask for the partitions of a topic, again until the caller's time is up."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_never,
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            reraise=True,
        ):
            with attempt:
                try:
                    return await self._ask_route(info.cls, info)
                except BusError as error:
                    self._trouble[info.topic] = error, asyncio.get_running_loop().time()
                    raise
        raise AssertionError("tenacity ends by returning or raising")

    async def _ask_route(self, cls: type[Event], info: EventInfo) -> _Route:
        loop = asyncio.get_running_loop()
        try:
            record = await self._topics.record(info.topic)
        except BusError as error:
            known = self._routes.get(cls)
            if known is None or not is_transient(error):
                raise
            known.stale_at = loop.time() + RECORD_TTL_S  # the server is away: what is known must do
            return known
        streams = self._topics.streams(info.topic, record.partitions)
        route = _Route(info, record, streams, loop.time() + RECORD_TTL_S)
        self._routes[cls] = route
        return route

    def _fresh_route(self, cls: type[Event]) -> _Route | None:
        route = self._routes.get(cls)
        fresh = route is not None and asyncio.get_running_loop().time() < route.stale_at
        return route if fresh else None

    def _has_one_sender(self) -> bool:
        return len(self._senders) + len(self._inside) == 1

    def _all_senders(self) -> list[Sender]:
        return [*self._senders.values(), *self._inside.values()]

    def _sender(
        self, stream: str, route: _Route, cause: Delivery[Any] | BatchCause | None
    ) -> Sender:
        """Return what publishes to `stream`; a handler's publishes have one of their own.

        They may use the reserve and never wait for room, nor behind those who do: a handler must
        not be held up by the backlog that it is there to reduce.
        """
        inside = cause is not None and not cause.settled
        senders = self._inside if inside else self._senders
        sender = senders.get(stream)
        if sender is None:
            own_id = f"{self.id}-handlers" if inside else self.id
            sender = senders[stream] = Sender(
                stream,
                own_id,
                self._store,
                self._telemetry,
                self._timeout_s,
                partial(self._topics.record, route.info.topic),
                self._has_one_sender,
            )
        if sender.record is not route.record:
            sender.keep_to(route.record, inside=inside)
        return sender


def _not_routed(topic: str, cause: BusError | None) -> PublishTimeout:
    """Return what a caller is told when its time was up before the topic's record was had."""
    why = f" ({cause})" if cause is not None else ""
    text = f"the partitions of topic {topic} could not be had in time{why}"
    if isinstance(cause, ReplyError):
        remedy = REMEDIES.get(cause.code, "")
        return PublishRefused(f"{text}: the event was not published{remedy}", cause.code)
    return PublishTimeout(f"{text}: the event was not published")


def _published(cls: type[Event]) -> EventInfo:
    """Return how events of a class travel. Errors: InvalidEvent for those that never do."""
    info = info_of(cls)
    if info.family == QUESTIONS:
        raise InvalidEvent(
            f"{info.type} is a question, asked in this process by bus.intervene: it is never"
            " published; declare what came of it as an event of another family"
        )
    return info


def _no_event(cls: type) -> InvalidEvent:
    return InvalidEvent(
        f"only events can be published, not {cls.__name__}:"
        " declare a class X(Event, type='family.what_happened')"
    )


class _EventIds:
    """Ids that are unique per process and sort by time of making, without a uuid per event."""

    def __init__(self) -> None:
        made_ms = time.time_ns() // 1_000_000
        noise = int.from_bytes(os.urandom(5), "big")
        self._prefix = _base32(made_ms, 9) + _base32(noise, 8)
        self._next = count().__next__

    def next(self) -> str:
        """Return the next id: 9 characters of time, 8 of noise, a counter of 8 hex digits."""
        return f"{self._prefix}{self._next():08x}"


def _base32(number: int, digits: int) -> str:
    return "".join(_ALPHABET[number >> 5 * i & 31] for i in reversed(range(digits)))
