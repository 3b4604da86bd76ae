"""The streams as an event store: what happened, by topic, time, type and key, over XRANGE.

Nothing is moved and no group notices. Memory stays flat: a page or two per partition are in hand.
"""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from operator import itemgetter

from bus.config import (
    FIRST_PAGE,
    LOOK_PATIENCE_S,
    PAGE_LEAST_BYTES,
    READ_BYTES,
    READ_COUNT,
    TURN_S,
    checked_number,
)
from bus.envelope import Envelope, entry_time, order
from bus.errors import Undecodable
from bus.event import Event
from bus.history.patience import patiently
from bus.history.position import Position, as_id
from bus.history.selection import Selection
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.codec import locate, open_envelope
from bus.streams.connection import is_transient
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable
from bus.telemetry import Telemetry

Found = tuple[str, RawEntry]  # stream and entry
Order = tuple[int, int]
OnGap = Callable[[str, bytes, bytes], None]  # stream, the last that was read, the first now


def history(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    topic: str,
    since: Position,
    until: Position,
    selection: Selection,
    *,
    limit: int | None = None,
    reverse: bool = False,
) -> AsyncGenerator[Envelope, None]:
    """Return the envelopes of `topic` in the order of their entry ids. See `Bus.history`."""
    bounds = as_id(since, default="-"), as_id(until, default="+")
    if limit is not None:
        checked_number(limit, "limit", 0, 2**63, whole=True)

    def tell(stream: str, after: bytes, first: bytes) -> None:
        telemetry.emit("history.gap", stream=stream, after=after.decode(), first=first.decode())

    async def envelopes() -> AsyncGenerator[Envelope, None]:
        left = -1 if limit is None else limit
        if not left:
            return
        record = await patiently(lambda: topics.existing(topic))
        spans = dict.fromkeys(streams_of(record, topic, selection.key), bounds)
        async with aclosing(merged(store, spans, reverse=reverse, on_gap=tell)) as entries:
            async for stream, entry in entries:
                if selection.names(entry):
                    envelope = envelope_of(stream, entry)
                    if selection.where is None or selection.admits(envelope):
                        yield envelope
                        left -= 1
                        if not left:
                            return

    return envelopes()


def streams_of(record: Record, topic: str, key: str | None = None) -> list[str]:
    """Return the streams of a topic; only that of `key`, if one is given."""
    if key is not None:
        return [keys.stream(topic, keys.partition_of(key, record.partitions))]
    return [keys.stream(topic, p) for p in range(record.partitions)]


async def merged(
    store: StreamStore,
    bounds: Mapping[str, tuple[str, str]],
    *,
    reverse: bool = False,
    on_gap: OnGap | None = None,
    after: Mapping[str, bytes] | None = None,
    patience_s: float = LOOK_PATIENCE_S,
) -> AsyncGenerator[Found, None]:
    """Yield what the streams hold between their bounds, both included, in the order of ids.

    Entries of one id come in the order of their streams. Others get a turn every 5 ms, however long
    the caller takes for an entry.
    on_gap: told, forwards, when what was read last is gone by the next page: what followed it may
    have been trimmed, too. after: stream -> what was read before, and is not yielded again.
    patience_s: how long a read is tried.
    """
    share = max(1, len(bounds))
    pages = {
        stream: _Pages(
            store,
            stream,
            span,
            reverse=reverse,
            share=share,
            on_gap=on_gap if not reverse else None,
            after=(after or {}).get(stream),
            patience_s=patience_s,
        )
        for stream, span in bounds.items()
    }
    loop = asyncio.get_running_loop()
    until = loop.time() + TURN_S
    try:
        heads = {s: _Head(page) for s, p in pages.items() if (page := await p.next())}
        while heads:
            for _, stream, entry in _certain(heads, reverse=reverse):
                yield stream, entry
                if loop.time() > until:
                    await asyncio.sleep(0)
                    until = loop.time() + TURN_S
            for stream in [s for s, head in heads.items() if not head.entries]:
                heads[stream] = _Head(await pages[stream].next())
                if not heads[stream].entries:
                    del heads[stream]
    finally:
        for unread in pages.values():
            unread.close()


class _Head:
    """What was read of one stream and is not taken yet, with what it is ordered by."""

    __slots__ = ("entries", "orders")

    def __init__(self, entries: list[RawEntry]) -> None:
        self.entries = entries
        self.orders: list[Order] = []  # known once there is something to compare with


