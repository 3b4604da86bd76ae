"""Making, moving and removing groups.

A group that is made or moved is told how many entries it has passed, where the server keeps that
count: without it neither the server nor anybody's monitoring knows how far it is behind until it
has read to the end. That number is what was ever added, less what lies beyond the place; it is
counted from the nearer end of the stream, up to 100,000 entries, and left out beyond that.
Before the first entry it is left out, too: there the server knows by itself, and a number would be
wrong as soon as that entry is trimmed. Nothing is trimmed beyond the place of a group; where there
is none yet, it is counted again if the trimming has come past it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from bus.admin.pauses import ended
from bus.admin.scope import records_of, rows_of
from bus.config import FIRST_PAGE, checked_name
from bus.envelope import order
from bus.errors import InUse
from bus.history.inspector import group_of
from bus.history.patience import patiently, twice_at_worst
from bus.history.position import Position, as_id
from bus.history.snapshot import GroupSnapshot
from bus.streams import keys
from bus.streams.inspection import count, next_share
from bus.streams.overview import overview
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry

COUNTED_MOST = 100_000
RECOUNTS = 10  # of a group whose workers read on meanwhile
FORWARDS, BACKWARDS = "<", ">"  # to seek.lua: only if the group is before the place, or beyond it
_LAST = 2**64 - 1  # the highest sequence of a millisecond
_ZERO = "0-0"


@dataclass(frozen=True, slots=True)
class Created:
    """Where a group was made; `existed`: the streams that had it before, and are as they were."""

    group: str
    topic: str
    streams: tuple[str, ...]
    existed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sought:
    """How a group was moved in one stream, or would be.

    before, after: the last id it counts as given. skipped: entries it will not be given; again:
    those it will be given once more; as they were just before. at_least: counted up to 100,000:
    there are more.
    counted: whether the server knows how many it has passed; always false on Redis 6.2.
    """

    stream: str
    group: str
    before: str
    after: str
    skipped: int
    again: int
    at_least: bool
    counted: bool


@dataclass(frozen=True, slots=True)
class Removed:
    """What a group left when it was removed from one stream, or would leave. Entries."""

    stream: str
    group: str
    undelivered: int
    at_least: bool
    pending: int
    inbox: int
    dead: int


async def create(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    group: str,
    topic: str,
    at: Position,
) -> Created:
    """Make a group on every stream of a topic. See `Admin.create_group`."""
    checked_name(group, "group name")
    after = _before(as_id(at, default="-"))
    made, existed = [], []
    for stream in await records_of(topics, topic):
        spot = await _spot(store, stream, after)
        # What is to be counted is not trimmed any more once the group is there.
        read = None if spot.pinned else spot.read
        if await _made(store, stream, group, spot.after, read):
            if spot.pinned:
                await _recount(store, topics, stream, group, spot.after)
            telemetry.emit("group.created", stream=stream, group=group)
            made.append(stream)
        else:
            existed.append(stream)
        await _made(store, keys.inbox(stream, group), group, _ZERO, None)
    return Created(group, topic, tuple(made), tuple(existed))


async def _made(store: StreamStore, stream: str, group: str, after: str, read: int | None) -> bool:
    """Make a group; False if there was one of that name."""
    make = partial(store.upkeep.create_group, stream, group, after, read)
    made, in_doubt = await twice_at_worst(make)
    return made or in_doubt


async def seek(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    group: str,
    topic: str | None,
    to: Position | tuple[Sought, ...],
    *,
    dry_run: bool,
) -> tuple[Sought, ...]:
    """Set which entry a group is given next. See `Admin.seek_group`."""
    plans = {plan.stream: plan for plan in to} if isinstance(to, tuple) else None
    wanted = "" if isinstance(to, tuple) else _before(as_id(to, default="+"))
    found = []
    for stream, row in (await rows_of(store, topics, group, topic)).items():
        before, only = row["last-delivered-id"].decode(), ""
        if plans is not None:
            plan = plans.get(stream)
            if plan is None or plan.before == plan.after:
                continue
            wanted = plan.after
            only = FORWARDS if order(plan.before) < order(wanted) else BACKWARDS
        while True:
            spot = await _spot(store, stream, wanted)
            sought = await _compared(store, stream, group, before, spot)
            if dry_run:
                break
            was, in_doubt = await _set(store, topics, stream, group, only, spot)
            if was is None:
                continue  # the trimming has come past it
            if not in_doubt:
                sought = replace(sought, before=was)
            if _has_passed(only, sought):  # by itself, meanwhile
                sought = Sought(stream, group, was, was, 0, 0, at_least=False, counted=spot.counted)
            else:
                telemetry.emit(
                    "group.moved",
                    stream=stream,
                    group=group,
                    before=sought.before,
                    after=spot.after,
                )
            break
        found.append(sought)
    return tuple(found)


async def _compared(
    store: StreamStore, stream: str, group: str, before: str, spot: "_Spot"
) -> Sought:
    """Return what a move means: how many entries lie between."""
    low, high = sorted((before, spot.after), key=order)
    between = 0
    if low != high:
        between = await patiently(partial(count, store, stream, f"({low}", high, COUNTED_MOST + 1))
    at_least, between = between > COUNTED_MOST, min(between, COUNTED_MOST)
    skipped, again = (between, 0) if high == spot.after else (0, between)
    return Sought(stream, group, before, spot.after, skipped, again, at_least, spot.counted)


def _has_passed(only: str, sought: Sought) -> bool:
    was, to = order(sought.before), order(sought.after)
    return (only == FORWARDS and was >= to) or (only == BACKWARDS and was <= to)


async def recount(
    store: StreamStore, topics: TopicTable, group: str, topic: str | None, *, dry_run: bool
) -> tuple[Sought, ...]:
    """Tell the server how many entries a group has passed. See `Admin.recount_group`."""
    found = []
    for stream, row in (await rows_of(store, topics, group, topic)).items():
        at = row["last-delivered-id"].decode()
        if dry_run:
            counted = (await _spot(store, stream, at)).counted
        else:
            at, counted = await _recount(store, topics, stream, group, at)
        found.append(Sought(stream, group, at, at, 0, 0, at_least=False, counted=counted))
    return tuple(found)


async def _recount(
    store: StreamStore, topics: TopicTable, stream: str, group: str, at: str
) -> tuple[str, bool]:
    """Tell the server how many entries a group has passed; return where it is, and if it was told.

    at: the last-delivered id that it had. If it has read on meanwhile, it is counted again.
    """
    for _ in range(RECOUNTS):
        spot = await _spot(store, stream, at)
        if not spot.counted:
            break
        was, _ = await _set(store, topics, stream, group, at, spot._replace(after=at))
        if was == at:
            return at, True
        at = was or at
    return at, False


async def _set(
    store: StreamStore, topics: TopicTable, stream: str, group: str, expected: str, spot: "_Spot"
) -> tuple[str | None, bool]:
    """Set a group to a place; return as `Upkeep.seek`, and whether an answer before was lost.

    Errors: UnknownGroup, when it has gone meanwhile.
    """
    move = partial(
        store.upkeep.seek, stream, group, expected, spot.after, spot.read, pinned=spot.pinned
    )
    try:
        return await twice_at_worst(move)
    except ReplyError as error:
        if error.code in ("NOGROUP", "ERR"):
            await rows_of(store, topics, group, keys.topic_of(stream))
        raise


async def remove(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    group: str,
    topic: str | None,
    *,
    dry_run: bool,
) -> tuple[Removed, ...]:
    """Delete a group with all that is its own. See `Admin.remove_group`."""
    streams = list(await rows_of(store, topics, group, topic))
    now_ms, _ = await patiently(store.pauses.look)
    seen: dict[str, GroupSnapshot] = {}
    for look in await patiently(partial(overview, store, streams, now_ms)):
        if look.trouble is not None:  # what is hidden, or another's, is not deleted unseen
            raise look.trouble
        for found in look.groups:
            if found.group == keys.wire(group):
                seen[look.stream] = group_of(look, found, now_ms)
    served = [stream for stream, found in seen.items() if found.served]
    if served and not dry_run:
        raise InUse(
            f"group {group} is served on {', '.join(served)}: its workers would make it again, at"
            " the beginning of the stream. Stop them first, or deploy them without the handler"
        )
    left = tuple(_left(stream, found) for stream, found in seen.items())
    if not dry_run:
        for stream in streams:
            await patiently(partial(store.upkeep.remove_group, stream, group))
            await ended(store, (keys.topic_of(stream), group))
            telemetry.emit("group.removed", stream=stream, group=group)
    return left


def _left(stream: str, found: GroupSnapshot) -> Removed:
    return Removed(
        stream,
        found.group,
        found.undelivered,
        found.at_least,
        found.pending,
        found.inbox,
        found.dead,
    )


def _before(place: str) -> str:
    """Return the id that comes just before a place: of what is given next, the last given."""
    if place == "-":
        return _ZERO
    if place == "+":
        return "$"
    ms, sequence = order(place)
    if sequence:
        return f"{ms}-{sequence - 1}"
    return f"{ms - 1}-{_LAST}" if ms else _ZERO


class _Spot(NamedTuple):
    """A place in a stream, as a last-delivered id.

    read: how many entries were added up to it, if the server is to be told. pinned: that holds as
    long as nothing beyond the place is trimmed. counted: whether the server will know the number.
    """

    after: str
    read: int | None
    pinned: bool
    counted: bool


async def _spot(store: StreamStore, stream: str, after: str) -> _Spot:
    """Look at a place: `$` is the end, as is what lies beyond, or in a stream without entries."""
    while True:
        info = await patiently(partial(store.upkeep.info, stream))
        if info is None:
            return _Spot(_ZERO, None, pinned=False, counted=False)
        end, added, first = (
            info["last-generated-id"].decode(),
            info.get("entries-added"),
            _first(info),
        )
        if after == "$" or first is None or order(after) >= order(end):
            return _Spot(end, added, pinned=False, counted=added is not None)
        if added is None or order(info["max-deleted-entry-id"]) > order(after):
            return _Spot(after, None, pinned=False, counted=False)  # it would not be believed
        if order(after) < order(first):
            return _Spot(after, None, pinned=False, counted=True)
        ahead = await _ahead(store, stream, after, end, info["length"])
        if ahead is None:
            return _Spot(after, None, pinned=False, counted=False)
        now = await patiently(partial(store.upkeep.info, stream))
        if now is not None and _first(now) == first:
            return _Spot(after, added - ahead, pinned=True, counted=True)
        # It was trimmed as it was counted.


def _first(info: dict[str, Any]) -> bytes | None:
    """Return the id of the first entry; None where there is none."""
    entry = info["first-entry"]
    return bytes(entry[0]) if entry else None


async def _ahead(store: StreamStore, stream: str, after: str, end: str, length: int) -> int | None:
    """Count the entries beyond a place up to the end, by those before it if these are fewer."""
    look = store.archive.range
    first, last, before, beyond, share = "-", end, 0, 0, FIRST_PAGE
    while beyond < COUNTED_MOST:
        page = await patiently(partial(look, stream, f"({after}", last, share, reverse=True))
        beyond += len(page)
        if len(page) < share:
            return beyond
        last = f"({page[-1][0].decode()}"
        page = await patiently(partial(look, stream, first, after, share))
        before += len(page)
        if len(page) < share:
            return length - before
        first = f"({page[-1][0].decode()}"
        share = next_share(page)
    return None
