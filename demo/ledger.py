"""What was published, held against what became of it.

Published: the receipts that the demo got, and the entries that lie in the streams. What became of
it: the record that the workers keep (records.py) and the dead letters. Everything is read from
Redis by plain commands, past the code under test.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bus import Handler, Receipt
from bus.streams import keys
from demo import records, workload

GROUPS: tuple[Handler[...], ...] = (
    *(workload.index, workload.unindex, workload.charge),
    *(workload.views, workload.clean, workload.audit),
)
PARTITIONS = {topic.name: topic.partitions for topic in (workload.documents,)}
PAGE = 1_000

Place = tuple[str, str]  # stream, entry id


def streams_of(handler: Handler[...]) -> list[str]:
    """Return the streams that a handler reads."""
    return [
        keys.stream(topic, partition)
        for topic in handler.reads()
        for partition in range(PARTITIONS.get(topic, 1))
    ]


@dataclass(frozen=True, slots=True)
class Published:
    """One event that the demo published. `called_at_ms`: before the service was called."""

    place: Place
    event_id: str
    type: str
    phase: str
    called_at_ms: float


@dataclass(slots=True)
class Book:
    """The receipts of the demo, in the order in which they came."""

    entries: list[Published] = field(default_factory=list)
    raw: list[tuple[Place, str | None]] = field(default_factory=list)
    """Entries written by hand: where, and the type that they claim to be."""

    def note(
        self, phase: str, called_at_ms: float, types: Iterable[str], receipts: Iterable[Receipt]
    ) -> None:
        """Note the receipts of one call of a service, and the types it promises to publish."""
        for type_, receipt in zip(types, receipts, strict=True):
            place = (receipt.stream, receipt.entry_id)
            self.entries.append(Published(place, receipt.event_id, type_, phase, called_at_ms))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter of a group: where its entry lay, and why it is dead."""

    place: Place
    reason: str


@dataclass(slots=True)
class GroupRecord:
    """What became of the events of one group. The dicts go by event id."""

    group: str
    wanted: dict[Place, str]
    started: dict[str, int]
    failed: dict[str, int]
    finished: dict[str, int]
    handled_at_ms: dict[str, float]
    dead: list[DeadLetter]

    @property
    def events(self) -> int:
        """How many events were wanted; the same one twice in the stream is one."""
        return len({event_id or place for place, event_id in self.wanted.items()})

    @property
    def lost(self) -> list[Place]:
        """Events that the group neither handled nor dead-lettered."""
        dead = {letter.place for letter in self.dead}
        return [
            place
            for place, event_id in self.wanted.items()
            if event_id not in self.handled_at_ms and place not in dead
        ]

    @property
    def reasons(self) -> Counter[str]:
        """Dead letters by reason."""
        return Counter(letter.reason for letter in self.dead)

    @property
    def retried(self) -> int:
        """Failed runs after which the event was to be tried again."""
        ended = self.reasons["failed"] + self.reasons["rejected"]
        return sum(self.failed.values()) - ended

    @property
    def cut_off(self) -> int:
        """Runs that began and neither returned nor raised: their worker was killed."""
        runs = (self.started, -1), (self.finished, 1), (self.failed, 1)
        return -sum(sign * sum(counts.values()) for counts, sign in runs)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry found in a stream; `event_id` and `type` are None where it has none.

    by_handler: published while another event was handled. data: the encoded event.
    """

    place: Place
    event_id: str | None
    type: str | None
    by_handler: bool = False
    data: bytes = b""

    @property
    def event(self) -> dict[str, Any]:
        """The event's fields."""
        found: dict[str, Any] = json.loads(self.data)
        return found


async def entries_of(redis: Any, stream: str) -> AsyncIterator[Entry]:
    """Yield every entry of a stream, oldest first."""
    start = "-"
    while page := await redis.xrange(stream, start, "+", PAGE):
        for entry_id, fields in page:
            yield Entry(
                (stream, entry_id.decode()),
                _text(fields.get(b"id")),
                _text(fields.get(b"type")),
                by_handler=b"causationid" in fields,
                data=fields.get(b"data", b""),
            )
        start = "(" + page[-1][0].decode()


async def read_streams(redis: Any) -> list[Entry]:
    """Return the entries of all streams that the demo's groups read."""
    streams = sorted({stream for handler in GROUPS for stream in streams_of(handler)})
    return [entry for stream in streams async for entry in entries_of(redis, stream)]


async def read_group(
    redis: Any, handler: Handler[...], book: Book, entries: Iterable[Entry]
) -> GroupRecord:
    """Return what became of everything that one group asked for.

    Asked for: what the receipts say was published, what handlers published (it lies in the
    streams), and what was written by hand.
    """
    group = handler.group
    return GroupRecord(
        group=group,
        wanted=dict(_wanted(handler, book, entries)),
        started=await _counts(redis, records.started(group)),
        failed=await _counts(redis, records.failed(group)),
        finished=await _counts(redis, records.finished(group)),
        handled_at_ms={
            event_id.decode(): float(at_ms)
            for event_id, at_ms in (await redis.hgetall(records.handled(group))).items()
        },
        dead=[letter async for letter in dead_letters_of(redis, handler)],
    )


async def dead_letters_of(redis: Any, handler: Handler[...]) -> AsyncIterator[DeadLetter]:
    """Yield the dead letters of a group."""
    for stream in streams_of(handler):
        start = "-"
        while page := await redis.xrange(keys.dead(stream, handler.group), start, "+", PAGE):
            for _, fields in page:
                place = (stream, fields[b"deadentry"].decode())
                yield DeadLetter(place, fields[b"deadreason"].decode())
            start = "(" + page[-1][0].decode()


def _wanted(
    handler: Handler[...], book: Book, entries: Iterable[Entry]
) -> Iterator[tuple[Place, str]]:
    for event in book.entries:
        if handler.wants(event.type):
            yield event.place, event.event_id
    by_hand = {place for place, _ in book.raw}
    for entry in entries:
        if entry.place not in by_hand and entry.type and handler.wants(entry.type):
            yield entry.place, entry.event_id or ""
    for place, claimed_type in book.raw:
        # Without a type nobody can tell who wanted it: every group that reads it has to answer.
        if place[0] in streams_of(handler) and (
            claimed_type is None or handler.wants(claimed_type)
        ):
            yield place, ""


async def _counts(redis: Any, key: str) -> dict[str, int]:
    return {name.decode(): int(n) for name, n in (await redis.hgetall(key)).items()}


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")
