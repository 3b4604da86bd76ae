"""Where a replay goes: into one handler's inbox, to a function in this program, or out again."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, runtime_checkable

from bus.config import (
    CROWDED_LOOK_S,
    CROWDED_SHARE,
    READ_COUNT,
    REPLAY_MEMORY_S,
    REPLAY_PATIENCE_S,
    checked_name,
)
from bus.delivery import Delivery, Origin, current_delivery
from bus.envelope import Envelope
from bus.errors import (
    BusError,
    DeclarationError,
    InvalidEffect,
    InvalidEvent,
    PublishUnknown,
    StreamFull,
    Undecodable,
)
from bus.event import Event, info_of
from bus.handler import Handler
from bus.history.event_store import envelope_of
from bus.history.groups import streams_with
from bus.history.patience import patiently
from bus.signature import checked_signature
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.codec import envelope_of as envelope_of_delivery
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable
from bus.telemetry import Telemetry
from bus.transaction import Transaction

Memory = dict[str, tuple[bytes, int]]  # stream -> the last id that was replayed, and how many


class Outcome(NamedTuple):
    """What became of a batch. left: those for which there was no room; put them again later."""

    replayed: int
    gone: int = 0
    unreadable: int = 0
    left: Sequence[RawEntry] = ()


class OutOfStep(Exception):
    """The server knows less than it said, or more: it went back, or somebody is at it, too."""


class Destination:
    """Takes what is replayed, batch by batch, each of one stream and in its order.

    name: what the checkpoint calls it. most: entries per batch.
    """

    name: str
    most: int

    async def check(self, streams: Sequence[str], record: Record) -> None:
        """Refuse what cannot go there. Errors: UnknownGroup."""

    def wants(self, type: str) -> bool:  # noqa: ARG002 - the others do
        """Return whether it takes events of that type at all."""
        return True

    async def put(self, run: str, stream: str, entries: Sequence[RawEntry]) -> Outcome:
        """Take a batch, each entry once per run if the server remembers it. Errors: OutOfStep."""
        raise NotImplementedError

    async def recall(
        self,
        run: str,  # noqa: ARG002 - the others do
        streams: Sequence[str],  # noqa: ARG002 - who publishes asks nothing of them
    ) -> Memory | None:
        """Ask the server how far a run has come. None if it is not told."""
        return None

    async def forget(self, run: str, streams: Sequence[str], after_s: int) -> None:
        """Have the server forget a run that is over, in so many seconds."""


class _OnServer(Destination):
    """One whose server remembers, in the step that puts it there, what a run has put."""

    def __init__(self, store: StreamStore) -> None:
        self._store = store
        self._known: Memory = {}  # as the server said last
        self._crowded = False
        self._look_at_s = 0.0  # loop time

    async def recall(self, run: str, streams: Sequence[str]) -> Memory | None:
        """Ask how far a run has come. GET each."""
        self._known = await patiently(
            lambda: self._store.archive.replayed(streams, run), REPLAY_PATIENCE_S
        )
        return dict(self._known)

    async def forget(self, run: str, streams: Sequence[str], after_s: int) -> None:
        """Forget it. EXPIRE each."""
        await patiently(lambda: self._store.archive.forget_replay(streams, run, after_s))

    async def crowded(self) -> bool:
        """Return whether the server's memory is nearly full; looks once a second. INFO."""
        now = asyncio.get_running_loop().time()
        if now >= self._look_at_s:
            self._look_at_s = now + CROWDED_LOOK_S
            share = await patiently(self._store.archive.memory_share, REPLAY_PATIENCE_S)
            self._crowded = share > CROWDED_SHARE
        return self._crowded


