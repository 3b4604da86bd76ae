"""The way in: events become entries, coalesced per stream, each batch appended at most once.

    publish -> encode -> the stream's lane -> one script call per stream in flight -> receipt

While a call is in flight, publishes collect in the lane; the next call takes them in order. A
unit (one `publish`, or the part of a `publish_many` that goes to one stream) is appended whole
or not at all. A batch whose outcome is unknown is sent again, unchanged and under the same
sequence number, which the script recognises; nothing else is ever re-sent.
"""

import asyncio
import os
import secrets
import time
from collections import deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import count
from typing import Any

import msgspec
from tenacity import AsyncRetrying, retry_if_exception, stop_never, wait_random_exponential

from bus.config import BATCH_BYTES, BATCH_EVENTS, REPLY_TIMEOUT_S, UNIT_BYTES, UNIT_EVENTS
from bus.delivery import Delivery, current_delivery
from bus.errors import (
    BusError,
    InvalidEvent,
    PublishTimeout,
    PublishUnknown,
    ServerUnreachable,
    Undecodable,
)
from bus.event import Event, EventInfo, info_of
from bus.streams import keys
from bus.streams.codec import NO_HEADERS, Headers, encode, key_of
from bus.streams.connection import TRANSIENT, Arg, ConnectionLost, ReplyError
from bus.streams.stream import Appended, StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: its order is sort order


class Receipt(msgspec.Struct, frozen=True):
    """Proof that an event is in its stream.

    What it means when the server crashes is in docs/guarantees.md, by persistence setting.
    """

    event_id: str
    stream: str
    entry_id: str


class _Unit:
    """What is appended whole: its wire arguments and who waits for it."""

    __slots__ = ("args", "bytes", "deadline", "events", "future")

    def __init__(self, events: int, size: int, args: list[Arg], deadline: float) -> None:
        self.events = events
        self.bytes = size
        self.args = args
        self.deadline = deadline
        self.future: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()


