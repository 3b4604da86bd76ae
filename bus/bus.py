"""The facade: wires the parts of one process and delegates to them. No logic lives here."""

import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Self, Unpack

import redis.asyncio

from bus.admin.admin import Admin
from bus.channels.channel import Channel, Channels
from bus.closing import close_all
from bus.committer import Committer
from bus.config import (
    CHANNEL_MAXLEN,
    CHANNEL_TTL,
    MAX_EVENT_BYTES,
    PRODUCER_MEMORY_S,
    PUBLISH_TIMEOUT_S,
    checked_number,
)
from bus.delivery import Delivery
from bus.effects import Effects
from bus.envelope import Envelope
from bus.errors import DeclarationError, NotSupported
from bus.event import Event
from bus.handler import Handler
from bus.history.backlog import Backlog, backlog
from bus.history.dead_letters import Access, DeadLetters, Filters
from bus.history.destinations import destination_of
from bus.history.event_store import history
from bus.history.hub import Hub
from bus.history.inspector import Inspector
from bus.history.position import Position
from bus.history.replay import Replayed, replay
from bus.history.selection import Predicate, Selection, Types
from bus.history.snapshot import Snapshot
from bus.history.tail import After, Tail
from bus.history.wanted import OnProgress, Wanted
from bus.local import Local
from bus.publisher import Publisher, Receipt
from bus.streams.address import parse_url, url_of_environment
from bus.streams.backend import Backend, backend_at
from bus.streams.codec import Headers
from bus.streams.fork import call_after_fork, forget_after_fork
from bus.streams.topics import TopicTable
from bus.topic import Topic
from bus.transaction import Transaction, Transactions