class IntoInbox(_OnServer):
    """One group's inboxes: its workers handle what comes, and nobody else notices."""

    most = READ_COUNT

    def __init__(self, store: StreamStore, telemetry: Telemetry, group: str) -> None:
        super().__init__(store)
        self.name = self._group = checked_name(group, "group name")
        self._telemetry = telemetry
        self._room = 0

    async def check(self, streams: Sequence[str], record: Record) -> None:
        """Refuse a group that no stream has. XINFO GROUPS each. Errors: UnknownGroup."""
        self._room = record.inbox_most
        await streams_with(self._store, streams, self._group, keys.topic_of(streams[0]))

    async def put(self, run: str, stream: str, entries: Sequence[RawEntry]) -> Outcome:
        """Copy entries into the inbox of one stream, on the server. `replay.lua`."""
        if await self.crowded():
            return Outcome(0, left=entries)
        ids = [entry_id for entry_id, _ in entries]
        known, before = self._known.get(stream, (b"", 0))
        answer = await patiently(
            lambda: self._store.archive.replay(
                stream, self._group, run, known, self._room, REPLAY_MEMORY_S, ids
            ),
            REPLAY_PATIENCE_S,
            lambda error: _tell_retried(self._telemetry, run, stream, error),
        )
        if answer is None:
            raise OutOfStep
        if answer.last:
            self._known[stream] = answer.last, answer.total
        # By the total: a call whose answer was lost may have copied some of them. If it is full all
        # of them are put again: the server passes over what it has copied.
        return Outcome(answer.total - before, answer.gone, left=entries if answer.full else ())


class ToFunction(Destination):
    """A function of this program: called with one event after the other, here and now."""

    most = 1

    def __init__(self, bus: Any, telemetry: Telemetry, call: "Callable[..., Any]") -> None:
        self._bus = bus
        self._telemetry = telemetry
        self._handler = call if isinstance(call, Handler) else None
        if self._handler is not None:
            if self._handler.batch is not None:
                raise DeclarationError(
                    f"handler {self._handler.group} takes batches: replay into its group"
                    f" (to={self._handler.group!r}), or to a function that takes one event"
                )
            self._call: Callable[..., Any] = self._handler.call
            self._group = self._handler.group
            self._takes_delivery = self._handler.takes_delivery
        else:
            self._call = call
            self._group = "replay"
            self._takes_delivery = checked_signature(call, [], self._group, batch=False)
        place = getattr(self._call, "__func__", self._call)
        called = getattr(place, "__qualname__", type(call).__qualname__)
        self.name = f"{getattr(place, '__module__', '')}:{called}"

    def wants(self, type: str) -> bool:
        """Return whether the handler asked for it; a plain function takes everything."""
        return self._handler is None or self._handler.wants(type)

    async def put(self, run: str, stream: str, entries: Sequence[RawEntry]) -> Outcome:
        """Call the function with each; what it raises ends the replay before that event."""
        replayed = unreadable = 0
        inbox = keys.inbox(stream, self._group)
        origin = Origin(self._group, inbox, stream, self._bus, envelope_of_delivery)
        for entry_id, fields in entries:
            # As it would lie in the inbox: so it says of itself that it is replayed, and what the
            # function publishes has the ids of this run.
            marked = [*fields, b"origentry", entry_id, b"run", run.encode()]
            delivery: Delivery[Any] = Delivery(origin, entry_id, marked, 1, 0.0)
            try:
                delivery.event = delivery.envelope.event
            except Undecodable as error:
                unreadable += 1
                tell_unreadable(self._telemetry, stream, entry_id, error)
                continue
            await self._run(delivery)
            replayed += 1
        return Outcome(replayed, unreadable=unreadable)

    async def _run(self, delivery: Delivery[Any]) -> None:
        delivery.refuse_effects(
            "a replay in a program of yours has no ack to take effects with: use bus.transaction()"
        )
        cause = current_delivery.set(delivery)
        try:
            args = (delivery.event, delivery) if self._takes_delivery else (delivery.event,)
            result = self._call(*args)
            if inspect.isawaitable(result):
                await result
        finally:
            delivery.settled = True
            current_delivery.reset(cause)


@runtime_checkable
class Republishes(Protocol):
    """What is needed of the bus that events are published to again."""

    store: StreamStore
    topics: TopicTable

    @property
    def address(self) -> str:
        """Where its server is."""

    def transaction(self) -> Transaction:
        """Begin a transaction."""


