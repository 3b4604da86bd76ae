"""The verbs: the only file that speaks stream commands. Durations here are whole milliseconds.

Each verb is one round trip of one command or one script, unless its docstring says otherwise.
Errors of all of them: ReplyError (the server refused), ConnectionLost, ServerUnreachable,
AuthenticationFailed. Who calls decides what to do about it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from bus.config import PRODUCER_MEMORY_S, REPLY_TIMEOUT_S
from bus.streams import keys
from bus.streams.answers import (
    Appended,
    Consumer,
    Limits,
    Pinned,
    RawEntry,
    Renewed,
    Room,
    Standing,
    Started,
    Survey,
    Taken,
)
from bus.streams.connection import Arg, Connection, Server, pack
from bus.streams.reader import Reader
from bus.streams.replies import Reply, ReplyError, row_of
from bus.streams.script import Script
from bus.telemetry import Telemetry

_append, _room, _record_topic = Script("append"), Script("room"), Script("record_topic")
_ack, _park, _dead_letter = Script("ack"), Script("park"), Script("dead_letter")
_renew, _start, _recover = Script("renew"), Script("start"), Script("recover")
_take_due, _take_parked = Script("take_due"), Script("take_parked")
_reclaim, _forget_consumer = Script("reclaim"), Script("forget_consumer")


class StreamStore:
    """The verbs over one server, with one connection for commands and one for publishing."""

    def __init__(self, server: Server, telemetry: Telemetry) -> None:
        self._server = server
        self._telemetry = telemetry
        self.commands = Connection(server, "commands", telemetry)
        self._publishing = Connection(server, "publishing", telemetry)
        self._history = Connection(server, "history", telemetry)

    async def close(self) -> None:
        """Close the connections."""
        for connection in (self._publishing, self._history, self.commands):
            await connection.close()

    def reader(self, group: str) -> Reader:
        """Return a reading connection of its own: XREADGROUP names one group and may block."""
        own = Connection(self._server, f"reading {group}", self._telemetry)
        return Reader(own, self.commands)

    # --- the way in

    async def append(
        self,
        stream: str,
        publisher: str,
        sequence: int,
        units: Sequence[list[Arg]],
        limits: Limits,
        timeout_s: float,
    ) -> Appended:
        """Append as many whole units as fit, at most once. `append.lua`; about 1.4 x XADDs.

        units: per unit [events, then per event: arguments, field, value, ...].
        Near `keep` and above it, it trims what nobody needs, once per `slack` entries.
        """
        drop = 1 if limits.drop_oldest else 0
        events = sum(u[0] for u in units)  # type: ignore[misc] # the first of a unit is a number
        args: list[Arg] = [sequence, PRODUCER_MEMORY_S, limits.keep, limits.slack, limits.most]
        args += (drop, len(units), events)
        for unit in units:
            args += unit
        target = (stream, keys.producer(stream, publisher))
        reply = await self._run(self._publishing, _append, target, args, timeout_s)
        first, added, taken, repeated, left, pinned, lost, dropped = reply
        ms, _, low = first.decode().partition("-")
        room = Room(left, _pinned(pinned), _by_group(lost))
        return Appended(
            ms,
            int(low or 0),
            added,
            taken,
            bool(repeated),
            room,
            {_name(g): n for g, n in zip(dropped[::2], dropped[1::2], strict=True)},
        )

    async def room(self, stream: str, limits: Limits, entries: int, *, urgent: bool = True) -> Room:
        """Trim what nobody needs and say how much fits. `room.lua`, 10-20 us of server.

        entries: how many are to fit; single entries are removed for them, else whole nodes only.
        urgent: over the publishing connection, else over that of the commands.
        """
        on = self._publishing if urgent else self.commands
        args: list[Arg] = [limits.keep, limits.most, entries]
        left, pinned, lost = await self._run(on, _room, (stream,), args)
        return Room(left, _pinned(pinned), _by_group(lost))

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
        return bytes(await self._run(self.commands, _record_topic, (keys.TOPICS,), args))

    async def any_entries(self, streams: Sequence[str]) -> bool:
        """Return whether any of `streams` holds an entry. XLEN each, one write."""
        lengths = await self._pipeline([("XLEN", s) for s in streams])
        return any(isinstance(n, ReplyError) or n > 0 for n in lengths)

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
        replies = await self._pipeline(exact)
        # A server that shows counters and yet does not take them is asked in the plain way.
        again = [
            n
            for n, r in enumerate(replies)
            if exact[n] != plain[n] and isinstance(r, ReplyError) and r.code == "ERR"
        ]
        for n, reply in zip(again, await self._pipeline([plain[n] for n in again]), strict=True):
            replies[n] = reply
        return [
            not (isinstance(r, ReplyError) and r.code == "BUSYGROUP")
            if not isinstance(r, ReplyError) or r.code == "BUSYGROUP"
            else r
            for r in replies
        ]

    async def _counted_ends(self, streams: Sequence[str]) -> dict[str, tuple[Arg, ...]]:
        """Return where streams end, as arguments that tell a new group how many entries that was.

        Made at `$` a group would have no count until it has read to the end (7.0, Valkey); 6.2 has
        none at all. What is appended meanwhile is delivered, and the count is right all the same.
        """
        replies = await self._pipeline([("XINFO", "STREAM", s) for s in streams])
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
        """Finish deliveries; return the ids refused. `ack.lua`, 0.9-1.4 us of server per id."""
        return list(await self._run(self.commands, _ack, (stream,), [group, consumer, *ids]))

    async def park(
        self, stream: str, group: str, consumer: str, entries: Iterable[tuple[bytes, int, int]]
    ) -> list[bytes]:
        """Park (id, delay_ms, delivery count to store); return lanes, b"" refused, b"lost"."""
        args: list[Arg] = [group, consumer]
        for entry in entries:
            args += entry
        return list(await self._run(self.commands, _park, (stream,), args))

    async def dead_letter(
        self, stream: str, group: str, consumer: str, entries: Iterable[tuple[bytes, list[Arg]]]
    ) -> list[int]:
        """Move (id, fields of the dead letter) to the dead letters; return 1 each, 0 refused."""
        args: list[Arg] = [group, consumer]
        for entry_id, fields in entries:
            args += (entry_id, len(fields), *fields)
        target = keys.dead(stream, group)
        return list(await self._run(self.commands, _dead_letter, (stream, target), args))

    async def renew(self, stream: str, group: str, consumer: str, ids: Sequence[bytes]) -> Renewed:
        """Reset the idle time of what is held; the delivery counts stay. `renew.lua`."""
        reply = await self._run(self.commands, _renew, (stream,), [group, consumer, *ids])
        return Renewed(*reply)

    async def start(
        self, stream: str, group: str, consumer: str, entry_id: bytes, count: int
    ) -> Started:
        """Store the count of a reclaimed delivery that is about to run. `start.lua`."""
        args: list[Arg] = [group, consumer, entry_id, count]
        return Started(await self._run(self.commands, _start, (stream,), args))

    # --- taking over

    async def recover(
        self, stream: str, group: str, consumer: str, most: int, held: Iterable[bytes]
    ) -> Taken:
        """Take up what is pending for `consumer` and not in `held`; counts stay. `recover.lua`."""
        args: list[Arg] = [group, consumer, most, *held]
        return _taken(await self._run(self.commands, _recover, (stream,), args))

    async def take_due(
        self, stream: str, group: str, consumer: str, most: int, lanes: Sequence[bytes]
    ) -> Taken:
        """Take up to `most` entries from due lanes; counts rise. `take_due.lua`."""
        args: list[Arg] = [group, consumer, most, *lanes]
        return _taken(await self._run(self.commands, _take_due, (stream,), args))

    async def take_parked(
        self, stream: str, group: str, consumer: str, entries: Iterable[tuple[bytes, bytes]]
    ) -> Taken:
        """Take single entries (lane, id) out of their lanes; counts rise. `take_parked.lua`."""
        args: list[Arg] = [group, consumer]
        for lane, entry_id in entries:
            args += (lane, entry_id)
        return _taken(await self._run(self.commands, _take_parked, (stream,), args))

    async def reclaim(
        self, stream: str, group: str, consumer: str, owner: bytes, most: int, least_idle_ms: int
    ) -> Taken:
        """Take up to `most` entries of a worker that is gone; counts stay. `reclaim.lua`.

        least_idle_ms 0: only if the owner has no lease; else whatever has been idle that long.
        """
        args: list[Arg] = [group, consumer, owner, most, least_idle_ms]
        target = (stream, keys.lease(stream, owner))
        return _taken(await self._run(self.commands, _reclaim, target, args))

    async def survey(self, stream: str, groups: Sequence[str]) -> Survey:
        """Look at the consumers of `groups`. Two round trips: TIME, SMEMBERS, XINFO; EXISTS."""
        commands: list[tuple[Arg, ...]] = [("TIME",), ("SMEMBERS", keys.workers(stream))]
        commands += [("XINFO", "CONSUMERS", stream, _wire(g)) for g in groups]
        time, listed, *rows = await self._pipeline(commands)
        for reply in (time, listed):
            if isinstance(reply, ReplyError):
                raise reply
        found: dict[str, list[Consumer]] = {}
        for group, reply in zip(groups, rows, strict=True):
            if isinstance(reply, list):
                table = [row_of(r) for r in reply]
                found[group] = [Consumer(r["name"], r["pending"], r["idle"]) for r in table]
        exists = await self._pipeline([("EXISTS", keys.lease(stream, name)) for name in listed])
        alive = frozenset(n for n, e in zip(listed, exists, strict=True) if e != 0)
        now_ms = int(time[0]) * 1000 + int(time[1]) // 1000
        return Survey(now_ms, frozenset(listed), alive, found)

    # --- leases

    async def keep_leases(
        self, streams: Sequence[str], consumer: str, groups: Sequence[str], lease_ms: int
    ) -> None:
        """Say that `consumer` is alive and serves `groups`.

        PEXPIRE each, which a server without memory still allows; SET PX where that found nothing;
        SADD each, since a janitor may have taken a paused worker off the list. One or two writes.
        """
        commands: list[tuple[Arg, ...]] = []
        for stream in streams:
            commands.append(("PEXPIRE", keys.lease(stream, consumer), lease_ms))
            commands.append(("SADD", keys.workers(stream), consumer))
        replies = await self._pipeline(commands)
        kept = replies[::2]
        gone = [s for s, reply in zip(streams, kept, strict=True) if reply != 1]
        served = ",".join(groups)
        made = await self._pipeline(
            [("SET", keys.lease(s, consumer), served, "PX", lease_ms) for s in gone]
        )
        listed = [r for r, k in zip(replies[1::2], kept, strict=True) if k != 1]
        for reply in (*made, *listed):
            if isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
                raise reply

    async def drop_leases(self, streams: Sequence[str], consumer: str) -> None:
        """Say that `consumer` has stopped. DEL each, one write."""
        await self._pipeline([("DEL", keys.lease(s, consumer)) for s in streams])

    async def served_groups(self, stream: str) -> set[str]:
        """Return the groups that live workers say they serve. SMEMBERS, then GET each."""
        names = await self.commands.call("SMEMBERS", keys.workers(stream))
        leases = await self._pipeline([("GET", keys.lease(stream, n)) for n in names])
        return {
            g
            for v in leases
            if isinstance(v, bytes)
            for g in v.decode("utf-8", "replace").split(",")
        }

    async def try_sweep(
        self, streams: Sequence[str], groups: Iterable[str], consumer: str, lease_ms: int
    ) -> list[str]:
        """Return the streams whose sweep is this process's turn now. SET NX PX each, one write."""
        names = tuple(groups)
        replies = await self._pipeline(
            [("SET", keys.sweep(s, names), consumer, "NX", "PX", lease_ms) for s in streams]
        )
        ours = []
        for stream, reply in zip(streams, replies, strict=True):
            # Without memory nobody gets a turn: then all may look, each take is safe by itself.
            if reply == b"OK" or (isinstance(reply, ReplyError) and reply.code == "OOM"):
                ours.append(stream)
            elif isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
                raise reply
        return ours

    async def forget_consumer(self, stream: str, group: str, consumer: bytes) -> bool:
        """Remove a consumer that has no lease and nothing pending; True if it is gone now."""
        args: list[Arg] = [_wire(group), consumer]
        target = (stream, keys.lease(stream, consumer))
        return bool(await self._run(self.commands, _forget_consumer, target, args))

    async def unlist_worker(self, stream: str, consumer: bytes) -> None:
        """Take a worker that is gone off the list. SREM."""
        await self.commands.call("SREM", keys.workers(stream), consumer)

    # --- looking back

    async def range(self, stream: str, first: str, last: str, count: int) -> list[RawEntry]:
        """Return up to `count` entries from `first` to `last`, both ids included. XRANGE."""
        try:
            rows = await self._history.call("XRANGE", stream, first, last, "COUNT", count)
        except ReplyError as error:
            raise error.explained(stream) from None
        return [(r[0], r[1]) for r in rows]

    async def look(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Send commands that only read, in one write; errors are among the replies."""
        if not commands:
            return []
        packed = b"".join(pack(c) for c in commands)
        return await self._history.submit(packed, len(commands))

    # --- sending

    async def _pipeline(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Send `commands` in one write; errors are among the replies."""
        if not commands:
            return []
        packed = b"".join(pack(c) for c in commands)
        return await self.commands.submit(packed, len(commands))

    async def _run(
        self,
        connection: Connection,
        script: Script,
        on: tuple[Arg, ...],
        args: list[Arg],
        timeout_s: float = REPLY_TIMEOUT_S,
    ) -> Reply:
        (reply,) = await connection.submit(script.packed(on, args), 1, timeout_s)
        if isinstance(reply, ReplyError) and reply.code == "NOSCRIPT":
            (reply,) = await connection.submit(script.packed_with_text(on, args), 1, timeout_s)
        if isinstance(reply, ReplyError):
            raise reply
        return reply


def _wire(name: str) -> bytes:
    """Return a group's name as the server has it; others may have given it any bytes."""
    return name.encode("utf-8", "surrogateescape")


def _name(group: bytes) -> str:
    """Return a group's name as text; the opposite of `_wire`."""
    return group.decode("utf-8", "surrogateescape")


def _pinned(reply: Reply) -> Pinned | None:
    if not reply:
        return None
    group, floor, pending, lag = reply
    return Pinned(_name(group), floor.decode(), pending, lag if lag >= 0 else None)


def _by_group(flat: Sequence[bytes]) -> dict[str, list[str]]:
    """Return {group: ids} of a flat list of pairs."""
    found: dict[str, list[str]] = {}
    for group, entry_id in zip(flat[::2], flat[1::2], strict=True):
        found.setdefault(_name(group), []).append(entry_id.decode())
    return found


def _taken(reply: Reply) -> Taken:
    entries, lost = reply
    return Taken([(i, c, f) for i, c, f in entries], lost)
