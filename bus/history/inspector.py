"""Takes snapshots of a bus: what the server says, judged.

Who lives is judged as the workers judge one another (`worker/reclaimer.py`, `worker/janitor.py`):
by the lease; a consumer that is not listed with the workers keeps none, it is of another language,
and is judged by when the server last heard of it.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from bus.config import HEARD_OF_MS, INSPECT_PATIENCE_S, checked_name
from bus.envelope import entry_time, order
from bus.errors import DeclarationError, PermissionDenied
from bus.history.backlog import (
    STREAMS_AT_ONCE,
    appends_per_s,
    name_of,
    seconds_left,
)
from bus.history.patience import patiently
from bus.history.snapshot import (
    ConsumerSnapshot,
    GroupSnapshot,
    LaneSnapshot,
    Paused,
    ServerFacts,
    Snapshot,
    StreamSnapshot,
    TopicSnapshot,
    summed,
)
from bus.streams import keys
from bus.streams.answers import Consumer
from bus.streams.keys import lane_due_ms
from bus.streams.overview import GroupLook, StreamLook, overview, server_look
from bus.streams.pauses import Pause
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable

RATED_MS = 5_000  # what comes in so long tells how fast a stream grows...
RATED_LEAST_MS = 1_000  # ...and what comes in less than this does not
REMEMBERED_MS = 600_000  # what a counter was longer ago says little about now


class Inspector:
    """Takes snapshots, and remembers what counters were, to see how fast streams grow.

    Belongs to one bus. Several snapshots may be under way at one time.
    """

    def __init__(self, store: StreamStore, topics: TopicTable) -> None:
        self._store = store
        self._topics = topics
        self._growth = Growth()

    async def snapshot(self, names: Iterable[str] | None = None) -> Snapshot:
        """Return what all topics look like, or those in `names`. See `Bus.inspect`."""
        return await patiently(lambda: self._snapshot(names), INSPECT_PATIENCE_S)

    async def _snapshot(self, names: Iterable[str] | None) -> Snapshot:
        (records, errors), server = await asyncio.gather(
            self._records(names), server_look(self._store)
        )
        now_ms, facts, pauses, hidden = server
        streams = [s for n, r in records.items() for s in self._topics.streams(n, r.partitions)]
        counted = self._growth.known(now_ms)
        looks: list[StreamLook] = []
        for at in range(0, len(streams), STREAMS_AT_ONCE):
            part = streams[at : at + STREAMS_AT_ONCE]
            looks += await overview(self._store, part, now_ms, counted)
        _refuse_if_all_is_hidden(looks)
        each = iter(looks)
        topics = [
            self._topic(
                name,
                record,
                [next(each) for _ in range(record.partitions)],
                now_ms,
                {g: paused_of(p) for (t, g), p in pauses.items() if t == name and p.holds(now_ms)},
            )
            for name, record in records.items()
        ]
        time = datetime.fromtimestamp(now_ms / 1000, UTC)
        return Snapshot(time, _facts(facts) if facts else None, tuple(topics), errors + hidden)

    async def _records(
        self, names: Iterable[str] | None
    ) -> tuple[dict[str, Record], tuple[str, ...]]:
        if isinstance(names, str):
            raise DeclarationError("topics is a list of names, not a string")
        known, errors = await self._topics.overview()
        if names is None:
            return known, errors
        wanted = sorted({checked_name(name, "topic name") for name in names})
        found = {name: known.get(name) or await self._topics.existing(name) for name in wanted}
        return found, ()

    def _topic(
        self,
        name: str,
        record: Record,
        looks: Sequence[StreamLook],
        now_ms: int,
        paused: Mapping[str, Paused],
    ) -> TopicSnapshot:
        streams = tuple(
            self._stream(partition, record, look, now_ms, paused)
            for partition, look in enumerate(looks)
        )
        by_name: dict[str, list[GroupSnapshot]] = {}
        for stream in streams:
            for group in stream.groups:
                by_name.setdefault(group.group, []).append(group)
        return TopicSnapshot(
            name,
            record.partitions,
            record.maxlen,
            record.keep,
            record.on_full,
            record.retention_s,
            record.implicit,
            streams,
            tuple(summed(by_name[group]) for group in sorted(by_name)),
        )

    def _stream(
        self,
        partition: int,
        record: Record,
        look: StreamLook,
        now_ms: int,
        paused: Mapping[str, Paused],
    ) -> StreamSnapshot:
        length = look.info.get("length", 0)
        first, last = _end(look, "first-entry"), _end(look, "last-entry")
        room = max(0, record.maxlen - length)
        added = look.info.get("entries-added")
        per_s = self._growth.per_s(look.stream, now_ms, added, look.newest)
        groups = tuple(
            group_of(look, group, now_ms, paused.get(keys.text(group.group)))
            for group in look.groups
        )
        pin = pinning(look.groups)
        return StreamSnapshot(
            look.stream,
            partition,
            length,
            added,
            record.maxlen,
            record.keep,
            room,
            None if first is None else first.decode(),
            None if last is None else last.decode(),
            _age_s(first, now_ms),
            _age_s(last, now_ms),
            per_s,
            None if pin is None else name_of(pin[0]),
            None if pin is None else _age_s(pin[1], now_ms),
            None if pin is None else seconds_left(room, per_s),
            len(look.leases),
            sum(g.dead for g in groups),
            None if look.trouble is None else str(look.trouble),
            groups,
            look.info["last-generated-id"].decode() if look.info else None,
        )


def group_of(
    look: StreamLook, group: GroupLook, now_ms: int, paused: Paused | None = None
) -> GroupSnapshot:
    """Judge what was seen of one group."""
    lanes: dict[int, int] = {}
    workers: dict[bytes, Consumer] = {}
    for consumer in (*group.consumers, *group.inbox_consumers):
        name, pending, idle_ms = consumer
        due_ms = lane_due_ms(name)
        if due_ms is not None:
            lanes[due_ms] = lanes.get(due_ms, 0) + pending
        elif (other := workers.get(name)) is None:
            workers[name] = consumer
        else:  # it has read stream and inbox
            idle_ms = min(idle_ms, other.idle_ms)
            workers[name] = Consumer(name, pending + other.pending, idle_ms)
    alive = {n for n, c in workers.items() if _lives(look, c)}
    serving = _serving(look, group, alive)
    return GroupSnapshot(
        name_of(group.group),
        group.undelivered,
        group.at_least,
        sum(c.pending for c in group.consumers) if group.consumers else group.row["pending"],
        group.inbox,
        sum(c.pending for c in group.inbox_consumers),
        sum(c.pending for n, c in workers.items() if n in alive),
        sum(lanes.values()),
        sum(pending for due_ms, pending in lanes.items() if due_ms <= now_ms),
        sum(c.pending for n, c in workers.items() if n not in alive),
        group.dead,
        _age_s(group.oldest_undelivered, now_ms),
        _age_s(group.oldest_pending, now_ms),
        _age_s(group.oldest_dead, now_ms),
        _age_s(group.newest_dead, now_ms),
        bool(serving),
        paused,
        group.row.get("lag"),
        tuple(
            ConsumerSnapshot(name_of(n), n in alive, c.pending, c.idle_ms / 1000, n in look.listed)
            for n, c in sorted(workers.items())
        ),
        tuple(
            LaneSnapshot(max(0, due_ms - now_ms) / 1000, pending)
            for due_ms, pending in sorted(lanes.items())
            if pending
        ),
        len(serving),
    )


def _lives(look: StreamLook, consumer: Consumer) -> bool:
    if consumer.name in look.listed:
        return consumer.name in look.leases
    return consumer.idle_ms < HEARD_OF_MS


def _serving(look: StreamLook, group: GroupLook, alive: set[bytes]) -> set[bytes]:
    """Return who serves a group: by their own word, and readers that keep no lease."""
    return {n for n, groups in look.leases.items() if group.group in groups} | alive - look.listed


def pinning(groups: Iterable[GroupLook]) -> tuple[bytes, bytes] | None:
    """Return the group that needs the oldest entry, and that entry's id; None if none is needed."""
    needs = [
        (order(entry_id), group.group, entry_id)
        for group in groups
        for entry_id in (group.oldest_undelivered, group.oldest_pending)
        if entry_id is not None
    ]
    return min(needs)[1:] if needs else None


