"""Who lives, and whose turn it is: the verbs on leases and on consumers. Durations in ms."""

from collections.abc import Iterable, Sequence

from bus.streams import keys
from bus.streams.answers import Consumer, Survey
from bus.streams.connection import Arg, Connection
from bus.streams.replies import ReplyError, row_of
from bus.streams.script import Script

_forget_consumer = Script("forget_consumer")


class Leases:
    """The lease keys of workers, the turns they take, and the consumers they leave behind."""

    def __init__(self, commands: Connection) -> None:
        self._commands = commands

    async def keep(
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
        replies = await self._commands.pipeline(commands)
        kept = replies[::2]
        gone = [s for s, reply in zip(streams, kept, strict=True) if reply != 1]
        served = ",".join(groups)
        made = await self._commands.pipeline(
            [("SET", keys.lease(s, consumer), served, "PX", lease_ms) for s in gone]
        )
        listed = [r for r, k in zip(replies[1::2], kept, strict=True) if k != 1]
        for reply in (*made, *listed):
            if isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
                raise reply

    async def drop(self, streams: Sequence[str], consumer: str) -> None:
        """Say that `consumer` has stopped. DEL each, one write."""
        await self._commands.pipeline([("DEL", keys.lease(s, consumer)) for s in streams])

    async def served_groups(self, stream: str) -> set[str]:
        """Return the groups that live workers say they serve. SMEMBERS, then GET each."""
        names = await self._commands.call("SMEMBERS", keys.workers(stream))
        leases = await self._commands.pipeline([("GET", keys.lease(stream, n)) for n in names])
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
        return await self._try_turns(
            streams, [keys.sweep(s, names) for s in streams], consumer, lease_ms
        )

    async def try_chore(
        self, streams: Sequence[str], name: str, consumer: str, lease_ms: int
    ) -> list[str]:
        """Return the streams for which a chore is this process's now. SET NX PX each, one write."""
        leases = [keys.chore(s, name) for s in streams]
        return await self._try_turns(streams, leases, consumer, lease_ms)

    async def _try_turns(
        self, streams: Sequence[str], leases: Sequence[str], consumer: str, lease_ms: int
    ) -> list[str]:
        replies = await self._commands.pipeline(
            [("SET", lease, consumer, "NX", "PX", lease_ms) for lease in leases]
        )
        ours = []
        for stream, reply in zip(streams, replies, strict=True):
            # Without memory nobody gets a turn: then all may look, each script is safe by itself.
            if reply == b"OK" or (isinstance(reply, ReplyError) and reply.code == "OOM"):
                ours.append(stream)
            elif isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
                raise reply
        return ours

    async def forget_consumer(self, stream: str, group: str, consumer: bytes) -> bool:
        """Remove a consumer that has no lease and nothing pending; True if it is gone now."""
        args: list[Arg] = [keys.wire(group), consumer]
        target = (keys.wire(stream), keys.lease(stream, consumer))
        return bool(await _forget_consumer.run(self._commands, target, args))

    async def unlist_worker(self, stream: str, consumer: bytes) -> None:
        """Take a worker that is gone off the list. SREM."""
        await self._commands.call("SREM", keys.workers(stream), consumer)

    async def survey(self, stream: str, places: Sequence[tuple[str, str]]) -> Survey:
        """Look at the consumers of (stream or inbox, group) in the partition of `stream`.

        Two round trips: TIME, SMEMBERS, XINFO CONSUMERS each; EXISTS each.
        """
        commands: list[tuple[Arg, ...]] = [("TIME",), ("SMEMBERS", keys.workers(stream))]
        commands += [
            ("XINFO", "CONSUMERS", keys.wire(key), keys.wire(group)) for key, group in places
        ]
        time, listed, *rows = await self._commands.pipeline(commands)
        for reply in (time, listed):
            if isinstance(reply, ReplyError):
                raise reply
        found: dict[tuple[str, str], list[Consumer]] = {}
        for place, reply in zip(places, rows, strict=True):
            if isinstance(reply, list):
                table = [row_of(r) for r in reply]
                found[place] = [Consumer(r["name"], r["pending"], r["idle"]) for r in table]
        exists = await self._commands.pipeline(
            [("EXISTS", keys.lease(stream, name)) for name in listed]
        )
        for reply in exists:
            if isinstance(reply, ReplyError):
                raise reply
        alive = frozenset(n for n, e in zip(listed, exists, strict=True) if e != 0)
        now_ms = int(time[0]) * 1000 + int(time[1]) // 1000
        return Survey(now_ms, frozenset(listed), alive, found)
