"""A stream in memory: its entries in the order of their ids, and the groups that read it."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator

from bus.envelope import order
from bus.streams.answers import RawEntry
from bus.streams.keys import LANE
from bus.streams.replies import ReplyError

Id = tuple[int, int]  # milliseconds and sequence
Fields = list[bytes]
_MOST = 2**64 - 1
HIGHEST: Id = (_MOST, _MOST)


def written(entry_id: Id) -> bytes:
    """Return an id as it is on the wire; the opposite of `order`."""
    return b"%d-%d" % entry_id


def first_of(bound: bytes | str) -> Id:
    """Return the lowest id that a range beginning at `bound` has: "-", an id, "(" and an id."""
    text = bound.decode() if isinstance(bound, bytes) else bound
    if text == "-":
        return 0, 0
    if text[0] == "(":
        return following(_parsed(text[1:]))
    return HIGHEST if text == "+" else _parsed(text)


def last_of(bound: bytes | str) -> Id:
    """Return the highest id that a range ending at `bound` has: "+", an id, "(" and an id."""
    text = bound.decode() if isinstance(bound, bytes) else bound
    if text == "+":
        return HIGHEST
    if text[0] == "(":
        ms, sequence = _parsed(text[1:])
        return (ms, sequence - 1) if sequence else (ms - 1, _MOST)
    if text == "-":
        return 0, 0
    ms, sequence = _parsed(text)
    return ms, sequence if "-" in text else _MOST


def _parsed(text: str) -> Id:
    try:
        return order(text)
    except ValueError:
        raise ReplyError(
            "ERR", "ERR Invalid stream ID specified as stream command argument"
        ) from None


def following(entry_id: Id) -> Id:
    """Return the id that comes next."""
    ms, sequence = entry_id
    return (ms, sequence + 1) if sequence < _MOST else (ms + 1, 0)


class Row:
    """One pending entry: who has it, since when, and how often it was delivered."""

    __slots__ = ("count", "owner", "since_ms")

    def __init__(self, owner: bytes, since_ms: int, count: int) -> None:
        self.owner = owner
        self.since_ms = since_ms
        self.count = count


class Consumer:
    """A worker or a lane: what it has, and when it was heard of."""

    __slots__ = ("rows", "seen_ms")

    def __init__(self, seen_ms: int) -> None:
        self.seen_ms = seen_ms
        self.rows: dict[Id, Row] = {}


class Group:
    """How far a group was given its stream, and what is pending."""

    __slots__ = ("consumers", "delivered", "ids", "rows")

    def __init__(self, delivered: Id) -> None:
        self.delivered = delivered
        self.rows: dict[Id, Row] = {}
        self.ids: list[Id] = []  # of the rows, rising
        self.consumers: dict[bytes, Consumer] = {}

    def consumer(self, name: bytes, now_ms: int) -> Consumer:
        """Return a consumer, made if there is none; it was heard of now."""
        found = self.consumers.get(name)
        if found is None:
            found = self.consumers[name] = Consumer(now_ms)
        found.seen_ms = now_ms
        return found

    def deliver(self, entry_id: Id, owner: bytes, now_ms: int) -> None:
        """Note that an entry was given to a consumer for the first time."""
        row = Row(owner, now_ms, 1)
        self.finish(entry_id)  # a group that was set back is given entries that are pending
        insort(self.ids, entry_id)
        self.rows[entry_id] = self.consumers[owner].rows[entry_id] = row

    def hand_over(
        self, entry_id: Id, owner: bytes, now_ms: int, count: int | None = None, idle_ms: int = 0
    ) -> None:
        """Give a pending entry to `owner`; None leaves its count."""
        row = self.rows[entry_id]
        self.consumers[row.owner].rows.pop(entry_id, None)
        row.owner, row.since_ms = owner, now_ms - idle_ms
        if count is not None:
            row.count = count
        self.consumer(owner, now_ms).rows[entry_id] = row

    def finish(self, entry_id: Id) -> bool:
        """Take an entry off the pending list; whether it was there."""
        row = self.rows.pop(entry_id, None)
        if row is None:
            return False
        del self.ids[bisect_left(self.ids, entry_id)]
        self.consumers[row.owner].rows.pop(entry_id, None)
        return True

    def owned(self, entry_id: Id, owner: bytes) -> Row | None:
        """Return the row of an entry that is pending for `owner`, else None."""
        row = self.rows.get(entry_id)
        return row if row is not None and row.owner == owner else None

    def pending(
        self, first: Id = (0, 0), last: Id = HIGHEST, owner: bytes | None = None
    ) -> Iterator[tuple[Id, Row]]:
        """Iterate over what is pending between two ids, oldest first, as it is now."""
        if owner is None:
            low, high = bisect_left(self.ids, first), bisect_right(self.ids, last)
            ids: Iterable[Id] = self.ids[low:high]
        else:
            consumer = self.consumers.get(owner)
            mine = () if consumer is None else sorted(consumer.rows)
            ids = [i for i in mine if first <= i <= last]
        return ((i, self.rows[i]) for i in ids)

    def drop_consumer(self, name: bytes) -> int:
        """Delete a consumer and whatever it has; return how much that was."""
        consumer = self.consumers.get(name)
        if consumer is None:
            return 0
        ids = list(consumer.rows)
        for entry_id in ids:
            self.finish(entry_id)
        del self.consumers[name]
        return len(ids)

    def drop_if_empty(self, lane: bytes) -> None:
        """Delete a lane that owns nothing any more."""
        consumer = self.consumers.get(lane)
        if consumer is not None and not consumer.rows:
            del self.consumers[lane]


class Log:
    """A stream: what is in it, what was ever in it, and its groups by name."""

    __slots__ = ("added", "deleted", "entries", "groups", "ids", "last")

    def __init__(self) -> None:
        self.entries: dict[Id, Fields] = {}
        self.ids: list[Id] = []  # of the entries, rising
        self.last: Id = (0, 0)  # the newest there ever was
        self.added = 0
        self.deleted: Id = (0, 0)  # the highest that was deleted singly
        self.groups: dict[bytes, Group] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __bool__(self) -> bool:
        return True  # one without entries is a stream all the same

    def add(self, fields: Fields, entry_id: Id) -> None:
        """Append an entry. Errors: ReplyError for an id that is not above the last."""
        if entry_id <= self.last:
            raise ReplyError(
                "ERR",
                "ERR The ID specified in XADD is equal or smaller than the target stream top item",
            )
        self.ids.append(entry_id)
        self.entries[entry_id] = fields
        self.last = entry_id
        self.added += 1

    def delete(self, entry_id: Id) -> bool:
        """Delete one entry; whether it was there. A group that has it pending has a ghost then."""
        if self.entries.pop(entry_id, None) is None:
            return False
        del self.ids[bisect_left(self.ids, entry_id)]
        self.deleted = max(self.deleted, entry_id)
        return True

    def trim(self, count: int) -> int:
        """Delete the oldest `count` entries; return how many there were."""
        gone = self.ids[:count] if count > 0 else []
        del self.ids[: len(gone)]
        for entry_id in gone:
            del self.entries[entry_id]
        return len(gone)

    def count_before(self, entry_id: Id) -> int:
        """Return how many entries lie before an id."""
        return bisect_left(self.ids, entry_id)

    def between(
        self, first: Id, last: Id, count: int | None = None, *, reverse: bool = False
    ) -> list[Id]:
        """Return the ids of up to `count` entries between two, both included."""
        low, high = bisect_left(self.ids, first), bisect_right(self.ids, last)
        if reverse:
            low = low if count is None else max(low, high - count)
            return self.ids[low:high][::-1]
        return self.ids[low : high if count is None else min(high, low + count)]

    def rows(self, ids: Iterable[Id]) -> list[RawEntry]:
        """Return entries as a reader sees them."""
        return [(written(i), self.copied(i)) for i in ids]

    def copied(self, entry_id: Id) -> Fields:
        """Return the fields of an entry; whoever changes them does not change the stream."""
        return self.entries[entry_id].copy()

    def ahead_of(self, group: Group) -> int:
        """Return how many entries a group was not given yet."""
        return len(self.ids) - bisect_right(self.ids, group.delivered)

    def drop_ghost(self, group: Group, entry_id: Id) -> bool:
        """Take an entry that is gone off a group's pending list; whether it was gone."""
        return entry_id not in self.entries and group.finish(entry_id)


def is_lane(consumer: bytes) -> bool:
    """Return whether a consumer is a lane."""
    return consumer.startswith(LANE)
