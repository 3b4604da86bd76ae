"""What the server recorded of each topic, and what this process declared.

`bus:topics` is a hash, topic -> JSON: partitions, maxlen, keep, on_full, retention_s, implicit.
The first process to use a topic records it. A record marked
implicit was made by a process that only used the topic; the first declaration replaces it while
the streams are empty. Partition counts must agree; other differences are told, and what is
recorded holds. Whoever knows a record writes it again when the server has lost it.
"""

import asyncio
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated

import msgspec

from bus.config import (
    INBOX_SHARE,
    KEEP_SHARE,
    MAXLEN,
    RESERVE,
    RESERVE_SHARE,
    SLACK,
    SLACK_SHARE,
    checked_name,
)
from bus.errors import DeclarationError, TopicMismatch, UnknownTopic
from bus.event import known_events
from bus.streams import keys
from bus.streams.answers import Limits
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.topic import OnFull, Topic

_SHOWN = 20  # topics named in an error
RECORD_TTL_S = 5.0  # how soon a process notices that a record was replaced, or lost


_Count = Annotated[int, msgspec.Meta(ge=1)]


class Record(msgspec.Struct, frozen=True):
    """What is recorded of a topic. Unknown fields of later releases are left alone.

    retention_s: in seconds, None for no limit. implicit: by its first use, not by a declaration.
    """

    partitions: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    maxlen: Annotated[int, msgspec.Meta(ge=2)] = MAXLEN
    keep: _Count = 0  # a tenth of maxlen, filled in below
    on_full: OnFull = "block"
    retention_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    implicit: bool = False

    def __post_init__(self) -> None:
        if not self.keep:
            msgspec.structs.force_setattr(self, "keep", max(1, self.maxlen // KEEP_SHARE))
        if self.keep >= self.maxlen:
            raise ValueError(f"keep = {self.keep} is not below maxlen = {self.maxlen}")

    @classmethod
    def of(cls, topic: Topic) -> "Record":
        """Return what a declaration records."""
        retention_s = None if topic.retention is None else topic.retention.total_seconds()
        return cls(topic.partitions, topic.maxlen, topic.keep, topic.on_full, retention_s)

    @property
    def slack(self) -> int:
        """How far above `keep` a stream may stand before an append trims it, in entries."""
        return max(1, min(SLACK, (self.maxlen - self.keep) // SLACK_SHARE))

    @property
    def reserve(self) -> int:
        """The entries above `maxlen` that only handlers' own publishes may use."""
        return max(RESERVE, self.maxlen // RESERVE_SHARE)

    @property
    def inbox_most(self) -> int:
        """The entries of an inbox up to which replays and redrives may fill it."""
        return max(1, (self.maxlen - self.keep) // INBOX_SHARE)

    def limits(self, *, inside: bool = False) -> Limits:
        """Return what an appender may do; `inside`: a handler, which may use the reserve."""
        most = self.maxlen + self.reserve if inside else self.maxlen
        return Limits(self.keep, self.slack, most, self.on_full == "drop_oldest")

    def differences(self, other: "Record") -> str:
        """Return where `other` differs in marks, as text; "" if nowhere."""
        marks = ("maxlen", "keep", "on_full", "retention_s")
        return ", ".join(
            f"{m} {getattr(self, m)} recorded, {getattr(other, m)} declared"
            for m in marks
            if getattr(self, m) != getattr(other, m)
        )


class TopicTable:
    """Partition counts by topic; asks the server once per topic, and again while implicit."""

    def __init__(self, store: StreamStore, declared: Iterable[Topic], telemetry: Telemetry) -> None:
        self._store = store
        self._telemetry = telemetry
        self._declared: dict[str, Topic] = {}
        self._known: dict[str, tuple[Record, float]] = {}
        self._told: dict[str, str] = {}  # topic -> the differences that were told
        self._lock = asyncio.Lock()
        for topic in declared:
            self.declare(topic)

    @property
    def declared(self) -> list[Topic]:
        """The topics this process declared."""
        return list(self._declared.values())

    def declare(self, topic: Topic) -> None:
        """Add a declaration of this process. Errors: DeclarationError when two differ."""
        if not isinstance(topic, Topic):
            raise DeclarationError(f"topics are declared as Topic(...), not {topic!r}")
        other = self._declared.setdefault(topic.name, topic)
        if other != topic:
            raise DeclarationError(f"topic {topic.name} is declared twice, differently")
        self._known.pop(topic.name, None)

    def streams(self, name: str, partitions: int) -> list[str]:
        """Return the stream keys of a topic."""
        return [keys.stream(name, p) for p in range(partitions)]

    async def check(self) -> None:
        """Compare what this process declared with what is recorded; records nothing. HGET each.

        Errors: TopicMismatch.
        """
        for name in self._declared:
            await self._holds(name, await self._store.topic_record(name))

    async def recorded(self, name: str) -> Record:
        """Return what holds for a topic without recording anything. HGET."""
        standing = await self._store.topic_record(name)
        if standing:
            return parsed(name, standing)
        declared = self._declared.get(name)
        return Record.of(declared) if declared else Record(1, implicit=True)

    async def known(self) -> dict[str, Record]:
        """Return what holds for every topic that is recorded or declared here, by name. HGETALL.

        A record that cannot be read is left out of it: see `overview` for what is wrong with it.
        """
        return (await self.overview())[0]

    async def overview(self) -> tuple[dict[str, Record], tuple[str, ...]]:
        """Return what is known, and what is wrong with the records that cannot be read. HGETALL."""
        found = {name: Record.of(topic) for name, topic in self._declared.items()}
        wrong = []
        for name, standing in (await self._store.topic_records()).items():
            try:
                found[checked_name(name, "topic name")] = parsed(name, standing)
            except DeclarationError as error:
                found.pop(name, None)
                wrong.append(str(error))
        return dict(sorted(found.items())), tuple(wrong)

    async def existing(self, name: str) -> Record:
        """Return what holds for a topic that somebody has declared, used, or has events of.

        HGET, and for a topic that is not recorded TYPE: its stream may have groups and no entry.
        Errors: DeclarationError for a bad name; UnknownTopic, which says what there is.
        """
        standing = await self._store.topic_record(checked_name(name, "topic name"))
        if standing:
            return parsed(name, standing)
        if name in self._declared:
            return Record.of(self._declared[name])
        if name not in {info.topic for info in known_events()}:
            kind = await self._store.type_of(keys.stream(name, 0))
            if kind == b"none":
                raise UnknownTopic(_no_such_topic(name, list(await self.known())))
        return Record(1, implicit=True)

    async def record_to_read(self, name: str) -> Record:
        """Return what holds for a topic; record it only if we know it from elsewhere.

        A worker that merely reads must not be the one who says that a topic has one partition:
        after a server lost its data that would contradict publishers who know better.
        """
        if self._ours(name) is None:
            standing = await self._store.topic_record(name)
            if not standing:
                return Record(1, implicit=True)
        return await self.record(name)

    async def record(self, name: str) -> Record:
        """Return what holds for a topic, at most RECORD_TTL_S old; record it if nobody has.

        HGET of bus:topics at first use; one script to record. Errors: TopicMismatch.
        """
        record = self._fresh(name)
        if record is None:
            async with self._lock:
                record = self._fresh(name)  # somebody may have asked while we waited
                if record is None:
                    record = await self._agree(name)
                    until = asyncio.get_running_loop().time() + RECORD_TTL_S
                    self._known[name] = (record, until)
        return record

    def _fresh(self, name: str) -> Record | None:
        known = self._known.get(name)
        if known is None:
            return None
        record, until = known
        return record if asyncio.get_running_loop().time() < until else None

    def _ours(self, name: str) -> Record | None:
        """Return what we would record: our declaration, or what we know to have been declared."""
        declared = self._declared.get(name)
        if declared is not None:
            return Record.of(declared)
        known = self._known.get(name)
        return known[0] if known is not None and not known[0].implicit else None

    async def _holds(self, name: str, standing: bytes) -> Record | None:
        """Return the record that holds for us, None if ours is to be recorded.

        Errors: TopicMismatch when a declaration of ours contradicts it.
        """
        if not standing:
            return None
        recorded, ours = parsed(name, standing), self._ours(name)
        if ours is None:
            return recorded
        if recorded.partitions == ours.partitions:
            if recorded.implicit:
                return None
            self._tell_differences(name, recorded, ours)
            return recorded
        streams = self.streams(name, recorded.partitions)
        if recorded.implicit and not await self._store.any_entries(streams):
            return None
        if name not in self._declared:
            return recorded
        raise TopicMismatch(
            f"topic {name} is declared with {ours.partitions} partitions here and"
            f" recorded with {recorded.partitions}"
            f"{' (by its first use)' if recorded.implicit else ''}:"
            " declare the recorded number, or empty the topic first (XTRIM"
            f" {keys.stream(name, 0)} MAXLEN 0, and so on) if its use was a mistake"
        )

    def _tell_differences(self, name: str, recorded: Record, ours: Record) -> None:
        """Say, once, that other marks are recorded than were declared here."""
        text = recorded.differences(ours) if name in self._declared else ""
        if text != self._told.get(name, ""):
            self._told[name] = text
            if text:
                self._telemetry.emit("topic.differs", topic=name, differences=text)

    async def _agree(self, name: str) -> Record:
        ours = self._ours(name) or Record(1, implicit=True)
        standing = await self._store.topic_record(name)
        while True:
            holds = await self._holds(name, standing)
            if holds is not None:
                return holds
            new = msgspec.json.encode(ours)
            stands = await self._store.record_topic(name, standing, new)
            if stands == new:
                self._telemetry.emit(
                    "topic.recorded",
                    topic=name,
                    partitions=ours.partitions,
                    implicit=ours.implicit,
                )
                return ours
            standing = stands  # somebody was first: agree with what stands now


def _no_such_topic(name: str, there: list[str]) -> str:
    close = get_close_matches(name, there, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    listed = ", ".join(there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
    return (
        f"there is no topic {name}: {hint}known here and on the server: {listed or 'none'}."
        f" One that is yet to be used is declared with Bus.connect(..., topics=[Topic({name!r})])"
    )


def parsed(name: str, value: bytes) -> Record:
    """Return a record as it is written in `bus:topics`. Errors: DeclarationError."""
    try:
        return msgspec.json.decode(value, type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DeclarationError(
            f"{keys.TOPICS} holds something else than a topic's record for {name}: {error}"
        ) from None
