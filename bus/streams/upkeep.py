"""The verbs of an operator: on groups, on what is pending, on what is kept. Durations in ms.

Errors of all of them as of `stream.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from bus.streams import keys
from bus.streams.answers import Pinned
from bus.streams.connection import Arg, Connection
from bus.streams.replies import Reply, ReplyError, row_of
from bus.streams.results import by_group, pinned
from bus.streams.script import Script

_release, _trim = Script("release"), Script("trim")
_seek, _remove_group = Script("seek"), Script("remove_group")


class PendingRow(NamedTuple):
    """One row of a group's pending list. owner: a worker, or a lane."""

    entry_id: bytes
    owner: bytes
    idle_ms: int
    deliveries: int


class Trimmed(NamedTuple):
    """Entries that went, the group that holds up the rest, and ghosts met by group."""

    gone: int
    held: Pinned | None
    lost: dict[str, list[str]]


class Upkeep:
    """What is done to groups and their entries from outside of any worker."""

    def __init__(self, commands: Connection) -> None:
        self._commands = commands

    async def info(self, stream: str) -> dict[str, Reply] | None:
        """Return the row of XINFO STREAM; None where there is no stream."""
        try:
            return row_of(await self._commands.call("XINFO", "STREAM", stream))
        except ReplyError as error:
            if error.code == "ERR":
                return None
            raise error.explained(stream) from None

    async def pending(
        self,
        stream: str,
        group: str,
        first: str,
        last: str,
        count: int,
        *,
        owner: str | None = None,
        idle_ms: int = 0,
    ) -> list[PendingRow]:
        """Return up to `count` rows between two ids; none where there is no such group.

        owner: of one worker or lane alone. idle_ms: of those that nobody touched for so long.
        XPENDING; it walks over what does not match.
        """
        command: tuple[Arg, ...] = ("XPENDING", keys.wire(stream), keys.wire(group))
        if idle_ms:
            command += ("IDLE", idle_ms)
        command += (first, last, count)
        if owner is not None:
            command += (keys.wire(owner),)
        try:
            rows = await self._commands.call(*command)
        except ReplyError as error:
            if error.code == "NOGROUP":
                return []
            raise error.explained(stream) from None
        return [PendingRow(*row) for row in rows]

    async def release(
        self, stream: str, group: str, owner: bytes, ids: Sequence[bytes]
    ) -> list[int]:
        """Let any worker take entries of a lane or a dead worker; counts stay. `release.lua`.

        Returns per id 1, 0 if it is not that owner's any more or the owner lives, -1 if its entry
        was gone.
        """
        target = (keys.wire(stream), keys.lease(stream, owner))
        args: list[Arg] = [keys.wire(group), owner, *ids]
        try:
            return list(await _release.run(self._commands, target, args))
        except ReplyError as error:
            raise error.explained(stream) from None

    async def trim(self, stream: str, cut: str, keep: int) -> Trimmed:
        """Remove what lies before the id `cut` ("" for none) and no group needs, but leave `keep`.

        About 5,000 entries a call: call again until none goes. `trim.lua`.
        """
        try:
            gone, who, lost = await _trim.run(self._commands, (stream,), [cut, keep])
        except ReplyError as error:
            raise error.explained(stream) from None
        return Trimmed(gone, pinned(who), by_group(lost))

    async def seek(
        self,
        stream: str,
        group: str,
        expected: str,
        to: str,
        entries_read: int | None,
        *,
        pinned: bool = False,
    ) -> str | None:
        """Set the last-delivered id of a group; return the one it had.

        expected: "" for any, "<" and ">" for any before or beyond `to`; if it has another one
        nothing is done. entries_read: how many entries
        that is since the stream began; None if the server is not to be told.
        pinned: nothing is done, and None returned, if all entries up to `to` are gone.
        `seek.lua`.
        """
        read: Arg = "" if entries_read is None else entries_read
        args: list[Arg] = [keys.wire(group), expected, to, read, int(pinned)]
        try:
            was = await _seek.run(self._commands, (stream,), args)
        except ReplyError as error:
            raise error.explained(stream) from None
        return None if was is None else bytes(was).decode()

    async def create_group(
        self, stream: str, group: str, after: str, entries_read: int | None
    ) -> bool:
        """Make a group that is given what comes after an id; False if there is one of that name.

        entries_read: as of `seek`. XGROUP CREATE MKSTREAM.
        """
        command: tuple[Arg, ...] = ("XGROUP", "CREATE", stream, group, after, "MKSTREAM")
        if entries_read is not None:
            command += ("ENTRIESREAD", entries_read)
        try:
            await self._commands.call(*command)
        except ReplyError as error:
            if error.code == "BUSYGROUP":
                return False
            raise error.explained(stream) from None
        return True

    async def remove_group(self, stream: str, group: str) -> bool:
        """Delete a group with its inbox and dead letters; False if there was none.

        `remove_group.lua`.
        """
        target = (
            keys.wire(stream),
            keys.wire(keys.inbox(stream, group)),
            keys.wire(keys.dead(stream, group)),
            keys.overrun(stream),
        )
        try:
            return bool(await _remove_group.run(self._commands, target, [keys.wire(group)]))
        except ReplyError as error:
            raise error.explained(stream) from None

    async def bodies(self, stream: str, ids: Sequence[bytes]) -> list[list[bytes] | None]:
        """Return the fields of entries; None for one that is gone. XRANGE each, one write."""
        key = keys.wire(stream)
        replies = await self._commands.pipeline([("XRANGE", key, i, i) for i in ids])
        return [_fields(r, stream) for r in replies]


def _fields(reply: Reply, stream: str) -> list[bytes] | None:
    if isinstance(reply, ReplyError):
        raise reply.explained(stream)
    return reply[0][1] if reply else None