def _certain(heads: dict[str, _Head], *, reverse: bool) -> list[tuple[Order, str, RawEntry]]:
    """Take out of the pages what certainly comes before all that is unread, in order.

    That is everything up to where the first of the pages ends.
    """
    if len(heads) == 1:
        ((stream, head),) = heads.items()
        entries, head.entries = head.entries, []
        return [((0, 0), stream, entry) for entry in entries]
    for head in heads.values():
        if not head.orders:
            head.orders = [_order(entry[0], reverse=reverse) for entry in head.entries]
    bound = min(head.orders[-1] for head in heads.values())
    certain: list[tuple[Order, str, RawEntry]] = []
    for stream, head in heads.items():
        taken = bisect_right(head.orders, bound)
        if taken:
            certain += [
                (o, stream, e)
                for o, e in zip(head.orders[:taken], head.entries[:taken], strict=True)
            ]
            head.orders, head.entries = head.orders[taken:], head.entries[taken:]
    certain.sort(key=itemgetter(0))
    return certain


class _Pages:
    """The pages of one stream; the next one is asked for while the last one is looked at."""

    def __init__(
        self,
        store: StreamStore,
        stream: str,
        span: tuple[str, str],
        *,
        reverse: bool,
        share: int,
        on_gap: OnGap | None,
        after: bytes | None,
        patience_s: float,
    ) -> None:
        self._store = store
        self._stream = stream
        self._first, self._last = span
        self._end = b"" if reverse else span[1].encode()  # behind it nothing can be missing
        self._reverse = reverse
        self._most_bytes = max(PAGE_LEAST_BYTES, READ_BYTES // share)
        self._on_gap = on_gap
        self._patience_s = patience_s
        self._count = max(1, min(FIRST_PAGE, 4 * FIRST_PAGE // share))
        self._after: bytes | None = None  # asked for again, to see whether it is still there
        if after is not None:
            self._go_beyond(after)
        self._coming: asyncio.Task[list[RawEntry]] | None = None
        if after is None or after != self._end:
            self._coming = self._ask()

    async def next(self) -> list[RawEntry]:
        """Return the next page, an empty one at the end."""
        if self._coming is None:
            return []
        page = await self._came()
        ended = len(page) < self._count
        if self._after is not None and self._on_gap is not None:
            if page and page[0][0] == self._after:
                page = page[1:]
            else:
                self._on_gap(self._stream, self._after, page[0][0] if page else b"")
        if ended or not page or page[-1][0] == self._end:
            self._coming = None
            return page
        self._go_beyond(page[-1][0])
        some = page[::8]
        entry_bytes = sum(sum(map(len, fields)) for _, fields in some) / len(some) + 64
        most = min(READ_COUNT, self._count * 4, int(self._most_bytes / entry_bytes))
        self._count = max(1, most) + (self._after is not None)
        self._coming = self._ask()
        return page

    async def _came(self) -> list[RawEntry]:
        """Return what was asked for; asked again if the server was away just then."""
        assert self._coming is not None
        try:
            return await self._coming
        except Exception as error:
            if not is_transient(error.__cause__ or error):
                raise
        self._coming = self._ask()
        return await self._coming

    def _go_beyond(self, entry_id: bytes) -> None:
        if self._on_gap is not None:
            self._after = entry_id
            self._first = entry_id.decode()
        elif self._reverse:
            self._last = "(" + entry_id.decode()
        else:
            self._first = "(" + entry_id.decode()

    def close(self) -> None:
        """Give up what was asked for and is not wanted."""
        if self._coming is not None and not self._coming.cancel() and not self._coming.cancelled():
            self._coming.exception()  # nobody waits for it, and nobody misses it

    def _ask(self) -> "asyncio.Task[list[RawEntry]]":
        return asyncio.create_task(
            patiently(
                lambda: self._store.archive.range(
                    self._stream, self._first, self._last, self._count, reverse=self._reverse
                ),
                self._patience_s,
            )
        )


def _order(entry_id: bytes, *, reverse: bool) -> Order:
    """Return what an entry is ordered by: backwards, the newest is the smallest."""
    ms, sequence = order(entry_id)
    return (-ms, -sequence) if reverse else (ms, sequence)


def envelope_of(stream: str, entry: RawEntry) -> Envelope:
    """Make the envelope of an entry, also of one that cannot be decoded: `.event` will say so."""
    entry_id, fields = entry
    try:
        return open_envelope(stream, entry_id, fields)
    except Undecodable as error:
        return _unreadable(stream, entry_id, fields, error)


def _unreadable(stream: str, entry_id: bytes, fields: list[bytes], error: Undecodable) -> Envelope:
    located = locate(fields)
    kind, text = type(error), str(error)  # not the error: its traceback leads back to all of this

    def refuse(_: Envelope) -> Event:
        raise kind(text)

    return Envelope(
        event_id=(located.id or b"").decode(errors="replace"),
        type=(located.type or b"").decode(errors="replace"),
        version=1,
        stream=stream,
        entry_id=entry_id.decode(),
        time=entry_time(entry_id),
        data=located.data or b"",
        content_type=located.content_type,
        _decode=refuse,
    )
