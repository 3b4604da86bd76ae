"""The streams as an event store: what happened, by topic, time, type and key, over XRANGE.

Nothing is moved and no group notices. Memory stays flat: a page or two per partition are in hand.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from operator import itemgetter

from bus.config import FIRST_PAGE, READ_BYTES, READ_COUNT, checked_number
from bus.delivery import Envelope, entry_time
from bus.errors import Undecodable
from bus.event import Event
from bus.history.patience import patiently
from bus.history.position import Position, as_id
from bus.history.selection import Selection
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.codec import locate, open_envelope
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable

Found = tuple[str, RawEntry]  # stream and entry


async def history(
    store: StreamStore,
    topics: TopicTable,
    topic: str,
    since: Position,
    until: Position,
    selection: Selection,
    *,
    limit: int | None = None,
    reverse: bool = False,
) -> AsyncIterator[Envelope]:
    """Yield the envelopes of `topic` in the order of their entry ids. See `Bus.history`."""
    bounds = as_id(since, default="-"), as_id(until, default="+")
    if limit is not None:
        checked_number(limit, "limit", 0, 2**63, whole=True)
    record = await patiently(lambda: topics.existing(topic))
    streams = streams_of(record, topic, selection.key)
    left = -1 if limit is None else limit
    if not left:
        return
    async for stream, entry in merged(store, dict.fromkeys(streams, bounds), reverse=reverse):
        if selection.names(entry):
            envelope = envelope_of(stream, entry)
            if selection.where is None or selection.admits(envelope):
                yield envelope
                left -= 1
                if not left:
                    return


def streams_of(record: Record, topic: str, key: str | None = None) -> list[str]:
    """Return the streams of a topic; only that of `key`, if one is given."""
    if key is not None:
        return [keys.stream(topic, keys.partition_of(key, record.partitions))]
    return [keys.stream(topic, p) for p in range(record.partitions)]


async def merged(
    store: StreamStore, bounds: dict[str, tuple[str, str]], *, reverse: bool = False
) -> AsyncGenerator[Found, None]:
    """Yield what the streams hold between their bounds, both included, in the order of ids."""
    pages = {s: _Pages(store, s, *span, reverse=reverse) for s, span in bounds.items()}
    try:
        heads = {s: page for s, p in pages.items() if (page := await p.next())}
        while heads:
            if len(heads) == 1:
                ((stream, page),) = heads.items()
                for entry in page:
                    yield stream, entry
                heads[stream] = []
            else:
                for _, stream, entry in _certain(heads, reverse=reverse):
                    yield stream, entry
            for stream in [s for s, page in heads.items() if not page]:
                heads[stream] = await pages[stream].next()
                if not heads[stream]:
                    del heads[stream]
    finally:
        for unread in pages.values():
            unread.close()


def _certain(
    heads: dict[str, list[RawEntry]], *, reverse: bool
) -> list[tuple[tuple[int, int], str, RawEntry]]:
    """Take out of the pages what certainly comes before all that is unread, in order.

    That is everything up to where the first of the pages ends.
    """
    ends = [_order(page[-1]) for page in heads.values()]
    bound = max(ends) if reverse else min(ends)
    certain = []
    for stream, page in heads.items():
        orders = [_order(entry) for entry in page]
        if reverse:
            taken = sum(order >= bound for order in orders)
        else:
            taken = sum(order <= bound for order in orders)
        certain += [(orders[n], stream, page[n]) for n in range(taken)]
        heads[stream] = page[taken:]
    certain.sort(key=itemgetter(0), reverse=reverse)
    return certain


class _Pages:
    """The pages of one stream; the next one is asked for while the last one is looked at."""

    def __init__(
        self, store: StreamStore, stream: str, first: str, last: str, *, reverse: bool
    ) -> None:
        self._store = store
        self._stream = stream
        self._first, self._last = first, last
        self._reverse = reverse
        self._count = FIRST_PAGE
        self._coming: asyncio.Task[list[RawEntry]] | None = self._ask()

    async def next(self) -> list[RawEntry]:
        """Return the next page, an empty one at the end."""
        if self._coming is None:
            return []
        page = await self._coming
        if len(page) < self._count:
            self._coming = None
            return page
        beyond = "(" + page[-1][0].decode()
        if self._reverse:
            self._last = beyond
        else:
            self._first = beyond
        entry_bytes = sum(sum(map(len, fields)) for _, fields in page[::8]) * 8 / len(page) + 64
        self._count = max(1, min(READ_COUNT, self._count * 4, int(READ_BYTES / entry_bytes)))
        self._coming = self._ask()
        return page

    def close(self) -> None:
        """Give up what was asked for and is not wanted."""
        if self._coming is not None and not self._coming.cancel() and not self._coming.cancelled():
            self._coming.exception()  # nobody waits for it, and nobody misses it

    def _ask(self) -> "asyncio.Task[list[RawEntry]]":
        return asyncio.create_task(
            patiently(
                lambda: self._store.archive.range(
                    self._stream, self._first, self._last, self._count, reverse=self._reverse
                )
            )
        )


def _order(entry: RawEntry) -> tuple[int, int]:
    ms, _, sequence = entry[0].partition(b"-")
    return int(ms), int(sequence)


def envelope_of(stream: str, entry: RawEntry) -> Envelope:
    """Make the envelope of an entry, also of one that cannot be decoded: `.event` will say so."""
    entry_id, fields = entry
    try:
        return open_envelope(stream, entry_id, fields)
    except Undecodable as error:
        return _unreadable(stream, entry_id, fields, error)


def _unreadable(stream: str, entry_id: bytes, fields: list[bytes], error: Undecodable) -> Envelope:
    located = locate(fields)

    def refuse(_: Envelope) -> Event:
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
