"""The verbs of channels: short-lived streams, a key each. Errors: as of `stream.py`."""

from collections.abc import Sequence
from typing import NamedTuple

from bus.streams import keys
from bus.streams.answers import Appended, Limits, Room
from bus.streams.archive import Archive
from bus.streams.codec import Fields, locate
from bus.streams.connection import Answer, Arg, Connection
from bus.streams.replies import ReplyError, row_of
from bus.streams.results import appended
from bus.streams.script import Script

END_TYPE = "bus.channel_ended"  # of the entry behind which nothing comes
_CLOCKS_DIFFER_MS = 60_000  # entry ids are of the server's clock, and a failover changes it
_append = Script("channel_append")


class ChannelState(NamedTuple):
    """What a channel looks like now.

    first, last: ids of its oldest and newest entry, b"" without entries. ended: whether the newest
    is the end marker. trimmed: whether entries are gone, as far as the server knows (6.2 does not).
    expires_ms: until it expires, None if it does not.
    """

    first: bytes
    last: bytes
    ended: bool
    trimmed: bool
    expires_ms: int | None


class ChannelAppends:
    """Appends to a channel that expires `ttl_ms` after it: what a `Sender` needs of a store."""

    calls_at_once = 1  # behind an end marker nothing comes, and that is known by the answer

    def __init__(self, connection: Connection, ttl_ms: int) -> None:
        self._connection = connection
        self.ttl_ms = ttl_ms

    def append_soon(
        self,
        stream: str,
        publisher: str,  # noqa: ARG002 - a repeat is known by the ids of its events
        sequence: int,  # noqa: ARG002 - as above
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,
        *,
        answer: Answer,
        follows: bool,  # noqa: ARG002 - one call at once
        at_once: bool,
    ) -> None:
        """Append events; behind an end marker none. `channel_append.lua`; an XADD each and 4 us.

        units: of one event each, see `forms.unit_of`. events: how many. The oldest above
        `limits.most` go. What `answer` is told is for `appended`, with ENDED as an error of its
        own. at_once: nothing else is published in this turn.
        """
        args = self._args(units, events, limits, back_ms=0)
        packed = _append.packed(_beside(stream), args)
        self._connection.submit_for(answer, packed, 1, timeout_s, at_once=at_once)

    async def append(
        self,
        stream: str,
        publisher: str,  # noqa: ARG002 - as above
        sequence: int,  # noqa: ARG002 - as above
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,
        *,
        again_ms: int,
    ) -> Appended:
        """Do the same, and wait for the answer.

        again_ms: since when the batch may be in already, 0 if it was never sent. It is looked for
        in what was added since then and in the minute before: clocks differ. 0.5 us an entry.
        """
        back_ms = again_ms + _CLOCKS_DIFFER_MS if again_ms else 0
        args = self._args(units, events, limits, back_ms=back_ms)
        return appended([await _append.run(self._connection, _beside(stream), args, timeout_s)])

    async def room(self, stream: str, limits: Limits, entries: int) -> Room:  # noqa: ARG002 - it has room for any
        """Return that there is room for all: a channel drops its oldest."""
        return Room(limits.most, None, {})

    def _args(
        self, units: Sequence[list[Arg]], events: int, limits: Limits, *, back_ms: int
    ) -> list[Arg]:
        args: list[Arg] = [self.ttl_ms, limits.most, END_TYPE, back_ms, events]
        for unit in units:
            args += unit
        return args


class ChannelStore:
    """The verbs over one server, on the connections for publishing and for looking back."""

    def __init__(self, publishing: Connection, archive: Archive) -> None:
        self._publishing = publishing
        self._archive = archive

    def appends(self, ttl_ms: int) -> ChannelAppends:
        """Return the appends to channels that live so long."""
        return ChannelAppends(self._publishing, ttl_ms)

    async def look(self, channel: str) -> ChannelState | None:
        """Return what a channel looks like, None if it is not there.

        A probe, XINFO STREAM and PTTL, one write: the oldest and the newest entry come along.
        Errors: WrongKeyType, PermissionDenied.
        """
        asked: list[tuple[Arg, ...]] = [("XINFO", "STREAM", channel), ("PTTL", channel)]
        info, left_ms = await self._archive.look_at_primary(asked)
        for reply in (info, left_ms):
            if isinstance(reply, ReplyError):
                if reply.code == "ERR" and "no such key" in reply.text:
                    return None
                raise reply.explained(channel)
        row = row_of(info)
        oldest, newest = row["first-entry"], row["last-entry"]
        return ChannelState(
            first=oldest[0] if oldest else b"",
            last=row["last-generated-id"],
            ended=bool(newest) and is_end(newest[1]),
            trimmed=row.get("entries-added", row["length"]) > row["length"],
            expires_ms=left_ms if left_ms >= 0 else None,
        )


def _beside(channel: str) -> tuple[str, str]:
    """Return the keys of the script: the channel, and the one that never exists."""
    return channel, keys.channel_probe(channel)


def is_end(fields: list[bytes]) -> bool:
    """Return whether an entry is an end marker."""
    return locate(fields).type == END_TYPE.encode()


def end_fields(event_id: str) -> Fields:
    """Return the fields of an end marker."""
    return ["id", event_id, "type", END_TYPE, "data", b"{}"]
