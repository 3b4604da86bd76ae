"""Changing what is recorded of a topic: how long its streams may grow, and what happens then."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from bus.admin.finding import printable
from bus.config import checked_name
from bus.history.patience import patiently
from bus.history.snapshot import TopicSnapshot
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable, parsed
from bus.telemetry import Telemetry
from bus.topic import OnFull, Topic


@dataclass(frozen=True, slots=True)
class Marks:
    """How long the streams of a topic may grow. retention_s: in seconds, None for no limit."""

    maxlen: int
    keep: int
    on_full: OnFull
    retention_s: float | None


@dataclass(frozen=True, slots=True)
class Marked:
    """What was recorded of a topic, and what is now; the same if nothing was to change."""

    topic: str
    before: Marks
    after: Marks


def consequences(topic: TopicSnapshot, after: Marks) -> list[str]:
    """Return what new marks will do to what is there, sentence by sentence; [] for nothing."""
    said = []
    for stream in topic.streams:
        needy = max(stream.groups, key=lambda g: g.undelivered + g.pending, default=None)
        needed = 0 if needy is None else min(stream.length, needy.undelivered + needy.pending)
        if needy is None or needed < after.maxlen:
            continue
        at_least = "more than " if needy.at_least else ""
        has = (
            f"{stream.stream}: group {printable(needy.group)} has still to do"
            f" {at_least}{needed:,} of its entries"
        )
        if after.on_full == "drop_oldest":
            lost = needed - after.maxlen + 1
            said.append(f"{has}: the next publish drops {at_least}{lost:,} of them, unhandled")
        else:
            verb = "are refused" if after.on_full == "reject" else "wait"
            said.append(f"{has}: publishers {verb} at once, until it has caught up")
    fewer = after.keep < topic.keep or after.maxlen < topic.maxlen
    now_s = float("inf") if topic.retention_s is None else topic.retention_s
    if fewer or (after.retention_s is not None and after.retention_s < now_s):
        said.append(
            "handled entries that are beyond that go by and by: nobody can replay them then"
        )
    return said


async def set_marks(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    name: str,
    *,
    maxlen: int | None,
    keep: int | None,
    on_full: OnFull | None,
    retention: timedelta | UnsetType | None,
    dry_run: bool,
) -> Marked:
    """Change marks of a topic. See `Admin.set_marks`."""
    changes: dict[str, Any] = {"maxlen": maxlen, "keep": keep, "on_full": on_full}
    changes = {mark: value for mark, value in changes.items() if value is not None}
    if retention is not UNSET:
        changes["retention"] = retention
    known = partial(topics.existing, name)
    while True:
        standing = await patiently(lambda: store.topic_record(checked_name(name, "topic name")))
        record = parsed(name, standing) if standing else await patiently(known)
        wanted = Record.of(_changed(name, record, changes))
        marked = Marked(name, _marks_of(record), _marks_of(wanted))
        if dry_run or marked.before == marked.after:
            return marked
        new = _rewritten(standing, wanted)
        if await patiently(partial(store.record_topic, name, standing, new)) == new:
            telemetry.emit("topic.marked", topic=name, differences=_said(marked))
            return marked
        # Somebody wrote meanwhile: what is to change is changed in what stands now.


def _changed(name: str, record: Record, changes: dict[str, Any]) -> Topic:
    """Return the topic as it is to be. Errors: DeclarationError for marks that cannot be."""
    retention = None if record.retention_s is None else timedelta(seconds=record.retention_s)
    facts: dict[str, Any] = {
        "partitions": record.partitions,
        "maxlen": record.maxlen,
        "keep": record.keep,
        "on_full": record.on_full,
        "retention": retention,
    }
    return Topic(name, **(facts | changes))


def _marks_of(record: Record) -> Marks:
    return Marks(record.maxlen, record.keep, record.on_full, record.retention_s)


def _rewritten(standing: bytes, wanted: Record) -> bytes:
    """Return the record to be written; what later releases have put there stays."""
    fields = msgspec.json.decode(standing, type=dict[str, Any]) if standing else {}
    return msgspec.json.encode({**fields, **msgspec.structs.asdict(wanted)})


def _said(marked: Marked) -> str:
    names = ("maxlen", "keep", "on_full", "retention_s")
    pairs = [(n, getattr(marked.before, n), getattr(marked.after, n)) for n in names]
    return ", ".join(f"{name} {old} is now {new}" for name, old, new in pairs if old != new)
