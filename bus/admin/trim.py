"""Removing history: the oldest entries, as far as no group needs them."""

from dataclasses import dataclass
from functools import partial

from bus.admin.scope import records_of
from bus.config import checked_number
from bus.envelope import order
from bus.errors import DeclarationError
from bus.history.backlog import STREAMS_AT_ONCE, name_of, pinning
from bus.history.patience import patiently, twice_at_worst
from bus.history.position import Position, as_id
from bus.shortage import tell_lost
from bus.streams import keys
from bus.streams.inspection import StreamSeen, count, look
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry

COUNTED_MOST = 100_000  # entries of a stream that a dry run counts


@dataclass(frozen=True, slots=True)
class TrimmedStream:
    """What a trim removed of one stream, or would remove. Entries.

    at_least: there may be more: a dry run counts up to 100,000, and what a call has removed whose
    answer was lost is not counted. length: before it.
    held_by: the group that needs the first entry that was asked for and stays, None if none does.
    """

    stream: str
    length: int
    removed: int
    at_least: bool
    held_by: str | None


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What a trim removed of a topic, stream by stream."""

    topic: str
    streams: tuple[TrimmedStream, ...]

    @property
    def removed(self) -> int:
        """The entries of all streams."""
        return sum(s.removed for s in self.streams)


async def trim(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    topic: str,
    *,
    before: Position,
    keep: int | None,
    dry_run: bool,
) -> Trimmed:
    """Remove what is old and needed by nobody. See `Admin.trim`."""
    if before is None and keep is None:
        raise DeclarationError("say what goes: before= a position, or keep= so many entries")
    cut = _cut(as_id(before, default="+"))
    if keep is not None:
        checked_number(keep, "keep", 0, 2**53, whole=True)
    streams = list(await records_of(topics, topic))
    found = []
    for at in range(0, len(streams), STREAMS_AT_ONCE):
        part = streams[at : at + STREAMS_AT_ONCE]
        for seen in await patiently(partial(look, store, part)):
            how = _dry if dry_run else partial(_trimmed, telemetry)
            found.append(await how(store, seen, cut, keep or 0))
    return Trimmed(topic, tuple(found))


def _cut(place: str) -> str:
    """Return the first id that stays as scripts compare it, "" if nothing need stay."""
    if place == "+":
        return ""
    ms, sequence = order(place) if place != "-" else (0, 0)
    if (ms, sequence) == (0, 0):
        raise DeclarationError("nothing lies before the start")
    return f"{ms}-{sequence}"


async def _dry(store: StreamStore, seen: StreamSeen, cut: str, keep: int) -> TrimmedStream:
    """Count what a trim would remove; nothing is changed, and no ghost acked."""
    length = seen.info.get("length", 0)
    pin = pinning(seen.groups)
    stays = cut
    held = pin is not None and (not cut or order(pin[1]) < order(cut))
    if pin is not None and held:
        stays = pin[1].decode()
    most = max(0, length - keep)
    there = most
    if stays and most:
        counted = min(most, COUNTED_MOST + 1)
        there = await count(store, seen.stream, "-", f"({stays}", counted)
    return TrimmedStream(
        seen.stream,
        length,
        min(there, COUNTED_MOST) if stays else there,
        bool(stays) and there > COUNTED_MOST,
        name_of(pin[0].group) if pin is not None and held and there < most else None,
    )


async def _trimmed(
    telemetry: Telemetry, store: StreamStore, seen: StreamSeen, cut: str, keep: int
) -> TrimmedStream:
    removed, held_by, in_doubt = 0, None, False
    length = seen.info.get("length", 0)
    while removed < length:  # what comes meanwhile is not meant
        done, lost_answer = await twice_at_worst(partial(store.upkeep.trim, seen.stream, cut, keep))
        in_doubt = in_doubt or lost_answer
        tell_lost(telemetry, seen.stream, done.lost)
        removed += done.gone
        if not done.gone and not done.lost:  # behind a hundred ghosts there may be more
            held_by = None if done.held is None else name_of(keys.wire(done.held.group))
            break
    if removed:
        telemetry.emit("topic.trimmed", stream=seen.stream, count=removed)
    return TrimmedStream(seen.stream, length, removed, at_least=in_doubt, held_by=held_by)
