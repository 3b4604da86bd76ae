"""The verbs: the only file that speaks stream commands. Durations here are whole milliseconds.

Each verb is one round trip of one command or one script, unless its docstring says otherwise.
Errors of all of them: ReplyError (the server refused), ConnectionLost, ServerUnreachable,
AuthenticationFailed. Who calls decides what to do about it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from bus.config import BATCH_BYTES, PRODUCER_MEMORY_S, SHARED_READERS_FROM
from bus.streams import keys
from bus.streams.answers import (
    Appended,
    Buried,
    Claim,
    Committed,
    Fate,
    Limits,
    Looked,
    Renewed,
    Room,
    Standing,
    Started,
    Taken,
)
from bus.streams.archive import Archive
from bus.streams.channels import ChannelStore
from bus.streams.connection import Answer, Arg, Connection, Server
from bus.streams.doorbell import Doorbell
from bus.streams.follower import Follower
from bus.streams.forms import append_call
from bus.streams.leases import Leases
from bus.streams.pauses import PauseTable
from bus.streams.reader import Reader, Reads
from bus.streams.replies import ReplyError, row_of
from bus.streams.results import DONE, appended, by_group, counts, fate_of, pinned, taken_of
from bus.streams.rights import Rights
from bus.streams.script import Script
from bus.streams.upkeep import Upkeep
from bus.telemetry import Telemetry

_append, _room, _record_topic = Script("append"), Script("room"), Script("record_topic")
_ack, _park, _dead_letter = Script("ack"), Script("park"), Script("dead_letter")
_commit, _once = Script("commit"), Script("once")
_renew, _start, _recover = Script("renew"), Script("start"), Script("recover")
_take_due, _take_parked, _refund = Script("take_due"), Script("take_parked"), Script("refund")
_move_parked, _retain, _reclaim = Script("move_parked"), Script("retain"), Script("reclaim")


class StreamStore:
    """The verbs over one server, with one connection for commands and one for publishing."""

    calls_at_once = 2  # appends of one sender that may be on their way together

    def __init__(self, server: Server, telemetry: Telemetry) -> None:
        self._server = server
        self._telemetry = telemetry
        self.commands = Connection(server, "commands", telemetry)
        self.leases = Leases(self.commands)
        self.pauses = PauseTable(self.commands)
        self.upkeep = Upkeep(self.commands)
        self._publishing = Connection(server, "publishing", telemetry, writes=2)
        self.archive = Archive(server, telemetry)
        self.channels = ChannelStore(self._publishing, self.archive)
        self.rights = Rights(server)

    @property
    def address(self) -> str:
        """Where the server is, as a URL without a password."""
        return self._server.redacted

    @property
    def clustered(self) -> bool:
        """Whether keys have slots; known once the server was checked."""
        return self._server.clustered

    async def close(self) -> None:
        """Close the connections."""
        for connection in (self._publishing, self.archive, self.commands):
            await connection.close()

    def readers(self, groups: Sequence[str]) -> list[Reads]:
        """Return a reader for each group: with a connection of its own, or many at one doorbell."""

        def connection(role: str) -> Connection:
            return Connection(self._server, role, self._telemetry)

        if len(groups) < SHARED_READERS_FROM:
            return [Reader(connection(f"reading {g}"), self.commands) for g in groups]
        bell = Doorbell(connection("waiting"), connection("reading"), self.commands)
        return [bell.reader() for _ in groups]

    def follower(self) -> Follower:
        """Return the connection that tails share: XREAD, which may block."""
        own = Connection(self._server, "tails", self._telemetry)
        return Follower(own, self.commands)

    # --- the way in

    def append_soon(
        self,
        stream: str,
        publisher: str,
        sequence: int,
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,
        *,
        answer: Answer,
        follows: bool,
        at_once: bool,
    ) -> None:
        """Append as many whole units as fit, at most once. `append.lua`; about 2 x XADDs.

        units: see `codec.encode_plain`, `unit_of` and `unit_of_several`. events: in all of them.
        Near `keep` and above it, it trims what nobody needs, once per `slack` entries. What
        `answer` is told is for `appended`. follows: only if the batch of the sequence before is
        in, and whole. at_once: nothing else is published in this turn.
        """
        target, args = append_call(
            stream, publisher, sequence, units, events, limits, follows=follows, again=False
        )
        packed = _append.packed(target, args)
        self._publishing.submit_for(answer, packed, 1, timeout_s, at_once=at_once)

    async def append(
        self,
        stream: str,
        publisher: str,
        sequence: int,
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,
        *,
        again_ms: int = 0,
    ) -> Appended:
        """Do the same, on a server that may not know the script, and wait for the answer.

        again_ms: since when it may be in already, or on its way; 0 if it was never sent.
        """
        target, args = append_call(
            stream, publisher, sequence, units, events, limits, follows=False, again=again_ms > 0
        )
        return appended([await _append.run(self._publishing, target, args, timeout_s)])

    async def room(self, stream: str, limits: Limits, entries: int, *, urgent: bool = True) -> Room:
        """Trim what nobody needs and say how much fits. `room.lua`, 10-20 us of server.

        entries: how many are to fit; single entries are removed for them, else whole nodes only.
        urgent: over the publishing connection, else over that of the commands.
        """
        on = self._publishing if urgent else self.commands
        args: list[Arg] = [limits.keep, limits.most, entries]
        left, who, lost = await _room.run(on, (stream,), args)
        return Room(left, pinned(who), by_group(lost))

    # --- topics

    async def topic_record(self, topic: str) -> bytes:
        """Return what is recorded of `topic`, b"" for nothing. HGET."""
        try:
            return await self.commands.call("HGET", keys.TOPICS, topic) or b""
        except ReplyError as error:
            raise error.explained(keys.TOPICS) from None

    async def record_topic(self, topic: str, expected: bytes, new: bytes) -> bytes:
        """Record `new` if `expected` (b"" for nothing) still stands; return what stands now."""
        args: list[Arg] = [topic, expected, new]
        try:
            return bytes(await _record_topic.run(self.commands, (keys.TOPICS,), args))
        except ReplyError as error:
            raise error.explained(keys.TOPICS) from None

    async def any_entries(self, streams: Sequence[str]) -> bool:
        """Return whether any of `streams` holds an entry. XLEN each, one write."""
        return any(n != 0 for n in await self.lengths(streams))

    async def lengths(self, streams: Sequence[str]) -> list[int]:
        """Return the number of entries of each stream, -1 where there is none to be had. XLEN."""
        replies = await self.commands.pipeline([("XLEN", s) for s in streams])
        return [-1 if isinstance(n, ReplyError) else n for n in replies]

    async def topic_records(self) -> dict[str, bytes]:
        """Return what is recorded, by topic. HGETALL: one small field per topic."""
        try:
            flat = await self.commands.call("HGETALL", keys.TOPICS)
        except ReplyError as error:
            raise error.explained(keys.TOPICS) from None
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return {name.decode(errors="replace"): bytes(record) for name, record in pairs}

    # --- groups

    async def create_groups(
        self, wanted: Sequence[tuple[str, str, str]]
    ) -> list[bool | ReplyError]:
        """Create groups (stream, group, first id): True created, False it existed, or the error.

        XGROUP CREATE MKSTREAM each, one write; XINFO STREAM before for those that start at `$`.
        """
        ends = await self._counted_ends([s for s, _, first in wanted if first == "$"])
        plain: list[tuple[Arg, ...]] = [
            ("XGROUP", "CREATE", s, g, first, "MKSTREAM") for s, g, first in wanted
        ]
        exact = [
            (*c[:4], *ends[s]) if first == "$" and s in ends else c
            for c, (s, _, first) in zip(plain, wanted, strict=True)
        ]
        replies = await self.commands.pipeline(exact)
        # A server that shows counters and yet does not take them is asked in the plain way.
        again = [
            n
            for n, r in enumerate(replies)
            if exact[n] != plain[n] and isinstance(r, ReplyError) and r.code == "ERR"
        ]
        second = await self.commands.pipeline([plain[n] for n in again])
        for n, reply in zip(again, second, strict=True):
            replies[n] = reply
        made: list[bool | ReplyError] = []
        for (stream, group, _), reply in zip(wanted, replies, strict=True):
            if not isinstance(reply, ReplyError):
                made.append(True)
            elif reply.code == "BUSYGROUP":
                made.append(False)
            else:
                # A server without memory refuses before it looks: a group that is there is enough.
                there = reply.code == "OOM" and group in await self.groups_of(stream)
                made.append(False if there else reply)
        return made

    async def _counted_ends(self, streams: Sequence[str]) -> dict[str, tuple[Arg, ...]]:
        """Return where streams end, as arguments that tell a new group how many entries that was.

        Made at `$` a group would have no count until it has read to the end (7.0, Valkey); 6.2 has
        none at all. What is appended meanwhile is delivered, and the count is right all the same.
        """
        replies = await self.commands.pipeline([("XINFO", "STREAM", s) for s in streams])
        rows = {
            s: row_of(r)
            for s, r in zip(streams, replies, strict=True)
            if not isinstance(r, ReplyError)
        }
        return {
            s: (row["last-generated-id"], "MKSTREAM", "ENTRIESREAD", row["entries-added"])
            for s, row in rows.items()
            if "entries-added" in row
        }

    async def groups_of(self, stream: str) -> dict[str, dict[str, Any]]:
        """Return group -> its row of XINFO GROUPS; empty when there is no stream."""
        try:
            rows = await self.commands.call("XINFO", "GROUPS", stream)
        except ReplyError as error:
            if error.code in ("ERR", "WRONGTYPE"):
                return {}
            raise
        found = [row_of(r) for r in rows]
        return {r["name"].decode("utf-8", "surrogateescape"): r for r in found}

    async def standing(self, stream: str, group: str) -> Standing | None:
        """Return how far `group` is, None when it does not exist. XINFO GROUPS, XRANGE of one."""
        row = (await self.groups_of(stream)).get(group)
        if row is None:
            return None
        after = "(" + row["last-delivered-id"].decode()
        ahead = await self.commands.call("XRANGE", stream, after, "+", "COUNT", 1)
        return Standing(row["pending"], bool(ahead))

    async def type_of(self, key: str) -> bytes:
        """Return the Redis type of `key`. TYPE."""
        return bytes(await self.commands.call("TYPE", key))

    # --- verdicts: each does nothing for entries that are not this consumer's any more

    async def ack(
        self, stream: str, group: str, consumer: str, ids: Sequence[bytes]
    ) -> list[bytes]:
        """Finish deliveries; return the ids refused, of 64 and more perhaps as b"".

        `ack.lua`: 0.9-1.4 us of server per id; half of that for 64 and more in order.
        """
        return list(await _ack.run(self.commands, (stream,), [group, consumer, *ids]))

    async def park(
        self, stream: str, group: str, consumer: str, entries: Iterable[tuple[bytes, Arg, int]]
    ) -> list[bytes]:
        """Park (id, delay_ms, delivery count to store); return lanes, b"" refused, b"lost".

        Instead of a delay: "@" and the server time in ms at which the entry is due.
        """
        args: list[Arg] = [group, consumer]
        for entry in entries:
            args += entry
        return list(await _park.run(self.commands, (stream,), args))

    async def dead_letter(
        self,
        stream: str,
        group: str,
        consumer: str,
        most: int,
        entries: Iterable[tuple[bytes, list[Arg]]],
        *,
        lease: bytes | None = None,
    ) -> list[Buried]:
        """Move (id, fields of the dead letter) to the dead letters, at most `most` in all (0: any).

        lease: refuse all of them while that key exists. `dead_letter.lua`.
        """
        args: list[Arg] = [keys.wire(group), keys.wire(consumer), most]
        for entry_id, fields in entries:
            args += (entry_id, len(fields), *fields)
        target: tuple[Arg, ...] = (keys.wire(stream), keys.wire(keys.dead(stream, group)))
        if lease is not None:
            target += (lease,)
        reply = await _dead_letter.run(self.commands, target, args)
        return [Buried(n) for n in reply]

    async def commit(
        self,
        target: tuple[Arg, ...],
        group: str,
        owner: str,
        touched: Iterable[str],
        sheet: Sequence[Arg],
    ) -> tuple[list[Committed], list[Looked], dict[str, int]]:
        """Apply effects and ack, all in one step per delivery; or a transaction. `commit.lua`.

        target: the stream or inbox and its dead letters; only the memory of a transaction.
        group, owner: "" and the sequence for a transaction. sheet: see `committer.Sheet`.
        Returns their fates, looks for room, and events appended by stream.
        3-6 us of server per delivery with a command or two.
        """
        args: list[Arg] = [group, owner, PRODUCER_MEMORY_S, *sheet]
        on = self.commands if group else self._publishing
        answers, looked, appended = await _commit.run(on, (*target, *touched), args)
        looks = [
            Looked(stream.decode(), pinned(who), by_group(ghosts), counts(dropped))
            for stream, who, ghosts, dropped in zip(*(looked[i::4] for i in range(4)), strict=True)
        ]
        if answers.count(1) == len(answers):
            fates = [DONE] * len(answers)
        else:
            fates = [fate_of(a) for a in answers]
        return fates, looks, counts(appended)

    async def failed_lately(
        self, stream: str, group: str, count: int
    ) -> dict[tuple[bytes, bytes], Committed]:
        """Return (original entry id, attempt) -> fate of the youngest whose effects failed.

        For those who have lost an answer of `commit`. XREVRANGE of `count` dead letters.
        """
        target = keys.dead(stream, group)
        rows = await self.commands.call("XREVRANGE", target, "+", "-", "COUNT", count)
        found: dict[tuple[bytes, bytes], Committed] = {}
        for _, flat in rows:
            row = dict(zip(flat[::2], flat[1::2], strict=True))
            if row.get(b"deadreason") == b"effects-failed":
                error = row.get(b"deaderror", b"").partition(b": ")[2]
                fate = fate_of([Fate.FAILED, error, row.get(b"deadapplied")])
                found[row.get(b"deadentry", b""), row.get(b"deadattempts", b"")] = fate
        return found

    async def renew(self, stream: str, group: str, consumer: str, ids: Sequence[bytes]) -> Renewed:
        """Reset the idle time of what is held; the delivery counts stay. `renew.lua`."""
        reply = await _renew.run(self.commands, (stream,), [group, consumer, *ids])
        return Renewed(*reply)

    async def start(
        self, stream: str, group: str, consumer: str, entry_id: bytes, count: int
    ) -> Started:
        """Store the count of a reclaimed delivery that is about to run. `start.lua`."""
        args: list[Arg] = [group, consumer, entry_id, count]
        return Started(await _start.run(self.commands, (stream,), args))

    async def claim(
        self, mark: str, home: str, stream: str, group: str, entry_id: bytes, keep_ms: int
    ) -> Claim:
        """Ask whether a delivery may handle its event, and say so in its mark. `once.lua`.

        home, stream: the partition's own stream, and what the entry was read from.
        """
        target = (mark, home, keys.inbox(home, group))
        place = "s" if stream == home else "i"
        return Claim(await _once.run(self.commands, target, [group, place, entry_id, keep_ms]))

    async def refund(
        self, stream: str, group: str, entries: Iterable[tuple[bytes, int, int]]
    ) -> list[int]:
        """Give parked entries attempts back: (id, least delivery count, attempts). `refund.lua`.

        Returns per entry 1 done, 0 not parked any more or below that count, -1 its entry is gone.
        """
        args: list[Arg] = [group]
        for entry in entries:
            args += entry
        return list(await _refund.run(self.commands, (stream,), args))

    # --- making room

    async def move_parked(
        self, stream: str, group: str, most: int, most_in_inbox: int
    ) -> tuple[int, list[str], bool]:
        """Move a group's oldest parked entries to its inbox, at most `most` and about 1 MiB.

        Returns how many, ghosts met, and whether the inbox is full. `move_parked.lua`.
        """
        target = (stream, keys.wire(keys.inbox(stream, group)))
        args: list[Arg] = [keys.wire(group), most, most_in_inbox, BATCH_BYTES]
        moved, lost, full = await _move_parked.run(self.commands, target, args)
        return moved, [i.decode() for i in lost], bool(full)

    async def retain(self, stream: str, retention_ms: int) -> tuple[int, dict[str, list[str]]]:
        """Trim what is older than `retention_ms` and needed by nobody, about 5,000 at a time.

        Returns how many went, and ghosts met by group. `retain.lua`.
        """
        gone, lost = await _retain.run(self.commands, (stream,), [retention_ms])
        return gone, by_group(lost)

    # --- taking over

    async def recover(
        self, stream: str, group: str, consumer: str, most: int, held: Iterable[bytes]
    ) -> Taken:
        """Take up what is pending for `consumer` and not in `held`; counts stay. `recover.lua`."""
        args: list[Arg] = [group, consumer, most, *held]
        return taken_of(await _recover.run(self.commands, (stream,), args))

    async def take_due(
        self, stream: str, group: str, consumer: str, most: int, lanes: Sequence[bytes]
    ) -> Taken:
        """Take up to `most` entries from due lanes; counts rise. `take_due.lua`."""
        args: list[Arg] = [group, consumer, most, *lanes]
        return taken_of(await _take_due.run(self.commands, (stream,), args))

    async def take_parked(
        self, stream: str, group: str, consumer: str, entries: Iterable[tuple[bytes, bytes]]
    ) -> Taken:
        """Take single entries (lane, id) out of their lanes; counts rise. `take_parked.lua`."""
        args: list[Arg] = [group, consumer]
        for lane, entry_id in entries:
            args += (lane, entry_id)
        return taken_of(await _take_parked.run(self.commands, (stream,), args))

    async def reclaim(
        self, stream: str, group: str, consumer: str, owner: bytes, most: int, least_idle_ms: int
    ) -> Taken:
        """Take up to `most` entries of a worker that is gone; counts stay. `reclaim.lua`.

        least_idle_ms 0: only if the owner has no lease; else whatever has been idle that long.
        """
        args: list[Arg] = [group, consumer, owner, most, least_idle_ms]
        target = (stream, keys.lease(stream, owner))
        return taken_of(await _reclaim.run(self.commands, target, args))