class _Count(NamedTuple):
    """What a counter of appends said at a server time."""

    ms: int
    added: int


class _Past(NamedTuple):
    """Two looks at a counter, RATED_MS apart or more, and the rate that was found last."""

    older: _Count
    newer: _Count
    per_s: float


class Growth:
    """How fast streams grow: by their counters, as they were 5 to 10 s ago and are now.

    Who looks less often sees what came since the look before. For a first look, and on a server
    without counters (Redis 6.2), the newest entries tell.
    """

    def __init__(self) -> None:
        self._past: dict[str, _Past] = {}

    def known(self, now_ms: int) -> frozenset[str]:
        """Return the streams whose counters are remembered; forgets what is too old."""
        self._past = {
            stream: past
            for stream, past in self._past.items()
            if 0 <= now_ms - past.newer.ms <= REMEMBERED_MS
        }
        return frozenset(self._past)

    def per_s(self, stream: str, now_ms: int, added: int | None, newest: Sequence[bytes]) -> float:
        """Return the rate in entries a second, and remember what the counter says now."""
        if added is None:
            return appends_per_s(newest, now_ms)
        now, past = _Count(now_ms, added), self._past.get(stream)
        if past is not None and now_ms < past.newer.ms:  # of a snapshot that took longer
            return past.per_s
        if past is None or added < past.newer.added:  # it is new to us, or was made anew
            past = _Past(now, now, appends_per_s(newest, now_ms))
        is_long_ago = now_ms - past.newer.ms >= RATED_MS
        since = past.newer if is_long_ago else past.older
        per_s = past.per_s
        if now_ms - since.ms >= RATED_LEAST_MS:
            per_s = (added - since.added) * 1000 / (now_ms - since.ms)
        older, newer = (past.newer, now) if is_long_ago else (past.older, past.newer)
        self._past[stream] = _Past(older, newer, per_s)
        return per_s