class ToBus(_OnServer):
    """New events, for every group: what happened is published again, on this bus or another."""

    most = 100

    def __init__(self, bus: Republishes, telemetry: Telemetry) -> None:
        super().__init__(bus.store)
        self.name = f"publish:{bus.address}"
        self._bus = bus
        self._telemetry = telemetry

    async def put(self, run: str, stream: str, entries: Sequence[RawEntry]) -> Outcome:
        """Publish a batch, and remember it in the same step, or less of it. Transactions."""
        if await self.crowded():
            return Outcome(0, left=entries)
        replayed = unreadable = at = 0
        while at < len(entries):
            part = entries[at : at + self.most]
            try:
                published = await self._publish(run, stream, part)
            except StreamFull:
                return Outcome(replayed, unreadable=unreadable, left=entries[at:])
            except (InvalidEvent, InvalidEffect) as error:
                # Together they are more than the topic takes at once, or than one step may be.
                if len(part) > 1:
                    self.most = len(part) // 2
                    continue
                if isinstance(error, InvalidEffect):
                    raise
                tell_unreadable(self._telemetry, stream, part[0][0], error)
                published = await self._publish(run, stream, part, skip=True)
                self.most = ToBus.most  # it was this one, and not how many they were
            replayed += published
            unreadable += len(part) - published
            at += len(part)
        return Outcome(replayed, unreadable=unreadable)

    async def _publish(
        self, run: str, stream: str, entries: Sequence[RawEntry], *, skip: bool = False
    ) -> int:
        """Publish in one step what can be; return how many. skip: none, but remember them.

        Only if the server knows what we think: of two who are at it one finds that it moved.
        Errors: StreamFull, InvalidEvent, InvalidEffect; OutOfStep.
        """
        events = [] if skip else await self._read(stream, entries)
        memory = keys.replay(stream, run)
        last, total = self._known.get(stream, (b"", 0))
        known = entries[-1][0], total + len(events)
        change = self._bus.transaction()
        try:
            async with change:
                was = change.own(memory)
                same = was.equals(f"{last.decode()} {total}") if last else was.missing()
                for envelope, event in events:
                    change.publish(
                        event,
                        when=same,
                        event_id=_new_id(run, stream, envelope.entry_id),
                        time=envelope.time,
                        source=envelope.source,
                        correlation_id=envelope.correlation_id or envelope.event_id,
                        causation_id=envelope.event_id,
                        traceparent=envelope.traceparent,
                        tracestate=envelope.tracestate,
                    )
                change.finally_set(
                    memory, f"{known[0].decode()} {known[1]}", REPLAY_MEMORY_S * 1000, same
                )
        except PublishUnknown as error:
            _tell_retried(self._telemetry, run, stream, error)
            raise OutOfStep from None
        if was.value != (f"{last.decode()} {total}".encode() if last else None):
            raise OutOfStep
        self._known[stream] = known
        return len(events)

    async def _read(self, stream: str, entries: Sequence[RawEntry]) -> list[tuple[Envelope, Event]]:
        """Return the events that can be published. Errors: InvalidEvent, more than ever fit."""
        events = []
        for entry in entries:
            envelope = envelope_of(stream, entry)
            try:
                events.append((envelope, envelope.event))
            except Undecodable as error:
                tell_unreadable(self._telemetry, stream, entry[0], error)
        for topic in {info_of(type(event)).topic for _, event in events}:
            record = await self._bus.topics.record(topic)
            if len(events) > max(1, (record.maxlen - record.keep) // 2):
                raise InvalidEvent(f"{len(events)} at once leave topic {topic} no room")
        return events


def destination_of(store: StreamStore, telemetry: Telemetry, bus: Any, to: Any) -> Destination:
    """Return what `to` names: a group, a bus to publish on, or a function. Errors: Declaration."""
    if isinstance(to, str):
        return IntoInbox(store, telemetry, to)
    if isinstance(to, Republishes):
        return ToBus(to, telemetry)
    if callable(to):
        return ToFunction(bus, telemetry, to)
    raise DeclarationError(
        f"to is the name of a group, a function or handler to call, or a bus to publish on,"
        f" not {to!r}"
    )


def _new_id(run: str, stream: str, entry_id: str) -> str:
    """Return the id of a published copy: of one run the same, however often it is tried."""
    text = f"{run} {stream} {entry_id}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def tell_unreadable(telemetry: Telemetry, stream: str, entry_id: bytes, error: BusError) -> None:
    """Tell of an entry that a replay leaves out."""
    telemetry.emit(
        "replay.unreadable",
        stream=stream,
        entry_id=entry_id.decode(),
        error_type=type(error).__name__,
        error=str(error),
    )


def _tell_retried(telemetry: Telemetry, run: str, stream: str, error: BaseException) -> None:
    telemetry.emit(
        "replay.retried",
        run=run,
        stream=stream,
        error_type=type(error).__name__,
        error=str(error),
    )
