"""The streams as an event store: what happened, by topic, type and time, over XRANGE.

Nothing is moved and no group notices. Memory stays flat: one page per partition is in hand.
"""

from collections.abc import AsyncIterator, Iterable

from bus.config import READ_COUNT, checked_name
from bus.delivery import Envelope, entry_time
from bus.errors import Undecodable
from bus.event import Event, info_of, type_matches
from bus.history.position import Position, as_id
from bus.streams.answers import RawEntry
from bus.streams.codec import locate, open_envelope
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable


async def history(
    store: StreamStore,
    topics: TopicTable,
    topic: str,
    since: Position,
    until: Position,
    types: Iterable[str | type[Event]] | None,
) -> AsyncIterator[Envelope]:
    """Yield the envelopes of `topic` in the order of their entry ids. See `Bus.history`."""
    first, last = as_id(since, default="-"), as_id(until, default="+")
    patterns = None if types is None else [_pattern(t) for t in types]
    for pattern in patterns or ():
        type_matches(pattern, "")  # raises for one that is none, before anything is read
    partitions = (await topics.recorded(checked_name(topic, "topic name"))).partitions
    readers = [_Reader(store, s, first, last) for s in topics.streams(topic, partitions)]
    heads = [(r, await r.next()) for r in readers]
    waiting = [(r, e) for r, e in heads if e is not None]
    while waiting:
        # The smallest id of at most a few hundred heads; a heap would buy little and hide it.
        reader, entry = min(waiting, key=lambda head: _order(head[1][0]))
        waiting.remove((reader, entry))
        following = await reader.next()
        if following is not None:
            waiting.append((reader, following))
        if patterns is None or _is_wanted(entry, patterns):
            yield _envelope(reader.stream, entry)


class _Reader:
    """Pages through one stream."""

    def __init__(self, store: StreamStore, stream: str, first: str, last: str) -> None:
        self.stream = stream
        self._store = store
        self._from = first
        self._last = last
        self._page: list[RawEntry] = []
        self._at = 0
        self._ended = False

    async def next(self) -> RawEntry | None:
        """Return the next entry, None at the end."""
        if self._at == len(self._page):
            if self._ended:
                return None
            self._page = await self._store.archive.range(
                self.stream, self._from, self._last, READ_COUNT
            )
            self._at = 0
            self._ended = len(self._page) < READ_COUNT
            if not self._page:
                return None
            self._from = "(" + self._page[-1][0].decode()
        self._at += 1
        return self._page[self._at - 1]


def _order(entry_id: bytes) -> tuple[int, int]:
    ms, _, sequence = entry_id.partition(b"-")
    return int(ms), int(sequence)


def _pattern(what: str | type[Event]) -> str:
    return what if isinstance(what, str) else info_of(what).type


def _is_wanted(entry: RawEntry, patterns: list[str]) -> bool:
    name = (locate(entry[1]).type or b"").decode(errors="replace")
    return any(type_matches(p, name) for p in patterns)


def _envelope(stream: str, entry: RawEntry) -> Envelope:
    """Make the envelope of an entry, also of one that cannot be decoded: `.event` will say so."""
    entry_id, fields = entry
    try:
        return open_envelope(stream, entry_id, fields)
    except Undecodable as error:
        return _unreadable(stream, entry_id, fields, error)


def _unreadable(stream: str, entry_id: bytes, fields: list[bytes], error: Undecodable) -> Envelope:
    located = locate(fields)

    def refuse(_: bytes) -> Event:
        raise error

    return Envelope(
        event_id=(located.id or b"").decode(errors="replace"),
        type=(located.type or b"").decode(errors="replace"),
        version=1,
        stream=stream,
        entry_id=entry_id.decode(),
        time=entry_time(entry_id),
        data=located.data or b"",
        _decode=refuse,
    )