def _refuse_if_all_is_hidden(looks: Sequence[StreamLook]) -> None:
    """Raise what is wrong with the first, if the user may look at nothing at all."""
    hidden = [look.trouble for look in looks if look.hidden]
    refused = [trouble for trouble in hidden if isinstance(trouble, PermissionDenied)]
    if refused and len(refused) == len(looks):
        raise refused[0]


def _facts(facts: Mapping[str, str]) -> ServerFacts:
    kind = "valkey" if "valkey_version" in facts else "redis"
    return ServerFacts(
        kind,
        facts.get(f"{kind}_version", ""),
        int(facts.get("uptime_in_seconds", 0)),
        int(facts.get("used_memory", 0)),
        int(facts.get("maxmemory", 0)) or None,
    )


def paused_of(pause: Pause) -> Paused:
    """Return a pause as a snapshot has it."""
    since, until = (_time(ms) if ms else None for ms in (pause.since_ms, pause.until_ms))
    return Paused(since, until, pause.why)


def _time(ms: int) -> datetime:
    return entry_time(str(ms))


def _end(look: StreamLook, which: str) -> bytes | None:
    entry = look.info.get(which)
    return bytes(entry[0]) if entry else None


def _age_s(entry_id: bytes | None, now_ms: int) -> float | None:
    return None if entry_id is None else max(0, now_ms - order(entry_id)[0]) / 1000
