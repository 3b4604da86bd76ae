"""The verbs of looking back, on a connection of their own.

Bodies hold up neither verdicts nor publishes there. Errors of all of them as of `stream.py`.
"""

import re
from collections.abc import Iterable, Sequence

from bus.config import PRODUCER_MEMORY_S, READ_BYTES
from bus.streams import keys
from bus.streams.answers import Copied, RawEntry, Returned
from bus.streams.connection import Arg, Connection, Server
from bus.streams.replies import Reply, ReplyError, refuse_replica
from bus.streams.script import Script
from bus.telemetry import Telemetry

# Adds nothing, and a replica refuses it: what only reads would never learn that it asks one.
WRITE_PROBE: tuple[Arg, ...] = ("XADD", keys.PROBE, "NOMKSTREAM", "*", "probe", "1")
_replay, _redrive, _lags = Script("replay"), Script("redrive"), Script("lags")


class Archive:
    """What streams, inboxes and dead letters hold, and what is done with it afterwards."""

    def __init__(self, server: Server, telemetry: Telemetry) -> None:
        self._connection = Connection(server, "history", telemetry)

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def range(
        self, stream: str, first: str, last: str, count: int, *, reverse: bool = False
    ) -> list[RawEntry]:
        """Return up to `count` entries from `first` to `last`, both ids included.

        XRANGE, oldest first; reverse: XREVRANGE, newest first. `(` before an id leaves it out.
        """
        command = ("XREVRANGE", stream, last, first) if reverse else ("XRANGE", stream, first, last)
        try:
            rows = await self._connection.call(*command, "COUNT", count)
        except ReplyError as error:
            raise error.explained(stream) from None
        return [(r[0], r[1]) for r in rows]

    async def look(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Send commands that only read, in one write; errors are among the replies."""
        return await self._connection.pipeline(commands)

    async def look_at_primary(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Do the same on the word of the server that takes writes; a probe goes before them.

        Errors: a transient ReplyError of a replica. The next call asks whoever the name leads to.
        """
        probe, *replies = await self.look([WRITE_PROBE, *commands])
        refuse_replica(probe)
        return replies

    async def lags(
        self, stream: str, groups: Sequence[str], most: int
    ) -> dict[str, tuple[int, int]]:
        """Return per group what the server says it lags by, and how many entries lie before it.

        Where that is more than `most`, it is how many there can be. Groups of which the server says
        nothing, or that are gone, are left out. `lags.lua`: the newest `most` entries, or about
        1 MiB of them, once for all groups.
        """
        args: list[Arg] = [most, READ_BYTES, *map(keys.wire, groups)]
        try:
            rows = await _lags.run(self._connection, (stream,), args)
        except ReplyError as error:
            raise error.explained(stream) from None
        said = zip(groups, rows, strict=True)
        return {g: (row[0], row[1]) for g, row in said if row and row[0] >= 0}

    # --- replaying

    async def memory_share(self) -> float:
        """Return how much of its maxmemory the server uses, 0 if it has none or says none. INFO."""
        (info,) = await self.look([("INFO", "memory")])
        if not isinstance(info, bytes):
            return 0.0
        used, most = (
            int(found[1]) if (found := re.search(rb"\b%s:(\d+)" % name, info)) else 0
            for name in (b"used_memory", b"maxmemory")
        )
        return used / most if most else 0.0

    async def ends(self, streams: Sequence[str], first: str, last: str) -> list[RawEntry | None]:
        """Return the first and the last entry of each stream between two ids; None where none is.

        XRANGE and XREVRANGE of one each, one write.
        """
        commands: list[tuple[Arg, ...]] = []
        for stream in streams:
            commands.append(("XRANGE", stream, first, last, "COUNT", 1))
            commands.append(("XREVRANGE", stream, last, first, "COUNT", 1))
        found: list[RawEntry | None] = []
        for command, rows in zip(commands, await self.look(commands), strict=True):
            if isinstance(rows, ReplyError):
                raise rows.explained(str(command[1]))
            found.append((rows[0][0], rows[0][1]) if rows else None)
        return found

    async def replay(
        self,
        stream: str,
        group: str,
        run: str,
        known: bytes,
        most: int,
        memory_s: int,
        ids: Sequence[bytes],
    ) -> Copied | None:
        """Copy entries to a group's inbox, once per run, while it has less than `most`.

        known: the last id that the server said it had dealt with, b"" for none. ids: rising.
        None if the server has forgotten that: nothing was done.
        `replay.lua`, about 6 us of server per entry; may be repeated.
        """
        target = (stream, keys.inbox(stream, group), keys.replay(stream, run))
        args: list[Arg] = [group, run, most, memory_s, known, *ids]
        try:
            copied, *more = await _replay.run(self._connection, target, args)
        except ReplyError as error:
            raise error.explained(keys.inbox(stream, group)) from None
        if copied < 0:
            return None
        gone, full, total, last = more
        return Copied(copied, gone, bool(full), total, last)

    async def replayed(self, streams: Sequence[str], run: str) -> dict[str, tuple[bytes, int]]:
        """Return how far a run has come: stream -> the last id and how many. GET each, one write.

        A stream of which nothing was replayed, or is remembered, is left out.
        """
        commands: list[tuple[Arg, ...]] = [("GET", keys.replay(s, run)) for s in streams]
        found = {}
        for stream, memory in zip(streams, await self.look(commands), strict=True):
            if isinstance(memory, ReplyError):
                raise memory.explained(keys.replay(stream, run))
            if memory is not None:
                last, _, total = memory.partition(b" ")
                found[stream] = last, int(total)
        return found

    async def forget_replay(self, streams: Sequence[str], run: str, after_s: int) -> None:
        """Forget a run that is over in so many seconds. EXPIRE each, one write.

        What is refused is let be: the memory has its time in any case.
        """
        await self.look([("EXPIRE", keys.replay(s, run), after_s) for s in streams])

    # --- dead letters

    async def fetch(self, wanted: Sequence[tuple[str, str]]) -> list[RawEntry | None]:
        """Return single entries (stream, id); None where there is none. XRANGE each, one write."""
        found: list[RawEntry | None] = []
        replies = await self.look([("XRANGE", stream, i, i) for stream, i in wanted])
        for (stream, _), rows in zip(wanted, replies, strict=True):
            if isinstance(rows, ReplyError):
                raise rows.explained(stream)
            found.append((rows[0][0], rows[0][1]) if rows else None)
        return found

    async def redrive(
        self,
        stream: str,
        group: str,
        run: str,
        number: int,
        most: int,
        letters: Iterable[tuple[bytes, Arg, int, Sequence[Arg]]],
    ) -> list[Returned]:
        """Move dead letters to the group's inbox while that has less than `most` entries.

        number: of the call within the run, rising; a repeat of the last one moves nothing more and
        is answered as before. letters: id, the id the entry had in its stream, how many of its
        values go, and values that go instead. `redrive.lua`, 10-15 us of server per letter.
        """
        target = (keys.dead(stream, group), keys.inbox(stream, group), keys.redrive(stream, run))
        args: list[Arg] = [group, run, number, most, PRODUCER_MEMORY_S]
        for entry_id, origin, values, instead in letters:
            args += (entry_id, origin, -len(instead) if instead else values, *instead)
        try:
            reply = await _redrive.run(self._connection, target, args)
        except ReplyError as error:
            raise error.explained(keys.inbox(stream, group)) from None
        return [Returned(n) for n in reply]

    async def purge(self, stream: str, group: str, ids: Sequence[bytes]) -> int:
        """Delete dead letters; return how many were there. XDEL."""
        target = keys.dead(stream, group)
        try:
            return int(await self._connection.call("XDEL", target, *ids))
        except ReplyError as error:
            raise error.explained(target) from None