class _Lane:
    """The publishes of one stream: a queue, and at most one script call in flight."""

    def __init__(
        self,
        stream: str,
        publisher_id: str,
        store: StreamStore,
        telemetry: Telemetry,
        patience_s: float,
    ) -> None:
        self._stream = stream
        self._publisher_id = publisher_id
        self._store = store
        self._telemetry = telemetry
        self._timeout_s = min(patience_s, REPLY_TIMEOUT_S)
        self._units: deque[_Unit] = deque()
        self._in_flight: list[_Unit] = []
        self._maybe_sent = False  # whether the batch in flight may have been appended unseen
        self._sequence = 0
        self._deadline: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def add(self, unit: _Unit) -> "asyncio.Future[tuple[str, int]]":
        """Queue a unit; its future gives the id of its first event as (ms, sequence)."""
        self._units.append(unit)
        loop = unit.future.get_loop()
        if self._deadline is None:
            self._deadline = loop.call_at(unit.deadline, self._expire)
        if self.task is None:
            # The task starts in the next turn of the loop: what this turn publishes goes together.
            self.task = loop.create_task(self._drain())
        return unit.future

    def awaited(self) -> list["asyncio.Future[tuple[str, int]]"]:
        """Return the futures that somebody waits for."""
        return [u.future for u in (*self._in_flight, *self._units) if not u.future.done()]

    async def _drain(self) -> None:
        try:
            while self._units:
                await self._send(self._next_batch())
        finally:
            self.task = None
            self._in_flight = []
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    def _next_batch(self) -> list[_Unit]:
        batch: list[_Unit] = []
        events = size = 0
        while self._units:
            unit = self._units[0]
            if batch and (events + unit.events > BATCH_EVENTS or size + unit.bytes > BATCH_BYTES):
                break
            events += unit.events
            size += unit.bytes
            batch.append(self._units.popleft())
        return batch

    async def _send(self, batch: list[_Unit]) -> None:
        self._in_flight = batch
        self._maybe_sent = False
        self._sequence += 1
        started = time.perf_counter()
        try:
            try:
                where = await self._attempt(batch)
            except BusError as error:
                if not _is_transient(error):
                    raise
                where = await self._insist(batch, error)
        except Exception as error:
            self._fail(batch, error)
            return
        at = where.sequence
        for unit in batch:
            if not unit.future.done():
                unit.future.set_result((where.ms, at))
            at += unit.events
        self._telemetry.emit(
            "publish.appended",
            stream=self._stream,
            count=where.events,
            bytes=sum(u.bytes for u in batch),
            duration_s=time.perf_counter() - started,
        )

    async def _attempt(self, batch: list[_Unit]) -> Appended:
        before, self._maybe_sent = self._maybe_sent, True  # true while it is on its way
        try:
            return await self._store.append(
                self._stream,
                self._publisher_id,
                self._sequence,
                [u.args for u in batch],
                self._timeout_s,
            )
        except ConnectionLost as error:
            self._maybe_sent = before or error.sent
            raise
        except BusError:
            self._maybe_sent = before
            raise

    async def _insist(self, batch: list[_Unit], first: BusError) -> Appended:
        """Send the batch again until it is in or its last deadline has passed."""
        loop = asyncio.get_running_loop()
        last = max(u.deadline for u in batch)
        error: BusError = first
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_never,
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            reraise=True,
        ):
            if loop.time() >= last:
                raise error
            self._telemetry.emit(
                "publish.retried",
                stream=self._stream,
                count=sum(u.events for u in batch),
                error_type=type(error).__name__,
                error=str(error),
            )
            with attempt:
                try:
                    return await self._attempt(batch)
                except BusError as again:
                    error = again
                    raise
        raise error

    def _expire(self) -> None:
        """Tell the callers whose time is up; their batch may go on being sent all the same."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for units, unknown in ((self._in_flight, self._maybe_sent), (self._units, False)):
            late = [u for u in units if u.deadline <= now and not u.future.done()]
            for unit in late:
                unit.future.set_exception(self._too_late(unknown))
            if units is self._units:
                for unit in late:
                    self._units.remove(unit)
        waiting = [u.deadline for u in (*self._in_flight, *self._units) if not u.future.done()]
        self._deadline = loop.call_at(min(waiting), self._expire) if waiting else None

    def _too_late(self, unknown: bool, cause: Exception | None = None) -> BusError:  # noqa: FBT001
        why = f" ({cause})" if cause is not None else ""
        if unknown:
            return PublishUnknown(
                f"no answer from {self._stream} in time{why}: the event may have been published;"
                " publish it again only if handlers tolerate it twice"
            )
        return PublishTimeout(
            f"{self._stream} could not be reached in time{why}: the event was not published"
        )

    def _fail(self, batch: list[_Unit], error: Exception) -> None:
        told = error
        if _is_transient(error) or self._maybe_sent:
            told = self._too_late(self._maybe_sent, error)
        elif isinstance(error, ReplyError):
            told = error.explained(self._stream)
        for unit in batch:
            if not unit.future.done():
                unit.future.set_exception(told)
                unit.future.exception()  # a caller that gave up never looks
        self._telemetry.emit(
            "publish.failed",
            stream=self._stream,
            count=sum(u.events for u in batch),
            error_type=type(told).__name__,
            error=str(told),
        )


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, ReplyError):
        return error.code in TRANSIENT
    return isinstance(error, ConnectionLost | ServerUnreachable)


class _Route:
    """Where the events of one class go."""

    __slots__ = ("info", "stale_at", "streams")

    def __init__(self, info: EventInfo, streams: list[str], stale_at: float | None) -> None:
        self.info = info
        self.streams = streams
        self.stale_at = stale_at  # loop time after which an implicit partition count is asked again


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
        self._headers = NO_HEADERS if source is None else Headers(source=source)
        self._id = secrets.token_hex(8)
        self._ids = _EventIds()
        self._lanes: dict[str, _Lane] = {}
        self._routes: dict[type[Event], _Route] = {}

    async def publish(
        self, event: Event, event_id: str | None = None, headers: Headers | None = None
    ) -> Receipt:
        """Append one event and wait until the server has it. See `Bus.publish`."""
        route = await self._route(event)
        event_id, stream, args, size = self._encoded(route, event, event_id, headers)
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        ms, at = await self._lane(stream).add(_Unit(1, size, [1, *args], deadline))
        return Receipt(event_id, stream, f"{ms}-{at}")

    async def publish_many(
        self, events: Iterable[Event], headers: Headers | None = None
    ) -> list[Receipt]:
        """Append events, atomically per stream. See `Bus.publish_many`."""
        by_stream: dict[str, list[tuple[int, str, list[Arg], int]]] = {}
        total = 0
        for position, event in enumerate(events):
            route = await self._route(event)
            event_id, stream, args, size = self._encoded(route, event, None, headers)
            by_stream.setdefault(stream, []).append((position, event_id, args, size))
            total += 1
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        units = {s: _unit_of(s, items, deadline) for s, items in by_stream.items()}
        futures = [self._lane(s).add(u) for s, u in units.items()]
        results = await asyncio.gather(*futures, return_exceptions=True)
        receipts: list[Receipt | None] = [None] * total
        failures: list[BaseException] = []
        for (stream, items), result in zip(by_stream.items(), results, strict=True):
            if isinstance(result, BaseException):
                failures.append(result)
                continue
            ms, at = result
            for offset, (position, event_id, _, _) in enumerate(items):
                receipts[position] = Receipt(event_id, stream, f"{ms}-{at + offset}")
        done = [r for r in receipts if r is not None]
        if failures:
            if done:
                failures[0].add_note(f"{len(done)} of {total} events, of other streams, are in")
            raise failures[0]
        return done

    async def close(self) -> None:
        """Wait until everybody who waits for a publish has an outcome."""
        awaited = [f for lane in self._lanes.values() for f in lane.awaited()]
        if awaited:
            await asyncio.wait(awaited, timeout=self._timeout_s)
        # What is left is waited for by nobody: callers that gave up, or were cancelled.
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _encoded(
        self, route: _Route, event: Event, event_id: str | None, headers: Headers | None
    ) -> tuple[str, str, list[Arg], int]:
        info = route.info
        key = key_of(info, event)
        headers = self._headers if headers is None else _with_source(headers, self._headers)
        cause = current_delivery.get()
        if cause is not None and not cause.settled:
            event_id = event_id or _derived_id(cause, info.type, key)
            headers = _caused_by(cause, headers)
        elif event_id is None:
            event_id = self._ids.next()
        fields, size = encode(info, event, event_id, key, headers, self._max_event_bytes)
        streams = route.streams
        stream = (
            streams[0]
            if len(streams) == 1
            else streams[keys.partition_of(key if key is not None else event_id, len(streams))]
        )
        return event_id, stream, [len(fields), *fields], size

    async def _route(self, event: Event) -> _Route:
        cls = event.__class__
        route = self._routes.get(cls)
        if route is not None and (
            route.stale_at is None or asyncio.get_running_loop().time() < route.stale_at
        ):
            return route
        if not isinstance(event, Event):
            raise InvalidEvent(
                f"only events can be published, not {cls.__name__}:"
                " declare a class X(Event, type='family.what_happened')"
            )
        info = info_of(cls)
        partitions, may_change = await self._topics.partitions(info.topic)
        stale_at = asyncio.get_running_loop().time() + 1.0 if may_change else None
        route = _Route(info, self._topics.streams(info.topic, partitions), stale_at)
        self._routes[cls] = route
        return route

    def _lane(self, stream: str) -> _Lane:
        lane = self._lanes.get(stream)
        if lane is None:
            lane = self._lanes[stream] = _Lane(
                stream, self._id, self._store, self._telemetry, self._timeout_s
            )
        return lane


def _unit_of(
    stream: str, items: Sequence[tuple[int, str, list[Arg], int]], deadline: float
) -> _Unit:
    size = sum(i[3] for i in items)
    if len(items) > UNIT_EVENTS or size > UNIT_BYTES:
        raise InvalidEvent(
            f"publish_many takes {UNIT_EVENTS:,} events or {UNIT_BYTES // 1024**2} MiB for one"
            f" stream, not {len(items):,} events of {size:,} bytes for {stream}: split the list"
        )
    args: list[Arg] = [len(items)]
    for item in items:
        args += item[2]
    return _Unit(len(items), size, args, deadline)


def _with_source(headers: Headers, defaults: Headers) -> Headers:
    return headers if headers.source is not None else headers._replace(source=defaults.source)


def _caused_by(cause: Delivery[Any], headers: Headers) -> Headers:
    event_id, correlation_id = _ids_of(cause)
    return headers._replace(
        causation_id=headers.causation_id or event_id,
        correlation_id=headers.correlation_id or correlation_id,
    )


def _ids_of(cause: Delivery[Any]) -> tuple[str, str]:
    """Return event id and correlation id of a delivery; on_dead may run for one that has none."""
    try:
        envelope = cause.envelope
    except Undecodable:
        return cause.entry_id.decode(), cause.entry_id.decode()
    return envelope.event_id, envelope.correlation_id or envelope.event_id


def _derived_id(cause: Delivery[Any], type: str, key: str | None) -> str:
    """Return an id that a retry of the same delivery makes again for the same publish."""
    ordinals = cause.ordinals
    if ordinals is None:
        ordinals = cause.ordinals = {}
    ordinal = ordinals[type, key or ""] = ordinals.get((type, key or ""), 0) + 1
    parts = (_ids_of(cause)[0], cause.group, type, key or "", str(ordinal))
    # Lengths in front: ("ab", "c") and ("a", "bc") must not meet.
    text = "".join(f"{len(p)}:{p}" for p in parts)
    return blake2b(text.encode(), digest_size=16).hexdigest()


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
