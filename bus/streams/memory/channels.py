"""Channels: what is added to them, as `scripts/channel_append.lua`."""

from collections.abc import Sequence

from bus.streams.answers import Appended, Limits, Room
from bus.streams.archive import Archive
from bus.streams.channels import END_TYPE, ChannelAppends, ChannelStore
from bus.streams.connection import Answer, Arg
from bus.streams.memory.connection import Direct
from bus.streams.memory.log import Fields, Id, Log
from bus.streams.memory.place import Place, wire
from bus.streams.memory.publishing import as_answered
from bus.streams.replies import Reply, ReplyError

_END = END_TYPE.encode()


def append(
    place: Place,
    channel: str,
    ttl_ms: int,
    most: int,
    units: Sequence[list[Arg]],
    *,
    again: bool,
) -> Appended:
    """Add events, up to an end marker, and put off the expiry; the oldest above `most` go.

    again: the batch may be in already. Errors: ReplyError ENDED behind an end marker.
    """
    key = wire(channel)
    log = place.log(key)
    batch: list[Fields] = []
    for unit in units:
        batch.append([wire(v) for v in unit[2:]])
        if _type_of(batch[-1]) == _END:
            break
    if log is not None and again:
        last_event = batch[-1][:2]
        for entry_id in reversed(log.ids):
            if log.entries[entry_id][:2] == last_event:
                ms, last = entry_id
                return _appended((ms, last - len(batch) + 1), len(batch), most, repeated=True)
    if log is not None and log.ids and _type_of(log.entries[log.ids[-1]]) == _END:
        if _type_of(batch[0]) == _END:
            return _appended(log.ids[-1], 1, most, repeated=True)
        raise ReplyError("ENDED", "ENDED nothing can be added to it any more")
    ms, low = place.append(key, batch[0])
    for n, fields in enumerate(batch[1:], 1):
        place.append(key, fields, (ms, low + n))
    log = place.made(key, Log)
    log.trim(len(log) - most)
    place.expire(key, ttl_ms)
    return _appended((ms, low), len(batch), most, repeated=False)


def _type_of(fields: Fields) -> bytes | None:
    return fields[3] if fields[2] == b"type" else None


def _appended(first: Id, events: int, most: int, *, repeated: bool) -> Appended:
    ms, low = first
    return Appended(str(ms), low, events, events, repeated, Room(most, None, {}), {})


class MemoryChannelAppends(ChannelAppends):
    """Appends to channels that expire so much later."""

    def __init__(self, direct: Direct, ttl_ms: int) -> None:
        self._direct = direct
        self.ttl_ms = ttl_ms

    def append_soon(
        self,
        stream: str,
        publisher: str,  # noqa: ARG002 - a repeat is known by the ids of its events
        sequence: int,  # noqa: ARG002 - as above
        units: Sequence[list[Arg]],
        events: int,  # noqa: ARG002 - as above
        limits: Limits,
        timeout_s: float,  # noqa: ARG002 - no server keeps anybody waiting
        *,
        answer: Answer,
        follows: bool,  # noqa: ARG002 - one call at once
        at_once: bool,  # noqa: ARG002 - as above
    ) -> None:
        """Append events, a turn of the loop later; behind an end marker none."""

        def go(place: Place) -> list[Reply]:
            done = append(place, stream, self.ttl_ms, limits.most, units, again=False)
            return [as_answered(done)]

        self._direct.do_soon(answer, go)

    async def append(
        self,
        stream: str,
        publisher: str,  # noqa: ARG002 - as above
        sequence: int,  # noqa: ARG002 - as above
        units: Sequence[list[Arg]],
        events: int,  # noqa: ARG002 - as above
        limits: Limits,
        timeout_s: float,  # noqa: ARG002 - as above
        *,
        again_ms: int,
    ) -> Appended:
        """Do the same, and wait for the answer; again_ms: see `ChannelAppends.append`."""
        again = again_ms > 0
        return await self._direct.do(append, stream, self.ttl_ms, limits.most, units, again=again)


class MemoryChannels(ChannelStore):
    """The verbs over one place. The looks are plain commands, which it answers."""

    def __init__(self, direct: Direct, archive: Archive) -> None:
        self._direct = direct
        self._archive = archive

    def appends(self, ttl_ms: int) -> ChannelAppends:
        """Return the appends to channels that live so long."""
        return MemoryChannelAppends(self._direct, ttl_ms)