class Bus(Local):
    """An event bus on a server or in memory; made by `Bus.connect`. Belongs to one event loop."""

    def __init__(
        self,
        backend: Backend,
        topics: Iterable[Topic],
        *,
        publish_timeout_s: float,
        max_event_bytes: int,
        source: str | None,
        allow_eviction: bool,
    ) -> None:
        super().__init__(self.publish)
        self._backend = backend
        self._declared = tuple(topics)
        self._allow_eviction = allow_eviction
        self._settings: dict[str, Any] = {
            "publish_timeout_s": publish_timeout_s,
            "max_event_bytes": max_event_bytes,
            "source": source,
        }
        self._abandoned: list[object] = []
        self._wire()
        self._open = True
        call_after_fork(self._after_fork)

    @classmethod
    def connect(
        cls,
        url: str | None = None,
        *,
        topics: Iterable[Topic] = (),
        publish_timeout_s: float = PUBLISH_TIMEOUT_S,
        max_event_bytes: int = MAX_EVENT_BYTES,
        source: str | None = None,
        durability: str = "fast",
        allow_eviction: bool = False,
    ) -> "Bus":
        """Return a bus; `async with` checks the server and closes it in the end.

        url: redis://[user:password@]host[:port][/db], rediss:// (TLS), unix:///path; by default
            the environment's BUS_URL or REDIS_URL, else redis://localhost:6379/0. memory:// keeps
            everything in this process, memory://name shared by its buses of that name.
        topics: declarations of this process; a topic nobody declared has one partition.
        publish_timeout_s: after this a publish fails, in seconds; below 300, half of how long the
            server remembers a batch.
        max_event_bytes: largest entry, all its fields together.
        source: CloudEvents `source` of everything published here.
        durability: "fast"; the others are not part of this release.
        allow_eviction: accept a server whose memory policy may delete streams.
        Errors: DeclarationError, NotSupported; entering the block: the ServerError family.
        """
        if durability != "fast":
            raise NotSupported(f"durability {durability!r} is not part of this release")
        checked_number(publish_timeout_s, "publish_timeout_s", 0.01, PRODUCER_MEMORY_S / 2 - 0.001)
        checked_number(max_event_bytes, "max_event_bytes", 64, 8 * 1024 * 1024, whole=True)
        address = parse_url(url or url_of_environment())
        if isinstance(topics, str):
            raise DeclarationError("topics is a list of Topic(...), not a string")
        return cls(
            backend_at(address),
            topics,
            publish_timeout_s=publish_timeout_s,
            max_event_bytes=max_event_bytes,
            source=source,
            allow_eviction=allow_eviction,
        )

    def _wire(self) -> None:
        publish_timeout_s = self._settings["publish_timeout_s"]
        self.store = self._backend.store(self.telemetry)
        self.topics = TopicTable(self.store, self._declared, self.telemetry)
        self._publisher = Publisher(self.store, self.topics, self.telemetry, **self._settings)
        self._way_in.lead_to(self._publisher)
        self.committer = Committer(self.store, self._publisher, self._way_in, self.telemetry)
        self._transactions = Transactions(
            self.store,
            self._publisher,
            self._way_in,
            self.committer,
            self.telemetry,
            publish_timeout_s=publish_timeout_s,
        )
        self._inspector = Inspector(self.store, self.topics)
        self.admin = Admin(self.store, self.topics, self._inspector, self.telemetry)
        self._hub = Hub(self.store, self.telemetry)
        self._channels = Channels(
            self.store, self._publisher, self._hub, self.telemetry, publish_timeout_s
        )
        self._redis: redis.asyncio.Redis | None = None

    def _after_fork(self) -> None:
        """Start afresh in a forked child: its parent's sockets and sequences are not its own.

        The old parts are kept, not closed: closing a socket registered with the parent's event
        loop would unregister it there too, since both processes share the epoll descriptor.
        """
        self._hub.closed = True
        self._abandoned.append(
            (self.store, self.topics, self._publisher, self.committer, self._hub, self._redis)
        )
        self._abandoned.append(self._channels)
        self._begin_anew()
        self._wire()

    # --- life

    async def ready(self) -> None:
        """Connect; check the server (version, rights, eviction) and the declared topics.

        Errors: the ServerError family, TopicMismatch.
        """
        self._line.bind()
        await self._backend.check(self.store, allow_eviction=self._allow_eviction)
        await self.topics.check()

    async def close(self) -> None:
        """Wait for what is being published, then close all connections."""
        if not self._open:
            return
        self._open = False
        forget_after_fork(self._after_fork)
        await close_all(
            [self._line.close],
            [self._publisher.close, self._transactions.close, self._channels.close],
            [self.committer.close],
            [self._observers.close],
            [self._hub.close],
            [self.store.close],
            [] if self._redis is None else [self._redis.aclose],
        )

    async def __aenter__(self) -> Self:
        """Connect and check the server."""
        try:
            await self.ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncGenerator[dict[str, Any], None]:  # noqa: ARG002 - frameworks hand it over
        """Be open as long as a web application is: `Starlette(lifespan=bus.lifespan)`.

        So for FastAPI; Litestar takes a list, `lifespan=[bus.lifespan]`. `request.state.bus` is the
        bus. Errors: as of `async with`; the application does not start.
        """
        if not self._open:  # an application may be started again, as by its tests
            self._resume()
            self._wire()
            self._open = True
            call_after_fork(self._after_fork)
        async with self:
            yield {"bus": self}

    @property
    def address(self) -> str:
        """Where the server is, as a URL without a password."""
        return self._backend.redacted

    def __repr__(self) -> str:
        return f"<Bus {self._backend.redacted}>"

    # --- publishing

    def publish(
        self,
        event: Event,
        *,
        event_id: str | None = None,
        time: datetime | None = None,
        source: str | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Coroutine[Any, Any, Receipt]:
        """Append one event to its topic and return where it is.

        The events of one stream that are published at the same time share a script call or two
        (up to 500 events or 1 MiB), and are appended in the order of the calls. What a handler
        publishes carries its delivery's ids and an event id that a retry makes again.

        time: when it happened, with a zone; by default the append time.
        Errors: InvalidEvent and EventTooLarge before anything is sent; PublishTimeout (certainly
        not published) and PublishUnknown (perhaps) after `publish_timeout_s`; ServerError.
        """
        given = (source, time, correlation_id, causation_id, traceparent, tracestate)
        headers = None if given == _NOTHING else Headers(*given)
        # Handed on and not awaited here: one more coroutine would be a tenth of its time.
        return self._way_in.publish(event, event_id, headers)

    async def publish_many(
        self, events: Iterable[Event], *, source: str | None = None
    ) -> list[Receipt]:
        """Append events, all or nothing per stream; the receipts are in the order of `events`.

        At most 5,000 events or 8 MiB for one stream. Errors: as `publish`; nothing is sent
        unless all events are valid. When one stream of several fails the error carries a note.
        """
        return await self._way_in.publish_many(
            events, None if source is None else Headers(source=source)
        )

    def transaction(self) -> Transaction:
        """Return a block that collects effects and applies them, with its events, in one step.

        `async with bus.transaction() as change: change.hset(...); change.publish(...)`: see
        `Effects` for the commands, `Transaction` for what is known afterwards. One script.
        Errors: InvalidEffect in the block; at its end EffectsFailed, PublishError, ServerError.
        """
        return self._transactions.begin()

    def effects_of(self, delivery: Delivery[Any]) -> Effects:
        """Return an empty collection of effects: what `delivery.effects` is made of."""
        return self.committer.effects_of(delivery)

    # --- channels

    def channel(
        self, name: str, *, ttl: timedelta = CHANNEL_TTL, maxlen: int = CHANNEL_MAXLEN
    ) -> Channel:
        """Return a short-lived topic for one run: `publish`, `end`, `tail`. See `Channel`.

        name: as of a topic; whoever knows it may write and read. ttl: it expires so long after
        what was published last, its end included, 1 s to 30 days. maxlen: about so many entries
        are kept, the newest. Nothing is done yet, and nothing is recorded of it anywhere.
        Errors: DeclarationError.
        """
        return self._channels.channel(name, ttl, maxlen)

    # --- looking back

    def history(
        self,
        topic: str,
        since: Position = None,
        until: Position = None,
        types: Types = None,
        *,
        key: str | None = None,
        where: Predicate | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> AsyncGenerator[Envelope, None]:
        """Iterate over what is kept of `topic`, in the order of entry ids over all partitions.

        since, until: both included; an entry id, ms, datetime, ISO 8601, "@-2h", "start", "end".
        types: event classes, names or patterns. key: reads that key's partition alone.
        where: takes an envelope; what raises Undecodable there is left out.
        limit: envelopes at most. reverse: the newest first.
        XRANGE or XREVRANGE, 500 entries a page. `envelope.event` decodes when it is asked for.
        Errors: DeclarationError for a bad position or pattern; UnknownTopic; ServerError.
        `envelope.event` raises Undecodable for an entry that is not what its type says; the
        iteration goes on.
        """
        selection = Selection(types, key, where)
        return history(
            self.store,
            self.topics,
            self.telemetry,
            topic,
            since,
            until,
            selection,
            limit=limit,
            reverse=reverse,
        )

    def tail(
        self,
        topics: str | Iterable[str],
        after: After = None,
        types: Types = None,
        *,
        key: str | None = None,
        where: Predicate | None = None,
    ) -> Tail:
        """Follow topics: iterate over what is appended from `after` on, for ever. See `Tail`.

        after: None or "end" for what is published once `await tail.ready()` has returned; an entry
            id, in each stream after it, itself excluded; a time or "start" as of `history`, itself
            included; or the `position` of another tail, a mapping of streams to such.
        types, key, where: as of `history`. In the order of ids per partition; over partitions as
        far as they were read together.
        What was is read by XRANGE, 500 entries a page; what comes by one XREAD for all tails of
        the bus that have caught up, on one connection.
        Errors: DeclarationError; those of `Tail` when it is iterated over, UnknownTopic among them.
        """
        return Tail(self._hub, self.topics, topics, after, Selection(types, key, where))

    async def backlog(self, topic: str) -> Backlog:
        """Return how far behind the groups of `topic` are, and who holds its streams since when.

        `print(await bus.backlog("document"))` shows a line per group. Three round trips for up to
        64 partitions, about 100 entries per group and stream; where the server keeps no counter
        (Redis 6.2), up to 10,000 more are counted, 1,000 a round trip.
        Errors: DeclarationError for a bad name; UnknownTopic; WrongKeyType; ServerError.
        """
        return await backlog(self.store, self.topics, topic)

    async def inspect(self, topics: Iterable[str] | None = None) -> Snapshot:
        """Return what everything looks like now: topics, streams, groups, consumers, lanes.

        topics: only these; by default all that are recorded, or declared here.
        Only reads. HGETALL, then two or three round trips for up to 64 streams; 3 to 8 commands a
        group and stream, 5-10 us of server: cheap enough for once a second with 50 groups.
        Errors: UnknownTopic; PermissionDenied if nothing may be looked at; ServerError.
        """
        return await self._inspector.snapshot(topics)

    def dead_letters(
        self, group: str, topic: str | None = None, **filters: Unpack[Filters]
    ) -> DeadLetters:
        """Return the dead letters of `group`, to be listed, shown, redriven, purged or exported.

        topic: one of its topics, all of them by default. filters: types, error, reason, since,
        until, ids, where, reverse: see `DeadLetters`. Nothing is read yet.
        Errors: DeclarationError.
        """
        access = Access(
            self.store,
            self.topics,
            self.telemetry,
            self.address,
            self._settings["max_event_bytes"],
        )
        return DeadLetters(access, group, topic, **filters)

    async def replay(
        self,
        topic: str,
        *,
        to: "str | Handler[...] | Bus | Callable[..., Any]",
        since: Position = None,
        until: Position = None,
        types: Types = None,
        key: str | None = None,
        where: Predicate | None = None,
        limit: int | None = None,
        rate: float | None = None,
        dry_run: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: OnProgress | None = None,
    ) -> Replayed:
        """Replay what `history` finds into one group, one function, or as new events.

        to: the name of a group: into its inboxes, for its workers alone, each once. A function as
            a handler has, or a handler: called here, one event after the other; what it raises
            ends the replay. A bus: published there again, as new events for every group.
        since, until: fixed as it begins. limit: events at most. rate: events a second at most.
        dry_run: counts, and gives a sample. progress: called with a `Progress`, 5 times a second.
        checkpoint: a file that is made; the same call goes on from it, also after a kill, and
            puts nothing twice into an inbox, nor publishes it twice (a function may be given the
            events of the last half second again).
        XRANGE of 500; then one script per batch and stream, a transaction, or a call. While an
        inbox holds half of the room between keep and maxlen, a stream is full, or the server uses
        90 % of its maxmemory, it waits.
        Errors: DeclarationError, UnknownTopic, UnknownGroup; CheckpointError; ServerError.
        """
        wanted = Wanted(
            topic,
            since,
            until,
            Selection(types, key, where),
            limit=limit,
            rate=rate,
            dry_run=dry_run,
            checkpoint=checkpoint,
            progress=progress,
        )
        destination = destination_of(self.store, self.telemetry, self, to)
        return await replay(self.store, self.topics, self.telemetry, wanted, destination)

    # --- the application's own state

    @property
    def redis(self) -> redis.asyncio.Redis:
        """A plain redis.asyncio client, 50 connections, bytes, no retries; none on memory://."""
        if self._redis is None:
            self._redis = self._backend.client()
        return self._redis


_NOTHING = (None,) * 6
