"""The one connection over which streams are followed: it waits for what is appended to any."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bus.config import REPLY_TIMEOUT_S
from bus.streams.answers import RawEntry
from bus.streams.archive import WRITE_PROBE, Archive
from bus.streams.connection import Arg, Connection, pack
from bus.streams.replies import Reply, ReplyError, refuse_replica, row_of

_LOOKED_AT_ONCE = 100  # streams per write: two bodies come along with each


class Extent(NamedTuple):
    """Where a stream begins and ends now.

    first: id of the oldest entry, b"" without entries. last: of the newest there ever was.
    met: whether that one is there. whole: whether nothing was ever taken from the stream, as far
    as the server knows (6.2 does not).
    """

    first: bytes
    last: bytes
    met: bool
    whole: bool


class Follower:
    """One connection for all who follow streams."""

    def __init__(self, connection: Connection, commands: Connection) -> None:
        self._connection = connection
        self._commands = commands  # what ends a read that blocks

    async def prepare(self, *, check: bool) -> None:
        """Connect, and see what `unblock` needs to know: `identify`; again for a `check`.

        Errors: a transient ReplyError of a replica; the next time it is asked for by name again.
        """
        if check or self._connection.client_id is None:
            await identify(self._connection)

    def read(
        self, after: Mapping[str, bytes], count: int, block_ms: int, measured: Sequence[str] = ()
    ) -> tuple["asyncio.Future[list[Reply]] | None", "asyncio.Future[list[Reply]]"]:
        """Ask for the entries beyond the ids of `after`, at most `count` per stream.

        XREAD, waiting up to `block_ms`, which takes nothing: see `entries_of` for its reply.
        measured: streams whose lengths are asked for in the same write; they come at once. XLEN.
        """
        lengths = None
        if measured:
            packed = b"".join(pack(("XLEN", s)) for s in measured)
            lengths = self._connection.submit(packed, len(measured))
        command: tuple[Arg, ...] = ("XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS")
        command += (*after, *after.values())
        return lengths, self._connection.submit(pack(command), 1, block_ms / 1000 + REPLY_TIMEOUT_S)

    async def unblock(self) -> None:
        """End a blocked read at once; it takes nothing. CLIENT UNBLOCK on the other connection."""
        if self._connection.client_id:
            await self._commands.submit(pack(("CLIENT", "UNBLOCK", self._connection.client_id)), 1)

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()


async def identify(connection: Connection) -> None:
    """See whether a connection leads to the primary, and what it is called. A probe, CLIENT ID.

    To be done before anything blocks on it, and now and then: a primary that becomes a replica goes
    on answering what only reads, late, or with nothing new once it is cut off.
    Errors: a transient ReplyError of a replica.
    """
    commands = [WRITE_PROBE]
    if connection.client_id != 0:
        commands.append(("CLIENT", "ID"))
    probe, *identity = await connection.submit(b"".join(map(pack, commands)), len(commands))
    refuse_replica(probe)
    if identity:  # else it is known that the access list forbids asking; then reads end by BLOCK
        connection.client_id = identity[0] if isinstance(identity[0], int) else 0


def entries_of(replies: Iterable[Reply]) -> list[tuple[str, list[RawEntry]]]:
    """Return the entries of an XREAD by stream. Errors: ReplyError."""
    (reply,) = replies
    if isinstance(reply, ReplyError):
        raise reply
    return [(name.decode(), entries) for name, entries in reply or ()]


async def extents(archive: Archive, streams: Sequence[str]) -> list[Extent | ReplyError | None]:
    """Return where streams begin and end, None for one that is not there.

    A probe and XINFO STREAM each, 100 in one write, on the connection for looking back.
    """
    found: list[Extent | ReplyError | None] = []
    for at in range(0, len(streams), _LOOKED_AT_ONCE):
        some = streams[at : at + _LOOKED_AT_ONCE]
        replies = await archive.look_at_primary([("XINFO", "STREAM", s) for s in some])
        found += [_extent(reply) for reply in replies]
    return found


async def pages(
    archive: Archive, wanted: Sequence[tuple[str, bytes, bytes | str, int]]
) -> list[list[RawEntry]]:
    """Return the entries of several streams: (stream, first id, last id, at most so many).

    XRANGE each, all in one write. Errors: WrongKeyType, PermissionDenied.
    """
    asked = [("XRANGE", s, first, last, "COUNT", count) for s, first, last, count in wanted]
    found = []
    for (stream, *_), reply in zip(wanted, await archive.look(asked), strict=True):
        if isinstance(reply, ReplyError):
            raise reply.explained(stream)
        found.append([(row[0], row[1]) for row in reply])
    return found


async def sound_extents(archive: Archive, streams: Sequence[str]) -> list[Extent | None]:
    """Return the same for streams that can all be read. Errors: WrongKeyType, PermissionDenied."""
    found: list[Extent | None] = []
    for stream, extent in zip(streams, await extents(archive, streams), strict=True):
        if isinstance(extent, ReplyError):
            raise extent.explained(stream)
        found.append(extent)
    return found


def _extent(reply: Reply) -> Extent | ReplyError | None:
    if isinstance(reply, ReplyError):
        return None if reply.code == "ERR" and "no such key" in reply.text else reply
    row = row_of(reply)
    oldest, newest, last = row["first-entry"], row["last-entry"], row["last-generated-id"]
    return Extent(
        first=oldest[0] if oldest else b"",
        last=last,
        met=bool(newest) and newest[0] == last,
        whole=row.get("entries-added") == row["length"],
    )
