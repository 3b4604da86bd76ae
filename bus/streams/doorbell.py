"""One connection that waits for all idle handlers of a process, and one over which they all read.

A read that blocks costs the server a wake-up, a write and a read of its own. With many handlers on
one topic they were most of what an event costs it (docs/adr/0019). So one XREAD, which takes
nothing, waits for them all; it rings, and they all read in one write.
"""

import asyncio
import contextlib
from collections.abc import Sequence

from bus.config import BLOCK_MS, REPLY_TIMEOUT_S
from bus.errors import BusError
from bus.streams.answers import RawEntry
from bus.streams.connection import Arg, Connection, pack
from bus.streams.follower import entries_of, identify
from bus.streams.reader import read_command
from bus.streams.replies import Reply, ReplyError, row_of

_Id = tuple[int, int]  # an entry id, as numbers
_BLOCK_MS_UNNAMED = 100
_OF_ITS_STREAMS = frozenset(["NOGROUP", "WRONGTYPE"])  # errors that say nothing of any others


class Doorbell:
    """Makes readers that share it; closed with the last of them.

    What makes it exact: `_newest` holds, per stream, an id that is known to have been given. A
    reader notes them before it reads. If nothing came and none has changed meanwhile, its group has
    all up to there, and the bell waits for what lies beyond.
    """

    def __init__(self, waiting: Connection, reading: Connection, commands: Connection) -> None:
        self._waiting = waiting
        self._reading = reading
        self._commands = commands  # what ends the wait
        self._readers: set[SharedReader] = set()
        self._newest: dict[str, _Id] = {}
        # Who waits, for which streams, and up to where each of these was known to be had.
        self._waiters: dict[asyncio.Future[bool], tuple[Sequence[str], list[_Id | None]]] = {}
        self._watched: set[str] = set()  # streams for which somebody waits, or did just now
        self._armed: frozenset[str] = frozenset()  # those that the server is watching
        self._watch: asyncio.Future[list[Reply]] | None = None  # while it does
        self._silent = False  # whether the last one ended without a ring: it may be a replica
        self._ringing: asyncio.Task[None] | None = None
        self._rearming: asyncio.Task[None] | None = None

    def reader(self) -> "SharedReader":
        """Return a reader for one more group."""
        reader = SharedReader(self)
        self._readers.add(reader)
        return reader

    async def leave(self, reader: "SharedReader") -> None:
        """Close the connections, if this was the last reader."""
        self._readers.discard(reader)
        if self._readers:
            return
        for task in (self._ringing, self._rearming):
            if task is not None:
                task.cancel()
        await self._waiting.close()
        await self._reading.close()

    # --- reading

    async def read(self, streams: Sequence[str], packed: bytes) -> list[tuple[str, list[RawEntry]]]:
        """Send a read that does not block, in one write with those of others. XREADGROUP."""
        try:
            found = entries_of(await self._reading.submit(packed))
        except BusError as error:
            self._forget(streams, error)
            raise
        for stream, entries in found:
            if entries:
                self._hear(stream, entries[-1][0])
        return found

    def heard(self, streams: Sequence[str]) -> list[_Id | None]:
        """Return what to hand to `wait`; asked for before a read is sent."""
        return [self._newest.get(s) for s in streams]

    def wait(self, streams: Sequence[str], heard: list[_Id | None]) -> "asyncio.Future[bool]":
        """Return what becomes true when there may be something to read.

        Errors of the future: those of the connection; ReplyError (a key of another type, ...).
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        if heard != self.heard(streams):
            future.set_result(True)
            return future
        self._waiters[future] = streams, heard
        self._watched.update(streams)
        if self._ringing is None:
            self._ringing = loop.create_task(self._ring(), name="doorbell")
            return future
        if self._rearming is None and self._misses_some():
            self._rearming = loop.create_task(self._rearm(), name="doorbell again")
        return future

    def give_up(self, future: "asyncio.Future[bool]") -> None:
        """Wait no more."""
        self._waiters.pop(future, None)

    # --- ringing

    async def _ring(self) -> None:
        """Ring for all who wait, as long as there are any."""
        try:
            while self._waiters:
                # Whatever is waited for, streams may be added or forgotten meanwhile: so each
                # comes alone, and between the last look and the watch nothing is waited for.
                if self._waiting.client_id is None or self._silent:
                    await identify(self._waiting)
                    self._silent = False
                elif unknown := self._watched - self._newest.keys():
                    await self._learn(list(unknown))
                else:
                    await self._ring_once()
        except Exception as error:
            self._newest.clear()
            self._watched.clear()
            # Each of them mends what broke, or fails of it, as if it had waited by itself.
            if not (told := self._taken(list(self._waiters))) and not isinstance(error, BusError):
                raise
            for future in told:
                future.set_exception(error)
        finally:
            self._ringing = None

    async def _ring_once(self) -> None:
        # What others read while nothing watched a stream is behind what is watched from now on.
        behind = [f for f, (streams, had) in self._waiters.items() if had != self.heard(streams)]
        for future in self._taken(behind):
            future.set_result(True)
        self._armed = frozenset(self._watched)
        ids = [f"{ms}-{seq}" for ms, seq in map(self._newest.__getitem__, self._armed)]
        # Where the access list forbids asking, nothing can end it to add a stream.
        block_ms = BLOCK_MS if self._waiting.client_id else _BLOCK_MS_UNNAMED
        command: tuple[Arg, ...] = ("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS")
        packed = pack((*command, *self._armed, *ids))
        self._watch = self._waiting.submit(packed, 1, block_ms / 1000 + REPLY_TIMEOUT_S)
        try:
            replies = await self._watch
        finally:
            self._watch = None
        rang = entries_of(replies)
        self._silent = not rang
        for stream, entries in rang:
            self._hear(stream, entries[-1][0])
            rung = self._taken([f for f, (s, _) in self._waiters.items() if stream in s])
            for future in rung:
                future.set_result(True)
            if not rung:  # they are busy: let it be until one comes back
                self._watched.discard(stream)

    async def _learn(self, streams: Sequence[str]) -> None:
        """Ask where streams end that we know nothing of. XINFO STREAM each, once."""
        asked = b"".join(pack(("XINFO", "STREAM", s)) for s in streams)
        replies = await self._waiting.submit(asked, len(streams))
        for stream, reply in zip(streams, replies, strict=True):
            if isinstance(reply, ReplyError):
                if reply.code != "ERR":  # no such key: it is made when it is read next
                    raise reply
                self._hear(stream, b"0-0")
            else:
                self._hear(stream, row_of(reply)["last-generated-id"])
        found = set(streams)
        for future in self._taken(
            [f for f, (s, _) in self._waiters.items() if found.intersection(s)]
        ):
            future.set_result(True)  # what came between its read and now, it has to look for

    def _misses_some(self) -> bool:
        """Whether the server watches, but not all that it should; the next watch is of all."""
        return self._watch is not None and not self._armed.issuperset(self._watched)

    async def _rearm(self) -> None:
        """End what the server watches, to watch more. CLIENT UNBLOCK; it takes nothing.

        Repeated, because the watch may still have been on its way, and while that is found out,
        another may have begun that misses what came meanwhile.
        """
        try:
            while self._misses_some() and self._waiting.client_id:
                with contextlib.suppress(BusError):  # if that lasts, the watch ends by itself
                    await self._commands.submit(
                        pack(("CLIENT", "UNBLOCK", self._waiting.client_id)), 1
                    )
                if self._watch is not None and self._misses_some():
                    await asyncio.wait([self._watch], timeout=0.05)
                await asyncio.sleep(0)  # so that it is taken in, if it has ended
        finally:
            self._rearming = None

    def _forget(self, streams: Sequence[str], error: BusError) -> None:
        """Forget how far streams have come, which may begin anew: all, if the server may be."""
        if isinstance(error, ReplyError) and error.code in _OF_ITS_STREAMS:
            for stream in streams:
                self._newest.pop(stream, None)
        else:
            self._newest.clear()

    def _hear(self, stream: str, entry_id: bytes) -> None:
        given = id_of(entry_id)
        if given > self._newest.get(stream, (-1, 0)):
            self._newest[stream] = given

    def _taken(self, futures: list["asyncio.Future[bool]"]) -> list["asyncio.Future[bool]"]:
        """Return those of `futures` for which somebody waits still; he waits no more."""
        for future in futures:
            del self._waiters[future]
        return [f for f in futures if not f.done()]


def id_of(entry_id: bytes) -> _Id:
    """Return an entry id as numbers, which compare as ids do."""
    ms, _, seq = entry_id.partition(b"-")
    return int(ms), int(seq)


class SharedReader:
    """A group's place at a doorbell, used as a `Reader` is."""

    def __init__(self, bell: Doorbell) -> None:
        self._bell = bell
        self._waits: asyncio.Future[bool] | None = None
        self._unblocked = False
        self._has_all: dict[str, _Id | None] = {}  # streams -> up to where its group has all

    async def read(
        self, group: str, consumer: str, streams: Sequence[str], count: int, block_ms: int
    ) -> list[tuple[str, list[RawEntry]]]:
        """Return new entries, at most `count` per stream, waiting up to `block_ms`.

        XREADGROUP over all streams: at once, unless the last one left nothing, and when the bell
        rings. After any error, what the lost reply held is pending for `consumer` unseen: call
        `StreamStore.recover` before reading on.
        """
        self._unblocked = False
        ends_at = asyncio.get_running_loop().time() + block_ms / 1000
        packed = pack(read_command(group, consumer, streams, count))
        had_all = [self._has_all.get(s) for s in streams]
        rings = True
        if block_ms and None not in had_all:
            rings = await self._wait(streams, had_all, ends_at)
        while not self._unblocked:
            heard = self._bell.heard(streams)
            self._has_all.clear()
            found = await self._bell.read(streams, packed)
            if all(len(entries) < count for _, entries in found):
                self._has_all.update(zip(streams, heard, strict=True))
                self._has_all.update((s, id_of(entries[-1][0])) for s, entries in found)
            # Also when nothing rang for so long: the group may have been moved back.
            if found or not block_ms or not rings or self._unblocked:
                return found
            rings = await self._wait(streams, heard, ends_at)
        return []

    async def _wait(self, streams: Sequence[str], has: list[_Id | None], ends_at: float) -> bool:
        """Wait until there may be more than the group has; False when it is time to look anyway."""
        self._waits = self._bell.wait(streams, has)
        timer = asyncio.get_running_loop().call_at(ends_at, self._end)
        try:
            return await self._waits
        finally:
            timer.cancel()
            self._bell.give_up(self._waits)
            self._waits = None

    async def unblock(self) -> None:
        """End a read that waits at once; it takes nothing."""
        self._unblocked = True
        self._end()

    def _end(self) -> None:
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(False)

    async def close(self) -> None:
        """Leave; the last one closes the connections."""
        await self._bell.leave(self)
